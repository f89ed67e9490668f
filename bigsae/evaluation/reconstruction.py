"""What an SAE makes of activations: sums over tokens, reduced over ranks, then divided."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.parallel import collectives
from bigsae.sae.base import SAE
from bigsae.sae.losses import Moments

_PAIRS_AT_ONCE = 2**25
# Half decades of the part of tokens on which a latent fires.
_EDGES = tuple(-7 + i / 2 for i in range(15))
_SUMS = (
    "num_tokens", "squared_error", "squares", "recon_squares", "product", "norm", "recon_norm", "norm_ratio", "cosine",
    "l0", "l1",
)  # fmt: skip


class ReconstructionSums:
    """Sums of one SAE over the tokens that this rank has seen, in float64 on its device."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        device = sae.W_dec.device
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.total = torch.zeros(sae.d_out, dtype=torch.float64, device=device)
        self.firing_counts = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        """Tokens on which each latent fires, [d_sae]."""

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in tokens: what the SAE reads, `[n, d_in]`, and what it predicts, `[n, d_out]`, in the LM's scale."""
        num_rows = max(_PAIRS_AT_ONCE // self.sae.d_sae, 1)
        device = self.sums.device
        for some_x, some_y in zip(x.split(num_rows), y.split(num_rows), strict=True):
            self._add(some_x.to(device), some_y.to(device, torch.float32))

    def _add(self, x: Tensor, y: Tensor) -> None:
        latents = self.sae.encode(x)
        recon = self.sae.reconstruct_from(x, latents).float()
        fires = latents > 0
        self.firing_counts += fires.sum(0)
        self.total += y.sum(0, dtype=torch.float64)
        norm, recon_norm = y.norm(dim=1), recon.norm(dim=1)
        product = (y * recon).sum(1)
        each = (
            (y - recon).square().sum(1),
            y.double().square().sum(1),
            recon.double().square().sum(1),
            product,
            norm,
            recon_norm,
            _ratio(recon_norm, norm),
            _ratio(product, norm * recon_norm),
            fires.sum(1),
            latents.abs().sum(1),
        )
        self.sums[0] += len(y)
        self.sums[1:] += torch.stack([values.sum(dtype=torch.float64) for values in each])

    def reduce_(self, group: ProcessGroup | None) -> None:
        """Replace the sums by those over all ranks of the group."""
        for tensor in (self.sums, self.total, self.firing_counts):
            collectives.sum_(tensor, group)

    def mean(self) -> Tensor:
        """Mean of what is predicted, float32 [d_out]."""
        return (self.total / self.sums[0]).float()

    def read(self, dense_above: float) -> dict[str, Any]:
        """The metrics, as docs/evaluate.md defines them."""
        sums = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        num_tokens = int(sums.pop("num_tokens"))
        mean = {name: value / num_tokens for name, value in sums.items()}
        variance = Moments(num_tokens, self.total, self.sums[2]).variance().item()
        density = self.firing_counts.double() / num_tokens
        dead, dense = self.firing_counts == 0, density > dense_above
        return {
            "fvu": _or_nan(sums["squared_error"], variance),
            "explained_variance": 1 - _or_nan(sums["squared_error"], variance),
            "mse": mean["squared_error"],
            "cosine": mean["cosine"],
            "norm": mean["norm"],
            "norm_ratio": mean["norm_ratio"],
            "relative_reconstruction_bias": _or_nan(sums["recon_squares"], sums["product"]),
            "l0": mean["l0"],
            "l1": mean["l1"],
            "dead_latents": int(dead.sum()),
            "dead_fraction": dead.double().mean().item(),
            "dense_latents": int(dense.sum()),
            "dense_fraction": dense.double().mean().item(),
            "tokens": num_tokens,
            "density_histogram": _histogram(density),
        }


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, 0 where both are."""
    return torch.where(whole > 0, part / whole, 0.0)


def _or_nan(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _histogram(density: Tensor) -> dict[str, list[float] | list[int] | int]:
    """Latents that fire, by the log10 of the part of tokens on which they do; and those that never do."""
    logs = density[density > 0].log10().clamp(min=_EDGES[0])
    counts = torch.histogram(logs.cpu(), torch.tensor(_EDGES, dtype=torch.float64)).hist
    return {
        "log10_edges": list(_EDGES),
        "num_latents": [int(count) for count in counts],
        "num_never": int((density == 0).sum()),
    }
