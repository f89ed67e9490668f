"""Pieces of the objectives that several architectures share. Sums are reduced over ranks, then divided."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.kernels.global_topk import Ranks
from bigsae.parallel import collectives

_MOMENT_ROWS = 256


@dataclass(frozen=True)
class Moments:
    """Sums over a set of tokens of all ranks: `total` [d] of x and `squares` [] of ‖x‖², both float64."""

    num_tokens: int
    total: Tensor
    squares: Tensor

    def variance(self) -> Tensor:
        """Σ‖x − x̄‖², a float64 scalar."""
        return self.squares - self.total.square().sum() / self.num_tokens


def global_moments(x: Tensor, num_tokens: int, group: ProcessGroup | None) -> Moments:
    """Moments of a batch of which this rank holds `x` [batch, d] and all ranks together `num_tokens` tokens.

    In float64: Σ‖x‖² − n‖x̄‖² cancels badly in float32 where the mean is long, as it is in residual streams.
    """
    sums = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device)
    for rows in x.detach().split(_MOMENT_ROWS):  # no float64 copy of the whole batch
        wide = rows.to(torch.float64, copy=True)
        sums[:-1] += wide.sum(0)
        sums[-1] += wide.square_().sum()
    collectives.sum_(sums, group)
    return Moments(num_tokens, sums[:-1], sums[-1])


def ranks_of(group: ProcessGroup | None) -> Ranks:
    """The ranks of `group` as the kernels know them."""
    if group is None:
        return Ranks()
    return Ranks(dist.get_rank(group), dist.get_world_size(group), partial(collectives.sum_, group=group))


@dataclass(frozen=True)
class DeadLatents:
    """The dead latents of a step."""

    mask: Tensor
    """bool [d_own], of this rank's latents"""
    num_dead: Tensor
    """float scalar on the device, of all ranks' latents"""


@dataclass
class StepContext:
    """What a training forward needs to know beyond its own tokens."""

    moments: Moments
    """Of the global batch's targets, in the SAE's units."""
    dead: DeadLatents | None = None
    """None while no latent is dead."""
    group: ProcessGroup | None = None
    """Ranks that see other tokens of the same batch, and hold the same latents."""
    ranks: Ranks = field(default_factory=Ranks)
    """All ranks of the step, for a selection over them."""
    sparsity: float = 1.0
    """Factor on the sparsity loss: its warm-up."""
    sparse: bool = False
    """Whether so few latents fire that computing on those alone is faster than on all; the same to rounding."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.moments.num_tokens


@dataclass
class StepOutput:
    """What a training forward gives. The sums are over this rank's tokens; ranks' sums add up."""

    loss: Tensor
    """This rank's share of the loss: the shares of the ranks that see other tokens, and their gradients, add up to the
    whole. The same on ranks that see the same tokens."""
    residual: Tensor
    """x − x̂, [batch, d_out], detached"""
    num_active: Tensor
    """Number of (token, latent) pairs with a value > 0, of this rank's tokens and latents."""
    firing_counts: Tensor
    """[d_own] int: tokens on which each latent fires."""
    parts: dict[str, Tensor]
    """This rank's share of each part of the loss, weighted and detached, under the architecture's `loss_parts`."""
