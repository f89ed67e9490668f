"""Every objective against plain dense autograd in float64: loss, its parts, statistics, and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bigsae.checks import resolve_prefixes, resolve_sae
from bigsae.config import SAEConfig
from bigsae.sae.losses import global_moments
from tests.sae import dense
from tests.sae.saes import (
    BATCH,
    D_IN,
    D_OUT,
    D_SAE,
    K,
    assert_same,
    assert_same_grads,
    dead_latents,
    make_batch,
    make_context,
    make_sae,
    run_step,
)

WARMUP = 0.3
FEW, MANY = 3, 20
assert D_IN // 2 > FEW and MANY > D_IN // 2  # k_aux lies between

# Architecture, what is configured, the number of dead latents, d_out.
Case = tuple[str, dict[str, Any], int, int | None]
JUMP: dict[str, Any] = {"jumprelu_bandwidth": 1.0, "l0_coefficient": 0.7, "pre_act_coefficient": 0.3}
QUADRATIC = JUMP | {"sparsity_loss": "quadratic", "target_l0": 7.5}
MEAN_QUADRATIC = QUADRATIC | {"sparsity_loss": "mean_quadratic"}
TANH = JUMP | {"sparsity_loss": "tanh", "tanh_scale": 0.6}
CASES: list[Case] = [
    *[("topk", {"k": K}, num_dead, None) for num_dead in (0, FEW, MANY)],
    ("topk", {"k": K, "k_aux": 4, "auxk_coefficient": 0.5}, FEW, None),
    ("topk", {"k": K, "auxk_coefficient": 0.0}, MANY, None),
    ("topk", {"k": K, "multi_topk": True}, MANY, None),
    ("topk", {"k": K, "multi_topk": True, "apply_b_dec_to_input": False}, 0, None),
    ("topk", {"k": K}, FEW, D_OUT),
    ("topk", {"k": K, "skip": True, "multi_topk": True}, MANY, D_OUT),
    *[("batchtopk", {"k": K}, num_dead, None) for num_dead in (0, FEW, MANY)],
    ("batchtopk", {"k": D_SAE - 2}, 0, None),  # more than are positive
    ("batchtopk", {"k": K, "apply_b_dec_to_input": False}, MANY, None),
    ("batchtopk", {"k": K}, FEW, D_OUT),
    ("batchtopk", {"k": K, "skip": True}, MANY, D_OUT),
    ("matryoshka", {"k": K}, FEW, None),
    ("matryoshka", {"k": K, "prefixes": (1, 17)}, MANY, None),
    ("matryoshka", {"k": K, "prefixes": (D_SAE,), "apply_b_dec_to_input": False}, 0, None),
    *[("jumprelu", fields, 0, None) for fields in (JUMP, TANH, QUADRATIC, MEAN_QUADRATIC)],
    *[("jumprelu", fields, FEW, None) for fields in (JUMP, TANH, QUADRATIC)],
    ("jumprelu", JUMP | {"pre_act_coefficient": 0.0}, FEW, None),
    *[
        ("jumprelu", fields | {"jumprelu_ste_to_input": True}, FEW, None)
        for fields in (JUMP, TANH, QUADRATIC, MEAN_QUADRATIC)
    ],
    ("jumprelu", QUADRATIC | {"apply_b_dec_to_input": False}, FEW, None),
    ("jumprelu", TANH, FEW, D_OUT),
    ("jumprelu", QUADRATIC | {"skip": True}, FEW, D_OUT),
    ("gated", {"l1_coefficient": 0.4}, FEW, None),
    ("gated", {"l1_coefficient": 2.0, "apply_b_dec_to_input": False}, 0, None),
    *[("standard", {"l1_coefficient": 0.4, "p_norm": p}, 0, None) for p in (1.0, 0.5, 2.0)],
    ("standard", {"l1_coefficient": 2.0, "apply_b_dec_to_input": False}, FEW, None),
]


def case_id(case: Case) -> str:
    architecture, fields, num_dead, d_out = case
    told = [f"{name}={value}" for name, value in fields.items() if name not in ("pre_act_coefficient",)]
    return "-".join([architecture, *told, f"dead={num_dead}", *(["transcoder"] if d_out else [])])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_dense_autograd(case: Case):
    architecture, fields, num_dead, d_out = case
    config = resolve_sae(SAEConfig(architecture=architecture, **fields), transcoder=d_out is not None)  # pyright: ignore[reportArgumentType]
    if architecture == "matryoshka":
        config = replace(config, prefixes=resolve_prefixes(config, D_SAE))
    sae = make_sae(config, d_out)
    x, y = make_batch(sae)
    dead = dead_latents(num_dead) if num_dead else None

    wide = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    step = dense.Step(config, wide, x.double(), y.double(), dead, WARMUP)
    expected = dense.expected(step)
    expected.loss.backward()
    expected_grads = {name: p.grad for name, p in wide.items() if p.grad is not None}
    assert not expected.fired[:2].any() and expected.fired[2:].any()

    by_path = []
    for sparse in (False, True) if sae.uses_density else (False,):
        output, grads = run_step(sae, x, y, dead, sparsity=WARMUP, sparse=sparse)
        assert_same(output.loss, expected.loss, "loss")
        assert tuple(output.parts) == sae.loss_parts and output.parts.keys() == expected.parts.keys()
        for name, part in expected.parts.items():
            assert_same(output.parts[name], part, name)
        assert_same(output.residual, expected.residual, "residual")
        assert not any(t.requires_grad for t in (output.residual, *output.parts.values()))
        assert int(output.num_active) == int(expected.fired.sum())
        assert output.firing_counts.tolist() == expected.fired.sum(0).tolist()
        assert_same_grads(grads, expected_grads)
        by_path.append(grads)
    assert_same_grads(by_path[0], by_path[-1])


def test_the_cases_show_what_they_are_for():
    """Many pairs lie in jumprelu's window, on both sides; gates and magnitudes disagree; parts are not negligible."""
    sae = make_sae(SAEConfig(architecture="jumprelu", **JUMP))
    x, _ = make_batch(sae)
    over = sae.encoder_input(x) @ sae.W_enc.T + sae.get_parameter("b_enc") - sae.get_parameter("threshold")
    assert ((over > 0) & (over < 0.5)).sum() > 50 and ((over < 0) & (over > -0.5)).sum() > 50
    sae = make_sae(SAEConfig(architecture="gated"))
    linear = sae.encoder_input(x) @ sae.W_enc.T
    gate = linear + sae.get_parameter("b_gate") > 0
    magnitude = linear * sae.get_parameter("r_mag").exp() + sae.get_parameter("b_mag") > 0
    assert (gate & ~magnitude).any() and (~gate & magnitude).any()
    for architecture, fields, num_dead, d_out in CASES:
        sae = make_sae(SAEConfig(architecture=architecture, **fields), d_out)  # pyright: ignore[reportArgumentType]
        x, y = make_batch(sae)
        output, _ = run_step(sae, x, y, dead_latents(num_dead) if num_dead else None, sparsity=WARMUP)
        off = set()
        if not fields.get("multi_topk"):
            off.add("multi_topk_loss")
        if not num_dead or fields.get("auxk_coefficient") == 0:
            off.add("auxk_loss")
        if not num_dead or fields.get("pre_act_coefficient") == 0:
            off.add("pre_act_loss")
        for name, part in output.parts.items():
            assert (part == 0) if name in off else (part > 1e-3 * output.loss), (architecture, fields, name)


SHARED = [
    ("topk", {"k": K, "multi_topk": True}),
    ("jumprelu", QUADRATIC),
    ("gated", {}),
    ("standard", {"p_norm": 0.5}),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("architecture", "fields"), SHARED)
def test_shares_of_a_batch_add_up(architecture, fields, sparse):
    """Two ranks' losses, parts, statistics and gradients add up to those of the whole batch."""
    sae = make_sae(SAEConfig(architecture=architecture, **fields))
    x, y = make_batch(sae)
    # AuxK's variance would need the ranks' process group, as would the mean of L0.
    dead = dead_latents(FEW) if architecture == "jumprelu" else None
    whole, grads = run_step(sae, x, y, dead, sparse=sparse)
    sae.zero_grad()
    context = make_context(y, dead, sparse=sparse)
    shares = [sae.training_forward(x[rows], y[rows], context) for rows in (slice(0, 10), slice(10, BATCH))]
    for share in shares:
        share.loss.backward()
    assert_same(shares[0].loss + shares[1].loss, whole.loss)
    for name, part in whole.parts.items():
        assert_same(shares[0].parts[name] + shares[1].parts[name], part, name)
    assert int(shares[0].num_active + shares[1].num_active) == int(whole.num_active)
    assert torch.equal(shares[0].firing_counts + shares[1].firing_counts, whole.firing_counts)
    assert_same_grads({name: p.grad for name, p in sae.named_parameters() if p.grad is not None}, grads)


def test_variance_survives_a_long_mean():
    """float32 sums would lose all digits of the variance here."""
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    exact = (x.double() - x.double().mean(0)).square().sum()
    torch.testing.assert_close(global_moments(x, 1000, None).variance(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_leave_the_batch_as_it_is(dtype):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    moments = global_moments(x, 5, None)
    assert torch.equal(x, before)
    centred = before.double() - before.double().mean(0)
    torch.testing.assert_close(moments.variance(), centred.square().sum())
