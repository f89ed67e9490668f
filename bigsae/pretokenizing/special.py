"""The special tokens of rows and documents, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bigsae.config import UserError
from bigsae.data.packing import Layout
from bigsae.data.tokenizer import layout_for, vocabulary_size
from bigsae.pretokenizing.options import PretokenizeConfig

_NAMES = ("bos", "eos", "sep")


@dataclass(frozen=True)
class SpecialTokens:
    """Each "bos", "eos", "sep", an id, or None; named as SAELens names them."""

    begin_batch_token: str | int | None
    begin_sequence_token: str | int | None
    sequence_separator_token: str | int | None


def resolve_special(config: PretokenizeConfig, tokenizer: Any) -> SpecialTokens:
    """What the flags mean for this tokenizer. Raises UserError where it has no such token."""
    first = "bos" if tokenizer.bos_token_id is not None else "none"
    after = "eos" if tokenizer.eos_token_id is not None else first
    automatic = {"begin_batch_token": first, "sequence_separator_token": after}

    def resolve(field: str) -> str | int | None:
        flag, value = "--" + field.replace("_", "-"), getattr(config, field)
        if value == "auto" and field in automatic:
            value = automatic[field]
        if value == "none":
            return None
        if value in _NAMES:
            if _id(value, tokenizer) is None:
                raise UserError(
                    f"{flag} {value}: the tokenizer of --model {config.model} has none: name another, an id, or none"
                )
            return value
        if value.isascii() and value.isdecimal() and int(value) < vocabulary_size(tokenizer):
            return int(value)
        known = [*_NAMES, f"an id below {vocabulary_size(tokenizer)}", "none"]
        raise UserError(f"{flag} {value}: give one of {', '.join(known)}")

    return SpecialTokens(
        resolve("begin_batch_token"),
        resolve("begin_sequence_token"),
        resolve("sequence_separator_token"),
    )


def layout_of(config: PretokenizeConfig, tokenizer: Any) -> Layout:
    """How the rows are packed."""
    special = resolve_special(config, tokenizer)
    return replace(
        layout_for(tokenizer, config.ctx_len, pretokenised=False),
        bos=_id(special.begin_batch_token, tokenizer),
        document_begin=_id(special.begin_sequence_token, tokenizer),
        separator=_id(special.sequence_separator_token, tokenizer),
    )


def _id(token: str | int | None, tokenizer: Any) -> int | None:
    return getattr(tokenizer, f"{token}_token_id") if isinstance(token, str) else token
