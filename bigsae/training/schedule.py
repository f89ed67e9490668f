"""What changes over a run: the learning rate, and the weight of the sparsity loss."""

from __future__ import annotations

import math
from collections.abc import Callable

from bigsae.config import OptimConfig, SAEConfig

_WARMUP_WITHOUT_LENGTH = 1000
_NUM_CYCLES = 4


def lr_schedule(optim: OptimConfig, num_steps: int | None) -> Callable[[int], float]:
    """A function from the step (from 0) to the factor on the peak learning rate.

    Linear warm-up x the schedule's shape x linear decay over the last `decay_fraction` of the run. Where the length
    of the run is not known (None), the warm-up is 1,000 steps and nothing decays.
    """
    if num_steps is None:
        warmup = optim.warmup_steps if optim.warmup_steps is not None else _WARMUP_WITHOUT_LENGTH
        return lambda step: min(1.0, (step + 1) / max(warmup, 1))
    default_warmup = min(1000, round(0.05 * num_steps))
    warmup = optim.warmup_steps if optim.warmup_steps is not None else default_warmup
    decay = round(optim.decay_fraction * num_steps)
    num_cycles = {"constant": 0, "cosine": 1, "cosine_restarts": optim.num_cycles or _NUM_CYCLES}[
        optim.schedule
    ]
    lowest = optim.min_factor or 0.0

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(warmup, 1))
        fall = min(1.0, (num_steps - step) / max(decay, 1))
        phase = num_cycles * step / num_steps % 1.0  # 0 at the start of each cycle
        shape = lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * phase))
        return rise * shape * fall

    return factor


def sparsity_schedule(sae: SAEConfig, num_steps: int | None) -> Callable[[int], float]:
    """A function from the step (from 0) to the factor on the sparsity loss: a linear warm-up, by default 5 %."""
    warmup = sae.sparsity_warmup_steps
    if warmup is None:
        warmup = _WARMUP_WITHOUT_LENGTH if num_steps is None else round(0.05 * num_steps)
    return lambda step: min(1.0, (step + 1) / max(warmup, 1))
