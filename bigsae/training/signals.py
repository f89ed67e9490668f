"""SIGTERM and SIGINT: noted when they come, obeyed by all ranks at the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopSignal:
    """A context in which SIGTERM and SIGINT only set `number`; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        # torchrun sends SIGTERM after the terminal's SIGINT: only a repeated one is an order to leave at once.
        signal.signal(number, self._before[number])  # pyright: ignore[reportArgumentType]

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
