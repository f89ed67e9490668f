"""Publish trained SAEs on the Hub, or write them in another format: `bigsae.export runs/x --push-to-hub …`."""

from __future__ import annotations

import sys

from bigsae.commands import parse_config, run_command
from bigsae.hub.options import ExportConfig


def main() -> None:
    """Parse the command line and export."""
    config = parse_config(ExportConfig, "bigsae.export", sys.argv[1:])
    from bigsae.hub.export import export_run  # after parsing, so that --help is quick

    print(export_run(config))


if __name__ == "__main__":
    run_command(main)
