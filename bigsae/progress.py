"""What a command shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

logger = logging.getLogger("bigsae")

SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_UPDATES = 0.1


class Progress:
    """How many of `total` things (None: not known) are done, and a note beside it; where `shown`, on one rank alone."""

    def __init__(
        self, activity: str, total: int | None, what: str = "", done: int = 0, shown: bool = True
    ) -> None:
        console = Console(stderr=True)
        self._in_lines = shown and not console.is_terminal
        self._activity, self._what, self._total, self._done = activity, what, total, done
        self._began = self._last_line = time.monotonic()
        self._last_update = 0.0
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(what),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not shown or self._in_lines,
        )
        self._task = self._bar.add_task(activity, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.update(self._task, completed=self._done)
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return max(time.monotonic() - self._began, 1e-9)

    def advance(self, num: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.reach(self._done + num, note)

    def reach(self, done: int, note: str = "") -> None:
        """So many are done in all."""
        self._done = done
        now = time.monotonic()
        if now - self._last_update < _SECONDS_BETWEEN_UPDATES:
            return
        self._last_update = now
        self._bar.update(self._task, completed=done, note=note)
        if self._in_lines and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            of = "" if self._total is None else f" of {self._total:,}"
            logger.info(
                "%s", "  ".join(filter(None, (f"{self._activity}: {done:,}{of} {self._what}".rstrip(), note)))
            )
