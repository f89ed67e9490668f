"""The update after the gradients are reduced: project, norm, clip, Adam, renormalise (in this order)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigsae.config import OptimConfig


def build_adam(
    parameters: Mapping[str, torch.nn.Parameter],
    optim: OptimConfig,
    lr_factors: Mapping[str, float] | None = None,
) -> torch.optim.Adam:
    """Adam over all parameters of one SAE; fused, for one pass and for its device-side `found_inf` mask.

    `lr_factors` names the parameters that have a learning rate of their own, as a multiple of the others'.
    """
    lr_factors = lr_factors or {}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if name not in lr_factors]}
    ]
    groups += [{"params": [parameters[name]], "lr_factor": factor} for name, factor in lr_factors.items()]
    return torch.optim.Adam(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def project_rows_(gradient: Tensor, rows: Tensor) -> None:
    """Take from each row of `gradient` its part along the unit row of `rows`, both `[d_sae, d_in]`.

    That part would only change the row's norm, which is renormalised away, yet it would enter Adam's moments
    (Bricken et al. 2023, "Towards Monosemanticity").
    """
    along = torch.linalg.vecdot(gradient, rows)
    gradient.addcmul_(along.neg().unsqueeze(1), rows)


def renormalise_rows_(rows: Tensor) -> None:
    """Bring each row of `[d_sae, d_in]` back to norm 1."""
    rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, a float32 scalar on their device."""
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
    )


def adam_step(
    adam: torch.optim.Adam, lr: float, norm: Tensor, grad_clip: float, num_batches: int = 1
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
