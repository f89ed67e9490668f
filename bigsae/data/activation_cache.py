"""Activations on disk: reading them row by row, from memory-mapped files.

    cache = ActivationCache(folder, index, ("model.layers.6",))
    cache(rows)   # as an Extractor: {hookpoint: [n, ctx_len, d_in]}

Rows have numbers: first those that are trained on, lane after lane, then those kept aside. A row stands where a row of
token ids stands when activations are made on the fly: [ctx_len], all of it the row's number.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigsae.config import UserError
from bigsae.data.cache_index import HELDOUT, CacheFile, Index, Shard

ACTIVATIONS, INPUT_IDS, KEPT, STARTS = "activations", "input_ids", "kept", "starts"
# Mapped files that are kept open; to open one takes some tens of microseconds.
_OPEN_FILES = 2048
_REASON = 200
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


class ActivationCache:
    """The rows of a cache, with their activations at `hookpoints` (all where not given).

    `root` is the folder that no file may lie outside of, also through links; the cache's own where not given. Raises
    UserError where files are missing or not those of the index; what is in them is looked at when they are read.
    """

    def __init__(self, folder: Path, index: Index, hookpoints: Sequence[str] = (), root: Path | None = None):
        self.folder, self.index = folder, index
        self.hookpoints = tuple(hookpoints) or tuple(index.hookpoints)
        self._root = (root or folder).resolve()
        self.shards = sorted(index.shards, key=lambda s: (s.place == HELDOUT, s.lane, s.place))
        for shard in self.shards:
            for file in (shard.tokens, *(shard.activations[name] for name in self.hookpoints)):
                self._check_size(file)
        self._starts = [self._read_starts(shard) for shard in self.shards]
        self.num_kept = torch.cat([starts.diff() for starts in self._starts])
        """Activations of each row."""
        counts = [shard.num_rows for shard in self.shards]
        self._first_rows = torch.tensor([0, *itertools.accumulate(counts)][:-1])
        # A mapping is cheap to hold, but a process may hold only so many.
        self._opened: Callable[[int, str], Any] = functools.lru_cache(_OPEN_FILES)(self._open_activations)

    @property
    def num_rows(self) -> int:
        """Rows that are trained on."""
        return self.index.num_rows

    def lanes(self) -> list[range]:
        """Numbers of the rows of each lane that is trained on."""
        lanes: dict[int, range] = {}
        for shard, first in zip(self.shards, self._first_rows.tolist(), strict=True):
            if shard.place != HELDOUT:
                begin = lanes.get(shard.lane, range(first, first)).start
                lanes[shard.lane] = range(begin, first + shard.num_rows)
        return list(lanes.values())

    def heldout_rows(self) -> Tensor:
        """The rows kept aside, [n, ctx_len], in the order in which documents gave them."""
        parts = [
            range(first, first + shard.num_rows)
            for shard, first in zip(self.shards, self._first_rows.tolist(), strict=True)
            if shard.place == HELDOUT
        ]
        # The ranks that wrote them had them in turn.
        turns = itertools.chain.from_iterable(itertools.zip_longest(*parts))
        return self.as_rows([number for number in turns if number is not None])

    def as_rows(self, numbers: Sequence[int]) -> Tensor:
        """Rows [n, ctx_len] of these `numbers`."""
        column = torch.tensor(numbers, dtype=torch.int64).unsqueeze(1)
        return column.expand(-1, self.index.ctx_len).contiguous()

    def kept_of(self, rows: Tensor) -> Tensor:
        """[n, ctx_len] bool for `rows` [n, ctx_len]: True where the reader gives an activation. These come first."""
        return torch.arange(self.index.ctx_len) < self.num_kept[rows[:, 0]].unsqueeze(1)

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """{hookpoint: [n, ctx_len, d_in]} for `rows` [n, ctx_len]: each row's activations, then zeros."""
        dtype = getattr(torch, self.index.dtype)
        found = {
            name: torch.zeros(len(rows), self.index.ctx_len, self.index.hookpoints[name], dtype=dtype)
            for name in self.hookpoints
        }
        for i, number in enumerate(rows[:, 0].tolist()):
            shard, row = self._find(number)
            begin, end = self._starts[shard][row : row + 2].tolist()
            for name, values in found.items():
                values[i, : end - begin] = self._opened(shard, name)[begin:end]
        return found

    def tokens(self, number: int) -> tuple[Tensor, Tensor]:
        """Token ids [ctx_len] of row `number`, and which of its positions have an activation [ctx_len] bool."""
        shard, row = self._find(number)
        file = self._open(self.shards[shard].tokens)
        return file.get_slice(INPUT_IDS)[row].to(torch.int64), file.get_slice(KEPT)[row]

    def verify(self) -> None:
        """Read every file, and compare it with its checksum. Raises UserError."""
        for shard in self.shards:
            for file in (shard.tokens, *(shard.activations[name] for name in self.hookpoints)):
                with self._path(file).open("rb") as opened:
                    if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                        raise UserError(
                            f"{self._path(file)} is not what was written, its checksum differs: write the cache again"
                        )

    def _find(self, number: int) -> tuple[int, int]:
        """Shard of row `number`, and its place there."""
        shard = int(torch.searchsorted(self._first_rows, number, right=True)) - 1
        return shard, number - int(self._first_rows[shard])

    def _path(self, file: CacheFile) -> Path:
        path = self.folder / file.file
        if not path.resolve().is_relative_to(self._root):
            raise UserError(f"{path} leads out of {self._root}: a cache has all its files in its own folder")
        return path

    def _check_size(self, file: CacheFile) -> None:
        path = self._path(file)
        if not path.is_file():
            raise UserError(f"{path} is missing, the cache is not whole: write or download it again")
        if (size := path.stat().st_size) != file.bytes:
            raise UserError(
                f"{path} has {size} bytes, its index says {file.bytes}: write or download it again"
            )

    def _open(self, file: CacheFile) -> Any:
        try:
            return safe_open(self._path(file), "pt")
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:_REASON]
            raise UserError(
                f"{self._path(file)} cannot be read ({reason}): write or download it again"
            ) from None

    def _slice(self, file: CacheFile, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        opened = self._open(file)
        found = opened.get_slice(name) if name in opened.keys() else None  # noqa: SIM118 (no mapping)
        if found is None or tuple(found.get_shape()) != shape or found.get_dtype() != dtype:
            raise UserError(
                f"{self._path(file)} does not hold {name} {list(shape)} in {dtype}, as its index says"
            )
        return found

    def _read_starts(self, shard: Shard) -> Tensor:
        ctx_len, num_rows = self.index.ctx_len, shard.num_rows
        self._slice(shard.tokens, INPUT_IDS, (num_rows, ctx_len), "I32")
        self._slice(shard.tokens, KEPT, (num_rows, ctx_len), "BOOL")
        starts = self._slice(shard.tokens, STARTS, (num_rows + 1,), "I64")[:]
        sizes = starts.diff()
        whole = starts[0] == 0 and starts[-1] == shard.num_activations
        if not whole or sizes.min() < 0 or sizes.max() > ctx_len:
            raise UserError(f"{self._path(shard.tokens)}: where its rows start cannot be right")
        return starts

    def _open_activations(self, shard: int, name: str) -> Any:
        file, index = self.shards[shard].activations[name], self.index
        shape = (self.shards[shard].num_activations, index.hookpoints[name])
        return self._slice(file, ACTIVATIONS, shape, _SAFETENSORS_DTYPES[index.dtype])
