"""How a step's time and memory grow with each size, beside what the cost model of bigsae.plan says.

The model counts operations and bytes; here it gets the rates of this device as measured in the same run, at the base
shape: of the encoder's matmul, of a pass over memory, and on a CPU of gathered rows, of a selection, and of memory that
is mapped anew.
Nothing is fitted to a step's time, or to the other shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benching import plot, step
from benching.common import finish, percentile
from benching.step import installed

_BASE = {"d_in": 576, "d_sae": 16_384, "k": 32, "batch": 2048}
_SIZES = {
    "d_sae": (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144),
    "k": (8, 16, 32, 64, 128),
    "batch": (512, 1024, 2048, 4096, 8192),
    "d_in": (128, 256, 576, 1024, 2048),
}
_MANY = {"d_in": 64, "d_sae": 2**20, "k": 32, "batch": 512}
_CALIBRATION_ROUNDS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py growth`."""
    parser.add_argument("--arch", choices=("topk", "batchtopk", "jumprelu"), default="topk")
    parser.add_argument(
        "--sizes", nargs="*", choices=list(_SIZES), default=list(_SIZES), help="which to vary"
    )
    parser.add_argument("--most-latents", type=int, default=262_144)
    parser.add_argument("--million", action="store_true", help="also 1,048,576 latents of a narrow SAE")
    parser.add_argument("--svg", help="draw times and memory to this file")


@dataclass(frozen=True)
class Point:
    """One shape."""

    varied: str
    d_in: int
    d_sae: int
    k: int
    batch: int

    @property
    def name(self) -> str:
        """As a row of the table."""
        return f"{self.varied}: d_in {self.d_in}, d_sae {self.d_sae}, k {self.k}, batch {self.batch}"

    @property
    def size(self) -> int:
        """Of what is varied."""
        return getattr(self, self.varied)


def points(arguments: argparse.Namespace) -> list[Point]:
    """The base shape with one size at a time varied."""
    found = [
        Point(varied, **{**_BASE, varied: size})
        for varied in arguments.sizes
        for size in _SIZES[varied]
        if varied != "d_sae" or size <= arguments.most_latents
    ]
    return found + [Point("d_sae", **_MANY)] * arguments.million


def run(arguments: argparse.Namespace) -> None:
    """Measure every point, and print what the model says beside it."""
    device = torch.device(arguments.device)
    found: dict[Point, dict[str, float]] = {}
    calibrations = []
    for point in points(arguments):
        if point.varied not in {p.varied for p in found}:  # a machine that others use is not always as fast
            calibrations.append(calibrate(device))
        found[point] = measure(point, arguments, device)
        print(f"{point.name}: {found[point]['ms_p50']:.1f} ms", flush=True)
    rates = {name: percentile([c[name] for c in calibrations], 50) for name in calibrations[0]}
    print(", ".join(f"{name} {rate / 1e9:.2f} G/s" for name, rate in rates.items()))
    rows = {}
    for point, row in found.items():
        row |= {f"model_{key}": value for key, value in model(point, arguments.arch, rates).items()}
        row |= {f"ratio_p{p}": row[f"ms_p{p}"] / row["model_ms"] for p in (20, 50, 80)}
        row["memory_ratio"] = row["bytes"] / row["model_bytes"]
        row |= {"size": point.size, **{f"{name}_per_second": rate for name, rate in rates.items()}}
        rows[point.name] = row
        print(
            f"{point.name}: {row['ms_p50']:.1f} ms, model {row['model_ms']:.1f} ({row['ratio_p50']:.2f}); "
            f"{row['bytes'] / 2**20:.0f} MiB, model {row['model_bytes'] / 2**20:.0f} ({row['memory_ratio']:.2f})",
            flush=True,
        )
    finish(arguments, rows, installed("torch", "triton"))
    if arguments.svg is not None:
        draw(rows, Path(arguments.svg))


def calibrate(device: torch.device) -> dict[str, float]:
    """What this device does in a second: operations of the base shape's encoder, and bytes of a pass over memory.

    On a CPU also bytes of gathered rows and of fresh memory, pre-activations that a selection looks through, and
    operations of the matmul where latents are too many for parts of it to stay in the cache.
    """
    from bigsae.kernels.topk import select_topk

    base = Point("d_sae", **_BASE)
    x, W_enc = (
        torch.randn(base.batch, base.d_in, device=device),
        torch.randn(base.d_sae, base.d_in, device=device),
    )
    bias = torch.zeros(base.d_sae, device=device)
    moved = [torch.ones_like(W_enc) for _ in range(6)]
    work: dict[str, tuple[float, Callable[[], Any]]] = {
        "flops": (2 * base.batch * base.d_in * base.d_sae, lambda: _multiply(x, W_enc, bias)),
        "bytes": (2 * sum(t.nbytes for t in moved), lambda: torch._foreach_mul_(moved, 1.0)),
    }
    if device.type == "cpu":
        part, looks = torch.randn(256, base.d_sae), base.batch // 256
        work["selected"] = (
            base.batch * base.d_sae,
            lambda: [select_topk(part, base.k) for _ in range(looks)],
        )
        work["gathered_bytes"] = _gathering(base, x, W_enc)
        work["fresh_bytes"] = (W_enc.nbytes, lambda: torch.empty_like(W_enc).fill_(1.0))
        slab = torch.empty(base.batch, base.d_sae)
        work["slab_flops"] = (work["flops"][0], lambda: torch.addmm(bias, x, W_enc.T, out=slab))
    return {name: amount / percentile(times(f, device), 50) for name, (amount, f) in work.items()}


@torch.no_grad()
def _multiply(x: Tensor, W_enc: Tensor, bias: Tensor) -> None:
    from bigsae.kernels.encode import pre_acts_by_slab

    for _ in pre_acts_by_slab(x, W_enc, bias, None):
        pass


def _gathering(base: Point, x: Tensor, weight: Tensor) -> tuple[float, Callable[[], Any]]:
    """Bytes of the rows that a step's decode reads, forward and for the activations' gradient; what does it."""
    from bigsae.kernels.decode import gather_dot, gather_sum

    indices = torch.stack([torch.randperm(base.d_sae)[: base.k] for _ in range(base.batch)])
    coefficients = torch.rand(indices.shape)

    def gather() -> None:
        gather_sum(coefficients, indices, weight, dtype=x.dtype)
        gather_dot(x, weight, indices, dtype=x.dtype)

    return 2 * indices.numel() * x.shape[1] * x.element_size(), gather


def times(
    function: Callable[[], Any], device: torch.device, rounds: int = _CALIBRATION_ROUNDS
) -> list[float]:
    """Seconds of each of `rounds` calls, after one that does not count."""
    seconds = []
    for number in range(rounds + 1):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:  # the first one warms up
            seconds.append(time.perf_counter() - begun)
    return seconds


def measure(point: Point, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step (20, 50, 80 %), and the most bytes that the trainer takes beside the batches."""
    from bigsae.parallel.mesh import alone

    shape = argparse.Namespace(**vars(replace(point)), arch=arguments.arch, bf16=False, grad_dtype="float32")
    batches = step.make_batches(shape, device)
    gc.collect()
    before = _begin_peak(device)
    trainer = step.make_trainer(shape, alone(device), batches[0])
    step.settle(trainer, 1, batches)
    seconds = times(step.on_batches(trainer.train_step, batches), device, arguments.rounds)
    used = _peak(device) - before
    return {**{f"ms_p{p}": 1e3 * percentile(seconds, p) for p in (20, 50, 80)}, "bytes": used}


def model(point: Point, arch: str, rates: dict[str, float], mesh: Any = None) -> dict[str, float]:
    """Milliseconds and bytes that bigsae.plan gives a rank of `mesh` (planning/stages.py; None: one) at these rates."""
    from bigsae.checks import resolve_sae
    from bigsae.config import OptimConfig, SAEConfig
    from bigsae.kernels.encode import cached_rows
    from bigsae.parallel.memory import sae_bytes, sae_shape
    from bigsae.planning import gpus
    from bigsae.planning.options import PlanConfig
    from bigsae.planning.stages import Mesh, sae_stages

    sparsity: dict[str, Any] = {"target_l0": float(point.k)} if arch == "jumprelu" else {"k": point.k}
    config = resolve_sae(SAEConfig(architecture=arch, d_sae=point.d_sae, **sparsity))  # pyright: ignore[reportArgumentType]
    shape = sae_shape(config, OptimConfig(), point.d_in, point.d_sae)
    mesh = mesh or Mesh(1, 1, 1, 1)
    own = point.d_sae // mesh.num_latent
    part = cached_rows(own, 4, point.batch, point.batch)
    # On a CPU pre-activations are made in parts of the cache, not in a slab.
    if part and rates.get("selected"):
        shape = replace(shape, slab_mb=max(1, part * own * 4 // 2**20))
    # The plan takes a part of a maker's figures; here the rates are those that were reached.
    flops = rates["flops"] if part or "slab_flops" not in rates else rates["slab_flops"]
    compute, memory = flops / gpus.MATMUL_EFFICIENCY, rates["bytes"] / gpus.MEMORY_EFFICIENCY
    gather = rates["gathered_bytes"] / gpus.MEMORY_EFFICIENCY if "gathered_bytes" in rates else None
    link = rates.get("link", 1.0) / gpus.LINK_EFFICIENCY
    device = gpus.GPU(
        None, compute, compute, memory, link, link, gather, rates.get("selected"), rates.get("fresh_bytes")
    )
    plan = PlanConfig("", (), batch_size_tokens=point.batch)
    stages = sae_stages(plan, [shape], mesh, with_auxk=False)
    taken = sae_bytes(shape, mesh.num_latent, mesh.num_data, point.batch, first_tokens=point.batch)
    return {
        "ms": 1e3 * sum(stage.seconds(device) for stage in stages),
        "bytes": taken.kept + taken.step,
        **{f"ms of {stage.name}": 1e3 * stage.seconds(device) for stage in stages},
    }


def _begin_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux with glibc: begin the high-water mark anew
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of this process, by their name in Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """A panel of times for each size that was varied, and one of memory against d_sae."""
    panels = []
    for varied in _SIZES:
        own = [
            row
            for name, row in rows.items()
            if name.startswith(f"{varied}:") and f"d_in {_MANY['d_in']}," not in name
        ]
        if own:
            sizes = [row["size"] for row in own]
            panels.append(_panel(varied, "ms", sizes, own, "ms_p50", "model_ms", 1.0))
            if varied == "d_sae":
                panels.append(_panel(varied, "MiB", sizes, own, "bytes", "model_bytes", 2**-20))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot.svg(panels))


def _panel(
    x: str, y: str, sizes: list[float], rows: list[dict[str, float]], found: str, expected: str, unit: float
) -> plot.Panel:
    return plot.Panel(
        x, y, sizes, [row[found] * unit for row in rows], [row[expected] * unit for row in rows]
    )
