"""Train sparse autoencoders: `accelerate launch -m bigsae.train --model … --dataset … --hookpoints … …`."""

from __future__ import annotations

import sys

from bigsae.commands import parse_train_config, run_command


def main() -> None:
    """Parse the command line and train."""
    config = parse_train_config(sys.argv[1:])
    from torch import distributed as dist  # after parsing, so that --help is quick

    from bigsae.training.run import Preempted, run_training

    stopped_by = None
    try:
        run_training(config)
    except Preempted as stopped:
        stopped_by = stopped
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by is not None:
        sys.exit(128 + stopped_by.number if stopped_by.number else 0)  # --max-hours is no failure


if __name__ == "__main__":
    run_command(main)
