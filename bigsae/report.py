"""Pictures of runs and a browser of their latents, in one HTML file: `python -m bigsae.report runs/x [runs/y …]`."""

from __future__ import annotations

import sys

from bigsae.commands import parse_config, run_command
from bigsae.reporting.options import ReportConfig


def main() -> None:
    """Parse the command line and write the report."""
    options = parse_config(ReportConfig, "bigsae.report", sys.argv[1:])
    from bigsae.reporting.write import write_report  # after parsing, so that --help is quick

    print(write_report(options))


if __name__ == "__main__":
    run_command(main)
