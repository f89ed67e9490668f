"""One SAE in training: its weights, optimiser and statistics, and the step that moves them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from bigsae.config import OptimConfig, SAEConfig, resolve_d_sae, resolve_lr
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.sae.base import SAE
from bigsae.sae.build import build_sae
from bigsae.sae.losses import DeadLatents, StepContext, global_moments
from bigsae.training.firing import FiringStatistics
from bigsae.training.initialise import activation_scale, decoder_bias
from bigsae.training.metrics import WindowSums
from bigsae.training.optim import adam_step, build_adam, gradient_norm, project_rows_, renormalise_rows_
from bigsae.training.schedule import lr_schedule


class SAETrainer:
    """Trains one SAE on batches of which each rank of the mesh brings an equal part."""

    def __init__(
        self, config: SAEConfig, optim: OptimConfig, d_in: int, num_steps: int | None, seed: int, mesh: Mesh
    ):
        d_sae = resolve_d_sae(config, d_in)
        self.config, self.optim, self.mesh = config, optim, mesh
        self.sae = build_sae(config, d_in, d_sae, seed, mesh.device)
        self.adam = build_adam(list(self.sae.parameters()), optim)
        self.peak_lr = resolve_lr(optim, d_sae)
        self.schedule = lr_schedule(optim, num_steps)
        self.firing = FiringStatistics(d_sae, config.dead_after_tokens, mesh.device, mesh.data)
        self.window = WindowSums(d_in, mesh.device)
        self.scale = 1.0
        self.initialised = False
        self.step = 0

    @torch.no_grad()
    def initialise(self, first: Tensor) -> None:
        """Set the scale and the start of b_dec from this rank's part `first` [tokens, d_in] of the first tokens."""
        if self.config.normalize == "scalar":
            self.scale = activation_scale(first, self.mesh.data)
        start = decoder_bias(first.float() * self.scale, self.config.b_dec_init, self.mesh.data)
        self.sae.b_dec.copy_(start)
        self.initialised = True

    def lr(self) -> float:
        """Learning rate of the coming step."""
        return self.peak_lr * self.schedule(self.step)

    def train_step(self, x: Tensor) -> None:
        """One step on this rank's part `x` [batch / ranks, d_in] of a global batch, in the LM's own scale."""
        assert self.initialised
        num_tokens = len(x) * self.mesh.num_ranks
        x = x.to(self.mesh.device, non_blocking=True).float() * self.scale
        moments = global_moments(x, num_tokens, self.mesh.data)
        output = self.sae.training_forward(
            x, StepContext(moments, self._dead_latents(num_tokens), self.mesh.data)
        )
        output.loss.backward()
        grad_norm, skipped = self._update()
        with torch.no_grad():
            self.firing.update(output.firing_counts, num_tokens)
            self.window.add(moments, output, grad_norm, skipped)
        self.step += 1

    def _dead_latents(self, num_tokens: int) -> DeadLatents | None:
        if not self.firing.may_be_dead(num_tokens):
            return None
        mask = self.firing.dead_mask()
        num_dead = mask.sum()
        if mask.device.type == "cpu" and not num_dead:  # costs nothing to ask here
            return None
        return DeadLatents(mask, num_dead.float())

    @torch.no_grad()
    def _update(self) -> tuple[Tensor, Tensor]:
        """Reduce, project, norm, clip, Adam, renormalise. Returns the gradient norm, and 1. where it was not finite."""
        gradients = []
        for parameter in self.sae.parameters():
            assert parameter.grad is not None
            gradients.append(collectives.sum_(parameter.grad, self.mesh.data))
        if self.config.normalize_decoder:
            assert self.sae.W_dec.grad is not None
            project_rows_(self.sae.W_dec.grad, self.sae.W_dec)
        norm = gradient_norm(gradients)
        skipped = adam_step(self.adam, self.lr(), norm, self.optim.grad_clip)
        if self.config.normalize_decoder:
            renormalise_rows_(self.sae.W_dec)
        self.adam.zero_grad(set_to_none=True)
        return norm, skipped

    def read_metrics(self) -> dict[str, float]:
        """What happened since the last call, over all ranks; begins a new window."""
        metrics = self.window.read(self.mesh.data)
        metrics["dead_fraction"] = self.firing.dead_mask().double().mean().item()
        self.window.clear()
        return metrics

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Σ‖s·x − x̂‖² and the number of active latents for `x` [tokens, d_in] of this rank, in the LM's own scale."""
        x = x.to(self.mesh.device, torch.float32) * self.scale
        recon, num_active = self.sae.reconstruct(x)
        return (x - recon).square().sum().double(), num_active

    @torch.no_grad()
    def folded(self) -> SAE:
        """A copy of the SAE as it stands that takes activations in the LM's own scale, without gradients."""
        sae = copy.deepcopy(self.sae).requires_grad_(False)
        sae.fold_scale_(self.scale)
        return sae

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that are the same on every rank."""
        named = {f"weights/{name}": p.detach() for name, p in self.sae.named_parameters()}
        for name, parameter in self.sae.named_parameters():
            state = self.adam.state[parameter] or _empty_adam_state(self.adam, parameter)
            named |= {f"adam/{name}/{key}": value for key, value in state.items()}
        named |= {f"firing/{name}": t for name, t in self.firing.tensors().items()}
        return named | {f"window/{name}": t for name, t in self.window.tensors().items()}

    def counters(self) -> dict[str, Any]:
        """The numbers of a checkpoint that are the same on every rank."""
        return {
            "step": self.step,
            "scale": self.scale,
            "initialised": self.initialised,
            "firing": self.firing.counters(),
            "window": [self.window.num_tokens, self.window.num_steps],
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take back what `counters` gave."""
        self.step, self.scale = counters["step"], counters["scale"]
        self.initialised = counters["initialised"]
        self.firing.load_counters(counters["firing"])
        self.window.num_tokens, self.window.num_steps = counters["window"]


def _empty_adam_state(adam: torch.optim.Adam, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """The state that Adam would make for `parameter` at its first step: a checkpoint is filled into it."""
    adam.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
    return adam.state[parameter]
