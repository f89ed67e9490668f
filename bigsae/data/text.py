"""A dataset together with the language model that reads it: opened, checked against each other, as rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigsae.config import DataConfig, LMConfig, UserError
from bigsae.data import tokens
from bigsae.data.origin import begins_with_bos, check_origin, read_origin
from bigsae.data.tokens import Source, TokenRows
from bigsae.lm.loading import vocab_size


@dataclass(frozen=True)
class Text:
    """A dataset that fits a language model."""

    dataset: str
    model: str
    data: DataConfig
    ctx_len: int
    source: Source
    tokenizer: Any
    """None where the dataset holds token ids and nothing else needs it."""
    vocab_size: int
    """Embeddings of the language model."""
    prepend_bos: bool
    """Whether each row begins with the tokenizer's BOS."""

    def rows(self, seed: int, rank: int = 0, num_ranks: int = 1) -> TokenRows:
        """This rank's rows, without the held-out documents'. Raises UserError as TokenRows does."""
        return TokenRows(self.source, self.tokenizer, self.ctx_len, self.data, seed, rank, num_ranks)

    def heldout(self, seed: int, max_rows: int, num_ranks: int, flag: str) -> Tensor:
        """[n, ctx_len] of the held-out documents, a multiple of `num_ranks` and at most `max_rows`; 0 where none are.

        `flag` is what sets `max_rows`. Raises UserError where some are held out but give no rows for every rank.
        """
        rows = tokens.heldout_rows(self.source, self.tokenizer, self.ctx_len, self.data, seed, max_rows)
        usable = len(rows) // num_ranks * num_ranks
        if self.data.heldout_documents and not usable:
            raise UserError(
                f"--data.heldout-documents {self.data.heldout_documents} gives {len(rows)} rows for {num_ranks} "
                f"ranks: raise it, or {flag}"
            )
        return rows[:usable]

    def kept(self, ids: Tensor) -> Tensor:
        """[n, ctx_len] bool: of which of the tokens `ids` the activations count, by --data.drop-….

        Raises UserError for ids that the language model does not have.
        """
        if (
            ids.max() >= self.vocab_size
        ):  # an embedding would fail far from the cause, on a GPU without a message
            raise UserError(
                f"--dataset {self.dataset} holds token id {ids.max()}, but --model {self.model} has "
                f"{self.vocab_size}: the dataset was tokenised for another model"
            )
        special_ids = self.tokenizer.all_special_ids if self.tokenizer is not None else []
        return tokens.token_mask(ids, special_ids, self.data)


def open_text(
    dataset: str,
    data: DataConfig,
    model: str,
    lm: LMConfig,
    lm_config: Any,
    ctx_len: int,
    *,
    with_tokenizer: bool = False,
) -> Text:
    """Open `dataset` for rows of `ctx_len` tokens of `model`, whose transformers configuration is `lm_config`.

    The tokenizer is read where it is needed, or asked for. Raises UserError where there is no such dataset or
    tokenizer, or the two do not belong to the model: ids beyond its embeddings, rows of another vocabulary.
    """
    source = tokens.open_dataset(dataset, data)
    tokenizer: Any = None
    size = vocab_size(lm_config)
    if with_tokenizer or not source.pretokenised or data.drop_special_tokens:
        tokenizer = tokens.load_tokenizer(model, lm.revision, lm.trust_remote_code)
        tokens.check_vocabulary(tokenizer, size)
    if source.pretokenised:
        origin = read_origin(dataset, data)
        if origin is not None:
            check_origin(origin, dataset, model, tokenizer, ctx_len)
        prepend_bos = begins_with_bos(origin, ctx_len)
    else:
        prepend_bos = tokenizer.bos_token_id is not None
    return Text(dataset, model, data, ctx_len, source, tokenizer, size, prepend_bos)
