"""Each kernel beside torch's own ways to the same result, and beside the time that its memory traffic takes alone.

That bound is the bytes that must be read, and written, at the speed at which this device does so in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benching.common import finish, paired_times, percentile, summarise
from benching.step import installed

_READ, _WRITE = "read", "write"
_CHECKED_ROWS = 64
_PASS_BYTES = 2**28
# A peer that would hold more than so many elements is left out: [batch, d_sae] at the largest shapes.
_MOST_ELEMENTS = 2**31


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py kernels`."""
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of pre_acts")


@dataclass(frozen=True)
class Case:
    """One operation: ours first, then others' ways."""

    name: str
    functions: dict[str, Callable[[], Any]]
    read: float
    """Bytes that must be read."""
    written: float = 0.0
    """Bytes that must be written."""
    check: Callable[[], None] = field(default=lambda: None)
    """Raises AssertionError where ours is wrong."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of one step."""

    pre_acts: Tensor
    x: Tensor
    d_out: Tensor
    W_dec: Tensor
    values: Tensor
    indices: Tensor
    k: int


def run(arguments: argparse.Namespace) -> None:
    """Check and time every case, each with a pass that reads and one that writes memory."""
    device = torch.device(arguments.device)
    inputs = make_inputs(arguments, device)
    rows: dict[str, dict[str, float]] = {}
    for case in cases(inputs):
        case.check()
        passes = memory_passes(device)
        seconds = paired_times({**case.functions, **passes}, arguments.rounds, arguments.warmup)
        bound = sum(
            num_bytes / _PASS_BYTES * percentile(seconds[kind], 50)
            for kind, num_bytes in ((_READ, case.read), (_WRITE, case.written))
        )
        ours = next(iter(case.functions))
        found = summarise({name: seconds[name] for name in case.functions}, ours)
        for name, row in found.items():
            row["bound_ms"] = 1e3 * bound
            row["to_bound"] = row["ms_p50"] / row["bound_ms"]
            rows[f"{case.name}: {name}"] = row
            print(f"{case.name}: {name}: {row['to_bound']:.2f} x the bound of {row['bound_ms']:.2f} ms")
    finish(arguments, rows, installed("torch", "triton"))


def make_inputs(arguments: argparse.Namespace, device: torch.device) -> Inputs:
    """Random ones; the selected latents are the kernel's own."""
    from bigsae.kernels.topk import select_topk

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    pre_acts = normal(arguments.batch, arguments.d_sae).to(getattr(torch, arguments.dtype))
    values, indices = select_topk(pre_acts, arguments.k)
    x, d_out = (normal(arguments.batch, arguments.d_in) for _ in range(2))
    W_dec = F.normalize(normal(arguments.d_sae, arguments.d_in), dim=1)
    return Inputs(pre_acts, x, d_out, W_dec, values.float(), indices, arguments.k)


def memory_passes(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Read, and write, _PASS_BYTES."""
    tensor = torch.ones(_PASS_BYTES // 8, dtype=torch.int64, device=device)
    other = torch.ones_like(tensor)
    return {_READ: tensor.sum, _WRITE: other.zero_}


def cases(inputs: Inputs) -> Iterator[Case]:
    """Selection, decode, gradients and JumpReLU, in the order of a step."""
    yield selection(inputs)
    yield decode(inputs)
    yield gradients(inputs)
    yield compaction(inputs)
    yield jumprelu(inputs)


def selection(i: Inputs) -> Case:
    """The k largest of each row; torch.topk breaks ties in no order, which is less than is asked for."""
    from bigsae.kernels import reference
    from bigsae.kernels.topk import select_topk

    def check() -> None:
        part = i.pre_acts[:_CHECKED_ROWS]
        for found, expected in zip(select_topk(part, i.k), reference.select_topk(part, i.k), strict=True):
            assert torch.equal(found, expected)

    functions = {
        "bigsae": lambda: select_topk(i.pre_acts, i.k),
        "torch.topk, ties in any order": lambda: torch.topk(i.pre_acts, i.k, dim=1),
    }
    return Case("top-k", functions, i.pre_acts.nbytes, check=check)


def decode(i: Inputs) -> Case:
    """Reconstructions, and the gradient of the activations."""
    from bigsae.kernels import reference
    from bigsae.kernels.decode import gather_dot, gather_sum

    def ours() -> tuple[Tensor, Tensor]:
        recon = gather_sum(i.values, i.indices, i.W_dec, dtype=torch.float32)
        return recon, gather_dot(i.d_out, i.W_dec, i.indices, dtype=torch.float32)

    def dense() -> tuple[Tensor, Tensor]:
        recon = reference.decode(i.values, i.indices, i.W_dec)
        return recon, (i.d_out @ i.W_dec.T).gather(1, i.indices)

    def by_gather() -> tuple[Tensor, Tensor]:
        rows = i.W_dec[i.indices]
        return torch.einsum("bk,bkd->bd", i.values, rows), torch.einsum("bd,bkd->bk", i.d_out, rows)

    others = {
        "dense [batch, d_sae]": (dense, i.pre_acts.numel()),
        "gather and einsum": (by_gather, i.indices.numel() * i.W_dec.shape[1]),
    }
    read = 2 * i.indices.numel() * i.W_dec.shape[1] * 4
    return _case("decode and its gradient", ours, others, read, i.d_out.nbytes + i.values.nbytes)


def gradients(i: Inputs) -> Case:
    """Of both matrices, from the unsorted indices on."""
    from bigsae.kernels import reference
    from bigsae.kernels.sparse_grad import LatentMajor

    d_sae = len(i.W_dec)

    def ours() -> tuple[Tensor, Tensor]:
        pattern = LatentMajor(i.indices, d_sae)
        return pattern.rows(i.values, i.x), pattern.rows(i.values, i.d_out)

    def dense() -> tuple[Tensor, Tensor]:
        spread = reference.scatter_dense(i.values, i.indices, d_sae).T
        return spread @ i.x, spread @ i.d_out

    def by_index_add() -> tuple[Tensor, ...]:
        latents, tokens = i.indices.flatten(), torch.arange(len(i.x), device=i.x.device)
        tokens = tokens.repeat_interleave(i.k)
        return tuple(
            torch.zeros_like(i.W_dec).index_add_(0, latents, rows[tokens] * i.values.view(-1, 1))
            for rows in (i.x, i.d_out)
        )

    others = {
        "dense [batch, d_sae]": (dense, i.pre_acts.numel()),
        "index_add_": (by_index_add, i.indices.numel() * i.W_dec.shape[1]),
    }
    return _case("gradients of both matrices", ours, others, 0, 2 * i.W_dec.nbytes)


def compaction(i: Inputs) -> Case:
    """All pre_acts above a bound, of which k a token are."""
    from bigsae.kernels.encode_above import compact_above

    bound = i.values[:, -1].mean().to(i.pre_acts.dtype)
    bounds = bound.float().expand(i.pre_acts.shape[1]).contiguous()

    def by_nonzero() -> tuple[Tensor, Tensor, Tensor]:
        tokens, latents = (i.pre_acts > bound).nonzero(as_tuple=True)
        return i.pre_acts[tokens, latents], latents, torch.bincount(tokens, minlength=len(i.pre_acts))

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return compact_above(i.pre_acts, bounds)

    return _case("pre_acts above a bound", ours, {"nonzero": (by_nonzero, 0)}, i.pre_acts.nbytes, 0)


def jumprelu(i: Inputs) -> Case:
    """JumpReLU and its gradients, on the pairs above the window and, by torch, on all."""
    from bigsae.kernels import reference
    from bigsae.kernels.jumprelu import jumprelu as sparse_jumprelu
    from bigsae.kernels.pairs import RaggedPairs

    bandwidth = 0.05
    threshold = i.values[:, -1].mean().expand(i.pre_acts.shape[1]).contiguous().requires_grad_()
    above = (i.pre_acts > threshold.detach() - bandwidth / 2).nonzero()
    crow = F.pad(torch.bincount(above[:, 0], minlength=len(i.x)).cumsum(0), (1, 0))
    pairs = RaggedPairs(above[:, 1].contiguous(), crow, i.pre_acts.shape[1])
    few = i.pre_acts[above[:, 0], above[:, 1]].float().requires_grad_()
    every = i.pre_acts.float().requires_grad_()

    def ours() -> tuple[Tensor, ...]:
        acts, active = sparse_jumprelu(few, threshold, pairs, bandwidth)
        (d_threshold,) = torch.autograd.grad(acts.sum() + active.sum(), threshold)
        return acts.sum(), active.sum(), d_threshold

    def dense() -> tuple[Tensor, ...]:
        acts, active = reference.jumprelu(every, threshold, bandwidth)
        (d_threshold,) = torch.autograd.grad(acts.sum() + active.sum(), threshold)
        return acts.sum(), active.sum(), d_threshold

    # Value and gradient of each pair, read and written once.
    num_bytes = 2 * few.nbytes
    others = {"dense [batch, d_sae]": (dense, 3 * i.pre_acts.numel())}
    return _case("JumpReLU of what is above", ours, others, num_bytes, num_bytes)


def _case(
    name: str,
    ours: Callable[[], tuple[Tensor, ...]],
    others: dict[str, tuple[Callable[[], tuple[Tensor, ...]], int]],
    read: float,
    written: float,
) -> Case:
    """`others` come with the elements that they hold at a time; all must give what ours gives, to rounding."""
    kept = {key: function for key, (function, size) in others.items() if size <= _MOST_ELEMENTS}
    for key in others.keys() - kept.keys():
        print(f"{name}: {key}: skipped, as it would hold {others[key][1]:.1e} elements")

    def check() -> None:
        found = ours()
        for key, function in kept.items():
            for a, b in zip(found, function(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")

    return Case(name, {"bigsae": ours, **kept}, read, written, check)
