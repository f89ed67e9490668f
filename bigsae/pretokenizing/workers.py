"""Processes that work through tasks, end with the one that started them, and say how far they are."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any

from bigsae.config import UserError
from bigsae.pretokenizing.spool import Tell

Work = Callable[[Any, Tell], None]

SECONDS_TO_END = 10.0

_TOKENIZERS = "transformers.models.auto.tokenization_auto"

_shared: Any = None


class _Stopped(Exception):
    """Another worker has failed."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises UserError where another call still writes in `folder`; workers of a killed one have time to end."""
    with (folder / "lock").open("a") as lock:
        deadline = time.monotonic() + SECONDS_TO_END
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise UserError(
                    f"--output-dir {folder.parent}: another bigsae.pretokenize is at work in it: wait for it, or "
                    "choose another folder"
                )
            time.sleep(0.1)
        fcntl.flock(lock, fcntl.LOCK_SH)  # shared with the workers
        yield


def _locked(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Workers:
    """`num_workers` processes, started when there is something for two of them; in a `with`."""

    def __init__(self, num_workers: int, folder: Path):
        self._num_workers, self._lock = num_workers, folder / "lock"
        # Imported once, for all of them: torch, which the tokenizers bring with them, takes seconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bigsae.pretokenizing.run", _TOKENIZERS])
        self._counters = (self._context.Value("q", 0), self._context.Value("q", 0))
        self._stop = self._context.Event()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, work: Work, tasks: list[Any], tell: Tell) -> None:
        """`work(task, tell)` for each task; in this process where there is one worker or task.

        Raises what the first that fails raises.
        """
        if min(self._num_workers, len(tasks)) <= 1:
            for task in tasks:
                work(task, tell)
            return
        if self._pool is None:
            # The processes are parallel enough.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            self._pool = ProcessPoolExecutor(
                self._num_workers, self._context, _begin, (*self._counters, self._stop, self._lock)
            )
        waiting: Any = [self._pool.submit(_call, work, task) for task in tasks]
        before = [counter.value for counter in self._counters]
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                now = [counter.value for counter in self._counters]
                tell(now[0] - before[0], now[1] - before[1])
                before = now
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "--num-workers: a worker was killed, perhaps for memory: go on with --resume and fewer of them"
            ) from None


def _begin(documents: Any, tokens: Any, stop: Any, lock: Path) -> None:
    global _shared
    # Kept open, and so locked, until this process ends: by itself, or with its parent.
    file = lock.open("a")
    fcntl.flock(file, fcntl.LOCK_SH)
    _shared = (documents, tokens, stop, file)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _call(work: Work, task: Any) -> None:
    documents, tokens, stop, _ = _shared

    def tell(num_documents: int, num_tokens: int) -> None:
        for counter, more in ((documents, num_documents), (tokens, num_tokens)):
            if more:
                with counter.get_lock():
                    counter.value += more
        if stop.is_set():
            raise _Stopped

    work(task, tell)
