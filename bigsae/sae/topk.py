"""TopK SAE with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093).

pre_acts = W_enc (x − b_dec) + b_enc          latents = ReLU of the k largest pre_acts, else 0
x̂ = Σ latents · W_dec + b_dec                 loss = Σ‖x − x̂‖² / Σ‖x − x̄‖² + AuxK

AuxK: with e = x − x̂ held fixed and ê = Σ over the k_aux largest pre_acts of dead latents · W_dec (b_dec not
added again), loss += coefficient · min(num_dead / k_aux, 1) · Σ‖e − ê‖² / Σ‖e − ē‖². Its gradient reaches the
encoder, and is not stopped by a ReLU: a dead latent is one whose pre_acts are small or negative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigsae.config import SAEConfig
from bigsae.kernels.decode import sparse_decode
from bigsae.kernels.encode import topk_encode
from bigsae.sae.base import SAE
from bigsae.sae.losses import DeadLatents, StepContext, StepOutput, global_moments


class TopKSAE(SAE):
    """Keeps the `k` largest latents of each token; among equal ones those of lower index."""

    architecture = "topk"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        k_aux: int | None = None,
        auxk_coefficient: float = 1 / 32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(d_in, d_sae, device)
        self.k = k
        self.k_aux = k_aux or max(d_in // 2, 1)
        self.auxk_coefficient = auxk_coefficient

    @classmethod
    def from_config(cls, config: SAEConfig, d_in: int, d_sae: int, device: torch.device) -> TopKSAE:
        """An SAE as configured, its weights not yet set."""
        return cls(d_in, d_sae, config.k, config.k_aux, config.auxk_coefficient, device)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k latents of each token: values and indices, `[..., k]` each, largest first."""
        rows = x.to(self.W_enc.dtype).reshape(-1, self.d_in)
        top_acts, top_indices, _ = topk_encode(rows - self.b_dec, self.W_enc, self.b_enc, self.k)
        shape = (*x.shape[:-1], self.k)
        return top_acts.view(shape), top_indices.view(shape)

    def encode(self, x: Tensor) -> Tensor:
        top_acts, top_indices = self.encode_sparse(x)
        latents = top_acts.new_zeros(*x.shape[:-1], self.d_sae)
        return latents.scatter(-1, top_indices, top_acts)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.to(self.W_enc.dtype).reshape(-1, self.d_in)
        top_acts, top_indices, pattern = topk_encode(rows - self.b_dec, self.W_enc, self.b_enc, self.k)
        recon = sparse_decode(top_acts, top_indices, self.W_dec, pattern) + self.b_dec
        return recon.view(x.shape), (top_acts > 0).sum()

    def training_forward(self, x: Tensor, context: StepContext) -> StepOutput:
        centred = x - self.b_dec
        top_acts, top_indices, pattern = topk_encode(centred, self.W_enc, self.b_enc, self.k)
        residual = x - (sparse_decode(top_acts, top_indices, self.W_dec, pattern) + self.b_dec)
        squared_error = residual.square().sum()
        loss = squared_error / context.moments.variance().float()
        auxk_loss = loss.new_zeros(())
        if context.dead is not None and self.auxk_coefficient:
            auxk_loss = self._auxk_loss(centred, residual.detach(), context.dead, context)
            loss = loss + auxk_loss
        fired = (top_acts.detach() > 0).to(torch.int32)
        counts = torch.zeros(self.d_sae, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, top_indices.flatten(), fired.flatten())
        return StepOutput(loss, squared_error.detach(), fired.sum(), counts, auxk_loss.detach())

    def _auxk_loss(self, centred: Tensor, e: Tensor, dead: DeadLatents, context: StepContext) -> Tensor:
        """This rank's share of the weighted auxiliary loss for the residual `e` [batch, d_in]."""
        k_aux = min(self.k_aux, self.d_sae)
        acts, indices, pattern = topk_encode(
            centred, self.W_enc, self.b_enc, k_aux, mask=dead.mask, relu=False
        )
        e_hat = sparse_decode(acts, indices, self.W_dec, pattern)
        variance = global_moments(e, context.moments.num_tokens, context.group).variance().float()
        weight = self.auxk_coefficient * (dead.num_dead / self.k_aux).clamp(max=1.0)
        return weight * (e - e_hat).square().sum() / variance

    def saelens_config(self) -> dict[str, Any]:
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}
