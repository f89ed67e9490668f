"""The same global batches give the same SAE on every data x latent mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bigsae import MeshConfig, OptimConfig, SAEConfig
from bigsae.training.fit import fit_trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.states import assert_same, described
from tests.distributed.test_fit import BATCH, DEAD, FAR, make_batches, transcoder_batches
from tests.distributed.test_fit import OPTIM as OPTIM_OF_FIT

Case = tuple[SAEConfig, OptimConfig, bool]
# Where the terms of a gradient cancel to about its eps, Adam makes whole steps of rounding, and each mesh rounds
# differently: 1 weight in 9,216 was off by 4e-6 at eps 1e-8. So too would thresholds at their own, much larger rate.
OPTIM = replace(OPTIM_OF_FIT, eps=1e-5)
JUMPRELU: dict[str, Any] = {"architecture": "jumprelu", "threshold_lr": 1e-3}


def bf16(batches: list[Tensor]) -> list[Tensor]:
    """The same, rounded, and each token twice: ties within tokens, and over tokens."""
    return [torch.cat([b[: BATCH // 2], b[: BATCH // 2]]).bfloat16().float() for b in batches]


ARCHITECTURES: dict[str, Case] = {
    "topk": (SAEConfig(k=4, **DEAD), OPTIM, False),
    "multi-topk": (SAEConfig(k=4, multi_topk=True, **DEAD), OPTIM, False),
    "batchtopk": (SAEConfig(architecture="batchtopk", k=4, **DEAD), OPTIM, False),
    "matryoshka": (SAEConfig(architecture="matryoshka", k=4, prefixes=(24, 200), **DEAD), OPTIM, False),
    "jumprelu": (SAEConfig(**JUMPRELU, target_l0=6, **DEAD), OPTIM, False),
    "jumprelu, dense at first": (
        SAEConfig(**JUMPRELU, pre_act_coefficient=0.1, **DEAD),
        OPTIM,
        False,
    ),
    "quadratic": (
        SAEConfig(**JUMPRELU, sparsity_loss="quadratic", target_l0=6, **DEAD),
        OPTIM,
        False,
    ),
    "tanh": (
        SAEConfig(**JUMPRELU, sparsity_loss="tanh", l0_coefficient=20, **DEAD),
        OPTIM,
        False,
    ),
    "gated": (SAEConfig(architecture="gated", resample_every_tokens=5 * BATCH, **FAR, **DEAD), OPTIM, False),
    "standard": (
        SAEConfig(architecture="standard", resample_every_tokens=7 * BATCH, **FAR, **DEAD),
        OPTIM,
        False,
    ),
    "standard, p 1.5": (SAEConfig(architecture="standard", p_norm=1.5, **FAR, **DEAD), OPTIM, False),
    "layer_norm": (SAEConfig(k=4, normalize="layer_norm", **DEAD), OPTIM, False),
    "accumulation": (SAEConfig(k=4, **DEAD), replace(OPTIM, accumulation_steps=2), False),
    "topk transcoder": (SAEConfig(k=4, skip=True, **DEAD), OPTIM, True),
    "jumprelu transcoder": (SAEConfig(**JUMPRELU, target_l0=6, skip=True, **DEAD), OPTIM, True),
    "k over a rank's latents": (SAEConfig(k=50, d_sae=64, init_tokens=2 * BATCH), OPTIM, False),
}
TIED = ("topk", "batchtopk", "jumprelu")


def train(case: Case, mesh: MeshConfig | None, rounded: bool = False) -> dict:
    sae, optim, transcoder = case
    batches = transcoder_batches() if transcoder else make_batches()
    if rounded:
        batches = bf16(make_batches())
    return described(fit_trainer(batches, sae, optim, seed=0, num_steps=None, mesh=mesh))


def train_all(mesh: MeshConfig | None) -> dict[str, dict]:
    results = {name: train(case, mesh) for name, case in ARCHITECTURES.items()}
    return results | {f"{name}, tied": train(ARCHITECTURES[name], mesh, rounded=True) for name in TIED}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return train_all(None)


MESHES = {
    "1 x 2": (2, MeshConfig(latent=2)),
    "2 x 2": (4, MeshConfig(latent=2)),
    "1 x 4": (4, MeshConfig(latent=4)),
    "2 x 1, moments sharded": (2, MeshConfig(latent=1, shard_optimizer=True)),
    "2 x 2, moments sharded": (4, MeshConfig(latent=2, shard_optimizer=True)),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_same_sae(alone, mesh):
    num_ranks, config = MESHES[mesh]
    for result in run_ranks(num_ranks, train_all, config):
        for case, theirs in result.items():
            try:
                assert_same(alone[case], theirs)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None


def test_the_cases_have_dead_latents_and_ties(alone):
    for case, result in alone.items():
        if case not in ("jumprelu, dense at first", "tanh", "k over a rank's latents", "standard, p 1.5"):
            assert result["metrics"]["dead_fraction"] > 0, case
