"""Datasets that training cannot read, or can make nothing of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from tests.bad_input.cases import Case, Prepare, call, cut, holding, train, without, written


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def given(message: str, name: str, text: str | bytes, begun: bool = False, **more: Any) -> Case:
    """Training on a file `name` that holds `text`."""
    return train(message, written(name, text), begun, dataset="{tmp}/" + name, **more)


def saved(columns: dict[str, list], *changes: Any) -> Prepare:
    """A dataset of `save_to_disk` in the folder `data`, with `changes` made to it."""

    def prepare(home: Path, tmp: Path) -> None:
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp / "data"))
        for change in changes:
            change(tmp / "data")

    return prepare


def on_saved(message: str, columns: dict[str, list], *changes: Any, begun: bool = False, **more: Any) -> Case:
    return train(message, saved(columns, *changes), begun, dataset="{tmp}/data", **more)


def mixed(home: Path, tmp: Path) -> None:
    (tmp / "data").mkdir()
    (tmp / "data" / "a.jsonl").write_text(lines({"text": "a"}))
    (tmp / "data" / "b.txt").write_text("b")


ROW = list(range(5, 37))
LONG: dict[str, Any] = {"batch_size_tokens": 8192, "tokens": 8192, "buffer__tokens": 8192}

CASES: dict[str, Case] = {
    "no such file": train(r"--dataset .*missing\.jsonl: there is no such", dataset="{home}/missing.jsonl"),
    "no such dataset": train(r"--dataset nobody/nothing cannot be opened", dataset="nobody/nothing"),
    "no name at all": train(r"--dataset is needed: give it", dataset=""),
    "empty": given(r"--dataset .*a\.jsonl holds no documents|--dataset .* cannot be read", "a.jsonl", ""),
    "empty text": given(r"--dataset .*a\.txt holds no", "a.txt", ""),
    "blank text": given(r"--dataset .*a\.txt holds no text", "a.txt", "  \n \n"),
    "blank documents": given(r"--dataset .* holds no text", "a.jsonl", lines({"text": " "}, {"text": ""})),
    "null documents": given(
        r"--data\.text-column text .* holds null, not text", "a.jsonl", lines({"text": None})
    ),
    "not JSON": given(r"--dataset .*a\.jsonl cannot be read: .*JSON", "a.jsonl", "this is not JSON\n"),
    "a torn line": given(
        r"--dataset .*a\.jsonl cannot be read", "a.jsonl", lines({"text": "a"}) + '{"text": "to'
    ),
    "not UTF-8": given(r"--dataset .*a\.jsonl cannot be read", "a.jsonl", b'{"text": "\xff\xfe\xfa"}\n'),
    "not UTF-8, streamed": given(
        r"--dataset .*a\.jsonl cannot be read", "a.jsonl", b'{"text": "\xff\xfe\xfa"}\n', data__streaming=True
    ),
    "a torn line, streamed": given(
        r"--dataset .*a\.jsonl cannot be read",
        "a.jsonl",
        lines(*[{"text": "a"}] * 9) + '{"text": "to',
        data__streaming=True,
    ),
    "text not UTF-8": given(r"--dataset .*a\.txt cannot be read: .*utf-8", "a.txt", b"\xff\xfe\x00 words"),
    "no parquet": given(r"--dataset .*a\.parquet cannot be read", "a.parquet", b"PAR1 or not"),
    "an empty parquet": given(r"--dataset .*a\.parquet cannot be read", "a.parquet", b""),
    "an unknown kind": given(
        r"--dataset .*a\.csv is none of \.jsonl, .*point --dataset at", "a.csv", "text\na\n"
    ),
    "an empty folder": train(
        r"--dataset .*data holds no \.jsonl, .*point --dataset at",
        lambda home, tmp: (tmp / "data").mkdir(),
        dataset="{tmp}/data",
    ),
    "a mixed folder": train(r"--dataset .* mixes json and text files: keep one", mixed, dataset="{tmp}/data"),
    "no such column": train(
        r"--data\.text-column body: .* has no such column; it has text", data__text_column="body"
    ),
    "a column of numbers": given(
        r"--data\.text-column text of .* holds int64, not text: choose among body",
        "a.jsonl",
        lines({"text": 1, "body": "b"}),
    ),
    "no text at all": on_saved(r"--data\.text-column text: .* it has label", {"label": [1, 2, 3]}),
    "no such split": train(r"--data\.split test: .* has only train: choose", data__split="test"),
    "a name for a path": train(r"--data\.name is for datasets of the Hub, .*leave it out", data__name="x"),
    "a revision for a path": train(
        r"--data\.revision is for datasets of the Hub, .*leave it out", data__revision="x"
    ),
    "shorter than a row": train(
        r"--dataset .*short\.jsonl .*less than one row of --ctx-len 16: lower --ctx-len",
        dataset="{home}/short.jsonl",
    ),
    "rows beyond all documents": train(
        r"--dataset .*less than one row of --ctx-len 100000: lower", ctx_len=100_000
    ),
    "shorter than a batch": train(
        r"--dataset .* holds less than one batch: lower --batch-size-tokens 8192", begun=True, **LONG
    ),
    "shorter than a batch, one epoch": train(
        r"--dataset .* holds less than one batch: lower", begun=True, data__epochs=1, **LONG
    ),
    "all held out": train(
        r"--data\.heldout-documents 12 takes all 12 documents .*lower it", data__heldout_documents=12
    ),
    "held out in vain": given(
        r"--data\.heldout-documents 1: .*not one row .*raise --data\.heldout-documents",
        "a.jsonl",
        lines(*[{"text": "a b"}] * 200),
        data__heldout_documents=1,
    ),
    "ids that are words": on_saved(
        r"--dataset .* column input_ids holds list<.*string>, not lists of integers",
        {"input_ids": [["a", "b"]] * 9},
    ),
    "an id that is no list": on_saved(
        r"--dataset .* column input_ids holds int\d+, not lists", {"input_ids": [1, 2]}
    ),
    "negative ids": on_saved(
        r"--dataset .* input_ids must be lists of token ids, found \[-1, ", {"input_ids": [[-1, *ROW]] * 9}
    ),
    "ids beyond the vocabulary": on_saved(
        r"--dataset .* holds token id 99999, but --model .*another model",
        {"input_ids": [[*ROW, 99_999, *ROW]] * 9},
        begun=True,
    ),
    "rows of ids too short": on_saved(
        r"--dataset .* no row of input_ids as long as .*lower --ctx-len", {"input_ids": [[5, 6, 7]] * 9}
    ),
    "special tokens alone": on_saved(
        r"rows in a row hold special tokens alone: look at --dataset",
        {"input_ids": [[0, 1] * 16] * 9},
        begun=True,
        lm__micro_batch_rows=512,
    ),
    "an origin that is no JSON": on_saved(
        r"--dataset .*its sae_lens\.json is not JSON .*tokenise it again",
        {"input_ids": [ROW] * 9},
        holding("sae_lens.json", "{"),
    ),
    "an origin that is a list": on_saved(
        r"--dataset .*sae_lens\.json is not a JSON object: tokenise it again",
        {"input_ids": [ROW] * 9},
        holding("sae_lens.json", "[]"),
    ),
    "an origin of shorter rows": on_saved(
        r"--ctx-len 16: the rows of --dataset .* hold 8 tokens: lower --ctx-len to 8",
        {"input_ids": [ROW] * 9},
        holding("sae_lens.json", '{"context_size": 8}'),
    ),
    "a torn state": on_saved(
        r"--dataset .*data cannot be opened", {"text": ["a"]}, holding("state.json", "{")
    ),
    "no features": on_saved(
        r"--dataset .*data cannot be opened", {"text": ["a"]}, without("dataset_info.json")
    ),
    "a torn table": on_saved(
        r"--dataset .*data cannot be opened", {"text": ["a"] * 99}, cut("data-00000-of-00001.arrow", 40)
    ),
    "no table": on_saved(
        r"--dataset .*data cannot be opened", {"text": ["a"]}, without("data-00000-of-00001.arrow")
    ),
    "no documents to cache": call(
        "cache_activations",
        "--model {home}/lm --dataset {tmp}/a.jsonl --hookpoints model.layers.1 --output-dir {tmp}/out --tokens 99",
        r"--dataset .*a\.jsonl",
        written("a.jsonl", ""),
    ),
    "no documents to tokenise": call(
        "pretokenize",
        "--model {home}/lm --dataset {tmp}/a.jsonl --output-dir {tmp}/out --data.num-shards 1",
        r"--dataset .*a\.jsonl",
        written("a.jsonl", ""),
    ),
}
