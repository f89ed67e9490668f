"""Latents of one SAE spread over ranks: each holds an equal, contiguous part, and sees the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh


@dataclass(frozen=True)
class Latents:
    """The ranks that hold one SAE between them. By default one rank holds it whole, and nothing here does anything."""

    group: ProcessGroup | None = None
    rank: int = 0
    num_ranks: int = 1

    def sum(self, part: Tensor) -> Tensor:
        """The sum over the ranks of what each one's latents give; its gradient, the same everywhere, reaches each part.

        What follows must be computed alike on every rank.
        """
        return part if self.group is None else _Sum.apply(part, self.group)  # pyright: ignore[reportReturnType]

    def share(self, whole: Tensor) -> Tensor:
        """`whole`, the same on every rank, for use by each one's latents: its gradient is the sum of theirs."""
        return whole if self.group is None else _Share.apply(whole, self.group)  # pyright: ignore[reportReturnType]

    def sum_(self, tensor: Tensor) -> Tensor:
        """As `sum`, in place and without a gradient."""
        return collectives.sum_(tensor, self.group)

    def gather(self, part: Tensor) -> Tensor:
        """The tensors [n, ...] of all ranks, by rank, [num_ranks * n, ...], without a gradient."""
        return collectives.gather(part, self.group)

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows of a tensor of all latents, [d_sae, ...]."""
        size = len(rows) // self.num_ranks
        return rows[self.rank * size : (self.rank + 1) * size]


def latents_of(mesh: Mesh) -> Latents:
    """The ranks of `mesh` that hold an SAE together with this one."""
    return Latents(mesh.latent, mesh.latent_rank, mesh.num_latent)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        return collectives.sum_(part.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0], None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return collectives.sum_(grad_outputs[0].clone(), ctx.group), None
