"""The update after the gradients: order, projection, clip, mask, schedule, statistics, starting values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bigsae.config import OptimConfig, SAEConfig, UserError
from bigsae.training.firing import FiringStatistics
from bigsae.training.fit import fit_trainer
from bigsae.training.initialise import activation_scale, decoder_bias
from bigsae.training.optim import adam_step, build_adam, gradient_norm, project_rows_, renormalise_rows_

CPU = torch.device("cpu")


def test_projection_leaves_nothing_along_the_rows():
    rows = torch.nn.functional.normalize(torch.randn(5, 7), dim=1)
    gradient = torch.randn(5, 7)
    before = gradient.clone()
    project_rows_(gradient, rows)
    assert (gradient * rows).sum(1).abs().max() < 1e-6
    rejected = before - gradient
    torch.testing.assert_close(rejected, (rejected * rows).sum(1, keepdim=True) * rows)


def test_clip_and_mask_equal_torch():
    """Clipping by the fused kernel's grad_scale is clip_grad_norm_; a norm that is no number changes nothing."""
    optim = OptimConfig(lr=0.1)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    adam, plain = build_adam({"ours": ours}, optim), torch.optim.Adam([theirs], lr=0.1, eps=1e-8)
    for step in range(3):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)) * 10
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        plain.step()
        assert adam_step(adam, 0.1, gradient_norm([ours.grad]), grad_clip=1.0) == 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    before, state = ours.detach().clone(), {k: v.clone() for k, v in adam.state[ours].items()}
    ours.grad = torch.full((3, 4), torch.nan)
    assert adam_step(adam, 0.1, gradient_norm([ours.grad]), grad_clip=1.0) == 1
    assert torch.equal(ours, before)
    assert all(torch.equal(adam.state[ours][key], value) for key, value in state.items())


def test_small_gradients_are_not_scaled_up():
    parameter = torch.nn.Parameter(torch.zeros(2))
    adam = build_adam({"w": parameter}, OptimConfig(eps=1.0))
    parameter.grad = torch.tensor([0.01, 0.0])
    adam_step(adam, 0.1, gradient_norm([parameter.grad]), grad_clip=1.0)
    torch.testing.assert_close(adam.state[parameter]["exp_avg"], torch.tensor([0.001, 0.0]))


def test_decoder_stays_at_unit_norm():
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    trainer = fit_trainer(batches, SAEConfig(k=3, d_sae=40), OptimConfig(lr=0.01), seed=0, num_steps=None)
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(40))
    free = SAEConfig(k=3, d_sae=40, normalize_decoder=False)
    trainer = fit_trainer(batches, free, OptimConfig(lr=0.01), seed=0, num_steps=None)
    assert (trainer.sae.W_dec.norm(dim=1) - 1).abs().max() > 1e-3


def test_renormalise():
    rows = torch.randn(5, 3)
    unit = rows / rows.norm(dim=1, keepdim=True)
    renormalise_rows_(rows)
    torch.testing.assert_close(rows, unit)


def test_firing_window_and_dead():
    firing = FiringStatistics(3, dead_after_tokens=10, device=CPU, group=None)
    firing.update(torch.tensor([5, 1, 0]), 5)
    firing.update(torch.tensor([5, 0, 0]), 5)
    assert firing.dead_mask().tolist() == [False, False, True]
    torch.testing.assert_close(firing.frequencies(), torch.tensor([1.0, 0.1, 0.0]))
    firing.update(torch.tensor([0, 0, 2]), 5)  # a new window: the last whole one still speaks
    torch.testing.assert_close(firing.frequencies(), torch.tensor([1.0, 0.1, 0.0]))
    assert firing.dead_mask().tolist() == [False, True, False]
    assert firing.num_tokens_since_fired.tolist() == [5, 10, 0]


def test_asking_the_device_seldom_never_misses_a_dead_latent():
    """Whatever fires when: while `may_be_dead` says no, no latent is dead; and mostly it does not ask."""
    generator = torch.Generator().manual_seed(0)
    firing = FiringStatistics(20, dead_after_tokens=2000, device=CPU, group=None)
    asked, before, said_no = 0, -1, 0
    for step in range(2000):
        may = firing.may_be_dead(5)
        asked, before = asked + (firing._ask_again_at != before), firing._ask_again_at
        said_no += not may
        assert may or not firing.dead_mask().any()
        rates = (
            torch.full((20,), 0.02) if step < 1500 else torch.cat([torch.zeros(1), torch.full((19,), 0.02)])
        )
        firing.update((torch.rand(20, generator=generator) < rates).int(), 5)
    assert firing.dead_mask().tolist() == [True] + [False] * 19
    assert said_no > 1000
    assert asked < 2000 / 20


def plain_steps(batches, start, k, lr, clip):
    """The step of DESIGN's order in plain dense float64: reduce, project, norm, clip, Adam, renormalise."""
    weights = {name: p.detach().double().requires_grad_() for name, p in start.items()}
    adam = torch.optim.Adam(list(weights.values()), lr=lr, eps=1e-8)
    norms = []
    for batch in batches:
        x = batch.double()
        pre_acts = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
        kth = pre_acts.detach().topk(k).values[:, -1:]
        latents = torch.where(pre_acts >= kth, pre_acts, 0).relu()
        residual = x - latents @ weights["W_dec"] - weights["b_dec"]
        adam.zero_grad()
        (residual.square().sum() / (x - x.mean(0)).square().sum()).backward()
        with torch.no_grad():
            gradient, rows = weights["W_dec"].grad, weights["W_dec"]
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
            norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), clip).item())
            adam.step()
            rows /= rows.norm(dim=1, keepdim=True)
    return weights, sum(norms) / len(norms)


def test_the_step_is_the_plain_one():
    """Projected before the norm, all four gradients in it, clipped (hard), and Adam sees what is left."""
    batches = [torch.randn(64, 12, generator=torch.Generator().manual_seed(i)) + 1 for i in range(4)]
    config = SAEConfig(k=3, d_sae=30, normalize="none", init_tokens=64, decoder_lr_factor=1)
    optim = OptimConfig(lr=0.01, warmup_steps=0, decay_fraction=0, grad_clip=0.05, eps=1e-8)
    start = fit_trainer(batches[:1], config, replace(optim, lr=1e-12), seed=0, num_steps=1)
    expected, norm = plain_steps(batches, dict(start.sae.named_parameters()), 3, 0.01, 0.05)
    trainer = fit_trainer(batches, config, optim, seed=0, num_steps=None)
    metrics = trainer.read_metrics()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 2 * 0.05  # the clip bites
    for name, parameter in trainer.sae.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=2e-5, msg=name)


def test_batches_that_are_no_numbers_are_refused():
    batches = [torch.randn(32, 8) for _ in range(3)]
    batches[1][0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite in 1 of 3 steps"):
        fit_trainer(batches, SAEConfig(k=2, d_sae=16, init_tokens=32), OptimConfig(), seed=0, num_steps=None)


def test_scale_brings_the_mean_norm_to_sqrt_d_in():
    x = torch.randn(500, 16) * 7 + 3
    scaled = x * activation_scale(x, None)
    assert scaled.norm(dim=1).mean().item() == pytest.approx(4.0, rel=1e-5)


def test_geometric_median_resists_outliers():
    x = torch.randn(501, 8, generator=torch.Generator().manual_seed(0))
    x[:50] += 1e4
    median = decoder_bias(x, "geometric_median", None)
    assert median.norm() < 1
    assert decoder_bias(x, "mean", None).norm() > 1e3
    # At the minimum of Σ‖x − m‖ the unit vectors towards the points add up to zero.
    towards = torch.nn.functional.normalize(x - median, dim=1).sum(0)
    assert towards.norm() < 1e-2
    assert decoder_bias(x, "zeros", None).abs().max() == 0


@pytest.mark.parametrize("start", [0.0, 4.0])
def test_thresholds_reach_the_target_from_where_no_pre_act_is_near(start):
    """All latents fire, or none and nothing lies in any threshold's window: from either the target L0 is reached."""
    batches = [torch.randn(256, 12, generator=torch.Generator().manual_seed(i)) for i in range(300)]
    config = SAEConfig(
        architecture="jumprelu",
        d_sae=48,
        target_l0=4,
        l0_coefficient=10,
        jumprelu_init_threshold=start,
        threshold_lr=0.03,
        init_tokens=256,
    )
    trainer = fit_trainer(batches[:1], config, OptimConfig(lr=1e-3, warmup_steps=0), seed=0, num_steps=300)
    first = trainer.read_metrics()["l0"]
    assert first > 15 if start == 0 else first < 0.01
    for batch in batches[1:]:
        trainer.train_step(batch)
    trainer.read_metrics()
    trainer.train_step(batches[0])
    assert trainer.read_metrics()["l0"] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{"k": 4}, {"architecture": "jumprelu", "target_l0": 4, "threshold_lr": 1e-12}],
    ids=["topk", "jumprelu"],
)
def test_the_encoder_starts_at_the_scale_of_the_reconstruction(options):
    """No other scale of the first reconstructions is closer to the tokens; at the decoder's own it is far from them."""
    batch = torch.randn(256, 12, generator=torch.Generator().manual_seed(0)) + 2
    config = SAEConfig(d_sae=600, init_tokens=256, **options)
    sae = fit_trainer([batch], config, OptimConfig(lr=1e-12), seed=0, num_steps=None).folded()
    with torch.no_grad():
        centred, decoded = batch - sae.b_dec, sae(batch) - sae.b_dec
    assert ((centred * decoded).sum() / decoded.square().sum()).item() == pytest.approx(1, abs=0.02)
    assert not 0.8 < sae.W_enc.norm(dim=1).mean() / sae.W_dec.norm(dim=1).mean() < 1.25
