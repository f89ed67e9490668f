"""Reductions and exchanges over a group of ranks. With group None (one rank) each of them does nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Renamed in torch 2.13, which warns of the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace `tensor` by its sum over the group, and return it."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def max_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace `tensor` by its maximum over the group, and return it."""
    if group is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def gather(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensors [n, ...] of all ranks of the group, by rank: [n * ranks, ...]. All of the same shape."""
    if group is None:
        return tensor
    whole = tensor.new_empty(len(tensor) * dist.get_world_size(group), *tensor.shape[1:])
    _all_gather(whole, tensor.contiguous(), group=group)
    return whole


def fill_from_parts_(whole: Tensor, part: Tensor, group: ProcessGroup | None) -> None:
    """Bring each rank's part [n, ...], a view of its own rows of `whole` [n * ranks, ...], to the other ranks."""
    if group is not None:
        _all_gather(whole, part.clone(), group=group)


def sum_to_parts(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's part [n, ...] of the sum over the group of `tensor` [n * ranks, ...]."""
    if group is None:
        return tensor
    part = tensor.new_empty(len(tensor) // dist.get_world_size(group), *tensor.shape[1:])
    _reduce_scatter(part, tensor, group=group)
    return part


def gather_on_host(tensor: Tensor, group: ProcessGroup | None, keep: bool = True) -> Tensor:
    """As `gather`, with the result on the CPU: one rank's part after the other passes through the device.

    Ranks without `keep` get an empty tensor.
    """
    if group is None:
        return tensor.cpu()
    sources = dist.get_process_group_ranks(group)
    num_rows = len(tensor) * len(sources) if keep else 0
    whole = torch.empty(num_rows, *tensor.shape[1:], dtype=tensor.dtype)
    received = torch.empty_like(tensor)
    for i, source in enumerate(sources):
        sent = tensor.contiguous() if source == dist.get_rank() else received
        dist.broadcast(sent, src=source, group=group)
        if keep:
            whole[i * len(tensor) : (i + 1) * len(tensor)] = sent
    return whole


def objects(value: Any, group: ProcessGroup | None) -> list[Any]:
    """The values of all ranks of the group, by rank (a CPU group)."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


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
    return next(filter(None, objects(text, group)), "")
