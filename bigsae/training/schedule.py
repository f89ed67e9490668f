"""The learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

from bigsae.config import OptimConfig


def lr_schedule(optim: OptimConfig, num_steps: int | None) -> Callable[[int], float]:
    """A function from the step (from 0) to the factor on the peak learning rate.

    Linear warm-up x the schedule's shape x linear decay over the last `decay_fraction` of the run. Where the length
    of the run is not known (None), the warm-up is 1,000 steps and nothing decays.
    """
    if num_steps is None:
        warmup = optim.warmup_steps if optim.warmup_steps is not None else 1000
        return lambda step: min(1.0, (step + 1) / max(warmup, 1))
    default_warmup = min(1000, round(0.05 * num_steps))
    warmup = optim.warmup_steps if optim.warmup_steps is not None else default_warmup
    decay = round(optim.decay_fraction * num_steps)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(warmup, 1))
        fall = min(1.0, (num_steps - step) / max(decay, 1))
        shape = 0.5 * (1 + math.cos(math.pi * step / num_steps)) if optim.schedule == "cosine" else 1.0
        return rise * shape * fall

    return factor
