"""FVU and L0 on documents that are never trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from bigsae.data.harvest import Extract
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.sae.losses import Moments
from bigsae.training.trainer import SAETrainer


@torch.no_grad()
def measure_heldout(
    rows: Tensor,
    keep: Tensor,
    extract: Extract,
    trainers: dict[str, SAETrainer],
    micro_batch_rows: int,
    mesh: Mesh,
) -> dict[str, dict[str, float]]:
    """FVU and L0 of each hookpoint's SAE over `rows` [rows, ctx_len] where `keep`, a bool of the same shape, is True.

    Every rank has the same `rows`, a multiple of the ranks, and measures its part; the sums are reduced, then divided.
    """
    assert len(rows) % mesh.num_ranks == 0
    own_rows, own_keep = rows[mesh.rank :: mesh.num_ranks], keep[mesh.rank :: mesh.num_ranks]
    sums: dict[str, Tensor] = {}
    for start in range(0, len(own_rows), micro_batch_rows):
        chosen = own_keep[start : start + micro_batch_rows].flatten().nonzero().squeeze(1)
        for name, values in extract(own_rows[start : start + micro_batch_rows]).items():
            x = values.flatten(0, 1)[chosen.to(values.device)]
            part = _sums(x, trainers[name])
            sums[name] = sums[name] + part if name in sums else part
    return {name: _read(collectives.sum_(part, mesh.data)) for name, part in sums.items()}


def _sums(x: Tensor, trainer: SAETrainer) -> Tensor:
    """Tokens, Σ‖s·x − x̂‖², active latents, Σ‖s·x‖² and Σ s·x of one part, float64 [4 + d_in]."""
    squared_error, num_active = trainer.evaluate(x)
    wide = x.double().to(squared_error.device) * trainer.scale
    numbers = torch.stack(
        [wide.new_tensor(float(len(x))), squared_error, num_active.double(), wide.square().sum()]
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
