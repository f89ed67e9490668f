"""Writing shards, and finding those that a run before has finished.

Ranks write in step: place p of all lanes, then place p + 1. Beside its files each shard has, until the cache is
finished, progress/<place>-<lane>.json with its part of the index and where its rank's data stood after it. A place is
whole once those of all ranks are there; what was written of later places is written anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bigsae.config import UserError
from bigsae.data.activation_cache import ACTIVATIONS, INPUT_IDS, KEPT, STARTS
from bigsae.data.cache_index import HELDOUT, CacheFile, Shard, parse_shard, stem
from bigsae.hub.files import write_atomic, write_json

PROGRESS = "progress"


@dataclass(frozen=True)
class Written:
    """What a rank had done at the end of a place."""

    place: int
    lane: int
    num_ranks: int
    """Ranks that wrote this place."""
    shard: Shard | None
    """None where the rank's data had ended before."""
    data: dict[str, Any] | None
    """TokenRows' state; None for what is kept aside."""


class ShardBuffer:
    """The rows that a rank has gathered for its next shard; room for `num_rows`."""

    def __init__(self, num_rows: int, ctx_len: int, widths: Mapping[str, int], dtype: torch.dtype):
        self._ids = torch.empty(num_rows, ctx_len, dtype=torch.int32)
        self._kept = torch.empty(num_rows, ctx_len, dtype=torch.bool)
        self._activations = {
            name: torch.empty(num_rows * ctx_len, d_in, dtype=dtype) for name, d_in in widths.items()
        }
        self.num_rows = self.num_activations = 0

    def add(self, ids: Tensor, kept: Tensor, activations: Mapping[str, Tensor]) -> None:
        """Take in rows [n, ctx_len], what of them is kept, and {hookpoint: [kept, d_in]} of that."""
        end = self.num_rows + len(ids)
        self._ids[self.num_rows : end] = ids
        self._kept[self.num_rows : end] = kept
        first, self.num_rows = self.num_activations, end
        self.num_activations += int(kept.sum())
        for name, values in activations.items():
            self._activations[name][first : self.num_activations] = values

    def write(self, folder: Path, place: int, lane: int) -> Shard | None:
        """Write what was gathered, and begin anew. None where that is nothing."""
        num_rows, num_activations = self.num_rows, self.num_activations
        self.num_rows = self.num_activations = 0
        if not num_rows:
            return None
        kept = self._kept[:num_rows]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        name = f"{stem(place, lane)}.safetensors"
        tokens = {INPUT_IDS: self._ids[:num_rows], KEPT: kept, STARTS: starts}
        return Shard(
            lane,
            place,
            num_rows,
            num_activations,
            _write(folder, f"tokens/{name}", tokens),
            {
                hookpoint: _write(
                    folder, f"activations/{hookpoint}/{name}", {ACTIVATIONS: values[:num_activations]}
                )
                for hookpoint, values in self._activations.items()
            },
        )


def _write(folder: Path, file: str, tensors: dict[str, Tensor]) -> CacheFile:
    sums: list[tuple[int, str]] = []

    def write(path: Path) -> None:
        save_file(tensors, path)
        with path.open("rb") as written:
            sums.append((path.stat().st_size, hashlib.file_digest(written, "sha256").hexdigest()))

    write_atomic(folder / file, write)
    return CacheFile(file, *sums[0])


def write_progress(folder: Path, written: Written) -> None:
    """Note that a rank has finished a place. Its files are on disk by then."""
    write_json(folder / PROGRESS / f"{stem(written.place, written.lane)}.json", asdict(written))


def read_progress(folder: Path) -> dict[int, list[Written]]:
    """What all ranks have written of each place, up to the last whole one; by place, then by lane. Raises UserError."""
    found: dict[int, list[Written]] = {}
    for path in sorted((folder / PROGRESS).glob("*.json")):
        try:
            values = json.loads(path.read_text())
            shard = values["shard"] and parse_shard(values["shard"], str(path))
            written = Written(**values | {"shard": shard})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: {path} cannot be read: {error}") from None
        found.setdefault(written.place, []).append(written)
    whole: dict[int, list[Written]] = {}
    for place in sorted(found):
        lanes = {written.lane: written for written in found[place]}
        num_ranks = max(written.num_ranks for written in found[place])
        follows = place == max(whole) + 1 if whole else place <= 0
        if sorted(lanes) != list(range(num_ranks)) or not follows:
            break
        whole[place] = [lanes[lane] for lane in sorted(lanes)]
    return whole


def drop_after(folder: Path, last: int) -> None:
    """Remove what was written of places after `last`, and temporary files."""
    for room in (folder / PROGRESS, folder / "tokens", *(folder / "activations").glob("*")):
        for path in room.glob("*"):
            if path.name.startswith(".") or _place(path) > last:
                path.unlink()


def _place(path: Path) -> int:
    first = path.name.partition("-")[0]
    return HELDOUT if first == "heldout" else int(first)


def finish(folder: Path) -> None:
    """Remove the notes of what is done: the index holds it."""
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
