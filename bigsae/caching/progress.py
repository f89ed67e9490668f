"""What is shown while a cache is made: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

logger = logging.getLogger("bigsae")

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def shown_progress(total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many of `total` activations are done; it shows that on one rank only (`shown`)."""
    console = Console(stderr=True)
    on_terminal = shown and console.is_terminal
    begun, last_line, first = time.monotonic(), time.monotonic(), done
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f}"), TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not on_terminal) as bar:
        task = bar.add_task("writing activations", total=total, completed=done, speed="")

        def show(done: int) -> None:
            nonlocal last_line
            now = time.monotonic()
            speed = f"{(done - first) / max(now - begun, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=min(done, total), speed=speed)
            if shown and not on_terminal and now - last_line > _SECONDS_BETWEEN_LINES:
                last_line = now
                logger.info("%s of %s activations  %s", f"{done:,}", f"{total:,}", speed)

        yield show
