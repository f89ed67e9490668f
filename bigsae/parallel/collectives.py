"""Reductions over a group of ranks. With group None (one rank) each of them does nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace `tensor` by its sum over the group, and return it."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def max_ints(values: Iterable[int], group: ProcessGroup | None) -> list[int]:
    """The largest of each value over the group (a CPU group: the result is read at once)."""
    values = list(values)
    if group is None:
        return values
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def min_int(value: int, group: ProcessGroup | None) -> int:
    """The smallest value over the group (a CPU group: the result is read at once)."""
    return -max_ints([-value], group)[0]


def barrier(group: ProcessGroup | None) -> None:
    """Wait until every rank of the group is here."""
    if group is not None:
        dist.barrier(group=group)


def first_text(text: str, group: ProcessGroup | None) -> str:
    """The first text over the group that is not empty, by rank; empty where all are (a CPU group)."""
    if group is None:
        return text
    texts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return next(filter(None, texts), "")
