"""Gated SAE (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders", 2404.16014).

gate = W_enc (x − b_dec) + b_gate             magnitude = ReLU(exp(r_mag) · W_enc (x − b_dec) + b_mag)
latents = magnitude where gate > 0, else 0    x̂ = Σ latents · W_dec + b_dec
loss = mean over tokens of ‖x − x̂‖² + λ · Σ ReLU(gate) · ‖W_dec row‖ + ‖x − x̂_gate‖²

x̂_gate = Σ ReLU(gate) · W_dec + b_dec with decoder and b_dec held fixed: it is there to give the gate a gradient, not to
train the decoder on it. λ = --sae.l1-coefficient times its warm-up. The rows' norms are held fixed in the penalty too:
else it would shrink them, exp(r_mag) would make up for it, and no gate would ever close (the paper has unit rows).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigsae.config import SAEConfig
from bigsae.kernels.pairs import DensePairs, RaggedPairs
from bigsae.sae.base import SAE, Shape
from bigsae.sae.losses import StepContext, StepOutput


class GatedSAE(SAE):
    """Decides which latents fire apart from how much."""

    architecture = "gated"
    loss_parts = ("l1_loss", "gate_loss")
    uses_density = True
    encoder_biases = ("b_gate", "b_mag")
    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, shape: Shape, l1_coefficient: float = 5.0, device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        self.l1_coefficient = l1_coefficient
        self.r_mag = nn.Parameter(torch.zeros(self.d_own, device=device))

    @classmethod
    def from_config(cls, config: SAEConfig, shape: Shape, device: torch.device) -> GatedSAE:
        """An SAE as configured (defaults resolved), its weights not yet set."""
        assert config.l1_coefficient is not None
        return cls(shape, config.l1_coefficient, device)

    def latents(self, x: Tensor) -> Tensor:
        encoder_input = self.encoder_input(x)
        linear = encoder_input @ self.W_enc.to(encoder_input.dtype).T
        magnitude = (linear * self.r_mag.exp() + self.b_mag).relu()
        return magnitude.masked_fill(linear + self.b_gate <= 0, 0)

    def decoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, pairs = self.encode_pairs(
            self.encoder_input(x), self.b_gate, self.b_gate.new_zeros(()), sparse=True
        )
        acts = self._magnitudes(gate, pairs)
        return pairs.decode(acts, self.W_dec), (acts > 0).sum()

    def _magnitudes(self, gate: Tensor, pairs: DensePairs | RaggedPairs) -> Tensor:
        """What latents fire with where their gate is open, from the gates' pre_acts."""
        linear = gate - pairs.spread(self.b_gate)
        return (linear * pairs.spread(self.r_mag.exp()) + pairs.spread(self.b_mag)).relu()

    def training_forward(self, x: Tensor, y: Tensor, context: StepContext) -> StepOutput:
        encoder_input, b_gate = self.centred(x, self.b_gate)
        gate, pairs = self.encode_pairs(encoder_input, b_gate, self.b_gate.new_zeros(()), context.sparse)
        acts = self._magnitudes(gate, pairs) * (gate > 0)
        residual = y - self.output(x, pairs.decode(acts, self.W_dec))
        gate_acts = gate.relu()
        l1 = (gate_acts * pairs.spread(self.W_dec.detach().norm(dim=1))).sum()
        latents = self.shape.latents
        gate_decoded = latents.sum(pairs.decode(gate_acts, self.W_dec.detach()))
        gate_residual = y - (gate_decoded + self.b_dec.detach())
        parts = {
            "l1_loss": self.l1_coefficient * context.sparsity * latents.sum(l1) / context.num_tokens,
            "gate_loss": gate_residual.square().sum() / context.num_tokens,
        }
        fired = acts.detach() > 0
        return StepOutput(
            residual.square().sum() / context.num_tokens + parts["l1_loss"] + parts["gate_loss"],
            residual.detach(),
            fired.sum(),
            pairs.latent_sums(fired.to(torch.int32)),
            {name: part.detach() for name, part in parts.items()},
        )

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "gated"}
