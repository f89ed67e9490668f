"""One SAE's update on a mesh: reduce, project, norm, clip, Adam, renormalise (in this order).

Gradients of latents are summed over `data`, the ranks that hold the same ones. With `shard_optimizer` (ZeRO-1,
Rajbhandari et al. 2020, arXiv 1910.02054) each of these ranks sums, updates and has the moments of its own part of the
rows, and gets the others' new rows from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigsae.config import OptimConfig, UserError
from bigsae.kernels.sparse_grad import add_in_place
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.sae.base import SAE
from bigsae.training.optim import (
    adam_step,
    build_adam,
    empty_state,
    gradient_norm,
    project_rows_,
    renormalise_rows_,
    set_grad_dtype,
)


class Update:
    """Adam over the parameters of `sae` that this rank holds."""

    def __init__(
        self,
        sae: SAE,
        optim: OptimConfig,
        lr_factors: Mapping[str, float],
        mesh: Mesh,
        *,
        unit_decoder: bool,
        shard_optimizer: bool,
        seed: int,
    ):
        """`seed` decides how moments below float32 are rounded."""
        self.sae, self.optim, self.mesh, self.unit_decoder = sae, optim, mesh, unit_decoder
        self.sliced = shard_optimizer and mesh.num_data > 1
        parameters = dict(sae.named_parameters())
        set_grad_dtype(parameters, optim)
        self.updated = {name: self._own_slice(name, p) for name, p in parameters.items()}
        """What Adam updates: the parameters, or views of this rank's part of their rows."""
        for matrix in (sae.W_enc, sae.W_dec):
            add_in_place(matrix)
        if self.sliced:
            set_grad_dtype(self.updated, optim)
        first_row = sae.shape.latents.rank * sae.d_own
        if self.sliced:
            first_row += self._first_row(sae.W_dec)
        self.adam = build_adam(self.updated, optim, lr_factors, seed=seed, first_row=first_row)

    def _own_slice(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not self.sliced or name in self.sae.shared:
            return parameter
        num_rows, num_parts = len(parameter), self.mesh.num_data
        if num_rows % num_parts:
            raise UserError(
                f"--mesh.shard-optimizer: {num_rows} latents a rank cannot be cut into {num_parts} equal parts: set "
                f"--sae.d-sae to a multiple of {self.mesh.num_ranks}"
            )
        first = self._first_row(parameter)
        return nn.Parameter(parameter.detach()[first : first + num_rows // num_parts])

    def _first_row(self, parameter: Tensor) -> int:
        return self.mesh.data_rank * (len(parameter) // self.mesh.num_data)

    @torch.no_grad()
    def __call__(self, lr: float) -> tuple[Tensor, Tensor]:
        """Update by the gradients that have gathered. Returns their norm, and 1. where it was not finite."""
        self._reduce()
        decoder = self.updated["W_dec"]
        if self.unit_decoder:
            assert decoder.grad is not None
            project_rows_(decoder.grad, decoder)
        norm = self._norm() / self.optim.accumulation_steps
        skipped = adam_step(self.adam, lr, norm, self.optim.grad_clip, self.optim.accumulation_steps)
        if self.unit_decoder:
            renormalise_rows_(decoder)
        if self.sliced:
            for name, parameter in self.sae.named_parameters():
                if name not in self.sae.shared:
                    collectives.fill_from_parts_(parameter, self.updated[name], self.mesh.data)
        self.sae.constrain_()
        self.adam.zero_grad(set_to_none=True)
        return norm, skipped

    def _reduce(self) -> None:
        for name, parameter in self.sae.named_parameters():
            assert parameter.grad is not None
            if self.updated[name] is parameter:
                collectives.sum_(parameter.grad, self.mesh.data)
            else:
                self.updated[name].grad = collectives.sum_to_parts(parameter.grad, self.mesh.data)
                parameter.grad = None

    def _norm(self) -> Tensor:
        """Of the gradient of all latents; what several ranks have alike counts once."""
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.updated.items():
            assert parameter.grad is not None
            gradients[name in self.sae.shared].append(parameter.grad)
        if self.mesh.latent is None and not self.sliced:
            return gradient_norm(gradients[False] + gradients[True])
        squares = gradient_norm(gradients[False]).square()
        if self.sliced:
            collectives.sum_(squares, self.mesh.data)
        collectives.sum_(squares, self.mesh.latent)
        return (squares + gradient_norm(gradients[True]).square()).sqrt()

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Take from Adam what it knows of `rows` [n] int64 of this rank's latents."""
        for name, parameter in self.sae.named_parameters():
            if name in self.sae.shared:
                continue
            updated = self.updated[name]
            own = rows - self._first_row(parameter) if updated is not parameter else rows
            own = own[(own >= 0) & (own < len(updated))]
            for value in self.adam.state[updated].values():
                if value.dim() > 0:
                    value[own] = 0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Adam's tensors for each parameter; before its first step those with which it would begin."""
        for parameter in self.updated.values():
            if not self.adam.state[parameter]:
                self.adam.state[parameter] = empty_state(self.adam, parameter)
        return {name: self.adam.state[parameter] for name, parameter in self.updated.items()}
