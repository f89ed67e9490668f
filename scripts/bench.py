"""Benchmarks. Each subcommand checks that what it compares agrees, then times it, paired and interleaved.

python scripts/bench.py lm --model HuggingFaceTB/SmolLM2-135M --hookpoint model.layers.6 --json lm.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# -- shared by all subcommands -----------------------------------------------------------------------------------


def paired_times(functions: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, after `warmup` rounds that do not count.

    A round calls every function once, beginning with another one each time, so drift and caches favour none.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            _synchronise()
            begun = time.perf_counter()
            functions[name]()
            _synchronise()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the sorted values."""
    return torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100).item()


def summarise(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Milliseconds (20, 50, 80 %) of each function, and its ratio to `reference` within the rounds (20, 50, 80 %)."""
    rows = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[reference], strict=True)]
        rows[name] = {
            **{f"ms_p{p}": 1e3 * percentile(values, p) for p in (20, 50, 80)},
            **{f"ratio_p{p}": percentile(ratios, p) for p in (20, 50, 80)},
        }
    return rows


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One line a function: median with its 20th and 80th percentiles, then the same of the paired ratio."""
    width = max(map(len, rows))
    print(f"{'':{width}}  {'median ms':>10}  {'p20 - p80':>21}  {'ratio':>7}  {'p20 - p80':>15}")
    for name, row in rows.items():
        print(
            f"{name:{width}}  {row['ms_p50']:10.3f}  {row['ms_p20']:9.3f} - {row['ms_p80']:9.3f}"
            f"  {row['ratio_p50']:7.4f}  {row['ratio_p20']:6.4f} - {row['ratio_p80']:6.4f}"
        )


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit of the working tree, `+dirty` where it was changed since."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return "none"
    return head.stdout.strip() + ("+dirty" if git("status", "--porcelain").stdout.strip() else "")


def finish(arguments: argparse.Namespace, rows: dict[str, dict[str, float]], packages: list[str]) -> None:
    """Print the table, and write it with its circumstances to `--json` where that is given."""
    print_table(rows)
    if arguments.json is None:
        return
    given = {k: v for k, v in vars(arguments).items() if k not in ("json", "run")}
    record = {
        "benchmark": arguments.benchmark,
        "arguments": given,
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit(),
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


# -- lm: what nnsight costs --------------------------------------------------------------------------------------


class _Stop(Exception):
    pass


def bench_lm(arguments: argparse.Namespace) -> None:
    """A bare truncated forward, by a plain hook, against the traced one that training uses.

    The bare model is another copy, since nnsight stays in a model that it has once wrapped.
    """
    from bigsae.config import LMConfig
    from bigsae.lm.activations import Extractor
    from bigsae.lm.hookpoints import activation_of, locate, resolve_hookpoints
    from bigsae.lm.loading import load_lm, meta_model, resolve_layout

    lm = LMConfig(dtype=arguments.dtype)
    device = torch.device(arguments.device)
    meta, config = meta_model(arguments.model, lm)
    sites = locate(meta, resolve_hookpoints([arguments.hookpoint], meta))
    if len(sites) != 1 or sites[0].hookpoint.side != "output":
        raise SystemExit("--hookpoint must name the output of one module")
    layout = resolve_layout(lm, 1, 1, {})
    bare, traced = (load_lm(arguments.model, lm, meta, layout, device, sites) for _ in range(2))
    extractor = Extractor(traced, sites)
    torch.manual_seed(0)
    ids = torch.randint(
        config.get_text_config().vocab_size, (arguments.rows, arguments.ctx_len), device=device
    )

    taken: list[torch.Tensor] = []
    stop = True

    def take(_module: Any, _args: Any, output: Any) -> None:
        taken.append(activation_of(output))
        if stop:
            raise _Stop

    bare.get_submodule(sites[0].hookpoint.path).register_forward_hook(take)

    @torch.no_grad()
    def run_bare(stopped: bool) -> torch.Tensor:
        nonlocal stop
        stop = stopped
        taken.clear()
        with suppress(_Stop):
            bare.base_model(input_ids=ids)
        return taken[0]

    functions = {
        "bare, stopped at the hookpoint": lambda: run_bare(True),
        "bare, to the end of the cut decoder": lambda: run_bare(False),
        "traced by nnsight, stopped": lambda: extractor(ids)[sites[0].name],
    }
    reference, *others = functions
    expected = functions[reference]()
    for name in others:
        if not torch.equal(functions[name](), expected):
            raise SystemExit(f"{name!r} gives other activations than {reference!r}: not timed")
    print(f"{sites[0].name}: {tuple(expected.shape)} {expected.dtype} on {device}, equal bit for bit")
    seconds = paired_times(functions, arguments.rounds, arguments.warmup)
    finish(arguments, summarise(seconds, reference), ["torch", "transformers", "nnsight"])


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, help="write the numbers and their circumstances here")
    common.add_argument("--rounds", type=int, default=30, help="rounds that count")
    common.add_argument("--warmup", type=int, default=5, help="rounds before, that do not")
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    lm = benchmarks.add_parser(
        "lm", parents=[common], help="cost of tracing a truncated forward with nnsight"
    )
    lm.add_argument("--model", required=True, help="Hub id or folder")
    lm.add_argument("--hookpoint", default="model.layers.6")
    lm.add_argument("--rows", type=int, default=8)
    lm.add_argument("--ctx-len", type=int, default=256)
    lm.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    lm.set_defaults(run=bench_lm)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
