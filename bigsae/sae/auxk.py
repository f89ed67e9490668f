"""AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2): dead latents learn the residual.

With e = y − ŷ held fixed and ê = Σ over the k_aux largest pre_acts of dead latents · W_dec (b_dec not added again):

    loss += coefficient · min(num_dead / k_aux, 1) · Σ‖e − ê‖² / Σ‖e − ē‖²

Its gradient reaches the encoder, and is not stopped by a ReLU: the pre_acts of dead latents are small or negative.
"""

from __future__ import annotations

from torch import Tensor

from bigsae.kernels.encode import Selection
from bigsae.sae.base import SAE
from bigsae.sae.losses import StepContext, global_moments


def auxk_selection(sae: SAE, k_aux: int, coefficient: float, context: StepContext) -> list[Selection]:
    """What is to be selected beside the latents that fire: the dead ones' largest pre_acts; nothing while none is."""
    if context.dead is None or not coefficient:
        return []
    return [sae.selection(min(k_aux, sae.d_sae), context.dead.mask)]


def auxk_loss(
    sae: SAE,
    selections: list[Selection],
    encoder_input: Tensor,
    b_enc: Tensor,
    e: Tensor,
    k_aux: int,
    coefficient: float,
    context: StepContext,
) -> Tensor:
    """This rank's share of the weighted loss for the residual `e` [batch, d_out], from the filled `auxk_selection`."""
    if not selections:
        return e.new_zeros(())
    assert context.dead is not None
    e = e.detach()
    selected = sae.topk(selections.pop(), encoder_input, b_enc, relu=False)
    e_hat = sae.shape.latents.sum(selected.decode(sae.W_dec))
    variance = global_moments(e, context.num_tokens, context.group).variance().float()
    weight = coefficient * (context.dead.num_dead / k_aux).clamp(max=1.0)
    return weight * (e - e_hat).square().sum() / variance
