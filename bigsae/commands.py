"""What every command shares: parsing, where messages go, and how a user's mistake ends."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from bigsae.config import TrainConfig, UserError
from bigsae.configfile import read_flags

Config = TypeVar("Config")

# torchrun ends the other ranks as soon as one fails. Rank 0 has the word, so the others leave it this long.
_SECONDS_FOR_RANK_0 = 10.0


def parse_train_config(arguments: list[str]) -> TrainConfig:
    """The configuration of a run from the command line of `bigsae.train`."""
    return parse_config(TrainConfig, "bigsae.train", arguments, ", such as a run's config.json")


def parse_config(kind: type[Config], prog: str, arguments: list[str], description: str = "") -> Config:
    """The configuration dataclass `kind` from the command line; `--config <file>` gives other flags' defaults.

    But for code of others: a file, which may be another's config.json, cannot ask for it to be run. Raises UserError.
    """
    default: Any = None
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            _flag, _, value = argument.partition("=")
            rest = arguments[:i] + arguments[i + (1 if value else 2) :]
            if not value and i + 1 == len(arguments):
                raise UserError("--config needs a file: YAML, JSON, or the config.json of a run")
            default = read_flags(kind, value or arguments[i + 1], tyro.MISSING)
            arguments = rest
            break
    _check_trust(default, {argument.partition("=")[0].replace("_", "-") for argument in arguments})
    return tyro.cli(
        kind,
        prog=prog,
        args=arguments,
        default=default,
        description=f"{inspect.cleandoc(kind.__doc__ or '')}\n\n"
        f"--config FILE reads defaults of any flags from YAML or JSON{description}.",
        console_outputs=is_main(),
    )


def _check_trust(default: Any, said: set[str]) -> None:
    """Refuse values of a file that ask for the code of a model's repository, where no flag has `said` as much."""
    group = "lm." if hasattr(default, "lm") else ""
    flags = (f"--{group}trust-remote-code", f"--{group}no-trust-remote-code")
    asks = getattr(getattr(default, "lm", default), "trust_remote_code", False) is True
    if asks and not said.intersection(flags):
        raise UserError(
            f"--config asks for the code of a model's repository to be run: add {flags[0]} to allow it, or {flags[1]}"
        )


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
