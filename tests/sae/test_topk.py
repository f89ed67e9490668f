"""What the TopK objectives give a gradient to, and what not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigsae.config import SAEConfig
from bigsae.sae.base import SAE
from tests.sae.saes import BATCH, D_SAE, K, assert_same, make_sae, make_x, run_step

ARCHITECTURES = ("topk", "batchtopk", "matryoshka")
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


def auxk_gradients(x: Tensor, sae: SAE, dead: Tensor) -> dict[str, Tensor]:
    """Gradients that AuxK alone gives: those with dead latents less those without."""
    (_, with_auxk), (_, without) = (run_step(sae, x, x, mask) for mask in (dead, None))
    return {name: with_auxk[name] - without[name] for name in with_auxk}


@each
def test_auxk_gradient_reaches_the_encoder_of_dead_latents(architecture):
    sae = make_sae(SAEConfig(architecture=architecture, k=K))
    x = make_x(sae, batch=BATCH + 2)[2:]
    # Latents so far below zero that a ReLU would stop their gradient: the ones AuxK is there to revive.
    dead = torch.arange(D_SAE) < 4
    with torch.no_grad():
        sae.get_parameter("b_enc")[dead] = -50
    grads = auxk_gradients(x, sae, dead)
    assert (grads["W_enc"][dead].norm(dim=1) > 1e-5).all()
    assert (grads["b_enc"][dead].abs() > 1e-5).all()
    assert (grads["W_dec"][dead].norm(dim=1) > 1e-5).all()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert grads[name][~dead].abs().max() < 1e-7


@each
def test_auxk_does_not_add_b_dec_again(architecture):
    """With an encoder that gives dead latents nothing, ê is 0 whatever b_dec: the loss is Σ‖e‖²/Σ‖e − ē‖²."""
    sae = make_sae(SAEConfig(architecture=architecture, k=K))
    x = make_x(sae)
    dead = torch.arange(D_SAE) < 10
    with torch.no_grad():
        sae.W_enc[dead], sae.get_parameter("b_enc")[dead], sae.b_dec[:] = 0, 0, 3.0
    output, _ = run_step(sae, x, x, dead)
    e = output.residual
    assert_same(output.parts["auxk_loss"], e.square().sum() / (e - e.mean(0)).square().sum() / 32)


@each
def test_no_gradient_through_clamped_latents(architecture):
    """Every pre_act is negative: nothing is selected, or what is is clamped to 0."""
    sae = make_sae(SAEConfig(architecture=architecture, k=K))
    x = make_x(sae)
    with torch.no_grad():
        sae.get_parameter("b_enc")[:] = -100
    output, grads = run_step(sae, x, x)
    assert int(output.num_active) == 0 and not output.firing_counts.any()
    assert_same(output.residual, x - sae.b_dec)
    assert not any(grads[name].any() for name in ("W_enc", "b_enc", "W_dec"))
    assert grads["b_dec"].abs().max() > 1e-5
