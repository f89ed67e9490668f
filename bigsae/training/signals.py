"""SIGTERM, SIGUSR1, SIGINT and --max-hours: noted when they come, obeyed by all ranks at the same step."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

_PATIENCE_SECONDS = 2.0


class StopSignal:
    """A context in which SIGTERM, SIGUSR1 (Slurm's way to tell of a limit) and SIGINT only set `number`.

    A cluster's SIGTERM reaches a worker twice, from the cluster and forwarded by its launcher: repeats are ignored (the
    launcher's SIGKILL follows after 30 s anyway). A second Ctrl-C, a while after the first, interrupts as usual.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        """The time counts from here."""
        self.number: int | None = None
        self._end = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._first = 0.0
        self._before: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """Whether this rank was told to stop, or its time is up."""
        return self.number is not None or (self._end is not None and time.monotonic() >= self._end)

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._first = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > _PATIENCE_SECONDS:
            raise KeyboardInterrupt
