"""Each kind of source gives the same documents; each mistake a message that names its flag."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
import torch

from bigsae.config import DataConfig, UserError
from bigsae.data.opening import open_dataset
from bigsae.data.sources import MapSource, StreamSource
from bigsae.data.tokens import TokenRows, heldout_rows
from tests.data.corpora import make_source, shard_contents, texts

DOCUMENTS = [*texts(23), "lines\nof one\n\ndocument", ""]


def write_jsonl(path, documents=DOCUMENTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"n": i, "text": text, "ids": [i]}) + "\n" for i, text in enumerate(documents))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def write_txt(folder):
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i:02} [of 25]*.txt").write_text(text)
    return folder


def write_saved_dict(folder):
    splits = {"train": DOCUMENTS, "other": texts(3, seed=1)}
    made = {name: datasets.Dataset.from_dict({"text": documents}) for name, documents in splits.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    return folder


def write_saved(folder):
    datasets.Dataset.from_dict({"text": DOCUMENTS, "n": list(range(25))}).save_to_disk(folder)
    return folder


def write_parquet(path, documents=DOCUMENTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"text": documents}).to_parquet(path)
    return path


def write_splits(folder):
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", DOCUMENTS[:10])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", DOCUMENTS[10:])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", texts(3, seed=1))
    (folder / "README.md").write_text("A copy of a dataset of the Hub.")
    return folder


def write_folder(folder):
    # One name alone looks like a split: then none is.
    write_jsonl(folder / "part.jsonl", DOCUMENTS[:10])
    write_jsonl(folder / "deep" / "test.jsonl", DOCUMENTS[10:])
    write_jsonl(folder / ".cache" / "hidden.jsonl", texts(3, seed=1))
    return folder


KINDS = {
    "jsonl": lambda d: write_jsonl(d / "x [1].jsonl"),
    "jsonl.gz": lambda d: write_jsonl(d / "x.jsonl.gz"),
    "jsonl.zst": lambda d: write_jsonl(d / "x.jsonl.zst"),
    "parquet": lambda d: write_parquet(d / "x.parquet"),
    "txt": lambda d: write_txt(d / "books"),
    "folder": lambda d: write_folder(d / "folder"),
    "splits": lambda d: write_splits(d / "folder"),
    "saved": lambda d: write_saved(d / "folder"),
    "saved dict": lambda d: write_saved_dict(d / "folder"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents(kind, streaming, tmp_path):
    path = KINDS[kind](tmp_path)
    data = DataConfig(num_shards=2, streaming=streaming)
    source = open_dataset(str(path), data)
    assert isinstance(source, StreamSource if streaming and "saved" not in kind else MapSource)
    contents = shard_contents(source, data, 0, 0)
    assert sorted(contents[0] + contents[1]) == sorted(DOCUMENTS)
    assert contents[0]
    assert contents[1]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo\n\nthree")
    for streaming in (False, True):
        data = DataConfig(num_shards=1, streaming=streaming)
        assert shard_contents(open_dataset(str(tmp_path / "book.txt"), data), data, 0, 0) == {
            0: ["one\ntwo\n\nthree"]
        }


@pytest.mark.parametrize("kind", ["splits", "saved dict"])
def test_another_split(kind, tmp_path):
    path = KINDS[kind](tmp_path)
    data = DataConfig(num_shards=1, split="test" if kind == "splits" else "other")
    assert sorted(shard_contents(open_dataset(str(path), data), data, 0, 0)[0]) == sorted(texts(3, seed=1))


@pytest.mark.parametrize("streaming", [False, True])
def test_input_ids_come_before_text(streaming, tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"text": "a", "input_ids": [5, 6, 7, 8]}\n{"text": "b", "input_ids": [9, 10]}\n')
    data = DataConfig(num_shards=1, epochs=1, streaming=streaming, text_column="absent")
    rows = TokenRows(open_dataset(str(path), data), None, 2, data, 0, 0, 1)
    assert sorted(row.tolist() for row in rows) == [[5, 6], [7, 8], [9, 10]]


def test_a_hub_id_is_given_on(monkeypatch):
    asked = []

    def load_dataset(path, **kwargs):
        asked.append((path, kwargs))
        return datasets.Dataset.from_dict({"body": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig(name="small", revision="v2", split="validation", text_column="body")
    open_dataset("someone/corpus", data)
    expected = {"name": "small", "revision": "v2", "split": "validation", "streaming": False}
    assert asked == [("someone/corpus", expected)]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"--dataset nobody/nothing cannot be opened .*Couldn't reach"
    ) as raised:
        open_dataset("nobody/nothing", DataConfig())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("message", "flag"),
    [
        ("Unknown split \"foo\". Should be one of ['train'].", "--data.split foo"),
        ("Config name is missing.\nPlease pick one among: ['a', 'b']", "--data.name"),
        ("something else", "--dataset someone/corpus cannot be opened"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, message, flag):
    def load_dataset(*_, **__):
        raise ValueError(message)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=f"^{flag}"):
        open_dataset("someone/corpus", DataConfig(split="foo"))


def refused(match, dataset, **data):
    for streaming in (False, True):
        with pytest.raises(UserError, match=match) as raised:
            open_dataset(str(dataset), DataConfig(streaming=streaming, **data))
        assert "\n" not in str(raised.value)


def test_what_cannot_be_opened(tmp_path):
    refused("--dataset .*corpus.jsonl: there is no such file", "corpus.jsonl")
    refused("--dataset .* there is no such file", "./data/corpus")
    refused("--dataset .* there is no such file", tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    refused("--dataset .*folder holds no .jsonl, .parquet or .txt", tmp_path / "folder")
    write_jsonl(tmp_path / "folder" / "a.jsonl")
    (tmp_path / "folder" / "b.txt").write_text("text")
    refused("--dataset .*folder mixes json and text files", tmp_path / "folder")
    (tmp_path / "x.csv").write_text("text\na\n")
    refused(r"--dataset .*x.csv is none of \.jsonl", tmp_path / "x.csv")
    refused(r"--data\.name is for datasets of the Hub", tmp_path / "folder", name="small")
    refused(r"--data\.revision is for datasets of the Hub", tmp_path / "folder", revision="main")


def test_unknown_splits_and_columns(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl")
    refused(r"--data\.split nope: .* has only train", path, split="nope")
    refused(r"--data\.split nope: .* has only test, train", write_splits(tmp_path / "splits"), split="nope")
    refused(
        r"--data\.split nope: .* has only train, other", write_saved_dict(tmp_path / "dict"), split="nope"
    )
    refused(r"--data\.split nope: .* has only train", write_saved(tmp_path / "saved"), split="nope")
    refused(r"--data\.text-column nope: .* it has n, text, ids", path, text_column="nope")
    refused(r"--data\.text-column n of .* holds int64, not text: choose among text", path, text_column="n")
    refused(r"--data\.text-column ids .* not text", path, text_column="ids")
    (tmp_path / "b.txt").write_text("text")
    refused(r"--data\.text-column body: .* it has text", tmp_path / "b.txt", text_column="body")
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    refused("holds values of mixed types, not text", tmp_path / "mixed.jsonl")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": ["a"]}\n')
    refused("input_ids holds list.*not lists of integers", tmp_path / "ids.jsonl")


def test_broken_files(tmp_path):
    for name, content in {
        "x.jsonl": b'{"text": "a"}\n{"text": \n',
        "x.jsonl.gz": b"not gzip",
        "x.parquet": b"not parquet",
        "x.txt": b"\xff\xfe\xfa",
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(f"--dataset .*{name} cannot be read: ", tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("")
    refused("--dataset .*empty.jsonl holds no documents", tmp_path / "empty.jsonl")


@pytest.mark.parametrize("kind", ["map", "files", "modulo"])
def test_too_little_data_is_refused_and_never_loops(kind, tokenizer):
    def refuse(match, column, ctx_len=64, num_ranks=1, rank=0, **data):
        config = DataConfig(**{"num_shards": 4, **data})
        with pytest.raises(UserError, match=match):
            list(TokenRows(make_source(kind, column), tokenizer, ctx_len, config, 0, rank, num_ranks))

    refuse(
        "corpus holds [1-9][0-9]* tokens .*less than one row of --ctx-len 4096",
        {"text": texts(6)},
        ctx_len=4096,
    )
    refuse("--dataset corpus holds no text", {"text": ["", None, " ", "\n", ""]})
    refuse(
        r"spread over 4 virtual shards .* lower --data\.num-shards", {"text": texts(6)}, ctx_len=150, epochs=1
    )
    refuse("no row of input_ids as long as one row of --ctx-len 64", {"input_ids": [[1] * 63] * 9})
    refuse("input_ids must be lists of token ids", {"input_ids": [[1, -100, 3]] * 9})
    refuse(r"--data\.num-shards 4 leaves ranks without data", {"text": texts(9)}, num_ranks=5)
    expected = (
        r"5 documents, 3 of them held out: too few for 3 ranks" if kind == "map" else "for one of the ranks"
    )
    refuse(expected, {"text": texts(5)}, num_ranks=3, rank=1, num_shards=3, heldout_documents=3, epochs=1)
    all_heldout = r"--data\.heldout-documents 9 takes all [69] documents of --dataset corpus: lower it"
    for num_documents in (6, 9):
        source = make_source(kind, {"text": texts(num_documents)})
        with pytest.raises(UserError, match=all_heldout):
            heldout_rows(source, tokenizer, 16, DataConfig(num_shards=4, heldout_documents=9), 0, 5)
    source = make_source(kind, {"text": texts(9)})
    with pytest.raises(UserError, match=r"--data\.heldout-documents 1: .* not one row of --ctx-len 4096"):
        heldout_rows(source, tokenizer, 4096, DataConfig(num_shards=4, heldout_documents=1), 0, 5)


def test_a_little_text_on_many_shards_comes_round_in_later_epochs(tokenizer):
    rows = TokenRows(
        make_source("map", {"text": texts(6)}), tokenizer, 150, DataConfig(num_shards=4), 0, 0, 1
    )
    assert next(rows).shape == torch.Size([150])
    rows.close()
