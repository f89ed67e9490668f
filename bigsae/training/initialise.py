"""Scale of the activations and start of b_dec, from the first tokens of all ranks together."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.parallel import collectives

# Weiszfeld's iteration roughly halves its error a step here; the change falls under the tolerance long before this.
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-6
# Rows that are widened to float64 at a time.
_CHUNK = 8192


def activation_scale(first: Tensor, group: ProcessGroup | None) -> float:
    """The s for which the mean of ‖s·x‖ is sqrt(d_in), over the rows of `first` [tokens, d_in] on all ranks."""
    norms = torch.linalg.vector_norm(first.float(), dim=1).double()
    sums = collectives.sum_(torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))]), group)
    total, num_tokens = sums.tolist()
    return math.sqrt(first.shape[1]) * num_tokens / total


def decoder_bias(
    first: Tensor, kind: Literal["geometric_median", "mean", "zeros"], group: ProcessGroup | None
) -> Tensor:
    """Where b_dec starts, float32 [d_in], from the rows of `first` [tokens, d_in] on all ranks."""
    first = first.float()
    ones = torch.ones(len(first), device=first.device)
    if kind == "zeros":
        return torch.zeros(first.shape[1], device=first.device)
    centre = _weighted_mean(first, ones, group)
    if kind == "geometric_median":
        centre = _geometric_median(first, centre, group)
    return centre.float()


def _geometric_median(x: Tensor, centre: Tensor, group: ProcessGroup | None) -> Tensor:
    """The point with the least sum of distances to the rows of `x`, by Weiszfeld's iteration from `centre`."""
    for _ in range(_MAX_ITERATIONS):
        distances = torch.linalg.vector_norm(x - centre.float(), dim=1, dtype=torch.float64)
        nearer = _weighted_mean(x, 1 / distances.clamp(min=1e-12), group)
        change = torch.linalg.vector_norm(nearer - centre) / torch.linalg.vector_norm(nearer).clamp(min=1e-12)
        centre = nearer
        if change < _TOLERANCE:
            break
    return centre


def _weighted_mean(x: Tensor, weights: Tensor, group: ProcessGroup | None) -> Tensor:
    """Σ w x / Σ w over all ranks, float64 [d_in]; summed in float64, so that it does not depend on their number."""
    sums = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device)
    for rows, w in zip(x.split(_CHUNK), weights.double().split(_CHUNK), strict=True):
        sums[:-1] += w @ rows.double()
        sums[-1] += w.sum()
    collectives.sum_(sums, group)
    return sums[:-1] / sums[-1]
