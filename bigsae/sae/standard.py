"""Standard SAE: ReLU with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity"; Conerly et al. 2024).

latents = ReLU(W_enc (x − b_dec) + b_enc)     x̂ = Σ latents · W_dec + b_dec
loss = mean over tokens of ‖x − x̂‖² + λ · ‖latent · ‖W_dec row‖‖_p

over the latents of a token; λ = --sae.l1-coefficient times its warm-up, p = --sae.p-norm. Decoder rows are free, and
weigh the penalty, so that small latents with long rows are no way around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigsae.config import SAEConfig
from bigsae.kernels.pairs import DensePairs, RaggedPairs
from bigsae.sae.base import SAE, Shape
from bigsae.sae.losses import StepContext, StepOutput


class StandardSAE(SAE):
    """Keeps every latent above zero."""

    architecture = "standard"
    loss_parts = ("l1_loss",)
    uses_density = True
    b_enc: nn.Parameter

    def __init__(
        self,
        shape: Shape,
        l1_coefficient: float = 5.0,
        p_norm: float = 1.0,
        device: torch.device | str = "cpu",
    ):
        super().__init__(shape, device)
        self.l1_coefficient, self.p_norm = l1_coefficient, p_norm

    @classmethod
    def from_config(cls, config: SAEConfig, shape: Shape, device: torch.device) -> StandardSAE:
        """An SAE as configured (defaults resolved), its weights not yet set."""
        assert config.l1_coefficient is not None and config.p_norm is not None
        return cls(shape, config.l1_coefficient, config.p_norm, device)

    def latents(self, x: Tensor) -> Tensor:
        encoder_input = self.encoder_input(x)
        W_enc, b_enc = self.W_enc.to(encoder_input.dtype), self.b_enc.to(encoder_input.dtype)
        return torch.nn.functional.linear(encoder_input, W_enc, b_enc).relu()

    def decoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts, pairs = self.encode_pairs(
            self.encoder_input(x), self.b_enc, self.b_enc.new_zeros(()), sparse=True
        )
        return pairs.decode(acts, self.W_dec), (acts > 0).sum()

    def training_forward(self, x: Tensor, y: Tensor, context: StepContext) -> StepOutput:
        encoder_input, b_enc = self.centred(x, self.b_enc)
        pre_acts, pairs = self.encode_pairs(encoder_input, b_enc, self.b_enc.new_zeros(()), context.sparse)
        acts = pre_acts.relu()
        residual = y - self.output(x, pairs.decode(acts, self.W_dec))
        strengths = acts * pairs.spread(self.W_dec.norm(dim=1))
        l1 = self.l1_coefficient * context.sparsity * self._penalty(strengths, pairs)
        l1_loss = l1 / context.num_tokens
        fired = acts.detach() > 0
        return StepOutput(
            residual.square().sum() / context.num_tokens + l1_loss,
            residual.detach(),
            fired.sum(),
            pairs.latent_sums(fired.to(torch.int32)),
            {"l1_loss": l1_loss.detach()},
        )

    def _penalty(self, strengths: Tensor, pairs: DensePairs | RaggedPairs) -> Tensor:
        """[]: the sum over tokens of the p-norm of their `strengths`, those on other ranks included."""
        if self.p_norm == 1:
            return self.shape.latents.sum(pairs.token_sums(strengths).sum())
        return root(self.shape.latents.sum(powers(strengths, pairs, self.p_norm)), self.p_norm).sum()

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "standard"}


def powers(values: Tensor, pairs: DensePairs | RaggedPairs, p: float) -> Tensor:
    """[batch]: Σ value^p of each token's `values`, which are not negative; zeros get no gradient."""
    positive = values > 0
    # 1 stands in for zeros, where the powers have no derivative.
    return pairs.token_sums(torch.where(positive, values, 1.0).pow(p) * positive)


def root(sums: Tensor, p: float) -> Tensor:
    """sums^(1/p), with a gradient of 0 at 0."""
    return torch.where(sums > 0, sums, 1.0).pow(1 / p) * (sums > 0)
