"""The objectives as the docstrings of bigsae.sae have them, in plain dense autograd: obvious, in any float dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigsae.config import SAEConfig

Weights = dict[str, Tensor]


@dataclass
class Expected:
    """What a training forward must give."""

    loss: Tensor
    parts: dict[str, Tensor]
    residual: Tensor
    fired: Tensor
    """bool [batch, d_sae]"""


@dataclass
class Step:
    """What an objective is of, for an SAE with `weights` under their names in bigsae."""

    config: SAEConfig
    """Defaults resolved."""
    weights: Weights
    x: Tensor
    y: Tensor
    dead: Tensor | None = None
    """bool [d_sae]"""
    sparsity: float = 1.0

    def __getattr__(self, name: str) -> Tensor:
        return self.weights[name]

    def linear(self) -> Tensor:
        """[batch, d_sae]: W_enc (x − b_dec)."""
        centred = self.x - self.b_dec if self.config.apply_b_dec_to_input else self.x
        return centred @ self.W_enc.T

    def residual(self, latents: Tensor) -> Tensor:
        recon = latents @ self.W_dec + self.b_dec
        if "W_skip" in self.weights:
            recon = recon + self.x @ self.W_skip.T
        return self.y - recon

    def norms(self) -> Tensor:
        return self.W_dec.square().sum(1).sqrt()


def expected(step: Step) -> Expected:
    """The objective of the architecture that the configuration names."""
    return OBJECTIVES[step.config.architecture](step)


def keep_largest(pre_acts: Tensor, k: int) -> Tensor:
    """The k largest of each row, the others 0; no ties."""
    kth = pre_acts.detach().topk(k).values[:, -1:]
    return torch.where(pre_acts >= kth, pre_acts, 0)


def scatter(x: Tensor) -> Tensor:
    """Σ‖x − x̄‖²"""
    return (x - x.mean(0)).square().sum()


def auxk(step: Step, pre_acts: Tensor, residual: Tensor) -> Tensor:
    coefficient = step.config.auxk_coefficient
    if step.dead is None or not coefficient:
        return residual.new_zeros(())
    e, num_dead = residual.detach(), int(step.dead.sum())
    k_aux = step.config.k_aux or e.shape[1] // 2
    candidates = keep_largest(pre_acts[:, step.dead], min(k_aux, num_dead))
    loss = (e - candidates @ step.W_dec[step.dead]).square().sum() / scatter(e)
    return coefficient * min(num_dead / k_aux, 1) * loss


def topk(step: Step) -> Expected:
    assert step.config.k is not None
    pre_acts = step.linear() + step.b_enc
    latents = keep_largest(pre_acts, step.config.k).relu()
    residual = step.residual(latents)
    parts = {"auxk_loss": auxk(step, pre_acts, residual), "multi_topk_loss": torch.zeros(())}
    if step.config.multi_topk:
        error = step.residual(keep_largest(pre_acts, 4 * step.config.k).relu())
        parts["multi_topk_loss"] = error.square().sum() / scatter(step.y) / 8
    loss = residual.square().sum() / scatter(step.y)
    return Expected(loss + sum(parts.values()), parts, residual, latents > 0)


def batchtopk(step: Step) -> Expected:
    assert step.config.k is not None
    pre_acts = step.linear() + step.b_enc
    kept = keep_largest(pre_acts.relu().view(1, -1), step.config.k * len(step.x))
    latents = kept.view(pre_acts.shape)
    prefixes = step.config.prefixes or (latents.shape[1],)
    residuals = [step.residual(latents * (torch.arange(latents.shape[1]) < prefix)) for prefix in prefixes]
    aux = auxk(step, pre_acts, residuals[-1])
    loss = sum(residual.square().sum() / scatter(step.y) for residual in residuals) / len(prefixes)
    return Expected(loss + aux, {"auxk_loss": aux}, residuals[-1], latents > 0)


def jumprelu(step: Step) -> Expected:
    config, theta = step.config, step.threshold
    assert config.jumprelu_bandwidth is not None and config.l0_coefficient is not None
    pre_acts = step.linear() + step.b_enc
    over = (pre_acts if config.jumprelu_ste_to_input else pre_acts.detach()) - theta
    # Zero, but with the gradient of a ramp that rises from 0 to 1 over the window.
    ramp = (over.detach().abs() < config.jumprelu_bandwidth / 2) * (over - over.detach())
    ramp = ramp / config.jumprelu_bandwidth
    open_ = pre_acts > theta
    latents = pre_acts * open_ + theta.detach() * ramp
    l0 = (open_ + ramp).sum(1)
    if config.sparsity_loss == "tanh":
        assert config.tanh_scale is not None
        sparsity = torch.tanh(config.tanh_scale * latents * step.norms()).sum(1)
    elif config.sparsity_loss == "quadratic":
        assert config.target_l0 is not None
        sparsity = 2 / config.target_l0 * (l0 - config.target_l0) ** 2
    elif config.sparsity_loss == "mean_quadratic":
        assert config.target_l0 is not None
        prior = config.target_l0 / len(theta) * (theta - theta.detach()).sum()
        sparsity = 2 / config.target_l0 * (l0.mean() - prior - config.target_l0) ** 2
    else:
        sparsity = l0
    short = torch.zeros(())
    if step.dead is not None and config.pre_act_coefficient:
        each = (theta - pre_acts).relu() * step.norms()
        short = config.pre_act_coefficient * each[:, step.dead].sum(1).mean()
    residual = step.residual(latents)
    parts = {
        "sparsity_loss": config.l0_coefficient * step.sparsity * sparsity.mean(),
        "pre_act_loss": short,
    }
    loss = residual.square().sum(1).mean() + sum(parts.values())
    return Expected(loss, parts, residual, open_)


def gated(step: Step) -> Expected:
    assert step.config.l1_coefficient is not None
    linear = step.linear()
    gate, magnitude = linear + step.b_gate, (linear * step.r_mag.exp() + step.b_mag).relu()
    latents = torch.where(gate > 0, magnitude, 0)
    residual = step.residual(latents)
    by_gate = step.y - gate.relu() @ step.W_dec.detach() - step.b_dec.detach()
    l1 = (gate.relu() * step.norms().detach()).sum(1).mean()
    parts = {
        "l1_loss": step.config.l1_coefficient * step.sparsity * l1,
        "gate_loss": by_gate.square().sum(1).mean(),
    }
    loss = residual.square().sum(1).mean() + sum(parts.values())
    return Expected(loss, parts, residual, latents > 0)


def standard(step: Step) -> Expected:
    p = step.config.p_norm
    assert step.config.l1_coefficient is not None and p is not None
    latents = (step.linear() + step.b_enc).relu()
    residual = step.residual(latents)
    strengths = latents * step.norms()
    # Token by token, over what is active: zeros have no derivative.
    norms = [(row[row > 0] ** p).sum() ** (1 / p) for row in strengths if (row > 0).any()]
    l1_loss = step.config.l1_coefficient * step.sparsity * torch.stack(norms).sum() / len(step.x)
    loss = residual.square().sum(1).mean() + l1_loss
    return Expected(loss, {"l1_loss": l1_loss}, residual, latents > 0)


OBJECTIVES = {
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka": batchtopk,
    "jumprelu": jumprelu,
    "gated": gated,
    "standard": standard,
}
