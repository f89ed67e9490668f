"""Ranks refill together whatever each gathers: same number of forwards, nothing lost, one end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigsae.config import UserError
from bigsae.data.buffer import ActivationBuffer
from bigsae.data.harvest import Harvest
from bigsae.parallel.mesh import build_mesh
from tests.distributed.ranks import run_ranks

CTX, ROWS, BATCH, CAPACITY = 8, 2, 10, 60
SPECIAL = 0


def make_rows(rank: int, num_rows: int, special_share: float) -> Tensor:
    """Rows of distinct numbers; a share of the positions holds special tokens instead."""
    rows = torch.arange(1, num_rows * CTX + 1).view(num_rows, CTX) + 100_000 * rank
    drop = torch.rand(rows.shape, generator=torch.Generator().manual_seed(rank)) < special_share
    return rows.masked_fill(drop, SPECIAL)


def harvest_all(num_rows: tuple[int, int], special: tuple[float, float], max_batches: int) -> dict:
    """Harvest until the end or `max_batches`; what this rank read, what waits, what it ran."""
    mesh = build_mesh()
    rows = make_rows(mesh.rank, num_rows[mesh.rank], special[mesh.rank])
    given = iter(rows)
    num_forwards = 0

    def extract(ids: Tensor) -> dict[str, Tensor]:
        nonlocal num_forwards
        num_forwards += 1
        torch.distributed.barrier()  # as an FSDP forward: hangs unless every rank comes
        return {"x": ids[..., None].float().expand(-1, -1, 2)}

    buffer = ActivationBuffer({"x": 2}, CAPACITY, ROWS * CTX, torch.float32, mesh.device, 0, mesh.rank)
    harvest = Harvest(given, extract, lambda ids: ids != SPECIAL, buffer, ROWS, CTX, BATCH, mesh)
    read: list[int] = []
    num_batches = 0
    while num_batches < max_batches and harvest.fill(num_batches, lambda: False):
        read += harvest.read()["x"][:, 0].int().tolist()
        num_batches += 1
    waiting = buffer.read(buffer.num_unread)["x"][:, 0].int().tolist()
    return {
        "read": read,
        "waiting": waiting,
        "left": sum(1 for _ in given) * CTX,
        "real": sorted(rows[rows != SPECIAL].tolist()),
        "num_forwards": num_forwards,
        "num_batches": num_batches,
    }


@pytest.mark.parametrize("special", [(0.0, 0.9), (0.9, 0.0)])
def test_one_rank_with_far_more_special_tokens(special):
    """One rank keeps a tenth of its tokens: the other waits for it, with forwards that come to nothing."""
    results = run_ranks(2, harvest_all, (2000, 2000), special, 40)
    for result in results:
        assert result["num_batches"] == 40
        gathered = sorted(result["read"] + result["waiting"])
        assert gathered == result["real"][: len(gathered)]  # each once, none skipped
    assert len({result["num_forwards"] for result in results}) == 1
    rich, poor = sorted(results, key=lambda result: len(result["real"]), reverse=True)
    assert rich["left"] > poor["left"]


def test_data_that_ends_on_one_rank_ends_all_at_the_same_step():
    results = run_ranks(2, harvest_all, (21, 200), (0.0, 0.0), 10_000)
    assert [result["num_batches"] for result in results] == [21 * CTX // BATCH] * 2
    for result in results:
        gathered = sorted(result["read"] + result["waiting"])
        assert gathered == result["real"][: len(gathered)]
    assert results[0]["left"] == 0


def broken_on_rank_1() -> str:
    """The error that each rank gets where rank 1 alone meets an infinite activation."""
    mesh = build_mesh()
    rows = make_rows(mesh.rank, 50, 0.0)

    def extract(ids: Tensor) -> dict[str, Tensor]:
        fine = ids[..., None].float().expand(-1, -1, 2)
        return {"fine": fine, "broken": fine / 0 if mesh.rank == 1 else fine}

    widths = {"fine": 2, "broken": 2}
    buffer = ActivationBuffer(widths, CAPACITY, ROWS * CTX, torch.float32, mesh.device, 0, mesh.rank)
    harvest = Harvest(iter(rows), extract, lambda ids: ids != SPECIAL, buffer, ROWS, CTX, BATCH, mesh)
    try:
        harvest.fill(17, lambda: False)
    except UserError as error:
        return str(error)
    return ""


def test_activations_that_are_no_numbers_stop_every_rank():
    for message in run_ranks(2, broken_on_rank_1):
        assert "non-finite activations at broken before step 17" in message
        assert "--lm.dtype" in message


def test_rows_of_special_tokens_alone_are_an_error_and_no_endless_refill():
    buffer = ActivationBuffer({"x": 2}, CAPACITY, 64 * CTX, torch.float32, torch.device("cpu"), 0, 0)
    nothing = iter(torch.full((100_000, CTX), SPECIAL))
    harvest = Harvest(
        nothing, lambda ids: {"x": torch.zeros(*ids.shape, 2)}, lambda ids: ids != SPECIAL, buffer, 64, CTX, BATCH,
        build_mesh(),
    )  # fmt: skip
    with pytest.raises(UserError, match="special tokens alone"):
        harvest.fill(0, lambda: False)


def stop_within_a_refill() -> list[int]:
    """Rank 0 asks to stop before its third forward; going on afterwards reads what a straight run reads."""
    mesh = build_mesh()

    def read(stop_at: int | None) -> list[int]:
        calls = 0

        def should_stop() -> bool:
            nonlocal calls
            calls += 1
            return mesh.rank == 0 and calls == stop_at

        buffer = ActivationBuffer({"x": 2}, CAPACITY, ROWS * CTX, torch.float32, mesh.device, 0, mesh.rank)
        rows = make_rows(mesh.rank, 50, 0.2)
        harvest = Harvest(
            iter(rows), lambda ids: {"x": ids[..., None].float().expand(-1, -1, 2)}, lambda ids: ids != SPECIAL,
            buffer, ROWS, CTX, BATCH, mesh,
        )  # fmt: skip
        if not harvest.fill(0, should_stop):
            assert harvest.refilling
            assert buffer.num_waiting < CAPACITY
            assert harvest.fill(0, lambda: False)
        return harvest.read()["x"][:, 0].int().tolist()

    stopped = read(stop_at=3)
    assert stopped == read(stop_at=None)
    return stopped


def stop_while_there_are_no_rows() -> tuple[bool, int]:
    """Rank 1 asks to stop the third time that it is asked; neither has rows meanwhile."""
    mesh = build_mesh()
    calls = forwards = 0

    def should_stop() -> bool:
        nonlocal calls
        calls += 1
        return mesh.rank == 1 and calls == 3

    def extract(ids: Tensor) -> dict[str, Tensor]:
        nonlocal forwards
        forwards += 1
        return {"x": ids[..., None].float().expand(-1, -1, 2)}

    buffer = ActivationBuffer({"x": 2}, CAPACITY, ROWS * CTX, torch.float32, mesh.device, 0, mesh.rank)
    harvest = Harvest(
        iter(make_rows(mesh.rank, 50, 0.0)), extract, lambda ids: ids != SPECIAL, buffer, ROWS, CTX, BATCH, mesh,
        lambda num_rows, seconds: False,
    )  # fmt: skip
    return harvest.fill(0, should_stop), forwards


def test_ranks_that_wait_for_rows_hear_that_they_shall_stop():
    assert run_ranks(2, stop_while_there_are_no_rows) == [(False, 0)] * 2


def test_a_refill_that_was_stopped_goes_on():
    run_ranks(2, stop_within_a_refill)
