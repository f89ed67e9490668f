"""The update after the gradients are reduced: project, norm, clip, Adam, renormalise (in this order)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigsae.config import OptimConfig
from bigsae.training.moments import ChunkedAdam, row_chunks

_MATRICES = ("W_enc", "W_dec")


def build_adam(
    parameters: Mapping[str, torch.nn.Parameter],
    optim: OptimConfig,
    lr_factors: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
    first_row: int = 0,
) -> torch.optim.Optimizer:
    """Adam over all parameters of one SAE; fused, for one pass and for its device-side `found_inf` mask.

    `lr_factors` names the parameters that have a learning rate of their own, as a multiple of the others'. `seed`
    decides how moments below float32 are rounded; `first_row` is the number of the first row of W_enc and W_dec among
    those of all ranks.
    """
    lr_factors = lr_factors or {}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name not in lr_factors]}
    ]
    groups += [{"params": [parameters[name]], "lr_factor": factor} for name, factor in lr_factors.items()]
    betas = (optim.beta1, optim.beta2)
    if optim.moments_dtype == optim.grad_dtype == "float32":
        return torch.optim.Adam(groups, lr=0.0, betas=betas, eps=optim.eps, fused=True)
    matrices = {name: parameters[name] for name in _MATRICES if name in parameters}
    return ChunkedAdam(groups, matrices, betas, optim.eps, optim.moments_dtype, seed, first_row)


def project_rows_(gradient: Tensor, rows: Tensor) -> None:
    """Take from each row of `gradient` its part along the unit row of `rows`, both `[d_sae, d_in]`.

    That part would only change the row's norm, which is renormalised away, yet it would enter Adam's moments
    (Bricken et al. 2023, "Towards Monosemanticity").
    """
    for chunk in row_chunks(gradient):
        part, unit = gradient[chunk], rows[chunk]
        wide = part.to(unit.dtype)
        wide.addcmul_(torch.linalg.vecdot(wide, unit).neg().unsqueeze(1), unit)
        if wide.dtype != part.dtype:
            part.copy_(wide)


def renormalise_rows_(rows: Tensor) -> None:
    """Bring each row of `[d_sae, d_in]` back to norm 1."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, a float32 scalar on their device."""
    parts: list[Tensor] = []
    for gradient in gradients:
        whole = gradient.dtype == torch.float32 or gradient.dim() < 2
        # The norm of what is in bfloat16 takes a float32 copy of it.
        parts += [gradient] if whole else [gradient[chunk] for chunk in row_chunks(gradient)]
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts])
    )


def adam_step(
    adam: torch.optim.Optimizer, lr: float, norm: Tensor, grad_clip: float, num_batches: int = 1
) -> Tensor:
    """One update, clipped to the global norm `grad_clip` (0: not at all); nothing changes where `norm` is not finite.

    The gradients are the sums of those of `num_batches` batches, `norm` is that of their mean.

    Clip and mask ride on the fused kernel's own `grad_scale` (a divisor) and `found_inf`, so that neither costs a
    pass over the weights or a host synchronisation. Returns 1. where the update was masked, else 0., on the device.
    """
    for group in adam.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    skipped = (~torch.isfinite(norm)).float()
    adam.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
    clip = norm / grad_clip if grad_clip else torch.ones_like(norm)
    adam.grad_scale = clip.clamp(min=1.0) * num_batches  # pyright: ignore[reportAttributeAccessIssue]
    adam.step()
    return skipped


def empty_state(adam: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """The state that Adam would make for `parameter` at its first step: a checkpoint is filled into it.

    Scalars, and tensors of which each row belongs to a row of the parameter.
    """
    if isinstance(adam, ChunkedAdam):
        return adam.empty_state(parameter)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def set_grad_dtype(parameters: Mapping[str, torch.nn.Parameter], optim: OptimConfig) -> None:
    """Have autograd give, and let be set, the gradients of W_enc and W_dec in `optim.grad_dtype`.

    To be called before the first forward. Each use of a weight rounds its gradient once; where it has several uses,
    such as AuxK's beside the reconstruction's, their gradients are added in this dtype.
    """
    if optim.grad_dtype == "bfloat16":
        for name in _MATRICES:
            if name in parameters:
                parameters[name].grad_dtype = torch.bfloat16
