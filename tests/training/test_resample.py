"""Resampling of dead latents: who, from what, and that training goes on from there."""

from __future__ import annotations

import pytest
import torch

from bigsae.config import OptimConfig, SAEConfig
from bigsae.parallel.mesh import alone
from bigsae.sae.base import Shape
from bigsae.sae.gated import GatedSAE
from bigsae.training.fit import fit_trainer
from bigsae.training.resample import resample_dead
from bigsae.training.update import Update

D_IN, D_SAE, BATCH = 8, 20, 64


@pytest.fixture
def trained() -> tuple[GatedSAE, Update]:
    """An SAE whose every parameter and moment is something."""
    sae = GatedSAE(Shape(D_IN, D_SAE))
    sae.initialise(0, 0.1)
    mesh = alone(torch.device("cpu"))
    update = Update(sae, OptimConfig(), {}, mesh, unit_decoder=False, shard_optimizer=False, seed=0)
    for parameter in sae.parameters():
        parameter.data += 0.3
        parameter.grad = torch.ones_like(parameter)
    update(1e-3)
    return sae, update


def test_dead_latents_become_directions_of_badly_reconstructed_tokens(trained):
    sae, update = trained
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[3, 7, 19]] = True
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    residual = torch.zeros(BATCH, D_IN)
    residual[[5, 40]] = 1.0  # no other token has any loss
    resample_dead(sae, update, dead, x, residual, seed=0)
    directions = torch.nn.functional.normalize(x[[5, 40]], dim=1)
    cosines = torch.nn.functional.normalize(sae.W_dec[dead], dim=1) @ directions.T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(3))
    mean_norms = [before[name][~dead].norm(dim=1).mean() for name in ("W_enc", "W_dec")]
    torch.testing.assert_close(sae.W_dec[dead].norm(dim=1), mean_norms[1].expand(3))
    torch.testing.assert_close(sae.W_enc[dead], 0.2 * mean_norms[0] / mean_norms[1] * sae.W_dec[dead])
    for name in ("b_gate", "b_mag", "r_mag"):
        assert sae.get_parameter(name)[dead].abs().max() == 0
    for name, parameter in sae.named_parameters():
        rows = ~dead if len(parameter) == D_SAE else slice(None)
        assert torch.equal(parameter[rows], before[name][rows]), name
        assert (update.state()[name]["exp_avg"][rows] != 0).all()
        if len(parameter) == D_SAE:
            assert not update.state()[name]["exp_avg"][dead].any()
            assert not update.state()[name]["exp_avg_sq"][dead].any()


def test_tokens_are_drawn_by_the_square_of_their_loss(trained):
    sae, update = trained
    dead = torch.ones(D_SAE, dtype=torch.bool)
    x = torch.eye(D_IN)[:2].repeat_interleave(1, 0)
    residual = torch.tensor([[1.0], [2.0**0.5]]).expand(2, D_IN)  # losses 1 : 2, so weights 1 : 4
    num_second = 0
    for seed in range(100):
        resample_dead(sae, update, dead, x, residual, seed=seed)
        num_second += int((sae.W_dec[:, 1] > 0).sum())
    assert num_second / (100 * D_SAE) == pytest.approx(0.8, abs=0.03)


def test_nothing_dead_or_nothing_to_learn_changes_nothing(trained):
    sae, update = trained
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    x = torch.randn(BATCH, D_IN)
    resample_dead(sae, update, torch.zeros(D_SAE, dtype=torch.bool), x, x, seed=0)
    resample_dead(sae, update, torch.ones(D_SAE, dtype=torch.bool), x, torch.zeros_like(x), seed=0)
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_run_resamples_at_its_intervals_and_the_latents_live():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(128, D_IN, generator=generator) + 6 for _ in range(60)]
    config = SAEConfig(
        architecture="standard",
        d_sae=64,
        l1_coefficient=0.1,
        b_dec_init="zeros",
        dead_after_tokens=1024,
        init_tokens=128,
    )
    without = fit_trainer(batches, config, OptimConfig(lr=1e-3), seed=0, num_steps=None)
    dead = without.read_metrics()["dead_fraction"]
    assert dead > 0.2
    every = SAEConfig(**{**config.__dict__, "resample_every_tokens": 2048})
    assert (
        fit_trainer(batches, every, OptimConfig(lr=1e-3), seed=0, num_steps=None).read_metrics()[
            "dead_fraction"
        ]
        < dead / 2
    )
    # Steps 16, 32, 48 of 60: the last one lies in the last fifth, which is left in peace.
    late = SAEConfig(**{**config.__dict__, "resample_every_tokens": 50 * 128})
    assert (
        fit_trainer(batches, late, OptimConfig(lr=1e-3), seed=0, num_steps=None).read_metrics()[
            "dead_fraction"
        ]
        == dead
    )
