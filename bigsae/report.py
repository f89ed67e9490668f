"""Pictures of runs and a browser of their latents, in one HTML file: `python -m bigsae.report runs/x [runs/y …]`."""

from __future__ import annotations

import sys

import tyro

from bigsae.commands import run_command
from bigsae.reporting.options import ReportConfig


def main() -> None:
    """Parse the command line and write the report."""
    options = tyro.cli(
        ReportConfig,
        prog="bigsae.report",
        args=sys.argv[1:],
        description=ReportConfig.__doc__,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    from bigsae.reporting.write import write_report  # after parsing, so that --help is quick

    print(write_report(options))


if __name__ == "__main__":
    run_command(main)
