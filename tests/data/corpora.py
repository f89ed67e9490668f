"""Small corpora, and a packer too simple to be wrong."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import datasets

from bigsae.config import DataConfig
from bigsae.data.sources import MapSource, Source, Start, StreamSource
from tests.models import english

KINDS = ("map", "files", "modulo")


def texts(num_documents: int, seed: int = 0) -> list[str]:
    """Different documents of different lengths."""
    return [f"n{i} " + english(3 + (i * 37) % 60, seed * 10_000 + i) for i in range(num_documents)]


def make_source(kind: str, column: dict[str, list[Any]], num_files: int = 5) -> Source:
    """Map-style, or a stream that fewer shards than `num_files` share by files and more by document number."""
    ((name, _),) = column.items()
    dataset = datasets.Dataset.from_dict(column)
    if kind == "map":
        return MapSource(dataset, "corpus", name, name == "input_ids")
    num_files = min(num_files if kind == "files" else 2, len(dataset))
    return StreamSource(
        dataset.to_iterable_dataset(num_shards=num_files), "corpus", name, name == "input_ids"
    )


def shard_contents(source: Source, data: DataConfig, seed: int, epoch: int) -> dict[int, list[Any]]:
    """Documents of all shards in the order of `epoch`."""
    contents = defaultdict(list)
    for document in source.walk(data, seed, epoch, {v: Start(0) for v in range(data.num_shards)}):
        contents[document.shard].append(document.content)
    return contents


def naive_rows(documents: list[str], tokenizer: Any, ctx_len: int) -> tuple[list[list[int]], int]:
    """Rows of one shard, and the number of tokens that are left over."""
    stream: list[int] = []
    for text in documents:
        if text and text.strip():
            stream += tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
            elif tokenizer.bos_token_id is not None:
                stream.append(tokenizer.bos_token_id)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = ctx_len - len(first)
    rows = [first + stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]
    return rows, len(stream) - size * len(rows)
