"""Write activations to disk: `accelerate launch -m bigsae.cache_activations --model … --dataset … --hookpoints … …`."""

from __future__ import annotations

import sys

from bigsae.caching.options import CacheConfig, VerifyConfig
from bigsae.commands import parse_config, run_command
from bigsae.config import named


def main() -> None:
    """Parse the command line and write, or verify, a cache."""
    arguments = sys.argv[1:]
    verifies = any(argument.partition("=")[0] == "--verify" for argument in arguments)
    kind = VerifyConfig if verifies else CacheConfig
    description = (
        "" if verifies else "; --verify FOLDER compares the files of a cache with their checksums instead"
    )
    config = parse_config(kind, "bigsae.cache_activations", arguments, description)
    # After parsing, so that --help is quick.
    from torch import distributed as dist

    from bigsae.caching.read import open_activations
    from bigsae.caching.write import write_activations
    from bigsae.training.run import Preempted

    if isinstance(config, VerifyConfig):
        with named("--verify"):
            open_activations(config.verify).verify()
        print(f"{config.verify}: every file is as it was written")
        return
    stopped_by = None
    try:
        write_activations(config)
    except Preempted as stopped:
        stopped_by = stopped
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by is not None:
        sys.exit(128 + (stopped_by.number or 0))


if __name__ == "__main__":
    run_command(main)
