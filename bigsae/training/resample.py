"""Resampling of dead latents (Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling").

Each dead latent gets a token of the present batch, drawn with a probability proportional to the square of its loss
‖x − x̂‖². Its decoder row becomes the direction of that token (at the mean norm of the others), its encoder row the same
direction at 0.2 of the mean norm of the living latents' rows, its biases 0; Adam forgets it. Each rank draws the same
tokens, so that the result does not depend on their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigsae.parallel import collectives
from bigsae.parallel.latents import Latents
from bigsae.parallel.mesh import Mesh
from bigsae.sae.base import SAE
from bigsae.seeds import derive_seed
from bigsae.training.update import Update

_ENCODER_NORM = 0.2


@torch.no_grad()
def resample_dead(
    sae: SAE, update: Update, dead: Tensor, encoder_input: Tensor, residual: Tensor, seed: int
) -> None:
    """Restart the latents of `sae` where `dead` [d_own] is True.

    `encoder_input` [batch, d_in] and `residual` [batch, d_out] are those of this rank's part of a global batch.
    """
    mesh, latents = update.mesh, sae.shape.latents
    all_dead = latents.gather(dead.to(torch.uint8)).bool()
    num_dead = int(all_dead.sum())
    if not num_dead:
        return
    losses = collectives.gather(residual.double().square().sum(1), mesh.data)
    generator = torch.Generator().manual_seed(seed)
    weights = losses.square().cpu()
    if not weights.sum() > 0:  # nothing is left to learn
        return
    drawn = torch.multinomial(weights, num_dead, replacement=True, generator=generator).to(dead.device)
    # Drawn for the dead latents of all ranks in order: these are this rank's.
    own = latents.own(torch.arange(len(all_dead), device=dead.device))[dead]
    drawn = drawn[(all_dead.cumsum(0) - 1)[own]]
    directions = _rows(encoder_input, drawn, mesh)
    directions /= torch.linalg.vector_norm(directions, dim=1, keepdim=True).clamp(min=1e-12)
    counted = ~dead if not all_dead.all() else torch.ones_like(dead)
    norms = [_mean_norm(w[counted], latents) for w in (sae.W_enc, sae.W_dec)]
    fresh = {"W_enc": _ENCODER_NORM * norms[0] * directions, "W_dec": norms[1] * directions}
    indices = dead.nonzero().squeeze(1)
    for name, parameter in sae.named_parameters():
        if name in sae.shared:
            continue
        if parameter.grad is not None:  # accumulated, for what the row was
            parameter.grad[indices] = 0
        parameter[indices] = fresh[name].to(parameter.dtype) if name in fresh else 0.0
    update.forget(indices)


def _mean_norm(rows: Tensor, latents: Latents) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    sums = latents.sum_(torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))]))
    return sums[0] / sums[1]


def resample_seed(seed: int, step: int) -> int:
    """The seed of the draw at `step` of a run with `seed`."""
    return derive_seed(seed, "resample", step)


def _rows(x: Tensor, drawn: Tensor, mesh: Mesh) -> Tensor:
    """Rows `drawn` (numbered over all ranks that see different tokens) of `x` [batch, d], on every such rank."""
    own = drawn - mesh.data_rank * len(x)
    mine = (own >= 0) & (own < len(x))
    rows = torch.zeros(len(drawn), x.shape[1], dtype=torch.float32, device=x.device)
    rows[mine] = x[own[mine]].float()
    return collectives.sum_(rows, mesh.data)
