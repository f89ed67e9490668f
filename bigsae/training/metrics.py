"""What is logged: sums between two logs, reduced over ranks, and the files and trackers they go to."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.hub.files import write_atomic
from bigsae.parallel import collectives
from bigsae.sae.losses import Moments, StepOutput

logger = logging.getLogger("bigsae")

# Places of the rank-local sums in WindowSums.local
_FINITE, _SQUARED_ERROR, _LOSS, _PARTS = range(4)


class WindowSums:
    """Sums since the last log, in float64 on the device; they leave it once a log."""

    def __init__(self, d_out: int, loss_parts: tuple[str, ...], device: torch.device):
        self.loss_parts = loss_parts
        self.total = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.num_skipped = torch.zeros((), dtype=torch.float64, device=device)
        self.local = torch.zeros(_PARTS + len(loss_parts), dtype=torch.float64, device=device)
        self.num_active = torch.zeros((), dtype=torch.float64, device=device)
        """Of this rank's tokens and latents; `local` is of its tokens, the same on ranks that see the same ones."""
        self.num_tokens = 0
        self.num_steps = 0
        self.num_updates = 0

    def add(self, moments: Moments, output: StepOutput, update: tuple[Tensor, Tensor] | None) -> None:
        """Take in one step, and the gradient norm and skip flag of its `update` where it had one."""
        self.total += moments.total
        self.squares += moments.squares
        if update is not None:
            self.grad_norm += torch.where(update[1] > 0, 0.0, update[0])
            self.num_skipped += update[1]
            self.num_updates += 1
        squared_error = output.residual.float().square().sum()
        parts = (
            torch.full_like(squared_error, len(output.residual)),
            squared_error,
            output.loss,
            *(output.parts[name] for name in self.loss_parts),
        )
        values = torch.stack([part.detach().double() for part in parts])
        # What is no number is left out of the means; `num_skipped` counts it.
        self.local += torch.where(torch.isfinite(values).all(), values, 0.0)
        self.num_active += output.num_active
        self.num_tokens += moments.num_tokens
        self.num_steps += 1

    def read(self, group: ProcessGroup | None, latents: ProcessGroup | None = None) -> dict[str, float]:
        """Means over the window, the same on every rank.

        fvu = Σ‖x − x̂‖² / Σ‖x − x̄‖² over all tokens of the window, x̄ their mean. Steps whose loss is not finite
        are left out, the rest stands for them; NaN where there is no rest. `group`: the ranks that see other tokens;
        `latents`: those that see the same ones, where only the number of active latents differs.
        """
        sums = collectives.sum_(self.local.clone(), group).tolist()
        finite = sums[_FINITE] / self.num_tokens or math.nan  # a share of the tokens, 1 but for broken steps
        num_active = collectives.sum_(collectives.sum_(self.num_active.clone(), group), latents).item()
        num_skipped = self.num_skipped.item()
        variance = Moments(self.num_tokens, self.total, self.squares).variance().item()
        return {
            "loss": sums[_LOSS] / self.num_steps / finite,
            "fvu": sums[_SQUARED_ERROR] / variance / finite,
            "l0": num_active / self.num_tokens,
            **{name: sums[_PARTS + i] / self.num_steps / finite for i, name in enumerate(self.loss_parts)},
            "grad_norm": self.grad_norm.item() / max(self.num_updates - num_skipped, 1),
            "num_skipped_steps": num_skipped,
        }

    def clear(self) -> None:
        """Begin a new window."""
        for tensor in (
            self.total,
            self.squares,
            self.grad_norm,
            self.num_skipped,
            self.local,
            self.num_active,
        ):
            tensor.zero_()
        self.num_tokens = self.num_steps = self.num_updates = 0

    def tensors(self) -> dict[str, Tensor]:
        """The sums that are the same on every rank, for a checkpoint."""
        return {
            "total": self.total,
            "squares": self.squares,
            "grad_norm": self.grad_norm,
            "num_skipped": self.num_skipped,
        }


class MetricsFile:
    """metrics.jsonl: one row a log and hookpoint, appended and flushed at once."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[str] = []

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps: a resumed run writes them anew."""
        self._waiting = [row for row in self._waiting if _step_of(row) <= step]
        if not self.path.exists():
            return
        rows = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        write_atomic(self.path, lambda path: path.write_text("".join(f"{row}\n" for row in rows)))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; where the disk is full, with the next one for which there is room."""
        self._waiting.append(json.dumps(row) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if self.path.exists():
                os.truncate(self.path, size)  # a part of a row may have been written
            if len(self._waiting) == 1:
                logger.error(
                    "%s cannot be written (%s): the run goes on, its rows wait", self.path, error.strerror
                )
            return
        self._waiting.clear()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # the torn last line of a killed run
