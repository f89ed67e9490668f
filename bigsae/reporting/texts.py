"""Tokens as readable text."""

from __future__ import annotations

from typing import Any


class Texts:
    """Puts the text of each token id that a report uses into a table, once."""

    def __init__(self, tokenizer: Any, table: list[str]):
        self._tokenizer, self._table = tokenizer, table
        self._places: dict[int, int] = {}
        # Decoded behind another token: by themselves, or at the beginning, some tokenizers drop a leading space.
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before = self._decode([])

    def __call__(self, token: int) -> int:
        """The place of `token`'s text in the table."""
        if token not in self._places:
            self._places[token] = len(self._table)
            self._table.append(self.text(token))
        return self._places[token]

    def text(self, token: int) -> str:
        """What the token `token` adds to a text; of a part of a character, or of nothing, the vocabulary's own name."""
        decoded = self._decode([token])
        piece = decoded[len(self._before) :] if decoded.startswith(self._before) else ""
        if piece and "\ufffd" not in piece:
            return piece
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([*self._anchor, *ids], clean_up_tokenization_spaces=False)
