"""Benchmarks. Each subcommand checks that what it compares agrees, then times it, paired and interleaved.

python scripts/bench.py step --device cpu --arch topk --d-sae 16384 --json step.json
python scripts/bench.py lm --model HuggingFaceTB/SmolLM2-135M --hookpoint model.layers.6 --json lm.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benching import growth, harvest, kernels, lm, step, train

# Subcommand, its file, its line of help.
BENCHMARKS = {
    "kernels": (kernels, "each kernel beside torch's own ways and the bound of its memory traffic"),
    "step": (step, "a training step beside its encoder's matmul and other trainers' steps"),
    "growth": (growth, "a step's time and memory against each size, beside the cost model of bigsae.plan"),
    "harvest": (harvest, "text to activations in the buffer, against a bare truncated forward"),
    "lm": (lm, "cost of tracing a truncated forward with nnsight"),
    "train": (train, "whole runs against SAELens's runner"),
}


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
    for name, (module, line) in BENCHMARKS.items():
        own = benchmarks.add_parser(name, parents=[common], help=line)
        module.add_options(own)
        own.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
