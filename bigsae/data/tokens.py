"""The token stage: a dataset as packed rows of tokens, dealt over ranks, resumable.

    source = open_dataset("corpus.jsonl", data)
    rows = TokenRows(source, tokenizer, ctx_len=256, data=data, seed=0, rank=0, num_ranks=1)
    for row in rows: ...  # [ctx_len] int64

The unit of everything is the virtual shard (sources.py): it shuffles, packs and counts by itself. A rank owns the
shards v with v % num_ranks == rank, so that a run goes on from the same cursors on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bigsae.config import DataConfig, UserError, short
from bigsae.data.cursors import merge_states, own_cursors
from bigsae.data.opening import open_dataset
from bigsae.data.packing import Cursor, EpochEnd, Packer, Row, pack, produce
from bigsae.data.sources import Document, Source
from bigsae.data.tokenizer import check_vocabulary, encoder, layout_for, load_tokenizer

__all__ = [
    "Source",
    "TokenRows",
    "check_vocabulary",
    "heldout_rows",
    "load_tokenizer",
    "merge_states",
    "open_dataset",
    "token_mask",
]

logger = logging.getLogger("bigsae")

_PREFETCH_ROWS = 256
_HELDOUT_LANES = 16
_FLAGS = {
    "seed": "--seed",
    "ctx_len": "--ctx-len",
    "num_shards": "--data.num-shards",
    "heldout_documents": "--data.heldout-documents",
    "heldout_seed": "--data.heldout-seed",
    "num_documents": "--dataset (documents)",
    "num_files": "--dataset (files)",
}


class TokenRows(Iterator[torch.Tensor]):
    """This rank's rows, [ctx_len] int64 on the CPU, in a fixed order that `seed` decides.

    Ends after `data.epochs` epochs, else never; what remains then is counted in `num_dropped_tokens`. Tokenisation
    runs ahead in a thread; `state_dict` stands at the row that was last given out all the same. `tokenizer` may be None
    for a dataset of input_ids. Raises UserError where a rank has no documents, or not one row in a whole epoch;
    for a stream, whose length nobody knows, that comes from `next` and on that rank alone.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        ctx_len: int,
        data: DataConfig,
        seed: int,
        rank: int,
        num_ranks: int,
    ):
        if data.num_shards < num_ranks:
            raise UserError(
                f"--data.num-shards {data.num_shards} leaves ranks without data: raise it to {num_ranks} or more"
            )
        source.check(data, seed, num_ranks)
        self.source, self.data, self.seed, self.rank = source, data, seed, rank
        self.layout = layout_for(tokenizer, ctx_len, source.pretokenised)
        self._encode = encoder(tokenizer, self.layout)
        self._shards = range(rank, data.num_shards, num_ranks)
        self._restart([Cursor(shard) for shard in self._shards])

    def _restart(self, cursors: list[Cursor]) -> None:
        self._cursors = {cursor.shard: cursor for cursor in cursors}
        self._skipped = {cursor.shard: cursor.skipped_documents for cursor in cursors}
        self._dropped = {cursor.shard: cursor.dropped_tokens for cursor in cursors}
        self._ended = False
        self._num_rows = 0
        self._first: Row | EpochEnd | None = None
        self.num_first_epoch_rows: int | None = None
        """Rows of this rank's first epoch since the start or the last `load_state_dict`; None until it has ended."""
        self._stop_worker: weakref.finalize | None = None

    def __iter__(self) -> TokenRows:
        return self

    def __next__(self) -> torch.Tensor:
        while not self._ended:
            if self._stop_worker is None:
                self._start_worker()
            item = self._first if self._first is not None else self._queue.get()
            self._first = None
            if isinstance(item, Row):
                self._num_rows += 1
                self._cursors[item.cursor.shard] = item.cursor
                self._skipped[item.cursor.shard] = item.cursor.skipped_documents
                self._dropped[item.cursor.shard] = item.cursor.dropped_tokens
                return torch.from_numpy(item.tokens.astype(np.int64))
            if isinstance(item, EpochEnd):
                self._note(item)
            elif item is None:
                self._ended = True
                self.close()
            else:
                self.close()
                raise item
        raise StopIteration

    def begin(self) -> None:
        """Start tokenising and wait for the first row; raises UserError at once where there will be none."""
        self._start_worker()
        first = self._queue.get()
        if isinstance(first, BaseException):
            self.close()
            raise first
        assert first is not None  # no row at all is an error, and comes as one
        self._first = first

    def wait(self, num_rows: int, seconds: float) -> bool:
        """Wait until `num_rows` rows, or what stands in their place, are there; False where `seconds` do not suffice.

        A stream whose server is away keeps `next` waiting for minutes.
        """
        if self._ended:
            return True
        if self._stop_worker is None:
            self._start_worker()
        deadline = time.monotonic() + seconds
        while self._worker.is_alive() and self._queue.qsize() < min(num_rows, _PREFETCH_ROWS):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        return True

    def _start_worker(self) -> None:
        self._queue: queue.Queue[Row | EpochEnd | BaseException | None] = queue.Queue(_PREFETCH_ROWS)
        items = produce(
            self.source, self._encode, self.layout, self.data, self.seed, list(self._cursors.values())
        )
        stop = threading.Event()
        thread = threading.Thread(
            target=_work, args=(items, self._queue, stop), name="bigsae-tokens", daemon=True
        )
        thread.start()
        self._worker = thread
        # Runs at close(), when this object goes, and before the interpreter does: a daemon thread alone may
        # crash in native code while the interpreter is torn down.
        self._stop_worker = weakref.finalize(self, _stop, stop, thread)

    def _note(self, end: EpochEnd) -> None:
        if self.num_first_epoch_rows is None:
            self.num_first_epoch_rows = self._num_rows
        self._skipped, self._dropped = end.skipped_documents, end.dropped_tokens
        what = "that was the last" if end.is_last else f"epoch {end.epoch + 1} begins, in a new order"
        logger.info(
            "rank %d has seen all its documents of epoch %d: %s "
            "(%d empty documents skipped and %d tokens dropped so far)",
            self.rank,
            end.epoch,
            what,
            self.num_skipped_documents,
            self.num_dropped_tokens,
        )

    @property
    def num_skipped_documents(self) -> int:
        """Documents of this rank's shards without text or tokens, exact at the end of an epoch."""
        return sum(self._skipped.values())

    @property
    def num_dropped_tokens(self) -> int:
        """Tokens of this rank's shards that filled no row, exact at the end of an epoch."""
        return sum(self._dropped.values())

    def left_out(self) -> dict[str, int]:
        """What of this rank's documents is in no row, by name."""
        return {
            "skipped_documents": self.num_skipped_documents,
            "dropped_tokens": self.num_dropped_tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the rows given out so far: plain JSON values, a cursor for each own shard."""
        return {
            **self._identity(),
            "cursors": [dataclasses.asdict(cursor) for cursor in self._cursors.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`: of this very rank, or merged by `merge_states` and from any number of ranks.

        Raises UserError where the dataset or the options that decide the order have changed since.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"{_FLAGS[name]} is {value}, but {short(state.get(name))} in the checkpoint: "
                    "a run goes on with the data it began with"
                )
        cursors = own_cursors(Cursor, state, self._shards)
        self.close()
        self._restart(cursors)

    def _identity(self) -> dict[str, int | None]:
        return {
            "seed": self.seed,
            "ctx_len": self.layout.ctx_len,
            "num_shards": self.data.num_shards,
            "heldout_documents": self.data.heldout_documents,
            "heldout_seed": self.data.heldout_seed,
            **self.source.identity(self.data),
        }

    def close(self) -> None:
        """Stop the thread. The next row, if one is asked for, starts another from where this one stood."""
        if self._stop_worker is not None:
            self._stop_worker()
            self._stop_worker = self._first = None


def _work(items: Iterator[Row | EpochEnd], out: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(out, item, stop):
                return
        _put(out, None, stop)
    except BaseException as error:  # raised anew where the rows are taken
        _put(out, error, stop)


def _put(out: queue.Queue, item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            out.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # where the garbage collector happens to run in it
        thread.join(timeout=10)


def token_mask(rows: torch.Tensor, special_ids: Sequence[int], data: DataConfig) -> torch.Tensor:
    """[n, ctx_len] bool, True where the activation of `rows` [n, ctx_len] is trained on."""
    mask = torch.ones_like(rows, dtype=torch.bool)
    if data.drop_special_tokens:
        mask &= ~torch.isin(rows, torch.tensor(list(special_ids), dtype=rows.dtype, device=rows.device))
    if data.drop_first_position:
        mask[:, 0] = False
    return mask


def heldout_rows(
    source: Source, tokenizer: Any, ctx_len: int, data: DataConfig, seed: int, max_rows: int
) -> torch.Tensor:
    """[n, ctx_len] int64, n <= max_rows: the held-out documents packed in turn, the same on every rank.

    [0, ctx_len] where none are held out. Raises UserError where they would be all documents, or give no row.
    """
    layout = layout_for(tokenizer, ctx_len, source.pretokenised)
    contents = source.heldout(data, seed)
    # Side by side as shards are, so that `max_rows` is not filled by the first document alone.
    lanes = max(1, min(data.heldout_documents, _HELDOUT_LANES))
    documents = (Document(i % lanes, i // lanes, content, None) for i, content in enumerate(contents))
    packers = {lane: Packer(Cursor(lane), layout, source.label) for lane in range(lanes)}
    rows: list[np.ndarray] = []
    for item in pack(documents, packers, encoder(tokenizer, layout)):
        if isinstance(item, Row) and len(rows) < max_rows:
            rows.append(item.tokens)
        if len(rows) >= max_rows:
            break
    if not rows and data.heldout_documents and max_rows > 0:
        raise UserError(
            f"--data.heldout-documents {data.heldout_documents}: these documents give not one row of --ctx-len "
            f"{ctx_len}: raise --data.heldout-documents"
        )
    stacked = np.stack(rows) if rows else np.empty((0, ctx_len))
    return torch.from_numpy(stacked.astype(np.int64))
