"""Documents of every odd kind: each is a clear error or counted as skipped, and none keeps anyone waiting."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bigsae
from bigsae.config import DataConfig, UserError
from bigsae.data.tokens import TokenRows, open_dataset
from bigsae.training.run import run_training
from tests.distributed.ranks import run_ranks
from tests.models import english, tiny_llama
from tests.training.test_checkpoints import config_of

GOOD = [{"text": english(20, seed)} for seed in range(60)]


def write_lines(path: Path, *odd: object) -> Path:
    """Good documents on both sides of `odd` ones: values, or lines as bytes."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in (*GOOD, *odd, *GOOD)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def count_rows(path: Path, tokenizer, streaming: bool) -> tuple[int, int]:
    """Rows of one epoch, and the documents that were skipped."""
    data = DataConfig(num_shards=2, epochs=1, streaming=streaming)
    rows = TokenRows(open_dataset(str(path), data), tokenizer, 16, data, 0, 0, 1)
    return sum(1 for _ in rows), rows.num_skipped_documents


SKIPPED = {
    "empty": {"text": ""},
    "blank": {"text": " \n\t\u3000 "},
    "null": {"text": None},
    "without the column": {"other": "x"},
    "an empty object": {},
}
TAKEN = {
    "a NUL": {"text": "one \0 two"},
    "marks that join, and no characters": {"text": "e\u0301 \u200d \ufeff \ufffd"},
    "huge, without a space": {"text": "a" * 300_000},
    "huge": {"text": english(50_000, 7)},
}


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_without_text_are_counted(tokenizer, tmp_path, streaming):
    clean = count_rows(write_lines(tmp_path / "good.jsonl"), tokenizer, streaming)
    path = write_lines(tmp_path / "odd.jsonl", *SKIPPED.values())
    assert count_rows(path, tokenizer, streaming) == (clean[0], len(SKIPPED))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", TAKEN)
def test_odd_text_is_text(tokenizer, tmp_path, streaming, kind):
    rows, skipped = count_rows(write_lines(tmp_path / "odd.jsonl", TAKEN[kind]), tokenizer, streaming)
    assert rows >= count_rows(write_lines(tmp_path / "good.jsonl"), tokenizer, streaming)[0]
    assert skipped == 0


def not_utf8() -> pa.Array:
    """A column of strings of which one is none."""
    values = [b"good text here"] * 40 + [b"\xff\xfe bad"] + [b"good text"] * 40
    whole = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), whole.buffers())


def torn_gzip(folder: Path) -> Path:
    whole = gzip.compress(write_lines(folder / "whole.jsonl").read_bytes())
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return folder / "a.jsonl.gz"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"text": not_utf8()}), folder / "a.parquet")
    return folder / "a.parquet"


def torn_parquet(folder: Path) -> Path:
    """Its end, where all else is found, is whole."""
    datasets.Dataset.from_list(GOOD * 40).to_parquet(folder / "a.parquet", batch_size=500)
    content = bytearray((folder / "a.parquet").read_bytes())
    content[3000:3200] = bytes(200)
    (folder / "a.parquet").write_bytes(content)
    return folder / "a.parquet"


def saved(folder: Path) -> Path:
    datasets.Dataset(pa.table({"text": not_utf8()})).save_to_disk(folder / "saved")
    return folder / "saved"


def with_line(odd: object) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "a.jsonl", odd)


MIXED = "--data.text-column text .* mixed types"
CANNOT = r"^--dataset \S+ cannot be read.*{}"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a number among texts": (with_line({"text": 3}), MIXED),
    "a list among texts": (with_line({"text": ["a"]}), MIXED),
    "an object among texts": (with_line({"text": {"a": 1}}), MIXED),
    "half a pair of characters": (with_line(b'{"text": "a \\ud800 b"}'), CANNOT.format("surrogate")),
    "a line that is not UTF-8": (with_line(b'{"text": "\xff\xfe"}'), CANNOT.format("utf-8")),
    "a line that is no JSON": (with_line(b"{nothing"), CANNOT.format("JSON")),
    "a row that is not UTF-8": (parquet, CANNOT.format("utf-8")),
    "a saved row that is not UTF-8": (saved, CANNOT.format("utf-8")),
    "a torn gzip": (torn_gzip, CANNOT.format("end-of-stream")),
    "a torn parquet": (torn_parquet, CANNOT.format("[Cc]orrupt")),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_a_clear_error(tokenizer, tmp_path, streaming, kind):
    make, message = REFUSED[kind]
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        count_rows(path, tokenizer, streaming)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def status_of_two(home: Path, out: Path) -> None:
    """Two ranks over one epoch, of which the second has hardly any text."""
    config = config_of(
        home, out, tokens=10**6, dataset=str(home / "uneven.jsonl"),
        data=bigsae.DataConfig(num_shards=2, epochs=1), checkpoint=bigsae.CheckpointConfig(every=0),
    )  # fmt: skip
    run_training(config)


def test_a_rank_that_ends_early_ends_all_and_what_was_skipped_is_in_the_status(tmp_path):
    tiny_llama(tmp_path / "lm", num_layers=2)
    lines = [{"text": english(90, i)} if i % 2 == 0 or i < 20 else {"text": None} for i in range(200)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_ranks(2, status_of_two, tmp_path, tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "finished" and "data ended" in status["reason"]
    assert 0 < status["step"] < 40
    assert status["skipped_documents"] == 90
    assert status["dropped_tokens"] > 0
