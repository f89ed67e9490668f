"""What steps really send, counted, is what parallel/traffic.py and docs/mesh.md say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigsae import MeshConfig, OptimConfig, SAEConfig
from bigsae.checks import resolve_sae
from bigsae.parallel import collectives
from bigsae.parallel.choose import step_shape
from bigsae.parallel.memory import sae_shape
from bigsae.parallel.mesh import build_mesh, share_latents
from bigsae.parallel.traffic import StepShape, step_payloads
from bigsae.training.trainer import SAETrainer
from tests.distributed.ranks import run_ranks

D_IN, D_SAE, K, K_AUX, BATCH, STEPS = 24, 384, 4, 12, 64, 6
HISTOGRAMS = 16384, 4096


class Counted:
    """Every collective of torch.distributed while it is in force: (kind, group, bytes) of each call."""

    def __init__(self):
        self.calls: list[tuple[str, str, int]] = []

    def _wrap(self, kind: str, function: Any, payload: int) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            tensor, group = arguments[payload], options.get("group")
            self.calls.append((kind, group_name(group), tensor.numel() * tensor.element_size()))
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
            "reduce",
            "barrier",
            "all_gather_object",
            "all_to_all",
            "all_to_all_single",
            "all_gather",
        ):
            self.patch.setattr(dist, other, refuse)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.patch.undo()


def group_name(group: Any) -> str:
    """data, latent or world: neighbours share latents."""
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == dist.get_world_size():
        return "world"
    return "latent" if ranks[1] == ranks[0] + 1 else "data"


def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("a step sends in a way that is not counted")


def steps(config: MeshConfig, dead: bool, sae: SAEConfig | None = None) -> list[list[tuple[str, str, int]]]:
    """The collectives of each of some steps, the tokens' way to their ranks included."""
    mesh = share_latents(build_mesh(), config.latent or 1)
    generator = torch.Generator().manual_seed(0)
    sae = sae or SAEConfig(
        k=K, d_sae=D_SAE, k_aux=K_AUX, dead_after_tokens=1 if dead else 10**9, b_dec_init="zeros"
    )
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
    # With one group of all ranks, that group is the world.
    alone = "world" if 1 in (shape.num_data, shape.num_latent) else None
    expected = total((p.kind, alone or p.group, p.num_bytes) for p in step_payloads(shape))
    for rank in run_ranks(num_ranks, steps, config, dead):
        # The last: after the first one nothing has been silent for a token yet, and the question comes now and then.
        assert total(rank[-1]) == expected


def total(calls: Iterable[tuple[str, str, int]]) -> dict[tuple[str, str], int]:
    sums: dict[tuple[str, str], int] = {}
    for kind, group, num_bytes in calls:
        sums[kind, group] = sums.get((kind, group), 0) + num_bytes
    return sums


OTHERS = {
    "multi_topk": SAEConfig(k=K, d_sae=D_SAE, multi_topk=True),
    "topk in bfloat16": SAEConfig(k=K, d_sae=D_SAE, dtype="bfloat16"),
    "topk, autocast": SAEConfig(k=K, d_sae=D_SAE, autocast=True),
    "batchtopk": SAEConfig("batchtopk", k=K, d_sae=D_SAE),
    "matryoshka": SAEConfig("matryoshka", k=K, d_sae=D_SAE),
    "jumprelu": SAEConfig("jumprelu", target_l0=K, d_sae=D_SAE),
    "gated": SAEConfig("gated", d_sae=D_SAE),
    "standard": SAEConfig("standard", d_sae=D_SAE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_send_it_too(name):
    """All that the formula names; beside it scalars, and histograms of a selection over all ranks."""
    sae = OTHERS[name]
    optim = OptimConfig()
    shape = step_shape(
        sae_shape(resolve_sae(sae, transcoder=False), optim, D_IN, D_SAE),
        2,
        2,
        BATCH,
        False,
        4,
        with_auxk=False,
    )
    expected = total((p.kind, "world", p.num_bytes) for p in step_payloads(shape))
    for rank in run_ranks(2, steps, MeshConfig(latent=2), False, sae):
        small = [
            call for call in rank[-1] if call[0] == "all_reduce" and (call[2] <= 16 or call[2] in HISTOGRAMS)
        ]
        large = [call for call in rank[-1] if call not in small]
        scalars = 4  # the norm's, which the formula has
        named = {key: value - scalars * (key[0] == "all_reduce") for key, value in expected.items()}
        assert total(large) == named
        assert len(small) < 16 and (sae.architecture in ("batchtopk", "matryoshka")) == any(
            call[2] in HISTOGRAMS for call in small
        )


def test_with_one_data_rank_gradients_send_little():
    """Nothing of the backward but b_dec's encoder part and a scalar: no matrix of any size leaves its rank."""
    largest = BATCH * D_IN * 4  # the reconstruction, of the forward
    for rank in run_ranks(2, steps, MeshConfig(latent=2), False):
        reduced = sorted(num_bytes for kind, _, num_bytes in rank[-1] if kind == "all_reduce")
        assert reduced == [4, D_IN * 4, largest]
