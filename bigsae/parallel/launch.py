"""What `accelerate launch` has started: the process group, and Accelerate's own services."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from bigsae.config import check_timeout


def join_launch(timeout: float, **options: Any) -> Accelerator:
    """Join the ranks of this launch; each waits for another one for `timeout` minutes at most.

    `options` are those of `accelerate.Accelerator`. Raises UserError for a `timeout` that is none.
    """
    check_timeout(timeout)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout))],
        **options,
    )
