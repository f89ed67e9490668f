"""What an evaluation shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich import progress
from rich.console import Console

logger = logging.getLogger("bigsae")

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Forwards that are done and left; shown on one rank only (`shown`)."""

    def __init__(self, num_forwards: int, shown: bool) -> None:
        console = Console(stderr=True)
        self._in_lines = shown and not console.is_terminal
        self._num_forwards, self._done, self._last_line = num_forwards, 0, time.monotonic()
        self._bar = progress.Progress(console=console, disable=not shown or self._in_lines)
        self._task = self._bar.add_task("measuring", total=num_forwards)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more forward is done."""
        self._done += 1
        self._bar.advance(self._task)
        if self._in_lines and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("forward %d of %d", self._done, self._num_forwards)
