"""TopK SAE with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093).

pre_acts = W_enc (x − b_dec) + b_enc          latents = ReLU of the k largest pre_acts, else 0
x̂ = Σ latents · W_dec + b_dec                 loss = Σ‖x − x̂‖² / Σ‖x − x̄‖² + AuxK (auxk.py)

Multi-TopK (appendix A.4) adds 1/8 of the first term with the 4 k largest pre_acts in place of the k largest; the
weight is sparsify's. A transcoder does not subtract b_dec, predicts y, and has y in place of x in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigsae.config import SAEConfig
from bigsae.kernels.topk_pairs import TopK
from bigsae.sae.auxk import auxk_loss, auxk_selection
from bigsae.sae.base import SAE, Shape
from bigsae.sae.losses import StepContext, StepOutput

_MULTI = 4
_MULTI_COEFFICIENT = 1 / 8


class TopKSAE(SAE):
    """Keeps the `k` largest latents of each token; among equal ones those of lower index."""

    architecture = "topk"
    loss_parts = ("auxk_loss", "multi_topk_loss")
    compares_latents = True
    b_enc: nn.Parameter

    def __init__(
        self,
        shape: Shape,
        k: int,
        k_aux: int | None = None,
        auxk_coefficient: float = 1 / 32,
        multi_topk: bool = False,
        device: torch.device | str = "cpu",
    ):
        super().__init__(shape, device)
        self.k = k
        self.k_aux = k_aux or max(self.d_out // 2, 1)
        self.auxk_coefficient = auxk_coefficient
        self.multi_topk = multi_topk

    @classmethod
    def from_config(cls, config: SAEConfig, shape: Shape, device: torch.device) -> TopKSAE:
        """An SAE as configured (defaults resolved), its weights not yet set."""
        assert config.k is not None and config.auxk_coefficient is not None
        return cls(shape, config.k, config.k_aux, config.auxk_coefficient, config.multi_topk, device)

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: StepContext) -> None:
        if not self.is_transcoder:
            self.match_scale_(x, self.decoded(x)[0], context.group)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k latents of each token: values and indices, `[..., k]` each, largest first."""
        rows, _ = self._normalise(x)
        top_acts, top_indices = self._topk(rows)
        shape = (*x.shape[:-1], self.k)
        return top_acts.view(shape), top_indices.view(shape)

    def _topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        selected = self.encode_topk(self.encoder_input(x), self.b_enc, self.k)
        assert isinstance(selected, TopK)  # an SAE in training may be on several ranks, and has no such view
        return selected.acts, selected.indices

    def latents(self, x: Tensor) -> Tensor:
        top_acts, top_indices = self._topk(x)
        return top_acts.new_zeros(len(x), self.d_sae).scatter(-1, top_indices, top_acts)

    def decoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        selected = self.encode_topk(self.encoder_input(x), self.b_enc, self.k)
        return selected.decode(self.W_dec), (selected.acts > 0).sum()

    def training_forward(self, x: Tensor, y: Tensor, context: StepContext) -> StepOutput:
        encoder_input, b_enc = self.centred(x, self.b_enc)
        dead = auxk_selection(self, self.k_aux, self.auxk_coefficient, context)
        selected = self.encode_topk(encoder_input, b_enc, self.k * (_MULTI if self.multi_topk else 1), *dead)
        variance = context.moments.variance().float()
        parts = {name: variance.new_zeros(()) for name in self.loss_parts}
        if self.multi_topk:
            error = y - self.output(x, selected.decode(self.W_dec))
            parts["multi_topk_loss"] = _MULTI_COEFFICIENT * error.square().sum() / variance
            selected = selected.first(self.k)
        residual = y - self.output(x, selected.decode(self.W_dec))
        parts["auxk_loss"] = auxk_loss(
            self, dead, encoder_input, b_enc, residual, self.k_aux, self.auxk_coefficient, context
        )
        loss = residual.square().sum() / variance + torch.stack(list(parts.values())).sum()
        return StepOutput(
            loss,
            residual.detach(),
            (selected.acts.detach() > 0).sum(),
            selected.firing_counts(self.d_own),
            {name: part.detach() for name, part in parts.items()},
        )

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}
