"""The harvest of a run, from text to activations in the buffer, beside a bare truncated forward."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benching.common import finish, percentile, summarise
from benching.lm import Bare

# Micro-batches of a round, about as many as a refill has here.
_MICRO_BATCHES = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py harvest`."""
    parser.set_defaults(rounds=12, warmup=2)
    parser.add_argument("--model", default=".quickstart/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument("--text", default=".quickstart/sotu", help="as bigsae.train's --dataset")
    parser.add_argument("--hookpoint", default="model.layers.6")
    parser.add_argument("--rows", type=int, default=8, help="token rows in one forward")
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--buffer-dtype", choices=("float32", "bfloat16"), default="bfloat16")


def run(arguments: argparse.Namespace) -> None:
    """Refills in turn with bare forwards of as many rows; what is compared is the time of a micro-batch.

    The bare forward has its tokens ready, on the device, and throws its activations away. The harvest reads and
    tokenises text, leaves out special tokens, and writes what is left into the buffer, in its data type.
    """
    from bigsae.config import BufferConfig, DataConfig, LMConfig, TrainConfig
    from bigsae.data.text import open_text
    from bigsae.lm.activations import Extractor
    from bigsae.lm.flops import forward_work
    from bigsae.lm.hookpoints import locate, resolve_hookpoints
    from bigsae.lm.loading import load_lm, meta_model, resolve_layout
    from bigsae.parallel.mesh import build_mesh
    from bigsae.training.supply import build_harvest

    lm, data = LMConfig(dtype=arguments.dtype, micro_batch_rows=arguments.rows), DataConfig()
    mesh = build_mesh()
    meta, config = meta_model(arguments.model, lm)
    sites = locate(meta, resolve_hookpoints([arguments.hookpoint], meta))
    layout = resolve_layout(lm, 1, 1, {})
    # Two copies: nnsight stays in a model that it has once wrapped.
    bare, model = (load_lm(arguments.model, lm, meta, layout, mesh.device, sites) for _ in range(2))
    text = open_text(arguments.text, data, arguments.model, lm, config, arguments.ctx_len)
    micro_batch = arguments.rows * arguments.ctx_len
    # A refill comes when half is used, so half is as many micro-batches as a round has.
    of_run = TrainConfig(
        model=arguments.model, dataset=arguments.text, hookpoints=(arguments.hookpoint,), output_dir="",
        tokens=1, batch_size_tokens=micro_batch // 4, ctx_len=arguments.ctx_len, lm=lm,
        buffer=BufferConfig(tokens=2 * _MICRO_BATCHES * micro_batch, dtype=arguments.buffer_dtype),
    )  # fmt: skip
    rows = _Kept(text.rows(0))
    widths = {site.name: site.d_in for site in sites}
    harvest = build_harvest(of_run, widths, rows, Extractor(model, sites), text.kept, mesh)
    forward = Bare(bare, sites[0])

    assert harvest.fill(0, lambda: False)
    seen = torch.stack(rows.seen).to(mesh.device).split(arguments.rows)
    rows.seen = []
    _check(harvest.buffer.storage[sites[0].name], [(ids, text.kept(ids.cpu())) for ids in seen], forward)
    print(
        f"{sites[0].name}: {harvest.buffer.num_unread} activations in the buffer, equal to the bare forward's"
    )

    seconds: dict[str, list[float]] = {"bare": [], "harvest": []}
    for number in range(arguments.warmup + arguments.rounds):
        times = {}
        for name in ("bare", "harvest") if number % 2 else ("harvest", "bare"):
            times[name] = _refill(harvest) if name == "harvest" else _forwards(forward, seen[:_MICRO_BATCHES])
            rows.seen = []
        if number >= arguments.warmup:
            for name, taken in times.items():
                seconds[name].append(taken * micro_batch)
    flops = micro_batch * forward_work(meta, sites).flops(arguments.ctx_len)
    table: dict[str, dict[str, float]] = summarise(seconds, "bare")
    for name, row in table.items():
        row["tokens_per_second"] = micro_batch / percentile(seconds[name], 50)
        row["tflops"] = flops / percentile(seconds[name], 50) / 1e12
    finish(arguments, table, ["torch", "transformers", "nnsight"])
    print(f"harvest: {1 / table['harvest']['ratio_p50']:.1%} of the bare forward's tokens/s")


class _Kept(Iterator[Tensor]):
    """Rows as they come, and those that came."""

    def __init__(self, rows: Any):
        self.rows, self.seen = rows, []
        self.wait = rows.wait

    def __next__(self) -> Tensor:
        self.seen.append(next(self.rows))
        return self.seen[-1]


def _check(storage: Tensor, batches: list[tuple[Tensor, Tensor]], forward: Bare) -> None:
    """What a first filling has written, in the order in which it came, is what the bare forward gives."""
    expected = torch.cat([forward(ids)[kept.to(ids.device)] for ids, kept in batches])
    if not torch.equal(storage[: len(expected)], expected.to(storage)):
        raise SystemExit("the buffer holds other activations than the bare forward gives: not timed")


def _refill(harvest: Any) -> float:
    """Seconds for each token that went through the language model, of one refill."""
    while harvest.buffer.num_unread >= harvest.buffer.capacity // 2:
        harvest.read()
    before = harvest.num_tokens
    begun = time.perf_counter()
    assert harvest.fill(0, lambda: False)
    taken = time.perf_counter() - begun
    return taken / (harvest.num_tokens - before)


def _forwards(forward: Bare, batches: tuple[Tensor, ...] | list[Tensor]) -> float:
    """Seconds for each token, of bare forwards."""
    begun = time.perf_counter()
    for ids in batches:
        forward(ids)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - begun) / sum(ids.numel() for ids in batches)
