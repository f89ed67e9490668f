"""One SAE in training: its weights, optimiser and statistics, and the step that moves them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigsae.checks import RESAMPLING_PART, resolve_d_sae, resolve_lr, resolve_sae, resolve_threshold_lr
from bigsae.config import OptimConfig, SAEConfig
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.sae.base import SAE, layer_norm
from bigsae.sae.build import build_sae
from bigsae.sae.losses import DeadLatents, StepContext, StepOutput, global_moments, ranks_of
from bigsae.training.firing import FiringStatistics
from bigsae.training.initialise import activation_scale, decoder_bias
from bigsae.training.metrics import WindowSums
from bigsae.training.optim import adam_step, build_adam, gradient_norm, project_rows_, renormalise_rows_
from bigsae.training.resample import resample_dead, resample_seed
from bigsae.training.schedule import lr_schedule, sparsity_schedule
from bigsae.training.start import copy_weights, unit_decoder_

# Below this density of firing latents the sparse path is the faster one. JumpReLU, forward and backward, [2048, 576] x
# 16,384, one thread: dense 2.7 s; sparse 0.57, 0.98, 1.28, 2.08 s at densities of 0.2, 1.6, 3.1, 6.3 %.
_SPARSE_BELOW = 1 / 16
_STEPS_BETWEEN_DENSITIES = 32
_FIRST_DENSITY_ROWS = 256


class SAETrainer:
    """Trains one SAE, or transcoder, on batches of which each rank of the mesh brings an equal part."""

    def __init__(
        self,
        config: SAEConfig,
        optim: OptimConfig,
        d_in: int,
        num_steps: int | None,
        seed: int,
        mesh: Mesh,
        d_out: int | None = None,
        start: SAE | None = None,
    ):
        """`d_out` makes it a transcoder to that width; `start` holds the weights to start from, in the LM's scale."""
        d_sae = resolve_d_sae(config, d_in)
        config = resolve_sae(config, transcoder=d_out is not None)
        self.config, self.optim, self.mesh, self.seed, self.num_steps = config, optim, mesh, seed, num_steps
        self.sae = build_sae(config, d_in, d_sae, seed, mesh.device, d_out)
        if start is not None:
            copy_weights(start, self.sae)
            if (
                config.normalize_decoder and d_out is None
            ):  # a transcoder's norms mean nothing before it is scaled
                unit_decoder_(self.sae)
        self.training_forward = self.sae.training_forward
        if config.compile:
            self.training_forward = torch.compile(self.sae.training_forward)
        self.peak_lr = resolve_lr(optim, d_sae)
        parameters = dict(self.sae.named_parameters())
        num_updates = num_steps // optim.accumulation_steps if num_steps is not None else None
        assert config.decoder_lr_factor is not None
        factors = {"W_dec": config.decoder_lr_factor}
        if "threshold" in parameters:
            factors["threshold"] = resolve_threshold_lr(config, self.peak_lr, num_updates) / self.peak_lr
        self.adam = build_adam(parameters, optim, factors)
        self.schedule = lr_schedule(optim, num_steps)
        self.sparsity = sparsity_schedule(config, num_steps)
        self.firing = FiringStatistics(d_sae, config.dead_after_tokens, mesh.device, mesh.data)
        self.window = WindowSums(self.sae.d_out, self.sae.loss_parts, mesh.device)
        self.ranks = ranks_of(mesh.data)
        self.scale = self.out_scale = 1.0
        self.density = 1.0
        self.initialised = False
        self.step = 0

    @torch.no_grad()
    def initialise(self, first: Tensor, first_targets: Tensor | None = None) -> None:
        """Set scales, b_dec and thresholds from this rank's part of the first tokens.

        `first` is `[tokens, d_in]`; a transcoder has its targets `[tokens, d_out]` as well.
        """
        if self.config.normalize == "scalar":
            self.scale = self.out_scale = activation_scale(first, self.mesh.data)
            if first_targets is not None:
                self.out_scale = activation_scale(first_targets, self.mesh.data)
        x, y = self._units(first, first_targets)
        if self.config.init_from is not None:
            self.sae.fold_scales_(1 / self.scale, 1 / self.out_scale)
            if self.config.normalize_decoder and self.sae.is_transcoder:
                unit_decoder_(self.sae)
        else:
            assert self.config.b_dec_init is not None
            self.sae.b_dec.copy_(decoder_bias(y, self.config.b_dec_init, self.mesh.data))
            self.sae.calibrate(x, self.mesh.data)
        if self.sae.uses_density:
            x = x[:_FIRST_DENSITY_ROWS]
            counts = torch.stack([self.sae.decoded(x)[1], torch.tensor(len(x), device=x.device)])
            num_active, num_tokens = collectives.sum_(counts, self.mesh.data).tolist()
            self.density = num_active / (num_tokens * self.sae.d_sae)
        self.initialised = True

    def _units(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs and targets, in the LM's own scale, in the SAE's units; an SAE's targets are its inputs."""
        x = x.to(self.mesh.device, non_blocking=True).float()
        if self.config.normalize == "layer_norm":
            x, _ = layer_norm(x)
            return x, x
        x = x * self.scale
        if y is None:
            return x, x
        return x, y.to(self.mesh.device, non_blocking=True).float() * self.out_scale

    def lr(self) -> float:
        """Learning rate of the coming step."""
        return self.peak_lr * self.schedule(self.step)

    def train_step(self, x: Tensor, y: Tensor | None = None) -> None:
        """One step on this rank's part of a global batch, in the LM's own scale.

        `x` is `[batch / ranks, d_in]`; a transcoder has its targets `y` [batch / ranks, d_out] as well.
        """
        assert self.initialised
        num_tokens = len(x) * self.mesh.num_ranks
        x, y = self._units(x, y)
        moments = global_moments(y, num_tokens, self.mesh.data)
        context = StepContext(
            moments,
            self._dead_latents(num_tokens),
            self.mesh.data,
            self.ranks,
            self.sparsity(self.step),
            sparse=self.density < _SPARSE_BELOW,
        )
        output = self.training_forward(x, y, context)
        output.loss.backward()
        update = self._update() if (self.step + 1) % self.optim.accumulation_steps == 0 else None
        with torch.no_grad():
            counts = self.firing.update(output.firing_counts, num_tokens)
            self.window.add(moments, output, update)
            self._measure_density(counts, num_tokens)
            self._resample(x, output, num_tokens)
        self.step += 1

    def _dead_latents(self, num_tokens: int) -> DeadLatents | None:
        if not self.firing.may_be_dead(num_tokens):
            return None
        mask = self.firing.dead_mask()
        num_dead = mask.sum()
        if mask.device.type == "cpu" and not num_dead:  # costs nothing to ask here
            return None
        return DeadLatents(mask, num_dead.float())

    def _measure_density(self, counts: Tensor, num_tokens: int) -> None:
        # Seldom, as the host waits for the device here.
        if self.sae.uses_density and self.step % _STEPS_BETWEEN_DENSITIES == 0:
            self.density = int(counts.sum()) / (num_tokens * self.sae.d_sae)

    def _resample(self, x: Tensor, output: StepOutput, num_tokens: int) -> None:
        """Restart dead latents where --sae.resample-every-tokens falls into this step."""
        every = self.config.resample_every_tokens
        if every is None or (self.num_steps is not None and self.step >= RESAMPLING_PART * self.num_steps):
            return
        after, before = self.firing.num_tokens, self.firing.num_tokens - num_tokens
        if after // every == before // every:
            return
        dead = self.firing.dead_mask()
        seed = resample_seed(self.seed, self.step)
        centred = self.sae.encoder_input(x)
        resample_dead(self.sae, self.adam, dead, centred, output.residual, self.mesh.data, seed)
        self.firing.revive(dead)

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
        norm = gradient_norm(gradients) / self.optim.accumulation_steps
        skipped = adam_step(self.adam, self.lr(), norm, self.optim.grad_clip, self.optim.accumulation_steps)
        if self.config.normalize_decoder:
            renormalise_rows_(self.sae.W_dec)
        self.sae.constrain_()
        self.adam.zero_grad(set_to_none=True)
        return norm, skipped

    def read_metrics(self) -> dict[str, float]:
        """What happened since the last call, over all ranks; begins a new window."""
        metrics = self.window.read(self.mesh.data)
        metrics["dead_fraction"] = self.firing.dead_mask().double().mean().item()
        self.window.clear()
        return metrics

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Σ‖y − ŷ‖² in the LM's own scale and the number of active latents, for `x` [tokens, d_in] of this rank.

        A transcoder has its targets `y` [tokens, d_out]; else they are `x`.
        """
        targets = x if y is None else y
        recon, num_active = self.sae.reconstruct(x.to(self.mesh.device, torch.float32) * self.scale)
        error = targets.to(self.mesh.device, torch.float32) - recon / self.out_scale
        return error.square().sum().double(), num_active

    @torch.no_grad()
    def folded(self) -> SAE:
        """A copy of the SAE as it stands that takes activations in the LM's own scale, without gradients."""
        sae = copy.deepcopy(self.sae).requires_grad_(False)
        sae.cast_(torch.float32)
        sae.fold_scales_(self.scale, self.out_scale)
        sae.shape = replace(sae.shape, autocast=False)
        return sae

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that are the same on every rank."""
        named = {f"weights/{name}": p.detach() for name, p in self.sae.named_parameters()}
        named |= {f"buffers/{name}": b for name, b in self.sae.named_buffers()}
        for name, parameter in self.sae.named_parameters():
            state = self.adam.state[parameter] or _empty_adam_state(self.adam, parameter)
            named |= {f"adam/{name}/{key}": value for key, value in state.items()}
        named |= {f"firing/{name}": t for name, t in self.firing.tensors().items()}
        return named | {f"window/{name}": t for name, t in self.window.tensors().items()}

    def rank_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that are this rank's own."""
        named = {"window_local": self.window.local}
        if self.optim.accumulation_steps > 1:
            for name, parameter in self.sae.named_parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                named[f"grad/{name}"] = parameter.grad
        return named

    def counters(self) -> dict[str, Any]:
        """The numbers of a checkpoint that are the same on every rank."""
        return {
            "step": self.step,
            "scale": self.scale,
            "out_scale": self.out_scale,
            "density": self.density,
            "initialised": self.initialised,
            "firing": self.firing.counters(),
            "window": [self.window.num_tokens, self.window.num_steps, self.window.num_updates],
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take back what `counters` gave."""
        self.step, self.scale, self.out_scale = counters["step"], counters["scale"], counters["out_scale"]
        self.density, self.initialised = counters["density"], counters["initialised"]
        self.firing.load_counters(counters["firing"])
        self.window.num_tokens, self.window.num_steps, self.window.num_updates = counters["window"]


def _empty_adam_state(adam: torch.optim.Adam, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """The state that Adam would make for `parameter` at its first step: a checkpoint is filled into it."""
    adam.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
    return adam.state[parameter]
