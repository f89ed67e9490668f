"""Where a rank computes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bigsae.parallel import mesh
from bigsae.parallel.mesh import build_mesh
from tests.distributed.ranks import run_ranks


def test_the_device_follows_from_the_local_rank(monkeypatch):
    """Rank 9 of two nodes of eight is the second of its node: there is no device 9."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(mesh.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mesh.dist, "get_world_size", lambda: 16)
    monkeypatch.setattr(mesh.dist, "get_rank", lambda: 9)
    monkeypatch.setattr(mesh.dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(mesh, "share_latents", lambda built, num_latent: built)  # makes groups of real ranks
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    built = build_mesh()
    assert built.device == torch.device("cuda", 1)
    assert chosen == [built.device]
    assert (built.rank, built.num_local_ranks, built.is_main) == (9, 8, False)


def test_alone_there_are_no_groups():
    built = build_mesh()
    assert (built.num_ranks, built.data, built.control, built.is_main) == (1, None, None, True)


def describe() -> tuple[int, int, bool]:
    """What a rank finds out about itself."""
    built = build_mesh()
    total = torch.ones(1)
    dist.all_reduce(total, group=built.data)
    assert total.item() == built.num_ranks
    return built.rank, built.num_ranks, built.is_main


def test_two_ranks():
    assert run_ranks(2, describe) == [(0, 2, True), (1, 2, False)]
