"""What a call shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("bigsae")

_SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """Counts of `what` out of `total` (None: unknown), and tokens/s."""

    def __init__(self, activity: str, what: str, total: int | None, done: int = 0):
        console = Console(stderr=True)
        self._on_terminal = console.is_terminal
        self._activity, self._what, self._total, self._done = activity, what, total, done
        self._tokens, self._began = 0, time.monotonic()
        self._last_line = self._last_update = self._began
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(what),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=console,
            disable=not self._on_terminal,
        )
        self._task = self._bar.add_task(activity, total=total, completed=done, speed="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.update(self._task, completed=self._done)
        self._bar.stop()

    def tell(self, num_done: int, num_tokens: int) -> None:
        """So many more are done, and so many tokens with them."""
        self._done += num_done
        self._tokens += num_tokens
        now = time.monotonic()
        if now - self._last_update < 0.2:
            return
        self._last_update = now
        speed = f"{self._tokens / (now - self._began):,.0f} tokens/s"
        self._bar.update(self._task, completed=self._done, speed=speed)
        if not self._on_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            of = "" if self._total is None else f" of {self._total:,}"
            logger.info("%s: %s%s %s  %s", self._activity, f"{self._done:,}", of, self._what, speed)
