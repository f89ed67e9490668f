"""What a run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger("bigsae")

_SECONDS_BETWEEN_LINES = 15.0


class ProgressBar:
    """Steps, tokens/s, time left, loss, FVU, L0 and dead fraction; shown on one rank only (`shown`)."""

    def __init__(self, num_steps: int, step: int, shown: bool):
        self._console = Console(stderr=True)
        self._shown, self._on_terminal = shown, shown and self._console.is_terminal
        self._num_steps, self._last_line = num_steps, time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._on_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=step, numbers="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def activity(self, name: str) -> None:
        """Say what is being done."""
        self._bar.update(self._task, description=name)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Show the numbers of the newest log."""
        numbers = (
            f"{metrics['tokens_per_second']:,.0f} tokens/s  loss {metrics['loss']:.4f}  fvu {metrics['fvu']:.4f}  "
            f"l0 {metrics['l0']:.1f}  dead {metrics['dead_fraction']:.1%}"
        )
        self._bar.update(self._task, numbers=numbers)
        due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or step >= self._num_steps
        if self._shown and not self._on_terminal and due:
            self._last_line = time.monotonic()
            logger.info("step %d of %d  %s", step, self._num_steps, numbers)
