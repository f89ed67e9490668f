"""How a pre-tokenised dataset was made: the sae_lens.json beside it, that SAELens and bigsae.pretokenize write.

Its fields are SAELens's (`PretokenizedDatasetMetadata`); what is bigsae's own stands under "bigsae".
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from bigsae.config import DataConfig, UserError
from bigsae.data.tokenizer import load_tokenizer

logger = logging.getLogger("bigsae")

ORIGIN_FILE = "sae_lens.json"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: which id stands for which token."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def read_origin(dataset: str, data: DataConfig) -> dict[str, Any] | None:
    """The sae_lens.json of `dataset`, a folder or a Hub id; None where it has none.

    Raises UserError where it is broken.
    """
    path = Path(dataset).expanduser() / ORIGIN_FILE
    if not path.parent.exists():
        try:
            path = Path(hf_hub_download(dataset, ORIGIN_FILE, repo_type="dataset", revision=data.revision))
        except LocalEntryNotFoundError:
            logger.warning("the %s of --dataset %s is out of reach: how it was tokenised is not checked",
                           ORIGIN_FILE, dataset)  # fmt: skip
            return None
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--dataset {dataset}: its {ORIGIN_FILE} is not JSON ({error}): tokenise it again"
        ) from None
    if not isinstance(origin, dict):
        raise UserError(f"--dataset {dataset}: its {ORIGIN_FILE} is not a JSON object: tokenise it again")
    return origin


def check_origin(origin: dict[str, Any], dataset: str, model: str, tokenizer: Any, ctx_len: int) -> None:
    """Raises UserError where rows of `origin` cannot serve a run of `model` and `ctx_len`; warns of what they lack.

    `tokenizer` is that of the model, or None where the run needs none; then the vocabularies are not compared.
    """
    length = origin.get("context_size")
    if isinstance(length, int) and length < ctx_len:
        raise UserError(
            f"--ctx-len {ctx_len}: the rows of --dataset {dataset} hold {length} tokens: lower --ctx-len to {length}, "
            "or tokenise the text anew"
        )
    begins = origin.get("begin_batch_token") is not None
    if isinstance(length, int) and length > ctx_len:
        begin = ", of which only the first begins with the token of the whole" if begins else ""
        logger.warning(
            "--ctx-len %d: the rows of --dataset %s hold %d tokens; each gives %d rows%s",
            ctx_len, dataset, length, length // ctx_len, begin,
        )  # fmt: skip
    if tokenizer is not None:
        _check_tokenizer(origin, dataset, model, tokenizer)


def begins_with_bos(origin: dict[str, Any] | None, ctx_len: int) -> bool:
    """Whether the first token of each row of `ctx_len` is the tokenizer's BOS; longer rows are cut to several."""
    if origin is None or origin.get("begin_batch_token") != "bos":
        return False
    length = origin.get("context_size")
    return not isinstance(length, int) or length < 2 * ctx_len


def _check_tokenizer(origin: dict[str, Any], dataset: str, model: str, tokenizer: Any) -> None:
    name, own = origin.get("tokenizer_name"), origin.get("bigsae")
    fingerprint = own.get("tokenizer_sha256") if isinstance(own, dict) else None
    if not isinstance(name, str) or (name == model and fingerprint is None):
        return
    if fingerprint is None:
        try:
            fingerprint = tokenizer_fingerprint(load_tokenizer(name))
        except UserError:
            logger.warning(
                "--dataset %s was tokenised with %s, which cannot be loaded here: whether that is the tokenizer of "
                "--model %s is not checked", dataset, name, model,
            )  # fmt: skip
            return
    if fingerprint != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"--dataset {dataset} was tokenised with {name}, whose vocabulary is not that of --model {model}: tokenise "
            "it for this model"
        )
