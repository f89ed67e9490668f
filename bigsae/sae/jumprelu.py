"""JumpReLU SAE (Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435).

pre_acts = W_enc (x − b_dec) + b_enc          latents = pre_acts where they exceed their latent's threshold θ, else 0
x̂ = Σ latents · W_dec + b_dec                 loss = mean over tokens of ‖x − x̂‖² + λ · sparsity + dead latents' loss

sparsity of a token, λ = --sae.l0-coefficient times its warm-up:
    step        L0                                                    (the paper)
    quadratic   2 / L0* · (L0 − L0*)²                                 (Gemma Scope 2; L0* = --sae.target-l0)
    mean_quadratic   the same of the batch's mean L0: tokens may differ, and the mean settles at L0* and not beside it.
                To the window's gradient it adds a prior, dL0/dθ = −L0* / d_sae for every latent: where no pre_act lies
                in the windows the thresholds would be stuck, whatever L0 is. At L0 = L0* both vanish.
    tanh        Σ tanh(c · latent · ‖W_dec row‖)                      (Conerly et al. 2025, Anthropic's January update)
dead latents: κ · Σ over dead latents of max(θ − pre_act, 0) · ‖W_dec row‖    (the same; they have no other gradient)

θ gets straight-through gradients in a window about it (kernels/jumprelu.py). It is trained directly, in float32: a step
of Adam moves it by about the learning rate, where log θ would move by that part of a small θ, and bfloat16 by nothing.
Started at a fixed 0.01 it still has far to go to a sparse L0; with a target it starts where the first tokens have it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigsae.config import SAEConfig
from bigsae.kernels.jumprelu import jumprelu
from bigsae.kernels.pairs import DensePairs, RaggedPairs
from bigsae.kernels.shortfall import shortfall
from bigsae.sae.base import SAE, Shape
from bigsae.sae.losses import StepContext, StepOutput

# The reconstruction loss, a sum over the width, pulls L0 above its target. At this weight against it L0 settled within
# 6 % of 32 on SmolLM2-135M (layer 6, residual and MLP), at 1 within 10 and 34 %; FVU followed L0 and nothing else.
_MEAN_QUADRATIC_PER_WIDTH = 1 / 50


class JumpReLUSAE(SAE):
    """Keeps the latents that exceed their own threshold. `config` is None for an SAE that is not trained further."""

    architecture = "jumprelu"
    loss_parts = ("sparsity_loss", "pre_act_loss")
    uses_density = True
    encoder_biases = ("b_enc", "threshold")
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def __init__(self, shape: Shape, config: SAEConfig | None = None, device: torch.device | str = "cpu"):
        super().__init__(shape, device)
        self.config = config
        self.l0_coefficient = 0.0 if config is None else _l0_coefficient(config, self.d_out)

    @classmethod
    def from_config(cls, config: SAEConfig, shape: Shape, device: torch.device) -> JumpReLUSAE:
        """An SAE as configured (defaults resolved), its weights not yet set."""
        return cls(shape, config, device)

    def cast_(self, dtype: torch.dtype) -> None:
        super().cast_(dtype)
        self.threshold.data = self.threshold.data.float()

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: StepContext) -> None:
        assert self.config is not None
        if self.config.jumprelu_init_threshold is not None:
            self.threshold.fill_(self.config.jumprelu_init_threshold)
            return
        assert self.config.target_l0 is not None
        acts, pairs, smallest = select_active(self, x, self.b_enc, self.config.target_l0, context)
        self.threshold.fill_(smallest)
        if not self.is_transcoder:
            self.threshold.mul_(self.match_scale_(x, pairs.decode(acts, self.W_dec), context.group))

    def latents(self, x: Tensor) -> Tensor:
        encoder_input = self.encoder_input(x)
        pre_acts = F.linear(
            encoder_input, self.W_enc.to(encoder_input.dtype), self.b_enc.to(encoder_input.dtype)
        )
        return pre_acts.masked_fill(pre_acts <= self.threshold, 0).relu()

    def decoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts, pairs = self.encode_pairs(
            self.encoder_input(x), self.b_enc, self.threshold.clamp(min=0), sparse=True
        )
        return pairs.decode(acts, self.W_dec), (acts > 0).sum()

    def training_forward(self, x: Tensor, y: Tensor, context: StepContext) -> StepOutput:
        config = self.config
        assert config is not None and config.jumprelu_bandwidth is not None
        encoder_input, b_enc = self.centred(x, self.b_enc)
        bound = self.threshold.detach() - config.jumprelu_bandwidth / 2
        pre_acts, pairs = self.encode_pairs(encoder_input, b_enc, bound, context.sparse)
        acts, active = jumprelu(
            pre_acts, self.threshold, pairs, config.jumprelu_bandwidth, to_input=config.jumprelu_ste_to_input
        )
        residual = y - self.output(x, pairs.decode(acts, self.W_dec))
        parts = {
            "sparsity_loss": context.sparsity
            * self._sparsity_loss(acts, active, pairs, context)
            / context.num_tokens,
            "pre_act_loss": self._pre_act_loss(encoder_input, b_enc, context) / context.num_tokens,
        }
        loss = residual.square().sum() / context.num_tokens + parts["sparsity_loss"] + parts["pre_act_loss"]
        fired = active.detach() > 0
        return StepOutput(
            loss,
            residual.detach(),
            fired.sum(),
            pairs.latent_sums(fired.to(torch.int32)),
            {name: part.detach() for name, part in parts.items()},
        )

    def _sparsity_loss(
        self, acts: Tensor, active: Tensor, pairs: DensePairs | RaggedPairs, context: StepContext
    ) -> Tensor:
        """Sum over tokens of the weighted sparsity."""
        config = self.config
        assert config is not None
        if config.sparsity_loss == "tanh":
            assert config.tanh_scale is not None
            strengths = acts * pairs.spread(self.W_dec.norm(dim=1))
            total = torch.tanh(config.tanh_scale * strengths).sum()
            return self.l0_coefficient * self.shape.latents.sum(total)
        l0 = pairs.token_sums(active)
        if config.sparsity_loss == "step":
            return self.l0_coefficient * self.shape.latents.sum(l0.sum())
        if config.sparsity_loss == "quadratic":
            assert config.target_l0 is not None
            penalties = 2 / config.target_l0 * (self.shape.latents.sum(l0) - config.target_l0).square()
        else:
            penalties = self._mean_quadratic(l0, config.target_l0, context)
        return self.l0_coefficient * penalties.sum()

    def _mean_quadratic(self, l0: Tensor, target: float | None, context: StepContext) -> Tensor:
        """[batch]: for each token the penalty of the mean L0 of all tokens; `l0` [batch] is that of own latents."""
        assert target is not None
        total = context.ranks.sum_(l0.detach().sum())
        beyond = total / context.num_tokens - target
        thresholds = self.threshold.sum()
        change = l0 - l0.detach() - target / self.d_sae * (thresholds - thresholds.detach())
        # The value, and the derivative by what changes L0.
        return 2 / target * (beyond.square() + 2 * beyond * change)

    def _pre_act_loss(self, encoder_input: Tensor, b_enc: Tensor, context: StepContext) -> Tensor:
        """Sum over tokens of the weighted loss of dead latents, computed on their rows alone."""
        assert self.config is not None
        if context.dead is None or not self.config.pre_act_coefficient:
            return self.b_dec.new_zeros(())
        dead = context.dead.mask.nonzero().squeeze(1)
        lacking = shortfall(encoder_input, self.W_enc, b_enc, self.threshold, self.W_dec, dead)
        total = self.shape.latents.sum(lacking)
        return self.config.pre_act_coefficient * total

    @torch.no_grad()
    def constrain_(self) -> None:
        # Below zero it would let negative pre_acts through. Not clamped in the graph: that would hold it at zero.
        self.threshold.clamp_(min=0)

    def saelens_config(self) -> dict[str, Any]:
        return saelens_jumprelu(self)


def select_active(
    sae: SAE, x: Tensor, b_enc: Tensor, num_active: float, context: StepContext
) -> tuple[Tensor, RaggedPairs, Tensor]:
    """The largest pre_acts of `x` [tokens, d_in] on all ranks, `num_active` a token on average, and the smallest."""
    return sae.encode_batchtopk(
        sae.encoder_input(x), b_enc, round(num_active * context.num_tokens), None, context
    )


def _l0_coefficient(config: SAEConfig, d_out: int) -> float:
    if config.l0_coefficient is not None:
        return config.l0_coefficient
    return _MEAN_QUADRATIC_PER_WIDTH * d_out if config.sparsity_loss == "mean_quadratic" else 1.0


def saelens_jumprelu(sae: SAE) -> dict[str, Any]:
    """SAELens's name of a JumpReLU SAE or transcoder."""
    if not sae.is_transcoder:
        return {"architecture": "jumprelu"}
    return {"architecture": "jumprelu_skip_transcoder" if sae.W_skip is not None else "jumprelu_transcoder"}
