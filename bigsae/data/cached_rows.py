"""The order in which the rows of a cache are read, dealt over ranks, resumable. In place of TokenRows.

The rows are dealt to lanes, a rank owns the lanes v with v % num_ranks == rank, and each lane has a cursor of its own:
a run goes on from the same cursors on any number of ranks. Lanes take turns, a row each.

- "shuffled": all rows of the cache in a seeded random order, another one in each epoch; its row i goes to lane
  i % num_shards.
- "as_made": the lanes are those of the ranks that made the cache, each in the order in which it was made.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bigsae.config import DataConfig, UserError, short
from bigsae.data.activation_cache import ActivationCache
from bigsae.data.cursors import own_cursors
from bigsae.data.sources import permuted
from bigsae.seeds import derive_seed

logger = logging.getLogger("bigsae")

# Positions of each lane that are looked up at a time.
_PLACES = 256
_FLAGS = {
    "seed": "--seed",
    "num_shards": "--data.num-shards",
    "cached_order": "--data.cached-order",
    "cache": "--activations (its index)",
}


@dataclass(frozen=True)
class LaneCursor:
    """Where a lane's next row stands in its order of that epoch."""

    shard: int
    epoch: int = 0
    position: int = 0


class CachedRows(Iterator[Tensor]):
    """This rank's rows [ctx_len] of `cache`, in an order that `seed` decides; they end after `data.epochs` epochs.

    `label` is the cache's name for the user. Raises UserError where a rank would have no rows.
    """

    def __init__(
        self, cache: ActivationCache, data: DataConfig, seed: int, rank: int, num_ranks: int, label: str
    ):
        self.cache, self.data, self.seed, self.rank = cache, data, seed, rank
        self._made = cache.lanes() if data.cached_order == "as_made" else None
        self.num_lanes = data.num_shards if self._made is None else len(self._made)
        if self._made is None and cache.num_rows < num_ranks:
            raise UserError(f"--activations {label} holds {cache.num_rows} rows: use fewer ranks")
        if self.num_lanes < num_ranks:
            raise UserError(
                f"--data.cached-order as_made: --activations {label} was made by {self.num_lanes} ranks: use as many, "
                "or fewer"
            )
        self._lanes = range(rank, self.num_lanes, num_ranks)
        self._fingerprint = cache.index.fingerprint()
        self._restart([LaneCursor(lane) for lane in self._lanes])

    def _restart(self, cursors: list[LaneCursor]) -> None:
        self._cursors = {cursor.shard: cursor for cursor in cursors}
        self._rows = self._walk(dict(self._cursors))
        self._num_rows = 0
        self.num_first_epoch_rows: int | None = None
        """Rows of this rank's first epoch since the start or the last `load_state_dict`; None until it has ended."""

    def __iter__(self) -> CachedRows:
        return self

    def __next__(self) -> Tensor:
        cursor, number = next(self._rows)
        self._cursors[cursor.shard] = cursor
        self._num_rows += 1
        return self.cache.as_rows([number])[0]

    def _walk(self, cursors: dict[int, LaneCursor]) -> Iterator[tuple[LaneCursor, int]]:
        """The rows from `cursors` on, each with its lane's cursor after it. Lanes in earlier epochs catch up first."""
        sizes = {lane: self._size(lane) for lane in cursors}
        while True:
            epoch = min(cursor.epoch for cursor in cursors.values())
            if self.data.epochs is not None and epoch >= self.data.epochs:
                return
            walked = {lane: cursor.position for lane, cursor in cursors.items() if cursor.epoch == epoch}
            for low in range(min(walked.values()), max(sizes[lane] for lane in walked), _PLACES):
                wanted = [
                    (position, lane)
                    for lane, first in walked.items()
                    for position in range(max(low, first), min(low + _PLACES, sizes[lane]))
                ]
                wanted.sort()
                for (position, lane), number in zip(wanted, self._numbers(wanted, epoch), strict=True):
                    yield LaneCursor(lane, epoch, position + 1), number
            cursors |= {lane: LaneCursor(lane, epoch + 1) for lane in walked}
            self._note_end(epoch)

    def _size(self, lane: int) -> int:
        if self._made is not None:
            return len(self._made[lane])
        return len(range(lane, self.cache.num_rows, self.num_lanes))

    def _numbers(self, wanted: list[tuple[int, int]], epoch: int) -> list[int]:
        """Numbers in the cache of rows given by position and lane."""
        if self._made is not None:
            return [self._made[lane][position] for position, lane in wanted]
        places = np.array([position * self.num_lanes + lane for position, lane in wanted], dtype=np.int64)
        return permuted(places, self.cache.num_rows, derive_seed(self.seed, "cached rows", epoch)).tolist()

    def _note_end(self, epoch: int) -> None:
        if self.num_first_epoch_rows is None:
            self.num_first_epoch_rows = self._num_rows
        last = self.data.epochs is not None and epoch + 1 >= self.data.epochs
        what = "that was the last" if last else f"epoch {epoch + 1} begins"
        logger.info("rank %d has read all its rows of epoch %d: %s", self.rank, epoch, what)

    def wait(self, num_rows: int, seconds: float) -> bool:
        """Rows are numbers: they are there."""
        return True

    def left_out(self) -> dict[str, int]:
        """Nothing: a cache holds rows."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the rows given out so far: plain JSON values, a cursor for each own lane."""
        cursors = [dataclasses.asdict(cursor) for cursor in self._cursors.values()]
        return {**self._identity(), "cursors": cursors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`: of this very rank, or merged by `tokens.merge_states` and from any number of ranks.

        Raises UserError where the cache or the options that decide the order have changed since.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"{_FLAGS[name]} is {value}, but {short(state.get(name))} in the checkpoint: "
                    "a run goes on with the activations it began with"
                )
        self._restart(own_cursors(LaneCursor, state, self._lanes))

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_shards": self.num_lanes,
            "cached_order": self.data.cached_order,
            "cache": self._fingerprint,
        }

    def close(self) -> None:
        """Nothing waits in the background."""
