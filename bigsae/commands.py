"""What every command shares: parsing, where messages go, and how a user's mistake ends."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import tyro

from bigsae.config import TrainConfig, UserError
from bigsae.configfile import read_flags

Config = TypeVar("Config")

# torchrun ends the other ranks as soon as one fails. Rank 0 has the word, so the others leave it this long.
_SECONDS_FOR_RANK_0 = 10.0
_TRUST = ("--lm.trust-remote-code", "--lm.no-trust-remote-code")


def parse_train_config(arguments: list[str]) -> TrainConfig:
    """The configuration from the command line; `--config <file>` gives the defaults of all other flags.

    But for code of others: a file, which may be another's config.json, cannot ask for it to be run. Raises UserError.
    """
    default = None
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            _flag, _, value = argument.partition("=")
            rest = arguments[:i] + arguments[i + (1 if value else 2) :]
            if not value and i + 1 == len(arguments):
                raise UserError("--config needs a file: YAML, JSON, or the config.json of a run")
            default = read_flags(TrainConfig, value or arguments[i + 1], tyro.MISSING)
            arguments = rest
            break
    said = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if default is not None and default.lm.trust_remote_code and not said.intersection(_TRUST):
        raise UserError(
            f"--config asks for the code of a model's repository to be run: add {_TRUST[0]} to allow it, or "
            f"{_TRUST[1]}"
        )
    config = tyro.cli(
        TrainConfig,
        prog="bigsae.train",
        args=arguments,
        default=default,
        description=(TrainConfig.__doc__ or "")
        + " --config FILE reads defaults of any flags from YAML or JSON, such as a run's config.json.",
        console_outputs=is_main(),
    )
    assert isinstance(config, TrainConfig)
    return config


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes a short message and exit status 2, a lost rank one and exit status 1.

    Of a UserError rank 0 alone prints, of a lost rank the first one of each node that is left.
    """
    level = logging.INFO if _rank() == 0 else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("bigsae").setLevel(level)
    try:
        main()
    except UserError as error:
        message = f"error: {error}"
        if _rank():
            time.sleep(_SECONDS_FOR_RANK_0)
            message = f"error on rank {_rank()}: {error}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        from bigsae.parallel.nodes import (  # torch is loaded by now, not while --help is asked for
            PeerLost,
            local_rank,
        )

        if not isinstance(error, PeerLost):
            raise
        if local_rank():
            time.sleep(_SECONDS_FOR_RANK_0)
        print(f"error on rank {_rank()}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not through the interpreter's end: what tears groups down there waits for the lost rank again.
        os._exit(1)


def is_main() -> bool:
    """Whether this rank prints."""
    return _rank() == 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
