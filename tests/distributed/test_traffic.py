"""What steps really send, counted, is what parallel/traffic.py and docs/mesh.md say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigsae import MeshConfig, OptimConfig, SAEConfig
from bigsae.parallel import collectives
from bigsae.parallel.mesh import build_mesh, share_latents
from bigsae.parallel.traffic import StepShape, step_payloads
from bigsae.training.trainer import SAETrainer
from tests.distributed.ranks import run_ranks

D_IN, D_SAE, K, K_AUX, BATCH, STEPS = 24, 384, 4, 12, 64, 6


class Counted:
    """Every collective of torch.distributed while it is in force: (kind, ranks, bytes) of each call."""

    def __init__(self):
        self.calls: list[tuple[str, int, int]] = []

    def _wrap(self, kind: str, function: Any, payload: int) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            tensor, group = arguments[payload], options.get("group")
            self.calls.append((kind, dist.get_world_size(group), tensor.numel() * tensor.element_size()))
            return function(*arguments, **options)

        return counted

    def __enter__(self) -> Counted:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(dist, "all_reduce", self._wrap("all_reduce", dist.all_reduce, 0))
        for name, kind in (("_all_gather", "all_gather"), ("_reduce_scatter", "reduce_scatter")):
            self.patch.setattr(collectives, name, self._wrap(kind, getattr(collectives, name), 1))
        for other in (
            "broadcast",
            "gather",
            "scatter",
            "send",
            "all_to_all",
            "all_to_all_single",
            "all_gather",
        ):
            self.patch.setattr(dist, other, refuse)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.patch.undo()


def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a step sends in a way that is not counted")


def steps(config: MeshConfig, dead: bool) -> list[list[tuple[str, int, int]]]:
    """The collectives of each of some steps, the tokens' way to their ranks included."""
    mesh = share_latents(build_mesh(), config.latent or 1)
    generator = torch.Generator().manual_seed(0)
    sae = SAEConfig(k=K, d_sae=D_SAE, k_aux=K_AUX, dead_after_tokens=1 if dead else 10**9, b_dec_init="zeros")
    trainer = SAETrainer(
        sae, OptimConfig(lr=1e-3), D_IN, STEPS, 0, mesh, shard_optimizer=config.shard_optimizer
    )
    batches = torch.randn(STEPS, mesh.num_ranks, BATCH // mesh.num_ranks, D_IN, generator=generator) + 3
    trainer.initialise(collectives.gather(batches[0, mesh.rank], mesh.latent))
    counted = []
    for batch in batches:
        with Counted() as step:
            trainer.train_step(collectives.gather(batch[mesh.rank], mesh.latent))
        counted.append(step.calls)
    return counted


MESHES = {
    "2 x 1": (2, MeshConfig(latent=1)),
    "1 x 2": (2, MeshConfig(latent=2)),
    "2 x 2": (4, MeshConfig(latent=2)),
    "2 x 2, moments sharded": (4, MeshConfig(latent=2, shard_optimizer=True)),
}


@pytest.mark.parametrize("dead", [False, True], ids=["none dead", "some dead"])
@pytest.mark.parametrize("mesh", MESHES)
def test_steps_send_what_the_formula_says(mesh, dead):
    num_ranks, config = MESHES[mesh]
    num_latent = config.latent or 1
    shape = StepShape(
        D_IN,
        D_SAE,
        K,
        BATCH,
        num_ranks // num_latent,
        num_latent,
        k_aux=K_AUX if dead else None,
        shard_optimizer=config.shard_optimizer,
    )
    expected: dict[tuple[str, str], int] = {}
    for payload in step_payloads(shape):
        key = payload.kind, payload.group
        expected[key] = expected.get(key, 0) + payload.num_bytes
    for rank in run_ranks(num_ranks, steps, config, dead):
        # The last: after the first one nothing has been silent for a token yet, and the question comes now and then.
        sent: dict[str, int] = {}
        for kind, _, num_bytes in rank[-1]:
            sent[kind] = sent.get(kind, 0) + num_bytes
        by_kind: dict[str, int] = {}
        for (kind, _), num_bytes in expected.items():
            by_kind[kind] = by_kind.get(kind, 0) + num_bytes
        assert sent == by_kind


def test_with_one_data_rank_gradients_send_little():
    """Nothing of the backward but b_dec's encoder part and a scalar: no matrix of any size leaves its rank."""
    largest = BATCH * D_IN * 4  # the reconstruction, of the forward
    for rank in run_ranks(2, steps, MeshConfig(latent=2), False):
        reduced = sorted(num_bytes for kind, _, num_bytes in rank[-1] if kind == "all_reduce")
        assert reduced == [4, D_IN * 4, largest]
