"""The TopK objective against plain dense autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigsae.sae.losses import DeadLatents, StepContext, global_moments
from bigsae.sae.topk import TopKSAE

D_IN, D_SAE, K, BATCH = 12, 40, 5, 33


def make_sae(seed: int = 0, **options) -> TopKSAE:
    sae = TopKSAE(D_IN, D_SAE, K, **options)
    sae.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return sae


def make_x(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(seed)) + 2


def dense_loss(
    weights: dict[str, Tensor], x: Tensor, dead: Tensor | None, k_aux: int
) -> tuple[Tensor, Tensor]:
    """The formulas of topk.py's docstring, dense. Returns (loss, auxk part of it)."""
    pre_acts = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
    kth = pre_acts.detach().topk(K).values[:, -1:]
    latents = torch.where(pre_acts >= kth, pre_acts, 0).relu()
    residual = x - (latents @ weights["W_dec"] + weights["b_dec"])
    loss = residual.square().sum() / (x - x.mean(0)).square().sum()
    auxk = loss.new_zeros(())
    if dead is not None:
        e = residual.detach()
        num = min(k_aux, int(dead.sum()))
        candidates = pre_acts.masked_fill(~dead, -torch.inf)
        kth = candidates.detach().topk(num).values[:, -1:]
        e_hat = torch.where(candidates >= kth, pre_acts, 0) @ weights["W_dec"]
        auxk = (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
        auxk = auxk / 32 * min(int(dead.sum()) / k_aux, 1)
    return loss + auxk, auxk


@pytest.mark.parametrize("num_dead", [0, 3, 20])
def test_loss_and_gradients_equal_dense_autograd(num_dead):
    sae, x = make_sae(), make_x()
    dead_mask = torch.zeros(D_SAE, dtype=torch.bool)
    dead_mask[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))[:num_dead]] = True
    dead = DeadLatents(dead_mask, torch.tensor(float(num_dead))) if num_dead else None
    output = sae.training_forward(x, StepContext(global_moments(x, BATCH, None), dead, None))
    output.loss.backward()

    wide = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    loss, auxk = dense_loss(wide, x.double(), dead_mask if num_dead else None, sae.k_aux)
    loss.backward()
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.auxk_loss.double(), auxk.detach(), rtol=1e-5, atol=0)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), wide[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def auxk_gradients(x: Tensor, sae: TopKSAE, dead_mask: Tensor) -> dict[str, Tensor]:
    """Gradients that AuxK alone gives: those with dead latents less those without."""
    grads = []
    for dead in (DeadLatents(dead_mask, dead_mask.sum().float()), None):
        sae.zero_grad()
        sae.training_forward(x, StepContext(global_moments(x, len(x), None), dead, None)).loss.backward()
        grads.append({name: p.grad.clone() for name, p in sae.named_parameters()})
    return {name: grads[0][name] - grads[1][name] for name in grads[0]}


def test_auxk_gradient_reaches_the_encoder_of_dead_latents():
    sae, x = make_sae(), make_x()
    # Latents so far below zero that a ReLU would stop their gradient: the ones AuxK is there to revive.
    dead_mask = torch.zeros(D_SAE, dtype=torch.bool)
    dead_mask[:4] = True
    with torch.no_grad():
        sae.b_enc[:4] = -50
    grads = auxk_gradients(x, sae, dead_mask)
    assert (grads["W_enc"][:4].norm(dim=1) > 1e-5).all()
    assert (grads["b_enc"][:4].abs() > 1e-5).all()
    assert grads["W_enc"][4:].abs().max() < 1e-7


def test_auxk_does_not_add_b_dec_again():
    """With an encoder that gives dead latents nothing, ê is 0 whatever b_dec: the loss is Σ‖e‖²/Σ‖e − ē‖²."""
    sae, x = make_sae(), make_x()
    dead_mask = torch.zeros(D_SAE, dtype=torch.bool)
    dead_mask[:10] = True
    with torch.no_grad():
        sae.W_enc[:10], sae.b_enc[:10], sae.b_dec[:] = 0, 0, 3.0
        e = x - sae(x)
    context = StepContext(global_moments(x, BATCH, None), DeadLatents(dead_mask, torch.tensor(10.0)), None)
    got = sae.training_forward(x, context).auxk_loss
    expected = e.square().sum() / (e - e.mean(0)).square().sum() / 32
    torch.testing.assert_close(got, expected)


def test_no_gradient_through_clamped_latents():
    sae, x = make_sae(), make_x()
    with torch.no_grad():
        sae.b_enc[:] = -100  # every pre_act negative: every latent is clamped to 0
    sae.training_forward(x, StepContext(global_moments(x, BATCH, None), None, None)).loss.backward()
    assert sae.W_enc.grad.abs().max() == 0
    assert sae.b_enc.grad.abs().max() == 0
    assert sae.b_dec.grad.abs().max() > 0


def test_variance_survives_a_long_mean():
    """float32 sums would lose all digits of the variance here."""
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    exact = (x.double() - x.double().mean(0)).square().sum()
    torch.testing.assert_close(global_moments(x, 1000, None).variance(), exact, rtol=1e-6, atol=0)


def test_views_agree():
    """forward, encode + decode, and encode_sparse are one function; shapes beyond two dimensions included."""
    sae = make_sae()
    x = make_x().view(3, 11, D_IN)
    latents = sae.encode(x)
    acts, indices = sae.encode_sparse(x)
    assert latents.shape == (3, 11, D_SAE)
    assert acts.shape == indices.shape == (3, 11, K)
    torch.testing.assert_close(latents.gather(-1, indices), acts, rtol=0, atol=0)
    assert int((latents > 0).sum()) == int((acts > 0).sum())
    torch.testing.assert_close(sae(x), sae.decode(latents))


def test_folding_the_scale_keeps_the_function():
    sae, x = make_sae(), make_x()
    scaled = sae(0.25 * x) / 0.25
    sae.fold_scale_(0.25)
    torch.testing.assert_close(sae(x), scaled)


def test_initial_weights_do_not_depend_on_what_else_is_made():
    """A block of latents has the same start whether it is made alone or with others, and follows the seed."""
    torch.manual_seed(1)
    wide, narrow, other = TopKSAE(4, 5000, 2), TopKSAE(4, 4096, 2), TopKSAE(4, 5000, 2)
    wide.initialise(7)
    torch.randn(100)
    narrow.initialise(7)
    other.initialise(8)
    assert torch.equal(wide.W_dec[:4096], narrow.W_dec)
    assert not torch.equal(wide.W_dec, other.W_dec)
    torch.testing.assert_close(wide.W_dec.norm(dim=1), torch.ones(5000))
