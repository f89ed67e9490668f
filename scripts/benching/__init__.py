"""The subcommands of scripts/bench.py, a file each, and what they share."""
