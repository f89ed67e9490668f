"""A run that goes on on any numbers of ranks, one after the other: each row of its data is met once.

The ranks of a run live in one process here, one after the other: their rows, buffers and harvests, and what deals
these anew from a checkpoint on disk, are a run's. Of a mesh the data know only the number of ranks; on meshes, with
processes, test_elastic.py does the same.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigsae.config import DataConfig
from bigsae.data.buffer import ActivationBuffer
from bigsae.data.harvest import Harvest
from bigsae.data.tokens import TokenRows
from bigsae.parallel.mesh import Mesh, alone
from bigsae.training import checkpoint
from bigsae.training.saved import Saved
from bigsae.training.saving import _deal_data
from tests.data.corpora import KINDS, make_source

CTX, ROWS, BATCH, CAPACITY, MOST_RANKS = 6, 2, 5, 40, 6


@dataclass
class Rank:
    """What a rank of a run has of the data."""

    mesh: Mesh
    rows: TokenRows
    harvest: Harvest


def as_activations(ids: Tensor) -> dict[str, Tensor]:
    """Of each token its id, which float32 holds."""
    return {"x": ids[..., None].float()}


def make_ranks(source: Any, data: DataConfig, num_ranks: int) -> list[Rank]:
    ranks = []
    for rank in range(num_ranks):
        # Without groups: each refills by itself, where those of a run refill together.
        mesh = replace(alone(torch.device("cpu")), rank=rank, num_ranks=num_ranks)
        rows = TokenRows(source, None, CTX, data, 0, rank, num_ranks)
        buffer = ActivationBuffer({"x": 1}, CAPACITY, ROWS * CTX, torch.float32, mesh.device, 0, rank)
        harvest = Harvest(rows, as_activations, torch.ones_like, buffer, ROWS, CTX, BATCH, mesh)
        ranks.append(Rank(mesh, rows, harvest))
    return ranks


def stopping(after: int) -> Callable[[], bool]:
    """Says that the run is to stop, from its call number `after` on."""
    calls = iter(range(10**9))
    return lambda: next(calls) >= after


def train(ranks: list[Rank], num_batches: int, stop_after: int | None) -> list[int]:
    """So many steps, fewer where the data end, and a stop within the refill after them; the ids that were met."""
    seen: list[int] = []
    for step in range(num_batches):
        filled = [rank.harvest.fill(step, lambda: False) for rank in ranks]  # all of them, whatever one says
        if not all(filled):
            return seen
        for rank in ranks:
            seen += rank.harvest.read()["x"].flatten().int().tolist()
    if stop_after is not None:
        for rank in ranks:
            rank.harvest.fill(num_batches, stopping(stop_after))
    return seen


def save(ranks: list[Rank], folder: Path, step: int) -> Saved:
    """A checkpoint of all ranks, as `saving.save` keeps their part of it."""
    tensors = {f"rank_{rank.mesh.rank}/buffer/{key}": value
               for rank in ranks for key, value in rank.harvest.buffer.tensors().items()}  # fmt: skip
    path = checkpoint.save(folder, step, tensors, {}, {}, {}, 1, alone(torch.device("cpu")))
    states = [
        {
            "buffer": rank.harvest.buffer.counters(),
            "refilling": rank.harvest.refilling,
            "data": rank.rows.state_dict(),
        }
        for rank in ranks
    ]
    return Saved(path, len(ranks), {}, json.loads(json.dumps(states)), 0)


def go_on(ranks: list[Rank], saved: Saved) -> None:
    """As `saving.resume` does with data and buffers."""
    for rank in ranks:
        if len(ranks) != saved.num_ranks:
            run: Any = SimpleNamespace(mesh=rank.mesh, rows=rank.rows, harvest=rank.harvest)
            _deal_data(run, saved)
            continue
        state = saved.ranks[rank.mesh.rank]
        waiting = rank.harvest.buffer.empty_tensors(state["buffer"])
        named = {f"rank_{rank.mesh.rank}/buffer/{key}": value for key, value in waiting.items()}
        checkpoint.read_tensors(saved, named)
        rank.harvest.load(waiting, state["buffer"], state["refilling"])
        rank.rows.load_state_dict(state["data"])


LEGS = st.lists(
    st.tuples(st.integers(1, MOST_RANKS), st.integers(0, 12), st.none() | st.integers(0, 3)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    legs=LEGS,
    kind=st.sampled_from(KINDS),
    num_shards=st.integers(MOST_RANKS, 9),
    num_documents=st.integers(40, 90),
)
def test_no_row_is_lost_or_repeated_on_any_ranks(legs, kind, num_shards, num_documents):
    """`legs`: ranks, steps, and after how many forwards of a refill the run is stopped there."""
    # Documents of one to four rows, no id twice.
    lengths = [CTX * (1 + i % 4) for i in range(num_documents)]
    starts = [sum(lengths[:i]) for i in range(num_documents)]
    documents = [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
    source = make_source(kind, {"input_ids": documents})
    data = DataConfig(num_shards=num_shards, epochs=1)
    met: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        saved, ranks = None, []
        for step, (num_ranks, num_batches, stop_after) in enumerate(legs):
            ranks = make_ranks(source, data, num_ranks)
            if saved is not None:
                go_on(ranks, saved)
            met += train(ranks, num_batches, stop_after)
            saved = save(ranks, Path(folder), step)
            for rank in ranks:
                rank.rows.close()
    for rank in ranks:
        met += rank.harvest.buffer.tensors()["x"].flatten().int().tolist()
        met += [token for row in rank.rows for token in row.tolist()]
    assert Counter(met) == Counter(range(sum(lengths)))
