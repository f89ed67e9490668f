"""What all benchmarks share: paired timing, percentiles, the table, and the circumstances of the numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


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
