"""The first half: documents to packed rows, spooled to disk by virtual shard.

A spool is a file of raw token ids, row after row, and a JSON of how far it goes: the cursor behind its last row. Both
are committed together, the JSON last, so that a call that was killed goes on from there; what
the file holds beyond its JSON is cut off. What a shard gives does not depend on who packs it, so neither the number of
workers nor a kill changes a byte.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bigsae.config import DataConfig
from bigsae.data.packing import Cursor, Layout, Packer, Row, pack, start_of
from bigsae.data.sources import Document, Source
from bigsae.data.tokenizer import encoder
from bigsae.hub.files import write_json

Tell = Callable[[int, int], None]
"""Called now and then with how many documents and tokens more are done."""


class Spool:
    """The rows of one virtual shard, on disk and about to be."""

    def __init__(self, folder: Path, shard: int, layout: Layout):
        self.shard, self.layout = shard, layout
        self._path, self._json = folder / f"{shard:05}.rows", folder / f"{shard:05}.json"
        state = json.loads(self._json.read_text()) if self._json.is_file() else {}
        self.cursor = Cursor(**state["cursor"]) if state else Cursor(shard)
        self.num_rows: int = state.get("num_rows", 0)
        self.end: dict[str, int] | None = state.get("end")
        """Counts of documents and tokens, once the shard is whole."""
        self._waiting: list[np.ndarray] = []

    def add(self, row: Row) -> None:
        """Take in a row; on disk after the next `commit`."""
        self._waiting.append(row.tokens)
        self.cursor = row.cursor

    def commit(self, end: dict[str, int] | None = None) -> None:
        """Put the waiting rows on disk; with the counts of `end` the shard is whole."""
        if not self._waiting and end is None:
            return
        with open(os.open(self._path, os.O_CREAT | os.O_WRONLY), "wb") as file:
            file.seek(self.num_rows * self.layout.ctx_len * np.dtype(self.layout.dtype).itemsize)
            file.truncate()
            for row in self._waiting:
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.num_rows += len(self._waiting)
        self._waiting, self.end = [], end
        state = {"num_rows": self.num_rows, "cursor": dataclasses.asdict(self.cursor), "end": end}
        write_json(self._json, state)

    def rows(self) -> np.ndarray:
        """What is on disk, [num_rows, ctx_len], memory-mapped."""
        shape = (self.num_rows, self.layout.ctx_len)
        if not self.num_rows:
            return np.empty(shape, dtype=self.layout.dtype)
        return np.memmap(self._path, dtype=self.layout.dtype, mode="r", shape=shape)


def fill(
    source: Source,
    tokenizer: Any,
    data: DataConfig,
    seed: int,
    spools: list[Spool],
    commit_tokens: int,
    tell: Tell,
) -> None:
    """Pack the shards of `spools` to their ends, each from where it stands, with commits on the way."""
    by_shard = {spool.shard: spool for spool in spools if spool.end is None}
    if not by_shard:
        return
    layout = spools[0].layout
    packers = {shard: Packer(spool.cursor, layout, source.label) for shard, spool in by_shard.items()}
    starts = {shard: start_of(packer) for shard, packer in packers.items()}
    num_documents = {shard: start.position for shard, start in starts.items()}

    def documents() -> Iterator[Document]:
        for document in source.walk(data, seed, 0, starts):
            num_documents[document.shard] = document.position + 1
            tell(1, 0)
            yield document

    num_waiting = 0
    for item in pack(documents(), packers, encoder(tokenizer, layout)):
        if isinstance(item, int):
            tell(0, item)
            continue
        by_shard[item.cursor.shard].add(item)
        num_waiting += layout.ctx_len
        if num_waiting >= commit_tokens:
            for spool in by_shard.values():
                spool.commit()
            num_waiting = 0
    for shard, spool in by_shard.items():
        packer = packers[shard]
        spool.commit(
            {
                "num_documents": num_documents[shard],
                "skipped_documents": packer.skipped_documents,
                "dropped_tokens": packer.dropped_tokens + len(packer.carry),
            }
        )
