"""The order in which a cache is read: every row once an epoch, from any cursor on, on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigsae.config import DataConfig, UserError
from bigsae.data.cached_rows import CachedRows
from bigsae.data.tokens import merge_states


class FakeCache:
    """As many rows as `sizes` of its lanes say, and nothing in them."""

    def __init__(self, *sizes: int):
        self.num_rows = sum(sizes)
        self.index = SimpleNamespace(fingerprint=lambda: f"{sizes}")
        self._sizes = sizes

    def lanes(self) -> list[range]:
        ends = torch.tensor(self._sizes).cumsum(0).tolist()
        return [range(end - size, end) for end, size in zip(ends, self._sizes, strict=True)]

    def as_rows(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers).unsqueeze(1)


def rows_of(
    rank: int = 0, num_ranks: int = 1, sizes: tuple[int, ...] = (40, 33), **options: Any
) -> CachedRows:
    data = DataConfig(**({"num_shards": 7, "epochs": 2} | options))
    return CachedRows(FakeCache(*sizes), data, 5, rank, num_ranks, "cache")  # pyright: ignore[reportArgumentType]


def numbers(rows: CachedRows) -> list[int]:
    return [int(row[0]) for row in rows]


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_every_row_once_an_epoch_in_another_order(num_ranks):
    ranks = [numbers(rows_of(rank, num_ranks)) for rank in range(num_ranks)]
    halves = [(found[: len(found) // 2], found[len(found) // 2 :]) for found in ranks]
    for epoch in range(2):
        assert sorted(number for half in halves for number in half[epoch]) == list(range(73))
    assert halves[0][0] != sorted(halves[0][0]) and halves[0][0] != halves[0][1]


def test_as_made_is_the_order_of_each_lane():
    ranks = [numbers(rows_of(rank, 2, cached_order="as_made", epochs=1)) for rank in range(2)]
    assert ranks == [list(range(40)), list(range(40, 73))]
    both = numbers(rows_of(cached_order="as_made", epochs=1))
    assert both[:6] == [0, 40, 1, 41, 2, 42] and both[-2:] == [38, 39]


@pytest.mark.parametrize("order", ["shuffled", "as_made"])
@pytest.mark.parametrize("rank", [0, 1])
def test_going_on_from_every_row(order, rank):
    rows = rows_of(rank, 2, cached_order=order)
    states, found = [json.dumps(rows.state_dict())], []
    for row in rows:
        found.append(int(row[0]))
        states.append(json.dumps(rows.state_dict()))
    assert len(found) > 60
    for i, state in enumerate(states):
        again = rows_of(rank, 2, cached_order=order)
        again.load_state_dict(json.loads(state))
        assert again.state_dict() == json.loads(state)
        assert numbers(again) == found[i:]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 4)])
def test_going_on_on_another_number_of_ranks(before, after):
    found: Counter[int] = Counter()
    states = []
    for rank in range(before):
        rows = rows_of(rank, before)
        for _ in range(5 + 15 * rank):
            found[int(next(rows)[0])] += 1
        states.append(json.loads(json.dumps(rows.state_dict())))
    for rank in range(after):
        rows = rows_of(rank, after)
        rows.load_state_dict(merge_states(states))
        found.update(numbers(rows))
    assert found == dict.fromkeys(range(73), 2)


def test_what_cannot_be():
    with pytest.raises(UserError, match="holds 2 rows: use fewer ranks"):
        rows_of(0, 3, sizes=(2,))
    with pytest.raises(
        UserError, match=r"--data\.cached-order as_made: --activations cache was made by 2 ranks"
    ):
        rows_of(0, 3, cached_order="as_made")
    state = rows_of().state_dict()
    for changed, message in (
        ({"num_shards": 8}, r"--data\.num-shards is 8, but 7"),
        ({"cached_order": "as_made", "num_shards": 2}, r"--data\.num-shards is 2"),
        ({"sizes": (40, 32)}, r"--activations \(its index\)"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of(**changed).load_state_dict(state)
