"""The model's tokenizer, and what packing needs of it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import transformers

from bigsae.config import UserError
from bigsae.data.packing import Encode, Layout

logger = logging.getLogger("bigsae")

_PROBE = "It's 1984:\n\n\tfoo(bar) != 'baz';  Été, 我们的国家, \u00a0 end."


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `model`, a Hub id or folder. Raises UserError where there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model {model}: its tokenizer cannot be loaded: {reason}") from error
    if vocabulary_size(tokenizer) == 0:
        raise UserError(f"--model {model} has no tokenizer: its vocabulary is empty")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer can give, be there gaps or not."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError where the tokenizer can give ids that a model of `vocab_size` embeddings does not have."""
    size = vocabulary_size(tokenizer)
    if size > vocab_size:
        raise UserError(
            f"--model: the tokenizer gives ids up to {size - 1}, but the model embeds only {vocab_size}: "
            "use a model and a tokenizer that belong together"
        )


def layout_for(tokenizer: Any, ctx_len: int, pretokenised: bool) -> Layout:
    """How rows are packed: BOS first where the tokenizer has one; EOS, else BOS, else nothing after documents."""
    if pretokenised:
        return Layout(ctx_len, None, None, True, np.uint32)
    if tokenizer is None:
        raise ValueError("a dataset of text needs a tokenizer")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        _say_once("the tokenizer has neither EOS nor BOS: documents are packed with nothing between them")
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32
    return Layout(ctx_len, bos, bos if eos is None else eos, False, dtype)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def encoder(tokenizer: Any, layout: Layout) -> Encode:
    """Texts to their token ids [n] in the layout's dtype, with no special tokens but those within the text."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        # verbose=False: that a document exceeds model_max_length is no news, it is cut into rows.
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(ids, dtype=layout.dtype) for ids in encoded["input_ids"]]

    def encode_fast(texts: list[str]) -> list[np.ndarray]:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=layout.dtype) for one in encoded]

    if layout.pretokenised:
        return encode
    # Also turns off the truncation and padding that a tokenizer.json may ask for, while no other thread uses it.
    expected = encode([_PROBE])[0]
    if not hasattr(tokenizer, "backend_tokenizer"):
        return encode
    # Half the time, and the interpreter free for the rest of it. A few tokenizers do more in Python.
    return encode_fast if np.array_equal(encode_fast([_PROBE])[0], expected) else encode
