"""Streams from a Hub with bad days: what drops out comes back, and no document is lost or met twice."""

from __future__ import annotations

import errno
import gzip
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx
import pytest
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import OfflineModeIsEnabled

from bigsae.config import DataConfig, UserError
from bigsae.data import reading, sources, tokens
from bigsae.data.reading import is_of_data, is_passing, persistently
from bigsae.data.sources import Start, StreamSource
from bigsae.data.tokens import TokenRows, heldout_rows, open_dataset
from tests.data.corpora import texts
from tests.hub.hub_server import Hub, Repository
from tests.models import tiny_tokenizer

NAME = "someone/corpus"
DATA = DataConfig(num_shards=3, epochs=2, streaming=True, heldout_documents=5)


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits of our own and of `datasets`, none of which is waited for."""
    found: list[float] = []
    monkeypatch.setattr(reading, "_sleep", found.append)
    for name in ("STREAMING_READ_RETRY_INTERVAL", "STREAMING_OPEN_RETRY_INTERVAL",
                 "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL"):  # fmt: skip
        monkeypatch.setattr(datasets_config, name, 0)
    return found


def publish(hub: Hub, folder: Path, suffix: str, num_files: int) -> None:
    """The same documents in `folder` and on the Hub."""
    folder.mkdir()
    documents = texts(120)
    for i in range(num_files):
        part = datasets.Dataset.from_dict({"text": documents[i::num_files]})
        path = folder / f"{i}.{suffix}"
        if suffix == "parquet":
            part.to_parquet(path, batch_size=7)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part["text"]))
    repository = hub.repositories["datasets/" + NAME] = Repository()
    repository.commit("all", {path.name: path.read_bytes() for path in folder.iterdir()})


def read_all(dataset: str, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of all epochs, and those kept aside."""
    source = open_dataset(dataset, DATA)
    heldout = heldout_rows(source, tokenizer, 24, DATA, 0, 10).tolist()
    return [row.tolist() for row in TokenRows(source, tokenizer, 24, DATA, 0, 0, 1)], heldout


@pytest.mark.parametrize(
    ("suffix", "num_files"), [("jsonl", 2), ("parquet", 9)]
)  # dealt one by one, and by files
def test_of_a_server_that_fails_a_third_nothing_is_lost(
    hub: Hub, waits, tmp_path, monkeypatch, suffix, num_files
):
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 48)
    tokenizer = tiny_tokenizer(tmp_path / "lm")
    publish(hub, tmp_path / "corpus", suffix, num_files)
    expected = read_all(str(tmp_path / "corpus"), tokenizer)
    assert len(expected[0]) > 100
    hub.failing = 0.3
    assert read_all(NAME, tokenizer) == expected
    assert 0.15 < hub.num_failed / len(hub.requests) < 0.45


def test_an_outage_that_outlasts_the_clients_patience(hub: Hub, waits, tmp_path, monkeypatch, caplog):
    """The server is away in the middle of the stream, for longer than what lies beneath us tries again."""
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 48)
    monkeypatch.setattr(tokens, "_PREFETCH_ROWS", 2)
    monkeypatch.setattr(datasets_config, "STREAMING_READ_MAX_RETRIES", 2)
    tokenizer = tiny_tokenizer(tmp_path / "lm")
    publish(hub, tmp_path / "corpus", "jsonl", 9)
    expected = read_all(str(tmp_path / "corpus"), tokenizer)[0]
    rows = TokenRows(open_dataset(NAME, DATA), tokenizer, 24, DATA, 0, 0, 1)
    found = [next(rows).tolist() for _ in range(20)]
    hub.outage = 60
    assert found + [row.tolist() for row in rows] == expected
    assert hub.num_failed == 60
    assert len(waits) >= 4
    for number, wait in enumerate(waits[:4]):
        assert 0.5 * 2**number <= wait <= 2**number
    assert "--dataset someone/corpus is out of reach (" in caplog.text and "again in 8 s" in caplog.text


def test_a_server_that_stays_away_is_an_error(hub: Hub, waits, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_now", lambda: sum(waits))
    monkeypatch.setattr(datasets_config, "STREAMING_READ_MAX_RETRIES", 2)
    tokenizer = tiny_tokenizer(tmp_path / "lm")
    publish(hub, tmp_path / "corpus", "jsonl", 4)
    source = open_dataset(NAME, DATA)
    hub.down = True
    with pytest.raises(UserError, match=r"--dataset \S+ is out of reach \(.*go on with --resume when"):
        next(TokenRows(source, tokenizer, 24, DATA, 0, 0, 1))
    assert 600 <= sum(waits) < 660
    waits.clear()
    with pytest.raises(UserError, match=r"--dataset someone/corpus cannot be opened"):
        open_dataset(NAME, DATA)
    assert 60 <= sum(waits) < 120


@pytest.mark.parametrize("num_files", [2, 5])
def test_each_document_once_from_a_stream_that_breaks_off_anywhere(waits, monkeypatch, num_files):
    """A third of all windows break off at some document; so do those that a walk from any place begins in."""
    monkeypatch.setattr(sources, "WINDOW_DOCUMENTS", 48)
    chance = random.Random(1)
    fails = False

    def documents(files: list[int]) -> Iterator[dict[str, str]]:
        for file in files:
            for i in range(90):
                if fails and chance.random() < 0.02:
                    raise ConnectionResetError("the peer is gone")
                yield {"text": f"{file} {i}"}

    stream = datasets.IterableDataset.from_generator(
        documents,
        gen_kwargs={"files": list(range(num_files))},
        features=datasets.Features({"text": datasets.Value("string")}),
    )
    source = StreamSource(stream, "flaky", "text", False)
    data = DataConfig(num_shards=3, heldout_documents=7)
    whole = list(source.walk(data, 0, 0, {v: Start(0) for v in range(3)}))
    assert len({document.content for document in whole}) == len(whole) == 90 * num_files - 7
    fails = True
    again = list(source.walk(data, 0, 0, {v: Start(0) for v in range(3)}))
    assert [document[:3] for document in again] == [document[:3] for document in whole]
    assert len(waits) > 5
    middle = next(document for document in again if document.position == 20 and document.shard == 1)
    rest = list(source.walk(data, 0, 0, {1: Start(20, middle.anchor)}))
    assert [document[:3] for document in rest] == [
        document[:3] for document in whole if document.shard == 1 and document.position >= 20
    ]


class Answered(Exception):
    """As clients raise it, which have the answer."""

    def __init__(self, status: int):
        super().__init__(f"HTTP {status}")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError("gone"), True),
        (TimeoutError(), True),
        (httpx.ReadError("gone"), True),
        (Answered(503), True),
        (Answered(429), True),
        (Answered(404), False),
        (Answered(403), False),
        (OfflineModeIsEnabled("offline"), False),
        (FileNotFoundError("a.parquet"), False),
        (OSError("Corrupt snappy compressed data."), False),
        (ValueError("no JSON"), False),
    ],
)
def test_what_may_pass(error, passing):
    assert is_passing(error) == passing
    wrapped = DatasetGenerationError("An error occurred while generating the dataset")
    wrapped.__cause__ = error
    assert is_passing(wrapped) == passing


def test_data_that_are_broken_are_not_tried_again(waits):
    calls = []
    with pytest.raises(UnicodeDecodeError):
        persistently(lambda: calls.append(b"\xff".decode()), "it", 60)
    assert not waits


def test_a_long_read_that_breaks_off_is_tried_again(monkeypatch):
    """The limit counts from the first failure: reading up to there may have taken longer."""
    clock, results = [0.0], [ConnectionResetError("gone"), ConnectionResetError("gone"), None]

    def read() -> str:
        clock[0] += 700
        error = results.pop(0)
        if error is not None:
            raise error
        return "read"

    monkeypatch.setattr(reading, "_now", lambda: clock[0])
    monkeypatch.setattr(reading, "_sleep", lambda seconds: None)
    assert persistently(read, "it", 701) == "read"


def test_who_waits_for_rows_may_do_something_else(tmp_path, monkeypatch):
    produce, gate = tokens.produce, threading.Event()

    def produce_later(*arguments: Any) -> Iterator[Any]:
        gate.wait()
        yield from produce(*arguments)

    monkeypatch.setattr(tokens, "produce", produce_later)
    data = DataConfig(num_shards=1, epochs=1)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "a " * 400}))
    source = open_dataset(str(tmp_path / "corpus.jsonl"), data)
    rows = TokenRows(source, tiny_tokenizer(tmp_path / "lm"), 24, data, 0, 0, 1)
    assert not rows.wait(1, 0.05)
    gate.set()
    assert rows.wait(3, 60)
    first = len(next(rows))
    assert first == 24 and rows.wait(10_000, 60)  # more than there are: the end stands in their place
    rest = list(rows)
    assert rest and rows.wait(1, 0)


def test_troubles_of_the_machine_are_not_blamed_on_a_file():
    assert not is_of_data(OSError(errno.EMFILE, "too many open files"))
    assert not is_of_data(RuntimeError("can't start new thread"))
    assert is_of_data(EOFError("ended before the end-of-stream marker"))
    assert is_of_data(gzip.BadGzipFile("not a gzipped file"))
    assert is_of_data(ConnectionResetError(errno.ECONNRESET, "gone"))
