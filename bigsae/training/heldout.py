"""FVU and L0 on documents that are never trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from bigsae.data.harvest import Extract
from bigsae.parallel import collectives
from bigsae.sae.losses import Moments
from bigsae.training.routing import Routing
from bigsae.training.trainer import SAETrainer
from bigsae.training.variants import Job


@torch.no_grad()
def measure_heldout(
    rows: Tensor,
    keep: Tensor,
    extract: Extract,
    trainers: dict[str, SAETrainer],
    jobs: dict[str, Job],
    routing: Routing,
    micro_batch_rows: int,
) -> dict[str, dict[str, float]]:
    """FVU and L0 of this rank's SAEs over `rows` [rows, ctx_len] where `keep`, a bool of the same shape, is True.

    Every rank has the same `rows`, a multiple of the ranks, and runs its part of them through the LM; `routing` brings
    the activations to the SAEs. The sums are reduced, then divided.
    """
    mesh = routing.mesh
    assert len(rows) % mesh.num_ranks == 0
    own_rows, own_keep = rows[mesh.rank :: mesh.num_ranks], keep[mesh.rank :: mesh.num_ranks]
    sums: dict[str, Tensor] = {}
    for start in range(0, len(own_rows), micro_batch_rows):
        chosen = own_keep[start : start + micro_batch_rows].flatten().nonzero().squeeze(1)
        kept = {
            name: values.flatten(0, 1)[chosen.to(values.device)]
            for name, values in extract(own_rows[start : start + micro_batch_rows]).items()
        }
        routed = routing.uneven(kept)
        for name, trainer in trainers.items():
            part = _sums(routed[jobs[name].reads], routed[jobs[name].predicts], trainer)
            sums[name] = sums[name] + part if name in sums else part
    return {name: _read(collectives.sum_(part, trainers[name].mesh.data)) for name, part in sums.items()}


def _sums(x: Tensor, y: Tensor, trainer: SAETrainer) -> Tensor:
    """Tokens, Σ‖y − ŷ‖², active latents, Σ‖y‖² and Σ y of one part, float64 [4 + d_out]."""
    squared_error, num_active = trainer.evaluate(x, y)
    wide = y.double().to(squared_error.device)
    numbers = torch.stack(
        [wide.new_tensor(float(len(y))), squared_error, num_active.double(), wide.square().sum()]
    )
    return torch.cat([numbers, wide.sum(0)])


def _read(sums: Tensor) -> dict[str, float]:
    num_tokens, squared_error, num_active = sums[:3].tolist()
    variance = Moments(int(num_tokens), sums[4:], sums[3]).variance().item()
    return {
        "heldout_fvu": squared_error / variance,
        "heldout_l0": num_active / num_tokens,
        "heldout_tokens": num_tokens,
    }
