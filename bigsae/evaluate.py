"""Measure SAEs: `accelerate launch -m bigsae.evaluate --saes … [--model … --dataset …]`."""

from __future__ import annotations

import json
import sys

from bigsae.commands import is_main, parse_config, run_command
from bigsae.evaluation.options import EvaluateConfig


def main() -> None:
    """Parse the command line, measure, and print the results on one rank."""
    config = parse_config(EvaluateConfig, "bigsae.evaluate", sys.argv[1:])
    # After parsing, so that --help is quick.
    from rich.console import Console
    from torch import distributed as dist

    from bigsae.evaluation.run import evaluate_saes, plain
    from bigsae.evaluation.table import as_table

    results = evaluate_saes(config)
    if is_main() and config.json:
        print(json.dumps(plain(results), indent=2))
    elif is_main():
        Console().print(as_table(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
