"""Where memory runs out because of an option: a message that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bigsae.config import UserError

# On a CPU there is no exception of its own for it; the second is of sizes beyond what can be counted.
_TEXTS = ("can't allocate memory", "Storage size calculation overflowed")


@contextmanager
def enough_memory(what: str, fix: str) -> Iterator[None]:
    """Have an allocation within it that fails raise UserError: there is no memory for `what`, so `fix`."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in _TEXTS):
            raise
        raise UserError(f"there is no memory for {what}: {fix}") from error
