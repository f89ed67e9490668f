"""Tokenise a dataset once, to rows on disk: `python -m bigsae.pretokenize --model … --dataset … --output-dir …`."""

from __future__ import annotations

import sys

from bigsae.commands import parse_config, run_command
from bigsae.pretokenizing.options import PretokenizeConfig


def main() -> None:
    """Parse the command line and write the rows."""
    config = parse_config(PretokenizeConfig, "bigsae.pretokenize", sys.argv[1:])
    from bigsae.pretokenizing.run import pretokenize_dataset  # after parsing, so that --help is quick

    pretokenize_dataset(config)


if __name__ == "__main__":
    run_command(main)
