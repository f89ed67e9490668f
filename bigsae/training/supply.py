"""The harvest of a run, wherever its activations come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigsae.config import TrainConfig
from bigsae.data.buffer import ActivationBuffer
from bigsae.data.harvest import Harvest, Rows
from bigsae.parallel.mesh import Mesh


def build_harvest(
    config: TrainConfig,
    widths: dict[str, int],
    rows: Rows,
    extract: Any,
    kept: Callable[[Tensor], Tensor],
    mesh: Mesh,
) -> Harvest:
    """This rank's buffer, an activation of `widths` for each hookpoint, filled from `rows` by `extract`.

    `extract` and `kept` take rows [n, ctx_len] as Harvest wants them.
    """
    on_cpu = config.buffer.device == "cpu"
    buffer = ActivationBuffer(
        widths,
        capacity=config.buffer.tokens,
        headroom=config.lm.chosen_rows * config.ctx_len,
        dtype=getattr(torch, config.buffer.dtype),
        device=torch.device("cpu") if on_cpu else mesh.device,
        seed=config.seed,
        rank=mesh.rank,
    )
    return Harvest(
        rows,
        extract,
        kept,
        buffer,
        config.lm.chosen_rows,
        config.ctx_len,
        config.batch_size_tokens // mesh.num_ranks,
        mesh,
        rows.wait,
    )
