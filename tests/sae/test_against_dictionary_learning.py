"""The objectives against dictionary_learning's trainers, with the same weights and activations, where comparable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigsae.config import SAEConfig
from bigsae.sae.base import SAE
from bigsae.training.optim import project_rows_, renormalise_rows_
from tests.sae.saes import (
    BATCH,
    D_IN,
    D_SAE,
    K,
    assert_same,
    assert_same_grads,
    make_batch,
    make_sae,
    make_x,
    run_step,
)

trainers = pytest.importorskip("dictionary_learning.trainers")
matryoshka = pytest.importorskip("dictionary_learning.trainers.matryoshka_batch_top_k")
standard = pytest.importorskip("dictionary_learning.trainers.standard")

# Our names of their parameters; their linear layers hold W_dec transposed, their plain matrices W_enc.
NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
TRANSPOSED = ("W_enc", "decoder.weight")


def in_our_layout(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {NAMES.get(name, name): t.T if name in TRANSPOSED else t for name, t in named.items()}


def their_trainer(cls: Any, ours: SAE, **fields: Any) -> Any:
    """One of their trainers, its dictionary with the weights of `ours`."""
    trainer = cls(
        steps=10,
        activation_dim=D_IN,
        dict_size=D_SAE,
        layer=0,
        lm_name="none",
        device="cpu",
        warmup_steps=0,
        **fields,
    )
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, theirs in in_our_layout(dict(trainer.ae.named_parameters())).items():
            theirs.copy_(weights[name])
    return trainer


def their_grads(trainer: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(trainer.ae.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return in_our_layout(dict(zip(named, grads, strict=True)))


def scatter(x: Tensor) -> Tensor:
    return (x.double() - x.double().mean(0)).square().sum().float()


TOPK = [
    ("topk", {}, trainers.TopKTrainer, {"k": K}),
    ("batchtopk", {}, trainers.BatchTopKTrainer, {"k": K}),
    (
        "matryoshka",
        {"prefixes": (4, 14)},
        matryoshka.MatryoshkaBatchTopKTrainer,
        # Theirs is the mean over prefixes of losses whose weights, by default, are those of a mean already.
        {"k": K, "group_fractions": [0.1, 0.25, 0.65], "group_weights": [1.0, 1.0, 1.0]},
    ),
]


@pytest.mark.parametrize("num_dead", [0, 8])
@pytest.mark.parametrize(
    ("architecture", "fields", "cls", "their_fields"), TOPK, ids=[case[0] for case in TOPK]
)
def test_topk_family(architecture, fields, cls, their_fields, num_dead):
    """They divide the reconstruction's squares by the number of tokens, we by Σ‖x − x̄‖²; AuxK both by the residual's.

    They do not weigh AuxK down where fewer than k_aux latents are dead (here more are), and select of pre_acts that
    they clamped at 0, so that latents far below get no gradient (here the dead ones lie just above).
    """
    ours = make_sae(SAEConfig(architecture=architecture, k=K, **fields))
    x = make_x(ours, batch=BATCH + 2)[2:]
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[2 : 2 + num_dead] = True
    with torch.no_grad():
        ours.W_enc[dead] *= 1e-3
        ours.get_parameter("b_enc")[dead] = torch.linspace(0.05, 0.1, num_dead)
    output, grads = run_step(ours, x, x, dead if num_dead else None)
    assert not output.firing_counts[dead].any()  # else theirs would not be dead
    trainer = their_trainer(cls, ours, auxk_alpha=(scatter(x) / len(x)).item() / 32, **their_fields)
    trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
    loss = trainer.loss(x, step=0) * len(x) / scatter(x)
    assert_same(output.loss, loss)
    assert (output.parts["auxk_loss"] > 1e-3) == bool(num_dead)
    assert_same_grads(grads, their_grads(trainer, loss))


@pytest.mark.parametrize("sparse", [False, True])
def test_standard(sparse):
    ours = make_sae(SAEConfig(architecture="standard", l1_coefficient=0.4))
    x = make_x(ours)
    trainer = their_trainer(
        standard.StandardTrainerAprilUpdate, ours, l1_penalty=0.4, sparsity_warmup_steps=None
    )
    loss = trainer.loss(x, step=0)
    output, grads = run_step(ours, x, x, sparse=sparse)
    assert_same(output.loss, loss)
    assert_same_grads(grads, their_grads(trainer, loss))


@pytest.mark.parametrize("sparse", [False, True])
def test_gated(sparse):
    """Their penalty has no decoder norms, which they keep at 1: the same loss there, and gradients up to the part
    along the rows, which they project away."""
    ours = make_sae(SAEConfig(architecture="gated", l1_coefficient=0.4))
    with torch.no_grad():
        renormalise_rows_(ours.W_dec)
    x = make_x(ours)
    trainer = their_trainer(trainers.GatedSAETrainer, ours, l1_penalty=0.4, sparsity_warmup_steps=None)
    loss = trainer.loss(x, step=0)
    output, grads = run_step(ours, x, x, sparse=sparse)
    assert_same(output.loss, loss)
    expected = their_grads(trainer, loss)
    for each in (grads, expected):
        each["W_dec"] = each["W_dec"].clone()
        project_rows_(each["W_dec"], ours.W_dec.detach())
    assert_same_grads(grads, expected)


BANDWIDTH, TARGET, COEFFICIENT = 0.25, 7.5, 0.7


@pytest.mark.parametrize("sparse", [False, True])
def test_jumprelu(sparse):
    """Their penalty is (mean L0 / L0* − 1)², ours 2 / L0* · (mean L0 − L0*)²: 2 · L0* times as much. Ours gives all
    thresholds one more gradient, that of the prior dL0/dθ = −L0* / d_sae, which is taken out here.

    Their step function sees latents after the JumpReLU, so that pre_acts within the window but below their threshold
    give it no gradient; here none are there.
    """
    config = SAEConfig(
        architecture="jumprelu",
        sparsity_loss="mean_quadratic",
        target_l0=TARGET,
        l0_coefficient=COEFFICIENT,
        jumprelu_bandwidth=BANDWIDTH,
        apply_b_dec_to_input=False,
    )
    ours = make_sae(config)
    x, _ = make_batch(ours, batch=5)
    # Each threshold lies in the widest gap of its latent's pre_acts, a little below its upper end.
    threshold, b_enc = ours.get_parameter("threshold"), ours.get_parameter("b_enc")
    with torch.no_grad():
        b_enc += 1
        pre_acts = torch.cat([x @ ours.W_enc.T + b_enc, torch.full((1, D_SAE), BANDWIDTH)]).sort(0).values
        gaps = pre_acts.diff(dim=0).masked_fill(pre_acts[:-1] < BANDWIDTH, 0)
        widest = gaps.argmax(0, keepdim=True)
        threshold.copy_(pre_acts.gather(0, widest + 1)[0] - torch.linspace(0.01, 0.12, D_SAE))
        over = x @ ours.W_enc.T + b_enc - threshold
    assert not ((over > -0.51 * BANDWIDTH) & (over < 1e-3)).any()
    assert ((over > 0) & (over < BANDWIDTH / 2)).sum() >= D_SAE
    trainer = their_trainer(
        trainers.JumpReluTrainer,
        ours,
        bandwidth=BANDWIDTH,
        target_l0=TARGET,
        sparsity_penalty=2 * TARGET * COEFFICIENT,
        sparsity_warmup_steps=None,
    )
    loss = trainer.loss(x, step=0)
    output, grads = run_step(ours, x, x, sparse=sparse)
    assert_same(output.loss, loss)
    assert output.parts["sparsity_loss"] > 0.01
    beyond = output.num_active.item() / len(x) - TARGET
    grads["threshold"] = grads["threshold"] + COEFFICIENT * 4 * beyond / D_SAE
    assert_same_grads(grads, their_grads(trainer, loss))
