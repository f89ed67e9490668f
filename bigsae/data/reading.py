"""Reading documents from where they may be torn, or out of reach for a while: what is passing is tried again."""

from __future__ import annotations

import errno
import lzma
import random
import time
import zlib
from collections.abc import Callable, Iterator
from logging import getLogger
from typing import TypeVar

import pyarrow as pa
from datasets.exceptions import DatasetsError

from bigsae.config import UserError

logger = getLogger("bigsae")

Result = TypeVar("Result")

# What `datasets`, the Hub's client and decompressors raise of data that are absent, out of reach or malformed.
FAILURES = (
    OSError, ValueError, RuntimeError, ImportError, EOFError, zlib.error, lzma.LZMAError, DatasetsError,
    pa.ArrowException,
)  # fmt: skip
# The machine's own troubles, of which no file is to blame.
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM}
# HTTP clients, whose errors have no base in common. A status that they were answered with says more than they do.
_CLIENTS = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
_PASSING_STATUS = {408, 425, 429}

FIRST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""Waits between two tries: the first, twice as long each time, and the longest."""
OPENING_SECONDS, READING_SECONDS = 60.0, 600.0
"""How long after the first failure the last try begins; less than ranks wait for one another by default."""
# Not the state of `random` itself, which is the run's.
_chance = random.Random()
_sleep, _now = time.sleep, time.monotonic


def persistently(read: Callable[[], Result], label: str, seconds: float) -> Result:
    """`read()`, tried again where the network or a server fails it, until `seconds` after it first did.

    `read` begins anew each time. Beneath it the Hub's client and `datasets` try a request again by themselves; what
    comes here is what outlasted that. Then a ConnectionError is raised; where the data are to blame, their error.
    """
    first_failed, wait = None, 0.0
    while True:
        try:
            return read()
        except Exception as error:
            if not is_passing(error):
                raise
            first_failed = _now() if first_failed is None else first_failed
            if _now() - first_failed >= seconds:
                raise ConnectionError(reason(error)) from error  # clients' own errors are of all kinds
            wait = min(2 * wait or FIRST_SECONDS, MOST_SECONDS)
            logger.warning("--dataset %s is out of reach (%s): again in %.0f s", label, reason(error), wait)
        # Ranks that lost one server together do not come back to it together.
        _sleep(wait * _chance.uniform(0.5, 1.0))


def is_passing(error: BaseException) -> bool:
    """Whether the network or a server is to blame for `error`, so that it may be gone the next time."""
    causes = list(_causes(error))
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", getattr(cause, "status", None))
        if isinstance(status, int):
            return status in _PASSING_STATUS or status >= 500
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes):
        return False
    return any(
        isinstance(cause, (ConnectionError, TimeoutError)) or type(cause).__module__.split(".")[0] in _CLIENTS
        for cause in causes
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it was raised from or while handling, and so on: `datasets` hides some of it ("from None")."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException, num_characters: int = 300) -> str:
    """One line; for an error that only says that there was one, that of its cause."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return (text[:num_characters] + " …" if len(text) > num_characters else text) or type(error).__name__


def is_of_data(error: BaseException) -> bool:
    """Whether a file, or where it comes from, is to blame for `error`, one of `FAILURES` met in reading documents."""
    if is_passing(error):
        return True
    if isinstance(error, OSError):
        return error.errno not in _OURS
    return not isinstance(error, (RuntimeError, ImportError))


def unreadable(label: str, error: BaseException) -> UserError:
    """What is told where documents of `label` cannot be read."""
    if is_passing(error):
        return UserError(
            f"--dataset {label} is out of reach ({reason(error, 200)}): go on with --resume when its server answers"
        )
    return UserError(
        f"--dataset {label} cannot be read ({reason(error, 200)}): mend or leave out the file that is broken"
    )
