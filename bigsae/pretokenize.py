"""Tokenise a dataset once, to rows on disk: `python -m bigsae.pretokenize --model … --dataset … --output-dir …`."""

from __future__ import annotations

import sys

import tyro

from bigsae.commands import run_command
from bigsae.pretokenizing.options import PretokenizeConfig


def main() -> None:
    """Parse the command line and write the rows."""
    config = tyro.cli(
        PretokenizeConfig, prog="bigsae.pretokenize", args=sys.argv[1:], description=PretokenizeConfig.__doc__
    )
    from bigsae.pretokenizing.run import pretokenize_dataset  # after parsing, so that --help is quick

    pretokenize_dataset(config)


if __name__ == "__main__":
    run_command(main)
