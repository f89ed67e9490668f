"""What `accelerate launch` has started: the process group, and Accelerate's own services."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from bigsae.config import UserError, check_timeout
from bigsae.parallel.nodes import limit_new_groups
from bigsae.parallel.restarts import INIT_METHOD, may_restart

_PACKAGES = {"wandb": ("wandb",), "tensorboard": ("tensorboardX", "tensorboard"), "trackio": ("trackio",)}


def join_launch(timeout: float, trackers: Sequence[str] = (), **options: Any) -> Accelerator:
    """Join the ranks of this launch; each waits for another one for `timeout` minutes at most.

    `options` are those of `accelerate.Accelerator`. Raises UserError for a `timeout` that is none, and where the
    package of a tracker is not installed.
    """
    check_timeout(timeout)
    for name in trackers:
        # Accelerate leaves it out in silence.
        if not any(find_spec(package) for package in _PACKAGES[name]):
            flags = "--log-with wandb, --wandb.project" if name == "wandb" else f"--log-with {name}"
            raise UserError(f"{flags}: a package is not installed: pip install {_PACKAGES[name][0]}")
    limit_new_groups(timeout)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                init_method=INIT_METHOD if may_restart() else None, timeout=timedelta(minutes=timeout)
            )
        ],
        log_with=list(trackers) or None,
        **options,
    )
