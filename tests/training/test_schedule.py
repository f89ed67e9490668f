"""Learning rate and sparsity weight over a run, and gradient accumulation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bigsae.config import OptimConfig, SAEConfig
from bigsae.training.fit import fit_trainer
from bigsae.training.schedule import lr_schedule, sparsity_schedule


def test_warm_up_and_decay():
    factor = lr_schedule(OptimConfig(warmup_steps=10, decay_fraction=0.2), 100)
    assert [factor(0), factor(9), factor(50), factor(80), factor(99)] == pytest.approx([0.1, 1, 1, 1, 0.05])
    default = lr_schedule(OptimConfig(), 200)
    assert [default(0), default(9), default(10)] == pytest.approx([0.1, 1, 1])
    assert lr_schedule(OptimConfig(), None)(10_000) == 1


def test_cosine_combines_with_warm_up_and_decay():
    cosine = lr_schedule(OptimConfig(warmup_steps=0, decay_fraction=0, schedule="cosine"), 100)
    assert [cosine(0), cosine(50), cosine(99)] == pytest.approx(
        [1, 0.5, 0.5 * (1 + math.cos(0.99 * math.pi))]
    )
    floor = OptimConfig(warmup_steps=4, decay_fraction=0.5, schedule="cosine", min_factor=0.2)
    factor = lr_schedule(floor, 100)
    shape = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in (0, 40, 75)]
    assert [factor(0), factor(40), factor(75)] == pytest.approx([shape[0] / 4, shape[1], shape[2] / 2])


def test_cosine_restarts_at_each_cycle():
    restarts = OptimConfig(warmup_steps=0, decay_fraction=0, schedule="cosine_restarts", num_cycles=2)
    factor = lr_schedule(restarts, 100)
    assert [factor(0), factor(25), factor(50), factor(75)] == pytest.approx([1, 0.5, 1, 0.5])
    assert factor(49) < 0.01
    four = lr_schedule(replace(restarts, num_cycles=None), 100)
    assert [four(0), four(25), four(50), four(75)] == pytest.approx([1, 1, 1, 1])


def test_sparsity_warm_up():
    factor = sparsity_schedule(SAEConfig(architecture="gated", sparsity_warmup_steps=4), 100)
    assert [factor(0), factor(3), factor(50)] == pytest.approx([0.25, 1, 1])
    default = sparsity_schedule(SAEConfig(architecture="gated"), 400)
    assert [default(0), default(19), default(20)] == pytest.approx([0.05, 1, 1])
    assert sparsity_schedule(SAEConfig(sparsity_warmup_steps=0), 10)(0) == 1


def test_the_warm_up_reaches_the_loss():
    batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    config = SAEConfig(architecture="standard", d_sae=16, init_tokens=64, sparsity_warmup_steps=4)
    optim = OptimConfig(lr=1e-12, warmup_steps=0)
    l1 = [
        fit_trainer(batches[:n], config, optim, seed=0, num_steps=4).read_metrics()["l1_loss"] * n
        for n in (1, 2)
    ]
    full = replace(config, sparsity_warmup_steps=0)
    l1_full = [
        fit_trainer(batches[:n], full, optim, seed=0, num_steps=4).read_metrics()["l1_loss"] * n
        for n in (1, 2)
    ]
    assert l1[0] == pytest.approx(0.25 * l1_full[0], rel=1e-5)
    assert l1[1] - l1[0] == pytest.approx(0.5 * (l1_full[1] - l1_full[0]), rel=1e-4)


def test_accumulated_updates_are_those_of_the_mean_gradient():
    """Two halves of a batch accumulated = the whole batch, for a loss that is a mean over tokens; clip included."""
    batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    halves = [half for batch in batches for half in batch.split(32)]
    config = SAEConfig(architecture="standard", d_sae=24, init_tokens=64, sparsity_warmup_steps=0)
    optim = OptimConfig(lr=1e-3, warmup_steps=0, decay_fraction=0, grad_clip=0.5)
    whole = fit_trainer(batches, config, optim, seed=0, num_steps=None)
    parts = fit_trainer(halves, config, replace(optim, accumulation_steps=2), seed=0, num_steps=None)
    assert whole.scale == parts.scale
    for (name, ours), theirs in zip(whole.sae.named_parameters(), parts.sae.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, msg=name)
    ours, theirs = whole.read_metrics(), parts.read_metrics()
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours["grad_norm"] > 0.5  # the clip bites
