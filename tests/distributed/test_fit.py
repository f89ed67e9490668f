"""The same global batches give the same SAE on one rank and on several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bigsae import OptimConfig, SAEConfig
from bigsae.training.fit import fit_trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.states import assert_same, described

D_IN, BATCH, STEPS = 24, 128, 20
# Adam turns rounding into whole steps where a gradient's terms cancel (|g| near eps): weights agree to about lr / 300.
OPTIM = OptimConfig(lr=3e-4, warmup_steps=5)


def make_batches() -> list[Tensor]:
    """Sparse mixtures about a long mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(60, D_IN, generator=generator)
    batches = []
    for _ in range(STEPS):
        strengths = torch.rand(BATCH, 60, generator=generator) * (
            torch.rand(BATCH, 60, generator=generator) < 0.1
        )
        batches.append(4 * strengths @ directions + 5)
    return batches


def config(**options) -> SAEConfig:
    return SAEConfig(k=4, d_sae=384, init_tokens=2 * BATCH, **options)


def transcoder_batches() -> list[tuple[Tensor, Tensor]]:
    """As `make_batches`, with targets of another width and scale."""
    mixing = torch.randn(D_IN, 20, generator=torch.Generator().manual_seed(1))
    return [(x, (x - 5).relu() @ mixing + 30) for x in make_batches()]


def train(sae: SAEConfig, optim: OptimConfig = OPTIM, transcoder: bool = False) -> dict:
    """Everything about a finished training that must not depend on the number of ranks."""
    batches = transcoder_batches() if transcoder else make_batches()
    return described(fit_trainer(batches, sae, optim, seed=0, num_steps=None))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_same_weights_with_dead_latents_and_auxk(num_ranks):
    # A latent is dead after two batches of *global* tokens: ranks counting their own would see none in time.
    sae = config(dead_after_tokens=2 * BATCH)
    alone = train(sae)
    assert alone["metrics"]["dead_fraction"] > 0.05
    assert alone["metrics"]["auxk_loss"] > 0
    for result in run_ranks(num_ranks, train, sae):
        assert_same(alone, result)


DEAD = {"d_sae": 384, "init_tokens": 2 * BATCH, "dead_after_tokens": 2 * BATCH}
# The mean of the activations, long and not taken out, keeps about half the latents silent.
FAR = {"b_dec_init": "zeros"}
CASES = {
    "multi-topk": (SAEConfig(k=4, multi_topk=True, **DEAD), OPTIM, False),
    "batchtopk": (SAEConfig(architecture="batchtopk", k=4, **DEAD), OPTIM, False),
    "matryoshka": (SAEConfig(architecture="matryoshka", k=4, prefixes=(24, 100), **DEAD), OPTIM, False),
    "jumprelu": (SAEConfig(architecture="jumprelu", target_l0=6, **DEAD), OPTIM, False),
    "quadratic": (
        SAEConfig(architecture="jumprelu", sparsity_loss="quadratic", target_l0=6, **DEAD),
        OPTIM,
        False,
    ),
    "jumprelu, dense at first": (
        SAEConfig(architecture="jumprelu", pre_act_coefficient=0.1, **DEAD),
        OPTIM,
        False,
    ),
    "tanh": (
        SAEConfig(architecture="jumprelu", sparsity_loss="tanh", l0_coefficient=20, **DEAD),
        OPTIM,
        False,
    ),
    "gated": (SAEConfig(architecture="gated", resample_every_tokens=5 * BATCH, **FAR, **DEAD), OPTIM, False),
    "standard": (
        SAEConfig(architecture="standard", resample_every_tokens=5 * BATCH, **FAR, **DEAD),
        OPTIM,
        False,
    ),
    "layer_norm": (SAEConfig(k=4, normalize="layer_norm", **DEAD), OPTIM, False),
    "accumulation": (SAEConfig(k=4, **DEAD), replace(OPTIM, accumulation_steps=2), False),
    "topk transcoder": (SAEConfig(k=4, skip=True, **DEAD), OPTIM, True),
    "batchtopk transcoder": (SAEConfig(architecture="batchtopk", k=4, **DEAD), OPTIM, True),
    "jumprelu transcoder": (SAEConfig(architecture="jumprelu", target_l0=6, skip=True, **DEAD), OPTIM, True),
}


def train_all() -> dict[str, dict]:
    return {name: train(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def alone_and_on_two() -> tuple[dict[str, dict], list[dict[str, dict]]]:
    """Every case on one rank, and on two: all of them in one launch."""
    return train_all(), run_ranks(2, train_all)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_on_two_ranks(alone_and_on_two, case):
    alone, ranks = alone_and_on_two
    if case not in ("jumprelu, dense at first", "tanh"):
        assert alone[case]["metrics"]["dead_fraction"] > 0, "no dead set to compare"
    for result in ranks:
        assert_same(alone[case], result[case])


def dead_after(num_tokens: int) -> float:
    """Dead fraction after a training in which latents die after `num_tokens` tokens."""
    trainer = fit_trainer(make_batches(), config(dead_after_tokens=num_tokens), OPTIM, seed=0, num_steps=None)
    return trainer.read_metrics()["dead_fraction"]


def test_dead_counts_tokens_of_all_ranks():
    """Just as many tokens as all ranks saw together: nothing could be dead if ranks counted their own alone."""
    total = STEPS * BATCH
    assert all(fraction > 0 for fraction in run_ranks(2, dead_after, total // 2 + 1))
    assert run_ranks(2, dead_after, total + 1) == [0.0, 0.0]
