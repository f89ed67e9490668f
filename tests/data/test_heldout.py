"""Held-out documents: chosen by seed, never trained on, packed as others are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from bigsae.config import DataConfig
from bigsae.data.tokens import TokenRows, heldout_rows
from tests.data.corpora import KINDS, make_source, naive_rows, texts


def rows_of(source, tokenizer, ctx_len, data, rank=0, num_ranks=1):
    return [row.tolist() for row in TokenRows(source, tokenizer, ctx_len, data, 0, rank, num_ranks)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_heldout", [1, 7, 60])
def test_heldout_documents_are_never_trained_on(kind, num_heldout):
    num_documents = 97
    source = make_source(kind, {"input_ids": [[i] * 4 for i in range(num_documents)]})
    data = DataConfig(num_shards=3, heldout_documents=num_heldout, epochs=2)
    held = heldout_rows(source, None, 4, data, 0, 10_000)
    assert held.shape == (num_heldout, 4)
    assert held.dtype == torch.int64
    held_ids = set(held[:, 0].tolist())
    assert len(held_ids) == num_heldout
    trained: Counter[int] = Counter()
    for rank in range(2):
        trained.update(row[0] for row in rows_of(source, None, 4, data, rank, 2))
    assert trained == Counter({i: 2 for i in range(num_documents) if i not in held_ids})
    assert torch.equal(heldout_rows(source, None, 4, data, 0, 5), held[:5])
    if kind == "modulo":
        assert held_ids == set(range(num_heldout))
    if kind == "map" and num_heldout == 7:
        other = heldout_rows(source, None, 4, data, 1, 10_000)
        assert not torch.equal(other, held)
        fixed = replace(data, heldout_seed=1)  # whatever decides the order of the others
        assert torch.equal(heldout_rows(source, None, 4, fixed, 0, 10_000), other)
        trained_ids = {row[0] for row in rows_of(source, None, 4, fixed)}
        assert trained_ids == set(range(num_documents)) - set(other[:, 0].tolist())


def test_heldout_text_is_packed_like_all_text_in_turn(tokenizer):
    documents = texts(30)
    source = make_source("modulo", {"text": documents})
    data = DataConfig(num_shards=4, heldout_documents=6)
    rows = [naive_rows([document], tokenizer, 21)[0] for document in documents[:6]]
    expected = [own[turn] for turn in range(max(map(len, rows))) for own in rows if turn < len(own)]
    assert len(expected) > 6
    assert heldout_rows(source, tokenizer, 21, data, 0, 100).tolist() == expected
    assert heldout_rows(source, tokenizer, 21, DataConfig(), 0, 100).shape == (0, 21)
