"""Documents in the order in which virtual shards give them out.

A source deals its documents to `data.num_shards` virtual shards. `walk` gives the documents of some of these, in
ascending (position, shard), where a position is a document's place in its shard's order of that epoch. Held-out
documents keep their places and are passed over, so positions do not depend on who walks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import datasets
import numpy as np

from bigsae.config import DataConfig, UserError
from bigsae.data.reading import FAILURES, READING_SECONDS, is_of_data, persistently, unreadable
from bigsae.seeds import derive_seed

FETCH_DOCUMENTS = 32  # read at a time from a map-style dataset: few, for documents may be large
WINDOW_DOCUMENTS = 16_384  # of a stream, over all shards, that are in memory to be shuffled
_ROUNDS = 6


class Document(NamedTuple):
    """One document as a shard gives it out."""

    shard: int
    position: int
    content: Any
    """str or sequence of token ids, or None."""
    anchor: dict[str, Any] | None
    """State of the stream from which a walk can come back to this document; None for map-style datasets."""


class Start(NamedTuple):
    """Where the walk through a shard begins."""

    position: int
    anchor: dict[str, Any] | None = None


def permuted(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), chosen by `key`, sends the integers `index`: int64 [n].

    A Feistel network with cycle walking: any part of the permutation of a billion documents costs that part alone.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    out = np.asarray(index).astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[outside] = (left << half) | right
        outside = out >= np.uint64(size)
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class MapSource:
    """A dataset with a length and random access; document i belongs to shard i modulo the number of shards."""

    dataset: datasets.Dataset
    label: str
    column: str
    pretokenised: bool

    def identity(self, data: DataConfig) -> dict[str, int]:
        """What must be the same for a cursor to mean the same document."""
        return {"num_documents": len(self.dataset)}

    def check(self, data: DataConfig, seed: int, num_ranks: int) -> None:
        """Raises UserError, on every rank alike, where some rank is left without documents."""
        held = self._heldout_numbers(data, seed)
        shards = np.arange(data.num_shards)
        left = np.array([len(range(v, len(self.dataset), data.num_shards)) for v in shards.tolist()])
        left -= np.bincount(held % data.num_shards, minlength=data.num_shards)
        if np.bincount(shards % num_ranks, weights=left).min() <= 0:
            raise UserError(
                f"--dataset {self.label} holds {len(self.dataset)} documents, {len(held)} of them held out: "
                f"too few for {num_ranks} ranks: use fewer ranks or more documents"
            )

    def heldout(self, data: DataConfig, seed: int) -> Iterator[Any]:
        """Contents of the held-out documents, chosen by --data.heldout-seed, else `seed`.

        Raises UserError where none would be left.
        """
        numbers = np.sort(self._heldout_numbers(data, seed)).tolist()
        for low in range(0, len(numbers), FETCH_DOCUMENTS):
            yield from self._fetch(numbers[low : low + FETCH_DOCUMENTS])

    def walk(
        self, data: DataConfig, seed: int, epoch: int, starts: Mapping[int, Start]
    ) -> Iterator[Document]:
        """Documents of the shards in `starts`, each in the order of `epoch` from its start, all in step."""
        held = set(self._heldout_numbers(data, seed).tolist())
        sizes = {v: len(range(v, len(self.dataset), data.num_shards)) for v in starts}
        keys = {v: derive_seed(seed, "documents", epoch, v) for v in starts}
        places = 256
        for low in range(min(start.position for start in starts.values()), max(sizes.values()), places):
            wanted: list[tuple[int, int, int]] = []
            for v, start in starts.items():
                positions = np.arange(max(low, start.position), min(low + places, sizes[v]))
                numbers = permuted(positions, sizes[v], keys[v]) * data.num_shards + v
                wanted.extend(
                    (position, v, number)
                    for position, number in zip(positions.tolist(), numbers.tolist(), strict=True)
                    if number not in held
                )
            wanted.sort()
            for i in range(0, len(wanted), FETCH_DOCUMENTS):
                some = wanted[i : i + FETCH_DOCUMENTS]
                contents = self._fetch([number for _, _, number in some])
                for (position, v, _), content in zip(some, contents, strict=True):
                    yield Document(v, position, content, None)

    def _heldout_numbers(self, data: DataConfig, seed: int) -> np.ndarray:
        size = len(self.dataset)
        if size == 0:
            raise UserError(f"--dataset {self.label} holds no documents")
        if data.heldout_documents >= size:
            raise _all_heldout(data, self.label, size)
        return permuted(
            np.arange(data.heldout_documents), size, derive_seed(_heldout_seed(data, seed), "heldout")
        )

    def _fetch(self, numbers: list[int]) -> list[Any]:
        with _readable(self.label):
            column = self.dataset.with_format("arrow")[numbers][self.column]
            if not self.pretokenised:
                return column.to_pylist()
        return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in column]


@dataclass(frozen=True)
class StreamSource:
    """A streamed dataset. Its files are dealt to the shards where there are enough, else its documents one by one.

    Each shard shuffles windows of its documents; a walk comes back to a window through the state that the stream
    had before it, and reads the window anew. The held-out documents are the stream's first (where files are dealt:
    those of the first shard's files, then of the next shard's).
    """

    dataset: datasets.IterableDataset
    label: str
    column: str
    pretokenised: bool

    def identity(self, data: DataConfig) -> dict[str, int]:
        """What must be the same for a cursor to mean the same document."""
        return {"num_files": self.dataset.num_shards}

    def check(self, data: DataConfig, seed: int, num_ranks: int) -> None:
        """Nothing can be known of a stream before it is read."""

    def heldout(self, data: DataConfig, seed: int) -> Iterator[Any]:
        """Contents of the held-out documents. Raises UserError where none would be left."""
        for _, content in self._heldout_documents(data):
            yield content

    def walk(
        self, data: DataConfig, seed: int, epoch: int, starts: Mapping[int, Start]
    ) -> Iterator[Document]:
        """Documents of the shards in `starts`, each in the order of `epoch` from its start, all in step."""
        length = max(16, WINDOW_DOCUMENTS // data.num_shards)
        lanes = self._lanes(data, starts, length)
        for window in count(min(lane.first_window for lane in lanes)):
            read = {v: (anchor, part) for lane in lanes for v, anchor, part in lane.read(window)}
            orders = {
                v: permuted(
                    np.arange(len(part)), max(1, len(part)), derive_seed(seed, "documents", epoch, v, window)
                ).tolist()
                for v, (_, part) in read.items()
            }
            for place in range(max(map(len, orders.values()), default=0)):
                position = window * length + place
                for v in sorted(read):
                    if place < len(orders[v]) and position >= starts[v].position:
                        anchor, part = read[v]
                        heldout, content = part[orders[v][place]]
                        if not heldout:
                            yield Document(v, position, content, anchor)
            if all(lane.exhausted for lane in lanes):
                return

    def _lanes(self, data: DataConfig, starts: Mapping[int, Start], length: int) -> list[_Lane]:
        if not self._by_files(data):
            shards = list(range(data.num_shards))
            heldout = data.heldout_documents
            return [_Lane(self._files(1, 0), self.column, shards, starts, length, heldout, self.label)]
        held = Counter(v for v, _ in self._heldout_documents(data))
        return [
            _Lane(
                self._files(data.num_shards, v), self.column, [v], {v: starts[v]}, length, held[v], self.label
            )
            for v in sorted(starts)
        ]

    def _by_files(self, data: DataConfig) -> bool:
        return self.dataset.num_shards >= data.num_shards

    def _files(self, num_parts: int, part: int) -> datasets.IterableDataset:
        # Also where there is one part: this gives a stream with a state of its own, while a plain copy shares it.
        return self.dataset.shard(num_parts, part, contiguous=False)

    def _heldout_documents(self, data: DataConfig) -> list[tuple[int, Any]]:
        if not data.heldout_documents:
            return []
        num_parts = data.num_shards if self._by_files(data) else 1

        def read() -> list[tuple[int, Any]]:
            parts = ((v, self._files(num_parts, v)) for v in range(num_parts))
            numbered = ((v, document[self.column]) for v, stream in parts for document in stream)
            return list(islice(numbered, data.heldout_documents + 1))

        with _readable(self.label):
            documents = persistently(read, self.label, READING_SECONDS)
        if len(documents) <= data.heldout_documents:
            raise _all_heldout(data, self.label, len(documents))
        return documents[:-1]


class _Lane:
    """One stream on its way to the shards that its documents are dealt to in turn."""

    def __init__(
        self,
        stream: datasets.IterableDataset,
        column: str,
        shards: list[int],
        starts: Mapping[int, Start],
        length: int,
        num_heldout: int,
        label: str,
    ):
        self.label = label
        self.shards, self.length, self.num_heldout, self.column = shards, length, num_heldout, column
        self.windows = {v: start.position // length for v, start in starts.items()}
        first = min(self.windows, key=lambda v: self.windows[v])
        self.first_window, anchor = self.windows[first], starts[first].anchor
        self.exhausted = False
        self.stream = stream
        self.anchor = anchor or self.stream.state_dict()
        self.iterator: Iterator[dict[str, Any]] | None = None

    def read(self, window: int) -> Iterator[tuple[int, dict[str, Any] | None, list[tuple[bool, Any]]]]:
        """(shard, anchor, its documents of that window as (is held out, content)) for each shard that wants it."""
        if window < self.first_window or self.exhausted:
            return
        anchor = self.anchor
        with _readable(self.label):
            wanted, number = persistently(lambda: self._window(window), self.label, READING_SECONDS)
        self.exhausted = number < self.length * len(self.shards)
        self.anchor = self.stream.state_dict()
        for v, part in wanted.items():
            yield v, anchor, part

    def _window(self, window: int) -> tuple[dict[int, list[tuple[bool, Any]]], int]:
        """The documents of that window that each shard wants, and how many the stream had for all of them.

        Where the stream breaks off within it, the next call begins again at the window's first document.
        """
        iterator, self.iterator = self.iterator, None
        if iterator is None:
            self.stream.load_state_dict(self.anchor)
            iterator = iter(self.stream)
        wanted: dict[int, list[tuple[bool, Any]]] = {
            v: [] for v, first in self.windows.items() if first <= window
        }
        size = self.length * len(self.shards)
        number = -1
        for number, document in enumerate(islice(iterator, size)):
            v = self.shards[number % len(self.shards)]
            if v in wanted:
                wanted[v].append((window * size + number < self.num_heldout, document[self.column]))
        self.iterator = iterator
        return wanted, number + 1


Source = MapSource | StreamSource


def _heldout_seed(data: DataConfig, seed: int) -> int:
    return seed if data.heldout_seed is None else data.heldout_seed


@contextmanager
def _readable(label: str) -> Iterator[None]:
    """Documents that turn out to be torn, or no text, or out of reach, only when they are read, as a UserError."""
    try:
        yield
    except FAILURES as error:
        if not is_of_data(error):
            raise
        raise unreadable(label, error) from error


def _all_heldout(data: DataConfig, label: str, size: int) -> UserError:
    return UserError(
        f"--data.heldout-documents {data.heldout_documents} takes all {size} documents of --dataset {label}: lower it"
    )
