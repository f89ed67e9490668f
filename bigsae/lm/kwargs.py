"""What of --lm.kwargs belongs to a machine and not to a run: apart from what loads models, as that takes seconds."""

from __future__ import annotations

import json
from dataclasses import replace

from bigsae.config import LMConfig, lm_kwargs

OF_THIS_MACHINE = ("cache_dir", "force_download", "local_files_only", "proxies")


def without_hub_kwargs(lm: LMConfig) -> LMConfig:
    """`lm` without how this machine reaches the Hub, which may name a proxy's password. Raises UserError."""
    kwargs = lm_kwargs(lm)
    return replace(lm, kwargs=json.dumps({k: v for k, v in kwargs.items() if k not in OF_THIS_MACHINE}))
