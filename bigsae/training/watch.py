"""A run watches itself: a hang is shown as the stacks of every rank, and copies that should be alike are compared."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from bigsae.config import UserError
from bigsae.parallel import collectives
from bigsae.training.trainer import SAETrainer

# Of --timeout: stacks are shown while the ranks still wait for one another.
_PART_OF_TIMEOUT = 0.9
_STDERR = 2
_PLACE, _FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


class Heartbeat:
    """Where nothing happens for most of `timeout` minutes, each rank writes the stacks of its threads to stderr."""

    def __init__(self, timeout: float):
        self._seconds = 60 * timeout * _PART_OF_TIMEOUT

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which `beat` is called at each step."""
        self.beat()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """All is well; the time counts anew."""
        # A thread in C, that needs no interpreter lock: it also speaks when another thread holds it for good.
        faulthandler.dump_traceback_later(self._seconds, file=_STDERR)


def check_replicas(trainers: Mapping[str, SAETrainer], step: int, control: object) -> None:
    """Compare, bit for bit, the weights that several ranks hold alike. All ranks call this.

    Raises UserError, on all ranks, where they differ: arithmetic or memory of a device is broken, as all of them have
    added the same gradients.
    """
    found = ""
    for name, trainer in trainers.items():
        for parameter, value in trainer.sae.named_parameters():
            group = trainer.mesh.world if parameter in trainer.sae.shared else trainer.mesh.data
            sums = collectives.gather(bit_sum(value).view(1), group).tolist()
            if len(set(sums)) > 1 and not found:
                usual = max(set(sums), key=sums.count)
                places = ", ".join(str(i) for i, s in enumerate(sums) if s != usual)
                found = (
                    f"{parameter} of {name} differs between the copies that ranks hold alike (numbers {places} among "
                    f"the {len(sums)} of them) after step {step}"
                )
    if found := collectives.first_text(found, control):  # pyright: ignore[reportArgumentType]
        raise UserError(
            f"{found}: a device computes or stores wrong. Leave it out and go on with --resume from a checkpoint of "
            "before it (--check-replicas-every says how often copies are compared)"
        )


@torch.no_grad()
def bit_sum(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device, another one for almost every other content; no copy of all of it."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    at_once = max(1, 2**22 // rows.shape[1])
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once].contiguous().view(bits).to(torch.int64)
        start = first * rows.shape[1]
        places = torch.arange(start, start + part.numel(), device=tensor.device).view_as(part)
        # Mixed with its place, as SplitMix64 does, before it is added: exchanged values are seen as well. Wraps around.
        part = (part + places * _PLACE) * _FIRST
        part = (part ^ (part >> 29)) * _SECOND
        total += (part ^ (part >> 32)).sum()
    return total
