"""The language model from the Hub, on two nodes of two ranks: who downloads, and the groups it is then held in."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigsae.config import LMConfig
from bigsae.lm.hookpoints import locate, resolve_hookpoints
from bigsae.lm.loading import download_lm, load_lm, meta_model, process_groups, resolve_layout
from bigsae.parallel.mesh import build_mesh
from bigsae.parallel.nodes import first_on_node, limit_waits
from tests.distributed.hub_server import REPOSITORY, hub
from tests.distributed.ranks import run_ranks
from tests.hub.environment import use_hub
from tests.models import tiny_llama

CPU = torch.device("cpu")


def download_and_load(folder: str, endpoint: str) -> dict[str, Any]:
    """Each node with a cache of its own; the model sharded within the node, replicated on the other."""
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, endpoint, Path(folder, "hf"))
        return downloaded_and_loaded(folder)


def downloaded_and_loaded(folder: str) -> dict[str, Any]:
    rank = dist.get_rank()
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    mesh = build_mesh()
    lm = LMConfig(dtype="float32", shard_size=2, kwargs=f'{{"cache_dir": "{folder}/node_{rank // 2}"}}')
    with first_on_node(mesh):
        meta, _ = meta_model(REPOSITORY, lm)
    with first_on_node(mesh):
        download_lm(REPOSITORY, lm, meta)
    sites = locate(meta, resolve_hookpoints(["model.layers.1"], meta))
    model = load_lm(REPOSITORY, lm, meta, resolve_layout(lm, 4, 2), CPU, sites)
    groups = process_groups(model)
    limit_waits(groups, 7)
    weight: Any = model.get_input_embeddings().weight
    return {
        "sum": weight.full_tensor().sum().item(),
        "groups": sorted(dist.get_process_group_ranks(group) for group in groups),
        "limits": {group._get_backend(CPU).options._timeout for group in groups},
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """What each rank has, and all requests to the Hub."""
    folder = tmp_path_factory.mktemp("download")
    tiny_llama(folder / "lm", num_layers=2)
    with hub(folder / "lm") as (endpoint, requests):
        return run_ranks(4, download_and_load, str(folder), endpoint), requests


def test_each_file_is_downloaded_once_a_node(loaded):
    ranks, requests = loaded
    assert len({rank["sum"] for rank in ranks}) == 1
    got = Counter(Path(path).name for method, path in requests if method == "GET" and "/resolve/" in path)
    assert got["config.json"] == got["model.safetensors"] == 2
    assert max(got.values()) == 2, got


def test_the_waits_in_the_groups_of_a_sharded_model_are_limited(loaded):
    """Those within a node, in which its weights travel, and those across: both of HSDP's."""
    ranks, _ = loaded
    assert [rank["groups"] for rank in ranks] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[0, 2], [2, 3]],
        [[1, 3], [2, 3]],
    ]
    assert all(rank["limits"] == {timedelta(minutes=7)} for rank in ranks)
