"""Documents to rows of tokens: one packer a shard, and the order in which a rank's shards fill rows."""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from bigsae.config import DataConfig, UserError
from bigsae.data.sources import Document, Source, Start

# A longer document is cut, so that memory and the work of a resume do not grow with it.
PIECE_CHARACTERS = 1 << 18
# Tokenised in one call.
_BATCH_PIECES = 64
_BATCH_CHARACTERS = 1 << 20
# Where pre-tokenisers cut too: before a space between words, and between a line's end and the next line's start.
_BOUNDARY = re.compile(r"(?<=\S)(?= \S)|(?<=\n)(?=\S)")

Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Layout:
    """What a row is made of."""

    ctx_len: int
    bos: int | None
    """Token at position 0 of each row."""
    separator: int | None
    """Token after each document."""
    pretokenised: bool
    """Documents are token ids; each is cut into rows by itself."""
    dtype: type[np.unsignedinteger]
    """Smallest that holds the vocabulary."""
    document_begin: int | None = None
    """Token before each document."""

    @property
    def num_packed(self) -> int:
        """Tokens of the documents that a row takes."""
        return self.ctx_len - (self.bos is not None)


@dataclass(frozen=True)
class Cursor:
    """Where a shard's next row begins, and what had been left out when it reached that document."""

    shard: int
    epoch: int = 0
    position: int = 0
    piece: int = 0
    offset: int = 0
    """Tokens of the piece that earlier rows took."""
    skipped_documents: int = 0
    """Documents without text or tokens."""
    dropped_tokens: int = 0
    """Tokens of remainders that fill no row."""
    anchor: dict[str, Any] | None = None
    """State of the stream from which to find the document; None for map-style datasets."""

    @property
    def is_fresh(self) -> bool:
        """Whether no row was made yet."""
        return self.epoch == self.position == self.piece == self.offset == 0


class Row(NamedTuple):
    """A row [ctx_len] and its shard's cursor after it."""

    tokens: np.ndarray
    cursor: Cursor


class EpochEnd(NamedTuple):
    """A rank has gone through all documents of its shards. Counts are per shard, since the start of the run."""

    epoch: int
    is_last: bool
    skipped_documents: dict[int, int]
    dropped_tokens: dict[int, int]


class Piece(NamedTuple):
    """A part of a document that is tokenised at once; `cursor` stands at its first token that is still wanted."""

    packer: Packer
    cursor: Cursor
    content: Any
    is_last: bool


@dataclass
class Packer:
    """Makes the rows of one shard, beginning at `start`."""

    start: Cursor
    layout: Layout
    label: str
    epoch: int = field(init=False)
    carry: np.ndarray = field(init=False)
    skipped_documents: int = field(init=False)
    dropped_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.epoch = self.start.epoch
        self.carry = np.empty(0, dtype=self.layout.dtype)
        self.skipped_documents, self.dropped_tokens = self.start.skipped_documents, self.start.dropped_tokens

    @property
    def resumes(self) -> bool:
        """Whether the present epoch began elsewhere than at its start."""
        return self.epoch == self.start.epoch and not self.start.is_fresh

    def cut(self, document: Document) -> Iterator[Piece]:
        """Pieces of a document, less those that rows before `start` took; empty documents are counted."""
        cursor = Cursor(
            self.start.shard,
            self.epoch,
            document.position,
            skipped_documents=self.skipped_documents,
            dropped_tokens=self.dropped_tokens,
            anchor=document.anchor,
        )
        if self.layout.pretokenised:
            pieces: Iterable[tuple[Any, bool]] = self._cut_ids(document.content)
        else:
            pieces = self._cut_text(document.content)
        resumed = self.resumes and self.start.position == document.position
        for number, (content, is_last) in enumerate(pieces):
            if not resumed or number > self.start.piece:
                yield Piece(self, replace(cursor, piece=number), content, is_last)
            elif number == self.start.piece:
                yield Piece(self, replace(cursor, piece=number, offset=self.start.offset), content, is_last)

    def _cut_ids(self, content: Any) -> Iterator[tuple[np.ndarray, bool]]:
        ids = np.asarray([] if content is None else content)
        if len(ids) == 0:
            self.skipped_documents += 1
            return
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > np.iinfo(self.layout.dtype).max:
            raise UserError(
                f"--dataset {self.label}: input_ids must be lists of token ids, found {ids[:8].tolist()}"
            )
        self.dropped_tokens += len(ids) % self.layout.ctx_len
        yield ids.astype(self.layout.dtype), True

    def _cut_text(self, content: Any) -> Iterator[tuple[str, bool]]:
        if content is not None and not isinstance(content, str):
            raise UserError(
                f"--data.text-column of --dataset {self.label} holds {type(content).__name__}, not text"
            )
        if not content or content.isspace():
            self.skipped_documents += 1
            return
        low = 0
        while low < len(content):
            high = _piece_end(content, low)
            yield content[low:high], high == len(content)
            low = high

    def feed(self, tokens: np.ndarray, cursor: Cursor) -> Iterator[Row]:
        """Rows that are full once `tokens` [n], which begin at `cursor`, are added."""
        num_carried, num_packed = len(self.carry), self.layout.num_packed
        stream = np.concatenate([self.carry, tokens])
        del tokens  # this generator waits for its turns
        used = 0
        while len(stream) - used >= num_packed:
            row = stream[used : used + num_packed]
            if self.layout.bos is not None:
                row = np.concatenate([np.array([self.layout.bos], dtype=self.layout.dtype), row])
            used += num_packed
            yield Row(row, replace(cursor, offset=cursor.offset + used - num_carried))
        # Documents that are rows already do not run into each other; cut() has counted what is dropped here.
        self.carry = stream[len(stream) if self.layout.pretokenised else used :].copy()


def _piece_end(text: str, low: int) -> int:
    high = low + PIECE_CHARACTERS
    if high >= len(text):
        return len(text)
    boundaries = list(_BOUNDARY.finditer(text, high - PIECE_CHARACTERS // 16, high))
    return boundaries[-1].start() if boundaries else high


def pack(documents: Iterable[Document], packers: dict[int, Packer], encode: Encode) -> Iterator[Row | int]:
    """Rows and, before each group's rows, the numbers of wanted tokens of its pieces.

    Documents of several shards that follow each other at the same position take turns, a row each: long documents
    would otherwise fill a whole buffer of activations each by itself. A row's turn follows from where it ends in its
    own document, so that a run which goes on from any cursors has the same turns.
    """
    num_packed = next(iter(packers.values())).layout.num_packed
    for _, group in itertools.groupby(documents, key=lambda document: document.position):
        cuts = [packers[document.shard].cut(document) for document in group]
        heads = [(piece, cut) for cut in cuts if (piece := next(cut, None)) is not None]
        while heads:
            number = min(piece.cursor.piece for piece, _ in heads)
            feeds: list[Iterator[Row]] = []
            for batch in _batches(piece for piece, _ in heads if piece.cursor.piece == number):
                for piece, wanted in _tokenise(batch, encode):
                    yield len(wanted)
                    feeds.append(piece.packer.feed(wanted, piece.cursor))
            # Rows are made as they are wanted: thousands of small arrays, held and freed once a group, would leave
            # the heap in pieces that nothing else fits into.
            yield from heapq.merge(
                *feeds, key=lambda row: (row.cursor.offset // num_packed, row.cursor.shard)
            )
            heads = [
                (following, cut)
                for piece, cut in heads
                if (following := piece if piece.cursor.piece > number else next(cut, None)) is not None
            ]


def _tokenise(batch: list[Piece], encode: Encode) -> Iterator[tuple[Piece, np.ndarray]]:
    layout = batch[0].packer.layout
    contents = [piece.content for piece in batch]
    for piece, ids in zip(batch, contents if layout.pretokenised else encode(contents), strict=True):
        if piece.cursor.piece == 0 and layout.document_begin is not None:
            ids = np.insert(ids, 0, layout.document_begin)
        if piece.is_last and layout.separator is not None:
            ids = np.append(ids, layout.dtype(layout.separator))
        yield piece, ids[piece.cursor.offset :]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content)
        if len(batch) == _BATCH_PIECES or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def produce(
    source: Source, encode: Encode, layout: Layout, data: DataConfig, seed: int, cursors: list[Cursor]
) -> Iterator[Row | EpochEnd]:
    """The rows of the shards of `cursors`, each from its cursor on, epoch after epoch until `data.epochs`.

    Shards may stand in different epochs: those behind catch up first, which is the order of an unbroken run as well.
    Raises UserError where a whole epoch gives no row and none is to come.
    """
    packers = {cursor.shard: Packer(cursor, layout, source.label) for cursor in cursors}
    ever = not all(cursor.is_fresh for cursor in cursors)
    while True:
        epoch = min(packer.epoch for packer in packers.values())
        is_last = data.epochs is not None and epoch + 1 >= data.epochs
        if data.epochs is not None and epoch >= data.epochs:
            return
        walked = {shard: packer for shard, packer in packers.items() if packer.epoch == epoch}
        starts = {shard: start_of(packer) for shard, packer in walked.items()}
        num_rows = num_tokens = 0
        for item in pack(source.walk(data, seed, epoch, starts), packers, encode):
            if isinstance(item, int):
                num_tokens += item
            else:
                num_rows += 1
                yield item
        ever = ever or num_rows > 0
        is_whole = len(walked) == len(packers) and not any(packer.resumes for packer in packers.values())
        hopeless = num_tokens < layout.num_packed or layout.pretokenised or (is_last and not ever)
        if is_whole and num_rows == 0 and hopeless:
            raise _no_row(source, layout, num_tokens, len(packers))
        for packer in walked.values():
            packer.epoch = epoch + 1
            if is_last:
                packer.dropped_tokens += len(packer.carry)
        yield EpochEnd(
            epoch,
            is_last,
            {shard: packer.skipped_documents for shard, packer in packers.items()},
            {shard: packer.dropped_tokens for shard, packer in packers.items()},
        )


def start_of(packer: Packer) -> Start:
    """Where the walk through this packer's documents begins."""
    return Start(packer.start.position, packer.start.anchor) if packer.resumes else Start(0)


def _no_row(source: Source, layout: Layout, num_tokens: int, num_shards: int) -> UserError:
    label, row = source.label, f"one row of --ctx-len {layout.ctx_len}"
    if num_tokens == 0:
        return UserError(
            f"--dataset {label} holds no text for one of the ranks: use fewer ranks or more documents "
            "(documents without text are skipped)"
        )
    if layout.pretokenised:
        return UserError(
            f"--dataset {label} holds {num_tokens} tokens for one of the ranks, but no row of input_ids as long as "
            f"{row}: lower --ctx-len or tokenise into longer rows"
        )
    if num_tokens < layout.num_packed:
        return UserError(
            f"--dataset {label} holds {num_tokens} tokens for one of the ranks, less than {row}: lower --ctx-len, "
            "use fewer ranks or more text"
        )
    return UserError(
        f"--dataset {label} holds {num_tokens} tokens for one of the ranks, but spread over {num_shards} virtual "
        f"shards none has enough for {row}: lower --data.num-shards, or raise --data.epochs"
    )
