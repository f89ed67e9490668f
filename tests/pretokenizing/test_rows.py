"""Which rows are written: those of training on the text, in an order of their own, whoever writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

import bigsae
from bigsae.config import DataConfig
from bigsae.data import packing
from bigsae.data.sources import Start
from bigsae.data.tokenizer import load_tokenizer
from bigsae.data.tokens import TokenRows, open_dataset
from bigsae.pretokenizing.run import pretokenize_dataset
from tests.pretokenizing.corpus import DOCUMENTS, configured, digests, written


def trained_rows(dataset, config, **data):
    """Rows that a run of one epoch on `dataset` sees."""
    options = DataConfig(num_shards=config.data.num_shards, epochs=1, **data)
    source = open_dataset(str(dataset), options)
    tokenizer = None if source.pretokenised else load_tokenizer(config.model)
    rows = TokenRows(source, tokenizer, config.ctx_len, options, config.seed, 0, 1)
    return [row.tolist() for row in rows], rows


@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_are_those_of_training_on_the_text(home, tmp_path, streaming, format):
    config = configured(home, tmp_path / "out", streaming, format=format)
    done = bigsae.pretokenize_dataset(config)
    rows = written(tmp_path / "out")
    expected, trained = trained_rows(config.dataset, config, streaming=streaming)
    assert sorted(rows) == sorted(expected)
    assert len(rows) == done.num_rows == done.num_tokens / 16 > 60
    assert done.num_files == len(
        [*(tmp_path / "out").rglob("*.parquet"), *(tmp_path / "out").rglob("*.arrow")]
    )
    assert done.num_files > 2
    assert done.num_documents == len(DOCUMENTS)
    assert done.num_skipped_documents == trained.num_skipped_documents == 2
    assert done.num_dropped_tokens == trained.num_dropped_tokens > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_training_from_it_sees_each_row_as_it_was_written(home, tmp_path, streaming):
    config = configured(home, tmp_path / "out")
    pretokenize_dataset(config)
    again, trained = trained_rows(tmp_path / "out", config, streaming=streaming)
    assert sorted(again) == sorted(written(tmp_path / "out"))
    assert trained.num_dropped_tokens == 0


def test_rows_lie_in_a_random_order_that_the_seed_decides(home, tmp_path):
    packed = pretokenized(home, tmp_path / "packed", shuffle=False)
    mixed = pretokenized(home, tmp_path / "mixed")
    assert sorted(mixed) == sorted(packed)
    place = {tuple(row): i for i, row in enumerate(packed)}
    following = sum(place[tuple(b)] == place[tuple(a)] + 1 for a, b in pairwise(mixed))
    assert following < 6  # of more than 60
    assert pretokenized(home, tmp_path / "again") == mixed
    assert sorted(pretokenized(home, tmp_path / "other", seed=1)) != sorted(mixed)


def pretokenized(home, out, **options):
    pretokenize_dataset(configured(home, out, **options))
    return written(out)


@pytest.mark.parametrize(
    ("row", "begin", "after"),
    [
        ("auto", "none", "auto"),
        ("none", "bos", "none"),
        ("bos", "bos", "eos"),
        ("7", "none", "8"),
        ("none",) * 3,
    ],
)
def test_special_tokens(home, tmp_path, monkeypatch, row, begin, after):
    """Against packing too simple to be wrong, of one shard in the order of the shard; long documents come in pieces."""
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 300)
    config = configured(
        home, tmp_path / "out", shuffle=False, begin_batch_token=row, begin_sequence_token=begin,
        sequence_separator_token=after,
    )  # fmt: skip
    config = replace(config, data=replace(config.data, num_shards=1))
    pretokenize_dataset(config)
    tokenizer = load_tokenizer(config.model)
    ids = {"bos": [tokenizer.bos_token_id], "eos": [tokenizer.eos_token_id], "none": [], "7": [7], "8": [8]}
    source = open_dataset(config.dataset, config.as_data())
    stream = []
    for document in source.walk(config.as_data(), 0, 0, {0: Start(0)}):
        if document.content.strip():
            text = tokenizer(document.content, add_special_tokens=False)["input_ids"]
            stream += ids[begin] + text + (ids["eos"] if after == "auto" else ids[after])
    first = ids["bos"] if row == "auto" else ids[row]
    size = 16 - len(first)
    expected = [first + stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    assert written(tmp_path / "out") == expected
    origin = json.loads((tmp_path / "out" / "sae_lens.json").read_text())
    names = {"auto": "bos", "none": None, "7": 7}
    assert origin["begin_batch_token"] == names.get(row, row)
    assert origin["begin_sequence_token"] == {"none": None}.get(begin, begin)
    assert origin["sequence_separator_token"] == {"auto": "eos", "none": None, "8": 8}.get(after, after)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_number_of_workers_changes_no_byte(home, tmp_path, streaming):
    for num_workers in (1, 2):
        config = configured(home, tmp_path / str(num_workers), streaming, num_workers=num_workers)
        pretokenize_dataset(config)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
