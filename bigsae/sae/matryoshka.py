"""Matryoshka SAE with BatchTopK (Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka SAEs",
arXiv 2503.17547).

Latents are selected as in batchtopk.py. With prefixes m_1 < … < m_G = d_sae, the first m_g latents alone give

    x̂_g = Σ over latents < m_g · W_dec + b_dec          loss = 1/G Σ_g Σ‖x − x̂_g‖² / Σ‖x − x̄‖² + AuxK

All prefixes weigh the same, as in the paper, where they are summed; as a mean the loss stays one of FVUs, and AuxK (of
the residual of the whole SAE) keeps its weight beside it whatever their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigsae.checks import resolve_prefixes
from bigsae.config import SAEConfig
from bigsae.kernels.pairs import RaggedPairs
from bigsae.sae.base import Shape
from bigsae.sae.batchtopk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """A BatchTopK SAE whose first latents are SAEs by themselves, of the widths `prefixes`."""

    architecture = "matryoshka"
    prefixes: tuple[int, ...]

    @classmethod
    def from_config(cls, config: SAEConfig, shape: Shape, device: torch.device) -> MatryoshkaSAE:
        """An SAE as configured (defaults resolved), its weights not yet set."""
        assert config.k is not None and config.auxk_coefficient is not None
        sae = cls(shape, config.k, config.k_aux, config.auxk_coefficient, device=device)
        sae.prefixes = resolve_prefixes(config, shape.d_sae)
        return sae

    def _reconstruct(
        self, x: Tensor, y: Tensor, acts: Tensor, pairs: RaggedPairs, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_prefixes, first = len(self.prefixes), self.shape.latents.rank * self.d_own
        # Where on this rank each prefix ends: nowhere, within its latents, or beyond them.
        ends = [min(max(width - first, 0), self.d_own) for width in self.prefixes]
        parts = pairs.split(ends).decode(acts, self.W_dec).view(len(x), num_prefixes, self.d_out)
        parts = self.shape.latents.sum(parts)
        residuals = y.unsqueeze(1) - (parts.cumsum(1) + self.b_dec)
        loss = residuals.square().sum() / (num_prefixes * variance)
        return loss, residuals[:, -1]
