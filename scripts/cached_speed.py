"""Tokens/s of training from an activation cache against training on the fly: the quickstart's SAE, paired in one run.

    python scripts/cached_speed.py --rounds 3 --json benchmarks/cached_cpu.json

Each round trains both, one after the other, first the one and then the other first. Before a training from the cache
its files are dropped from the system's page cache, so that they are read from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benching.common import commit, machine, percentile

import bigsae


def forget(folder: Path) -> None:
    """Drop the files below `folder` from the page cache."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def trained(config: bigsae.TrainConfig) -> dict[str, float]:
    """Tokens/s of a training, refills included and saving left out, and the parts of that time."""
    bigsae.train_saes(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "tokens_per_second" in row]
    seconds = [config.log_every * config.batch_size_tokens / row["tokens_per_second"] for row in rows]
    waited = sum(s * row["lm_time_share"] for s, row in zip(seconds, rows, strict=True))
    return {"tokens_per_second": config.tokens / sum(seconds), "harvest_share": waited / sum(seconds)}


def main() -> None:
    """Make the cache, train both ways, print and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path(".quickstart"))
    parser.add_argument("--tokens", type=int, default=8 * 1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(arguments.quickstart, Path(scratch), arguments.tokens, arguments.rounds)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(quickstart: Path, scratch: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """The quickstart's SAE on `tokens` tokens, both ways, `rounds` times."""
    lm, data = bigsae.LMConfig(dtype="float32"), bigsae.DataConfig()
    fly = bigsae.TrainConfig(
        model=str(quickstart / "SmolLM2-135M"), dataset=str(quickstart / "sotu"), hookpoints=("model.layers.6",),
        output_dir="", tokens=tokens, batch_size_tokens=1024, log_every=tokens // 1024, lm=lm, data=data,
        buffer=bigsae.BufferConfig(tokens=2048), optim=bigsae.OptimConfig(lr=2e-3, warmup_steps=20),
    )  # fmt: skip
    cache = bigsae.CacheConfig(
        model=fly.model, dataset=fly.dataset, hookpoints=fly.hookpoints, output_dir=str(scratch / "cache"),
        tokens=tokens + 2 * 2048, lm=lm, data=data,
    )  # fmt: skip
    begun = time.perf_counter()
    bigsae.write_activations(cache)
    seconds = time.perf_counter() - begun
    cached = replace(
        fly,
        model="",
        dataset="",
        lm=bigsae.LMConfig(),
        data=bigsae.DataConfig(),
        activations=cache.output_dir,
    )
    runs: dict[str, list[dict[str, float]]] = {"fly": [], "cached": []}
    for number in range(rounds):
        ways = [("fly", fly), ("cached", cached)]
        for name, config in ways if number % 2 else ways[::-1]:
            forget(scratch / "cache")
            runs[name].append(trained(replace(config, output_dir=str(scratch / f"{name}_{number}"))))
    pairs = zip(runs["cached"], runs["fly"], strict=True)
    ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    return {
        "machine": machine(),
        "commit": commit(),
        "tokens": tokens,
        "rounds": rounds,
        "seconds_to_write_the_cache": seconds,
        "cached_tokens": cache.tokens,
        "bytes": sum(path.stat().st_size for path in (scratch / "cache").rglob("*.safetensors")),
        **{name: {key: [run[key] for run in found] for key in found[0]} for name, found in runs.items()},
        "ratio": {f"p{p}": percentile(ratios, p) for p in (0, 50, 100)},
    }


if __name__ == "__main__":
    main()
