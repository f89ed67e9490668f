"""Train sparse autoencoders: `accelerate launch -m bigsae.train --model … --dataset … --hookpoints … …`."""

from __future__ import annotations

import sys

from bigsae.commands import parse_train_config, run_command


def main() -> None:
    """Parse the command line and train."""
    config = parse_train_config(sys.argv[1:])
    from bigsae.training.run import Preempted, train_saes  # after parsing, so that --help is quick

    try:
        train_saes(config)
    except Preempted as stopped:
        sys.exit(128 + (stopped.number or 0))


if __name__ == "__main__":
    run_command(main)
