"""BatchTopK SAE (Bussmann et al. 2024, "BatchTopK Sparse Autoencoders", arXiv 2412.06410).

pre_acts = W_enc (x − b_dec) + b_enc          latents = the k · batch largest positive pre_acts of the global batch
x̂ = Σ latents · W_dec + b_dec                 loss = Σ‖x − x̂‖² / Σ‖x − x̄‖² + AuxK (auxk.py)

Single tokens have no batch: `encode` and everything but the training forward keep what exceeds a threshold, the running
mean (rate 0.01) of the smallest value that a training batch kept. So it is exported as a JumpReLU SAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigsae.config import SAEConfig
from bigsae.kernels.pairs import RaggedPairs
from bigsae.sae.auxk import auxk_loss, auxk_selection
from bigsae.sae.base import SAE, Shape
from bigsae.sae.jumprelu import saelens_jumprelu, select_active
from bigsae.sae.losses import StepContext, StepOutput

_THRESHOLD_RATE = 0.01


class BatchTopKSAE(SAE):
    """Keeps `k` latents of a token on average: more of some, fewer of others."""

    architecture = "batchtopk"
    loss_parts = ("auxk_loss",)
    b_enc: nn.Parameter
    threshold: Tensor
    threshold_weight: Tensor
    smallest: Tensor

    def __init__(
        self,
        shape: Shape,
        k: int,
        k_aux: int | None = None,
        auxk_coefficient: float = 1 / 32,
        device: torch.device | str = "cpu",
    ):
        super().__init__(shape, device)
        self.k = k
        self.k_aux = k_aux or max(self.d_out // 2, 1)
        self.auxk_coefficient = auxk_coefficient
        # All 0 before the first step. `smallest` is that of the last batch: where to look for the next one's.
        self.register_buffer("threshold", torch.zeros((), device=device))
        self.register_buffer("threshold_weight", torch.zeros((), device=device))
        self.register_buffer("smallest", torch.zeros((), device=device))
        self._has_guess = False  # known to the host; only of speed

    @classmethod
    def from_config(cls, config: SAEConfig, shape: Shape, device: torch.device) -> BatchTopKSAE:
        """An SAE as configured (defaults resolved), its weights not yet set."""
        assert config.k is not None and config.auxk_coefficient is not None
        return cls(shape, config.k, config.k_aux, config.auxk_coefficient, device=device)

    @torch.no_grad()
    def take_over(self, values: Mapping[str, Tensor]) -> None:
        if "threshold" in values:
            self.threshold.copy_(values["threshold"].mean())
            self.smallest.copy_(self.threshold)
            self.threshold_weight.fill_(1.0)

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: StepContext) -> None:
        if not self.is_transcoder:
            acts, pairs, _ = select_active(self, x, self.b_enc, self.k, context)
            self.match_scale_(x, pairs.decode(acts, self.W_dec), context.group)

    def latents(self, x: Tensor) -> Tensor:
        encoder_input = self.encoder_input(x)
        W_enc, b_enc = self.W_enc.to(encoder_input.dtype), self.b_enc.to(encoder_input.dtype)
        pre_acts = torch.nn.functional.linear(encoder_input, W_enc, b_enc)
        return pre_acts.masked_fill(pre_acts <= self.threshold, 0)

    def decoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts, pairs = self.encode_pairs(self.encoder_input(x), self.b_enc, self.threshold, sparse=True)
        return pairs.decode(acts, self.W_dec), (acts > 0).sum()

    def training_forward(self, x: Tensor, y: Tensor, context: StepContext) -> StepOutput:
        encoder_input, b_enc = self.centred(x, self.b_enc)
        guess = self.smallest if self._has_guess else None
        self._has_guess = True
        dead = auxk_selection(self, self.k_aux, self.auxk_coefficient, context)
        acts, pairs, smallest = self.encode_batchtopk(
            encoder_input, b_enc, self.k * context.num_tokens, guess, context, *dead
        )
        self._follow(smallest)
        loss, residual = self._reconstruct(x, y, acts, pairs, context.moments.variance().float())
        auxk = auxk_loss(
            self, dead, encoder_input, b_enc, residual, self.k_aux, self.auxk_coefficient, context
        )
        fired = acts.detach() > 0
        return StepOutput(
            loss + auxk,
            residual.detach(),
            fired.sum(),
            pairs.latent_sums(fired.to(torch.int32)),
            {"auxk_loss": auxk.detach()},
        )

    @torch.no_grad()
    def _follow(self, smallest: Tensor) -> None:
        """Take in the smallest value that this batch kept; a batch that kept none, or no number, says nothing."""
        usable = (smallest > 0) & smallest.isfinite()
        self.smallest.copy_(torch.where(usable, smallest, self.smallest))
        # Weighted as Adam's moments are: a mean of what there was, not of that and a start at 0.
        weight = self.threshold_weight.lerp(torch.ones_like(self.threshold_weight), _THRESHOLD_RATE)
        moved = self.threshold + _THRESHOLD_RATE / weight * (self.smallest - self.threshold)
        self.threshold.copy_(torch.where(usable, moved, self.threshold))
        self.threshold_weight.copy_(torch.where(usable, weight, self.threshold_weight))

    def _reconstruct(
        self, x: Tensor, y: Tensor, acts: Tensor, pairs: RaggedPairs, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of the reconstruction loss, and the residual [batch, d_out]."""
        residual = y - self.output(x, pairs.decode(acts, self.W_dec))
        return residual.square().sum() / variance, residual

    @torch.no_grad()
    def fold_scales_(self, s_in: float, s_out: float) -> None:
        super().fold_scales_(s_in, s_out)
        self.threshold.div_(s_in)
        self.smallest.div_(s_in)

    def saelens_config(self) -> dict[str, Any]:
        return saelens_jumprelu(self)

    def saelens_tensors(self) -> dict[str, Tensor]:
        return super().saelens_tensors() | {"threshold": self.threshold.expand(self.d_sae)}
