"""Resampling of dead latents (Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling").

Each dead latent gets a token of the present batch, drawn with a probability proportional to the square of its loss
‖x − x̂‖². Its decoder row becomes the direction of that token (at the mean norm of the others), its encoder row the same
direction at 0.2 of the mean norm of the living latents' rows, its biases 0; Adam forgets it. Each rank draws the same
tokens, so that the result does not depend on their number.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.parallel import collectives
from bigsae.sae.base import SAE
from bigsae.seeds import derive_seed

_ENCODER_NORM = 0.2


@torch.no_grad()
def resample_dead(
    sae: SAE,
    adam: torch.optim.Adam,
    dead: Tensor,
    encoder_input: Tensor,
    residual: Tensor,
    group: ProcessGroup | None,
    seed: int,
) -> None:
    """Restart the latents of `sae` where `dead` [d_sae] is True.

    `encoder_input` [batch, d_in] and `residual` [batch, d_out] are those of this rank's part of a global batch.
    """
    indices = dead.nonzero().squeeze(1)
    if not len(indices):
        return
    losses = _gather(residual.double().square().sum(1), group)
    generator = torch.Generator().manual_seed(seed)
    weights = losses.square().cpu()
    if not weights.sum() > 0:  # nothing is left to learn
        return
    drawn = torch.multinomial(weights, len(indices), replacement=True, generator=generator).to(dead.device)
    directions = _rows(encoder_input, drawn, group)
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True).clamp(min=1e-12)
    alive = ~dead
    norms = [
        torch.linalg.vector_norm(w[alive] if alive.any() else w, dim=1).mean() for w in (sae.W_enc, sae.W_dec)
    ]
    fresh = {"W_enc": _ENCODER_NORM * norms[0] * directions, "W_dec": norms[1] * directions}
    for name, parameter in sae.named_parameters():
        if name in ("b_dec", "W_skip"):  # all others have a row a latent
            continue
        if parameter.grad is not None:  # accumulated, for what the row was
            parameter.grad[indices] = 0
        parameter[indices] = fresh[name].to(parameter.dtype) if name in fresh else 0.0
        for key in ("exp_avg", "exp_avg_sq"):
            if key in adam.state[parameter]:
                adam.state[parameter][key][indices] = 0


def resample_seed(seed: int, step: int) -> int:
    """The seed of the draw at `step` of a run with `seed`."""
    return derive_seed(seed, "resample", step)


def _gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The values [batch] of all ranks, by rank: [batch * ranks]."""
    if group is None:
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)


def _rows(x: Tensor, drawn: Tensor, group: ProcessGroup | None) -> Tensor:
    """Rows `drawn` (numbered over all ranks) of `x` [batch, d], on every rank."""
    rank = 0 if group is None else dist.get_rank(group)
    own = drawn - rank * len(x)
    mine = (own >= 0) & (own < len(x))
    rows = torch.zeros(len(drawn), x.shape[1], dtype=torch.float32, device=x.device)
    rows[mine] = x[own[mine]].float()
    return collectives.sum_(rows, group)
