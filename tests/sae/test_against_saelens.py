"""The objectives against SAELens's own TrainingSAEs, with the same weights and activations.

Loss terms are compared one by one, and every gradient. Where the two differ on purpose a test says how and why.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bigsae.config import OptimConfig, SAEConfig
from bigsae.parallel.mesh import build_mesh
from bigsae.sae.base import SAE
from bigsae.sae.batchtopk import BatchTopKSAE
from bigsae.training.trainer import SAETrainer
from tests.sae.saes import (
    BATCH,
    D_IN,
    D_SAE,
    K,
    assert_same,
    assert_same_grads,
    dead_latents,
    make_sae,
    make_x,
    run_step,
)

pytest.importorskip("sae_lens")
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer as TheirTrainer

FEW, MANY = 3, 20
WARMUP = 0.3
Terms = dict[str, Tensor]


def their_sae(ours: SAE, architecture: str, **fields: Any) -> TrainingSAE[Any]:
    """SAELens's training class with the weights of `ours`."""
    cls, config = get_sae_training_class(architecture)
    subtract = ours.shape.apply_b_dec_to_input
    theirs = cls(config(d_in=ours.d_in, d_sae=ours.d_sae, apply_b_dec_to_input=subtract, **fields))
    weights = {name: p.detach().clone() for name, p in ours.named_parameters()}
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    theirs.load_state_dict(theirs.state_dict() | weights)
    return theirs


def their_step(
    theirs: TrainingSAE[Any],
    x: Tensor,
    dead: Tensor | None = None,
    coefficients: dict[str, float] | None = None,
) -> TrainStepOutput:
    return theirs.training_forward_pass(TrainStepInput(x, coefficients or {}, dead, 0, False))


def their_grads(theirs: TrainingSAE[Any], loss: Tensor) -> dict[str, Tensor]:
    """The gradients of one of their losses, in our layout."""
    named = dict(theirs.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
    found = dict(zip(named, grads, strict=True))
    return found | {"W_enc": found["W_enc"].T}


def scatter(x: Tensor) -> Tensor:
    return (x.double() - x.double().mean(0)).square().sum().float()


def their_topk_terms(output: TrainStepOutput, x: Tensor, num_prefixes: int = 1) -> tuple[Tensor, Tensor]:
    """Their reconstruction loss and AuxK in our units.

    They divide both sums of squares by the number of tokens; we divide them by Σ‖x − x̄‖² and by Σ‖e − ē‖², as in Gao
    et al.: the loss does not depend on the scale of x, nor AuxK's weight on how good the SAE is. Of prefixes they take
    the sum; we take the mean, so that AuxK keeps its weight beside them.
    """
    assert output.feature_acts.shape == (len(x), D_SAE)
    e = (x - output.sae_out).detach()
    losses = [loss for name, loss in output.losses.items() if "mse_loss" in name]
    assert len(losses) == num_prefixes
    recon = sum(losses, torch.zeros(())) * len(x) / scatter(x) / num_prefixes
    return recon, output.losses["auxiliary_reconstruction_loss"] * len(x) / scatter(e)


TOPK: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("topk", "topk", {}, {}),
    ("topk", "topk", {"apply_b_dec_to_input": False}, {}),
    ("batchtopk", "batchtopk", {}, {}),
    # Their AuxK for each level's own error is another objective; without it, it is that of the whole SAE, as ours.
    ("matryoshka", "matryoshka_batchtopk", {"prefixes": (4, 11)}, {"matryoshka_widths": [4, 11, D_SAE]}),
]


@pytest.mark.parametrize("num_dead", [0, FEW, MANY])
@pytest.mark.parametrize(("architecture", "name", "fields", "their_fields"), TOPK)
def test_topk_family(architecture, name, fields, their_fields, num_dead):
    ours = make_sae(SAEConfig(architecture=architecture, k=K, **fields))
    # Acts rescaled by decoder norms are the same where the norms are kept at 1, as ours are.
    theirs = their_sae(
        ours, name, k=K, aux_loss_coefficient=1 / 32, rescale_acts_by_decoder_norm=False, **their_fields
    )
    x, dead = make_x(ours), dead_latents(num_dead) if num_dead else None
    output, grads = run_step(ours, x, x, dead)
    their_output = their_step(theirs, x, dead)
    recon, auxk = their_topk_terms(their_output, x, len(their_fields.get("matryoshka_widths", "1")))
    assert_same(output.residual, x - their_output.sae_out)
    assert_same(output.firing_counts, (their_output.feature_acts > 0).sum(0))
    assert_same(output.loss - output.parts["auxk_loss"], recon)
    assert_same(output.parts["auxk_loss"], auxk)
    assert (auxk > 0) == bool(num_dead)
    assert_same_grads(grads, their_grads(theirs, recon + auxk))


def test_batchtopk_threshold():
    """They average from a start at 0, so that their threshold is too low for the first hundreds of steps; ours is the
    mean of what there was."""
    ours = make_sae(SAEConfig(architecture="batchtopk", k=K))
    assert isinstance(ours, BatchTopKSAE)
    theirs = their_sae(ours, "batchtopk", k=K, rescale_acts_by_decoder_norm=False)
    for step in range(5):
        x = make_x(ours, seed=step) * (1 + step)
        run_step(ours, x, x)
        their_step(theirs, x)
        unbiased = theirs.topk_threshold / (1 - 0.99 ** (step + 1))  # pyright: ignore[reportOperatorIssue]
        assert_same(ours.threshold, unbiased)


JUMP: dict[str, Any] = {"jumprelu_bandwidth": 1.0, "l0_coefficient": 0.7}
MODES: list[dict[str, Any]] = [
    {"sparsity_loss": "step"},
    {"sparsity_loss": "tanh", "tanh_scale": 0.6},
    {"sparsity_loss": "quadratic", "target_l0": 7.5},
]
THEIR_NAMES = {
    "sparsity_loss": "jumprelu_sparsity_loss_mode",
    "tanh_scale": "jumprelu_tanh_scale",
    "target_l0": "target_l0",
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["sparsity_loss"])
def test_jumprelu(mode, subtract, to_input, sparse):
    shared = JUMP | {"jumprelu_ste_to_input": to_input}
    config = SAEConfig(
        architecture="jumprelu", pre_act_coefficient=0.05, apply_b_dec_to_input=subtract, **shared, **mode
    )
    ours = make_sae(config)
    their_mode = {THEIR_NAMES[name]: value for name, value in mode.items()}
    theirs = their_sae(ours, "jumprelu", pre_act_loss_coefficient=0.05, **shared, **their_mode)
    x, dead = make_x(ours), dead_latents(FEW)
    output, grads = run_step(ours, x, x, dead, sparsity=WARMUP, sparse=sparse)
    their_output = their_step(theirs, x, dead, {"l0": 0.7 * WARMUP})
    assert_same(ours.encode(x), their_output.feature_acts)
    assert_same(output.residual, x - their_output.sae_out)
    assert_same(output.parts["sparsity_loss"], their_output.losses["l0_loss"])
    assert_same(output.parts["pre_act_loss"], their_output.losses["pre_act_loss"])
    assert_same(output.loss, their_output.loss)
    assert_same_grads(grads, their_grads(theirs, their_output.loss))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_gated(subtract, sparse):
    """They train decoder and b_dec on the gates' reconstruction and penalty as well, which the paper holds fixed there
    (equation 8, and rows of norm 1); without that part of theirs all gradients are the same."""
    ours = make_sae(SAEConfig(architecture="gated", l1_coefficient=0.4, apply_b_dec_to_input=subtract))
    theirs = their_sae(ours, "gated")
    x = make_x(ours)
    output, grads = run_step(ours, x, x, sparsity=WARMUP, sparse=sparse)
    their_output = their_step(theirs, x, None, {"l1": 0.4 * WARMUP})
    assert_same(ours.encode(x), their_output.feature_acts)
    assert_same(output.residual, x - their_output.sae_out)
    assert_same(output.parts["l1_loss"], their_output.losses["l1_loss"])
    assert_same(output.parts["gate_loss"], their_output.losses["auxiliary_reconstruction_loss"])
    assert_same(output.loss, their_output.loss)
    expected = their_grads(theirs, their_output.loss)
    with torch.no_grad():
        gates = (theirs.process_sae_in(x) @ theirs.W_enc + theirs.b_gate).relu()  # pyright: ignore[reportOperatorIssue]
    held = (gates @ theirs.W_dec + theirs.b_dec - x).square().sum(1).mean()
    held = held + 0.4 * WARMUP * (gates * theirs.W_dec.norm(dim=1)).sum(1).mean()
    for name in ("W_dec", "b_dec"):
        extra = their_grads(theirs, held)[name]
        assert extra.norm() > 0.01 * grads[name].norm()
        expected[name] = expected[name] - extra
    assert_same_grads(grads, expected)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("subtract", [False, True])
def test_standard(subtract, p, sparse):
    config = SAEConfig(architecture="standard", l1_coefficient=0.4, p_norm=p, apply_b_dec_to_input=subtract)
    ours = make_sae(config)
    theirs = their_sae(ours, "standard", lp_norm=p)
    x = make_x(ours)
    output, grads = run_step(ours, x, x, sparsity=WARMUP, sparse=sparse)
    their_output = their_step(theirs, x, None, {"l1": 0.4 * WARMUP})
    assert_same(ours.encode(x), their_output.feature_acts)
    assert_same(output.parts["l1_loss"], their_output.losses["l1_loss"])
    assert_same(output.loss, their_output.loss)
    assert_same_grads(grads, their_grads(theirs, their_output.loss))


LR, STEPS = 0.01, 10
STEP_CASES = [
    ("standard", {"l1_coefficient": 0.4}),
    ("jumprelu", JUMP | {"jumprelu_init_threshold": 0.3, "pre_act_coefficient": 0.5}),
]


@pytest.mark.parametrize(("architecture", "fields"), STEP_CASES, ids=["standard", "jumprelu"])
def test_ten_steps_give_the_same_weights(architecture, fields):
    """Clipped (theirs always is, to 1), Adam, thresholds kept from falling below zero, dead latents counted.

    Their sparsity warm-up begins at 0 where ours takes the first of its steps, so there is none.
    """
    # Theirs are dead that did not fire in more than two batches.
    config = SAEConfig(
        architecture=architecture,
        d_sae=D_SAE,
        normalize="none",
        normalize_decoder=False,
        sparsity_warmup_steps=0,
        dead_after_tokens=3 * BATCH,
        **fields,
    )
    if architecture == "jumprelu":
        config = replace(config, threshold_lr=LR)
    optim = OptimConfig(lr=LR, warmup_steps=0, decay_fraction=0)
    trainer = SAETrainer(config, optim, D_IN, STEPS, 0, build_mesh())
    x = torch.randn(STEPS, BATCH, D_IN, generator=torch.Generator().manual_seed(0)) + 2
    trainer.initialise(x[0])
    with torch.no_grad():
        # Latents that become dead, whose thresholds then fall.
        trainer.sae.get_parameter("b_enc")[:4] = -8
        if architecture == "jumprelu":
            trainer.sae.get_parameter("threshold")[:4] = 2.5 * LR
    start = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}

    their_fields = fields if architecture == "standard" else JUMP | {"pre_act_loss_coefficient": 0.5}
    theirs = their_sae(trainer.sae, architecture, **their_fields)
    their_config = SAETrainerConfig(STEPS * BATCH, BATCH, lr=LR, lr_end=LR, dead_feature_window=2)
    their_trainer = TheirTrainer(their_config, theirs, iter(()))
    num_dead, num_below = 0, 0
    for step in range(STEPS):
        trainer.train_step(x[step])
        their_trainer.step(x[step])
        num_below += int((theirs.state_dict().get("threshold", x) < 0).sum())
        num_dead += int(their_trainer.dead_neurons.sum())
    assert num_dead > 4
    if architecture == "jumprelu":
        assert num_below > 4
        theirs.threshold.data.clamp_(min=0)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    for name, parameter in trainer.sae.named_parameters():
        expected = dict(theirs.named_parameters())[name].detach()
        expected = expected.T if name == "W_enc" else expected
        assert (expected - start[name]).abs().max() > 3 * LR
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-3 * LR, msg=name)
