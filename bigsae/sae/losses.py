"""Pieces of the objectives that several architectures share. Sums are reduced over ranks, then divided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.parallel import collectives


@dataclass(frozen=True)
class Moments:
    """Sums over a set of tokens of all ranks: `total` [d_in] of x and `squares` [] of ‖x‖², both float64."""

    num_tokens: int
    total: Tensor
    squares: Tensor

    def variance(self) -> Tensor:
        """Σ‖x − x̄‖², a float64 scalar."""
        return self.squares - self.total.square().sum() / self.num_tokens


def global_moments(x: Tensor, num_tokens: int, group: ProcessGroup | None) -> Moments:
    """Moments of a batch of which this rank holds `x` [batch, d_in] and all ranks together `num_tokens` tokens.

    In float64: Σ‖x‖² − n‖x̄‖² cancels badly in float32 where the mean is long, as it is in residual streams.
    """
    wide = x.detach().double()
    sums = torch.cat([wide.sum(0), wide.square().sum().view(1)])
    collectives.sum_(sums, group)
    return Moments(num_tokens, sums[:-1], sums[-1])


@dataclass(frozen=True)
class DeadLatents:
    """The dead latents of a step, the same on every rank."""

    mask: Tensor
    """bool [d_sae]"""
    num_dead: Tensor
    """float scalar on the device"""


@dataclass
class StepContext:
    """What a training forward needs to know beyond its own tokens."""

    moments: Moments
    """Of the global batch, in the SAE's units."""
    dead: DeadLatents | None
    """None while no latent is dead."""
    group: ProcessGroup | None
    """Ranks that see other tokens of the same batch."""


@dataclass
class StepOutput:
    """What a training forward gives. The sums are over this rank's tokens; ranks' sums add up."""

    loss: Tensor
    """This rank's share of the loss: the shares of all ranks, and their gradients, add up to the whole."""
    squared_error: Tensor
    """Σ‖x − x̂‖²"""
    num_active: Tensor
    """Number of (token, latent) pairs with a value > 0."""
    firing_counts: Tensor
    """[d_sae] int: tokens on which each latent fires."""
    auxk_loss: Tensor
    """This rank's share of the weighted auxiliary loss; 0 while no latent is dead."""
