"""What one rank of a node does before the others, and what ends the wait for a rank that does not come."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigsae.config import UserError
from bigsae.parallel import nodes
from bigsae.parallel.mesh import Mesh, alone, build_mesh
from bigsae.parallel.nodes import PeerLost, first_on_node, limit_new_groups, limit_waits, lost_peers_named
from tests.distributed.ranks import run_ranks


def mesh_of_two_nodes() -> Mesh:
    """Ranks 0 and 1 are one node, 2 and 3 the next."""
    os.environ.update(LOCAL_RANK=str(dist.get_rank() % 2), LOCAL_WORLD_SIZE="2")
    return build_mesh()


def take_turns(mesh: Mesh, folder: Path) -> bool:
    """Whether the node's other rank was in the block before this one."""
    node, first = mesh.rank // 2, mesh.rank % 2 == 0
    mine, other = folder / f"{node}_{first}", folder / f"{node}_{not first}"
    with first_on_node(mesh):
        if first:
            time.sleep(0.5)  # for the other one to come too early
        was_there = other.exists()
        mine.touch()
    return was_there


def fail_on(mesh: Mesh, rank: int, kind: type[Exception]) -> tuple[str, str, bool]:
    """What this rank raises where `rank` fails in the block, and whether it came to its turn."""
    entered = False
    try:
        with first_on_node(mesh):
            entered = True
            if mesh.rank == rank:
                raise kind("--model is nowhere")
    except Exception as error:
        dist.barrier()  # all are still in step
        return type(error).__name__, str(error), entered
    return "", "", entered


def wait_in_vain(mesh: Mesh) -> tuple[float, str]:
    """Rank 0 in a collective of a group of its own with a limit of 1.2 s, to which the others come after 4 s."""
    group = dist.new_group(backend="gloo")
    limit_waits((None, group), 0.02)
    dist.barrier()
    if mesh.rank:
        time.sleep(4)
        return 0.0, ""
    start = time.monotonic()
    with pytest.raises(PeerLost) as caught, lost_peers_named(0.02):
        dist.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - start, str(caught.value)


def make_a_group_alone(mesh: Mesh) -> tuple[float, str]:
    """Rank 0 makes a group with a limit of 1.2 s; the others never do."""
    if mesh.rank:
        time.sleep(4)
        return 0.0, ""
    limit_new_groups(0.02)
    start = time.monotonic()
    with pytest.raises(PeerLost) as caught, lost_peers_named(0.02):
        dist.new_group(backend="gloo")
    return time.monotonic() - start, str(caught.value)


def on_four_ranks(folder: str) -> dict[str, Any]:
    mesh = mesh_of_two_nodes()
    nodes._SECONDS_TO_SIGN = 1.0
    return {
        "turns": take_turns(mesh, Path(folder)),
        "first fails": fail_on(mesh, 2, UserError),
        "second fails": fail_on(mesh, 3, MemoryError),
        "waited": wait_in_vain(mesh),
        "made a group": make_a_group_alone(mesh),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(4, on_four_ranks, str(tmp_path_factory.mktemp("nodes")))


def test_the_first_rank_of_each_node_goes_first(found):
    assert [rank["turns"] for rank in found] == [False, True, False, True]


def test_an_error_on_the_first_rank_of_a_node_ends_all_before_their_turn(found):
    results = [rank["first fails"] for rank in found]
    assert {(kind, text) for kind, text, _ in results} == {("UserError", "--model is nowhere")}
    assert [entered for *_, entered in results] == [True, False, True, False]


def test_an_unexpected_error_on_a_later_rank_ends_all_with_its_name(found):
    results = [rank["second fails"] for rank in found]
    assert results[3] == ("MemoryError", "--model is nowhere", True)
    assert (
        results[:3] == [("PeerLost", "rank 3 of the run failed: MemoryError: --model is nowhere", True)] * 3
    )


def test_a_wait_ends_after_the_limit_with_a_line_that_names_it(found):
    seconds, message = found[0]["waited"]
    assert 1 < seconds < 3 + 2  # the limit, and the time that those who are left have to sign
    assert re.fullmatch(
        r"rank 1, 2, 3 of the run died.* --timeout 0\.02 minutes \(Timed out waiting 1200ms .*--resume.*",
        message,
    )


def test_nor_does_a_group_wait_longer_for_ranks_that_do_not_make_it(found):
    seconds, message = found[0]["made a group"]
    assert 1 < seconds < 3 + 2
    assert "of the run died, or did not answer within --timeout 0.02 minutes" in message


def test_alone_the_block_runs_once():
    entered = 0
    with first_on_node(alone(torch.device("cpu"))):
        entered += 1
    assert entered == 1
    with pytest.raises(KeyError), first_on_node(alone(torch.device("cpu"))):
        raise KeyError("x")


@pytest.mark.parametrize(
    "error", [RuntimeError("a size does not match"), UserError("--k"), PeerLost("rank 3")]
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, lost_peers_named(30):
        raise error
    assert caught.value is error
