"""A long run watched from outside: does its memory stay flat, does it keep its files few, does it stay as fast?

    python scripts/soak.py --steps 20000 --json benchmarks/soak_cpu.json

Trains a TopK SAE on SmolLM2-135M (of .quickstart; its first layer, so that steps are many and short) by
`python -m bigsae.train`, or on --ranks of them by `accelerate launch`, with asynchronous checkpoints, the heartbeat and
--check-replicas-every on. Once a second the resident memory and the open files of each rank are read from the system;
tokens/s are those of metrics.jsonl. The first tenth of the steps is compared with the last: of the files the medians,
of the speed all tokens over all time. Memory is a saw: it rises between two checkpoints and falls with each, so the
lowest and the highest of a tenth are compared, the median is told.

The text is short enough to be read whole in each tenth. Otherwise a tenth may be the first to meet a longer speech: the
tokenizer then takes more than before, once, and keeps it, and more pages of the dataset's file are mapped (12 MB when
all speeches are read, at step 9,208). Speed is compared without the first row, in which the buffer is filled; memory
without the moments after the last step, when the SAE is exported.

A machine that others use as well is not equally fast for minutes. So beside each reading a fixed piece of work is
timed, a sort of a million numbers, and tokens/s are told as they are and as tokens for each of these sorts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from benching.common import commit, machine

LOG_EVERY = 100
CHARACTERS_OF_A_TOKEN = 4
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What the system says of one rank at one moment."""

    rank: int
    step: int
    rss: int
    """Resident bytes."""
    files: int
    """Open file descriptors."""
    sort_seconds: float
    """Of the fixed piece of work, in this process."""


def write_text(quickstart: Path, tokens: int, folder: Path) -> None:
    """Some of the quickstart's speeches, evenly over the years, of about `tokens` tokens."""
    speeches = sorted((quickstart / "sotu").glob("*.txt"))
    characters = sum(speech.stat().st_size for speech in speeches)
    folder.mkdir(parents=True)
    for speech in speeches[:: max(1, characters // (tokens * CHARACTERS_OF_A_TOKEN))]:
        shutil.copy(speech, folder)


def command(arguments: argparse.Namespace, text: Path, output: Path) -> list[str]:
    """The training's command line."""
    launch = [] if arguments.ranks == 1 else [*LAUNCH, str(arguments.ranks)]
    flags = {
        "model": arguments.quickstart / "SmolLM2-135M",
        "dataset": text,
        "hookpoints": "model.layers.0",
        "output-dir": output,
        "tokens": arguments.steps * arguments.batch * arguments.ranks,
        "batch-size-tokens": arguments.batch * arguments.ranks,
        "ctx-len": 128,
        "lm.dtype": "float32",
        "lm.micro-batch-rows": 8,  # its outputs are small enough for malloc to keep their place: no saw
        "sae.d-sae": 1024,
        "buffer.tokens": 8192,
        "data.epochs": 1000,
        "data.heldout-documents": 1,
        "eval.every": arguments.steps // 10,
        "checkpoint.every": arguments.steps // 20,
        "check-replicas-every": arguments.steps // 20,
        "log-every": LOG_EVERY,
    }
    pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *launch, "-m", "bigsae.train", *pairs]


def watch(arguments: argparse.Namespace, text: Path, output: Path) -> list[Sample]:
    """Run the training to its end. Exits with its status where that is not 0."""
    process = subprocess.Popen(command(arguments, text, output))
    samples: list[Sample] = []
    numbers = np.random.default_rng(0).random(1_000_000, dtype=np.float32)
    while process.poll() is None:
        rows = read_rows(output / "metrics.jsonl")
        step = rows[-1]["step"] if rows else 0
        begun = time.perf_counter()
        np.sort(numbers)
        sort_seconds = time.perf_counter() - begun
        for rank, process_of_rank in enumerate(ranks_of(process.pid)):
            try:
                with process_of_rank.oneshot():
                    rss, files = process_of_rank.memory_info().rss, process_of_rank.num_fds()
            except psutil.NoSuchProcess:
                continue
            samples.append(Sample(rank, step, rss, files, sort_seconds))
        time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return samples


def ranks_of(pid: int) -> list[psutil.Process]:
    """The processes below (and with) `pid` that train, in the order of their starts."""
    try:
        process = psutil.Process(pid)
        below = [process, *process.children(recursive=True)]
        found = [
            p for p in below if "bigsae.train" in p.cmdline() and "accelerate" not in " ".join(p.cmdline())
        ]
    except psutil.NoSuchProcess:
        return []
    return sorted(found, key=lambda p: p.pid)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl that there are so far."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def summarise(
    samples: list[Sample], rows: list[dict[str, Any]], num_steps: int, ranks: int
) -> dict[str, Any]:
    """Medians of each tenth of the steps: of each rank's memory and files; and tokens/s."""
    tenth = num_steps // 10
    speeds = [(row["step"], row["tokens_per_second"]) for row in rows if "tokens_per_second" in row][1:]
    tenths: list[dict[str, Any]] = []
    for number in range(10):
        low, high = number * tenth, (number + 1) * tenth
        inside = [s for s in samples if low < s.step <= high and s.step < num_steps]
        # The same number of tokens in each row: the harmonic mean is all tokens over all time.
        speed = statistics.harmonic_mean([v for step, v in speeds if low < step <= high])
        tenths.append(
            {
                "tokens_per_second": speed,
                "tokens_per_sort": speed * statistics.median(s.sort_seconds for s in inside),
                **{
                    f"rss_mb_{name}": [of(s.rss for s in inside if s.rank == r) / 2**20 for r in range(ranks)]
                    for name, of in {"low": min, "median": statistics.median, "high": max}.items()
                },
                "files": [statistics.median(s.files for s in inside if s.rank == r) for r in range(ranks)],
            }
        )
    first, last = tenths[0], tenths[-1]
    return {
        "tenths": tenths,
        "last_over_first": {
            **{name: last[name] / first[name] for name in ("tokens_per_second", "tokens_per_sort")},
            **{
                name: max(b / a for a, b in zip(first[name], last[name], strict=True))
                for name in ("rss_mb_low", "rss_mb_median", "rss_mb_high")
            },
            "files": max(b - a for a, b in zip(first["files"], last["files"], strict=True)),
        },
    }


def main() -> None:
    """Run, print and write what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path(".quickstart"))
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64, help="tokens a rank and step")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.steps % (10 * LOG_EVERY):
        raise SystemExit(
            f"--steps must be a multiple of {10 * LOG_EVERY}: each tenth is so many rows of metrics.jsonl"
        )
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    output = home / "run"
    tokens = arguments.steps // 10 * arguments.batch * arguments.ranks
    write_text(arguments.quickstart, tokens * 2 // 3, home / "text")
    begun = time.perf_counter()
    samples = watch(arguments, home / "text", output)
    result = {
        "machine": machine(),
        "commit": commit(),
        "steps": arguments.steps,
        "batch_size_tokens": arguments.batch * arguments.ranks,
        "ranks": arguments.ranks,
        "seconds": time.perf_counter() - begun,
        "samples": len(samples),
        **summarise(samples, read_rows(output / "metrics.jsonl"), arguments.steps, arguments.ranks),
    }
    shutil.rmtree(home)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
