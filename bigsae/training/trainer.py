"""One SAE in training: its weights, optimiser and statistics, and the step that moves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigsae.checks import (
    RESAMPLING_PART,
    check_divides,
    resolve_d_sae,
    resolve_lr,
    resolve_sae,
    resolve_threshold_lr,
)
from bigsae.config import OptimConfig, SAEConfig
from bigsae.kernels.sparse_grad import gradient_dtype
from bigsae.parallel import collectives
from bigsae.parallel.latents import latents_of
from bigsae.parallel.memory import SPARSE_BELOW
from bigsae.parallel.mesh import Mesh, rows_of_all
from bigsae.sae.base import SAE, layer_norm
from bigsae.sae.build import build_sae, empty_like
from bigsae.sae.losses import DeadLatents, StepContext, StepOutput, global_moments, ranks_of
from bigsae.training.firing import FiringStatistics
from bigsae.training.initialise import activation_scale, decoder_bias
from bigsae.training.metrics import WindowSums
from bigsae.training.resample import resample_dead, resample_seed
from bigsae.training.schedule import lr_schedule, sparsity_schedule
from bigsae.training.start import copy_weights, unit_decoder_
from bigsae.training.update import Update

_STEPS_BETWEEN_DENSITIES = 32
_FIRST_DENSITY_ROWS = 256


@dataclass
class Steps:
    """How many steps there were, and of which kinds."""

    all: int = 0
    dense: int = 0
    """On all latents of each token."""
    dead: int = 0
    """In which some latents were dead, or may have been: an auxiliary loss was computed."""


class SAETrainer:
    """Trains one SAE, or transcoder, on batches of which each rank of `mesh.data` brings an equal part.

    The ranks of `mesh.latent` hold a part of the latents each, and bring the same tokens.
    """

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
        shard_optimizer: bool = False,
    ):
        """`d_out` makes it a transcoder to that width; `start` holds the weights to start from, in the LM's scale."""
        d_sae = resolve_d_sae(config, d_in)
        config = resolve_sae(config, transcoder=d_out is not None)
        check_divides(d_sae, mesh.num_latent)
        self.config, self.optim, self.mesh, self.seed, self.num_steps = config, optim, mesh, seed, num_steps
        self.sae = build_sae(config, d_in, d_sae, seed, mesh.device, d_out, latents_of(mesh))
        if start is not None:
            copy_weights(start, self.sae)
            if config.normalize_decoder and d_out is None:  # a transcoder's mean nothing before it is scaled
                unit_decoder_(self.sae)
        self.training_forward = self.sae.training_forward
        if config.compile:
            self.training_forward = torch.compile(self.sae.training_forward)
        self.peak_lr = resolve_lr(optim, d_sae)
        assert config.normalize_decoder is not None
        self.update = Update(
            self.sae,
            optim,
            self._lr_factors(),
            mesh,
            unit_decoder=config.normalize_decoder,
            shard_optimizer=shard_optimizer,
            seed=seed,
        )
        self.schedule = lr_schedule(optim, num_steps)
        self.sparsity = sparsity_schedule(config, num_steps)
        self.firing = FiringStatistics(
            self.sae.d_own, config.dead_after_tokens, mesh.device, mesh.data, mesh.latent
        )
        self.window = WindowSums(self.sae.d_out, self.sae.loss_parts, mesh.device)
        self.ranks = ranks_of(mesh.world)
        self.scale = self.out_scale = 1.0
        self.density = 1.0
        self.initialised = False
        self.step = 0
        self._steps = Steps()

    def _lr_factors(self) -> dict[str, float]:
        config, num_updates = self.config, None
        if self.num_steps is not None:
            num_updates = self.num_steps // self.optim.accumulation_steps
        assert config.decoder_lr_factor is not None
        factors = {"W_dec": config.decoder_lr_factor}
        if "threshold" in dict(self.sae.named_parameters()):
            factors["threshold"] = resolve_threshold_lr(config, self.peak_lr, num_updates) / self.peak_lr
        return factors

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
            self.sae.calibrate(x, self._context(y))
        if self.sae.uses_density:
            x = x[:_FIRST_DENSITY_ROWS]
            num_active = int(self.ranks.sum_(self.sae.decoded(x)[1]))
            self.density = num_active / (len(x) * self.mesh.num_data * self.sae.d_sae)
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

        `x` is `[batch / num_data, d_in]`; a transcoder has its targets `y` [batch / num_data, d_out] as well.
        """
        assert self.initialised
        x, y = self._units(x, y)
        context = self._context(y)
        context.dead = self._dead_latents(context.num_tokens)
        output = self.training_forward(x, y, context)
        output.loss.backward()
        self._mark_nonfinite(output.loss)
        updates = (self.step + 1) % self.optim.accumulation_steps == 0
        update = self.update(self.lr()) if updates else None
        with torch.no_grad():
            counts = self.firing.update(output.firing_counts, context.num_tokens)
            self.window.add(context.moments, output, update)
            self._measure_density(counts, context.num_tokens)
            self._resample(x, output, context.num_tokens)
        self.step += 1
        self._steps.all += 1
        self._steps.dense += self.sae.uses_density and not context.sparse
        self._steps.dead += context.dead is not None

    def take_steps(self) -> Steps:
        """The steps since the last call, of this process."""
        steps, self._steps = self._steps, Steps()
        return steps

    @torch.no_grad()
    def _mark_nonfinite(self, loss: Tensor) -> None:
        """Have the gradients say where the loss is not finite: their sum tells all ranks at once, without asking."""
        mark = 0 * loss.detach()
        for name in ("b_dec", *self.sae.encoder_biases):
            gradient = self.sae.get_parameter(name).grad
            assert gradient is not None
            gradient += mark

    def _context(self, y: Tensor) -> StepContext:
        num_tokens = len(y) * self.mesh.num_data
        return StepContext(
            global_moments(y, num_tokens, self.mesh.data),
            None,
            self.mesh.data,
            self.ranks,
            self.sparsity(self.step),
            sparse=self.density < SPARSE_BELOW,
        )

    def _dead_latents(self, num_tokens: int) -> DeadLatents | None:
        if not self.firing.may_be_dead(num_tokens):
            return None
        mask = self.firing.dead_mask()
        num_dead = collectives.sum_(mask.sum(), self.mesh.latent)
        if mask.device.type == "cpu" and not num_dead:  # costs nothing to ask here
            return None
        return DeadLatents(mask, num_dead.float())

    def _measure_density(self, counts: Tensor, num_tokens: int) -> None:
        # Seldom, as the host waits for the device here.
        if self.sae.uses_density and self.step % _STEPS_BETWEEN_DENSITIES == 0:
            num_active = int(collectives.sum_(counts.sum(), self.mesh.latent))
            self.density = num_active / (num_tokens * self.sae.d_sae)

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
        resample_dead(self.sae, self.update, dead, centred, output.residual, seed)
        self.firing.revive(dead)

    def read_metrics(self) -> dict[str, float]:
        """What happened since the last call, over all ranks; begins a new window."""
        metrics = self.window.read(self.mesh.data, self.mesh.latent)
        metrics["dead_fraction"] = self.firing.dead_fraction()
        self.window.clear()
        return metrics

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Σ‖y − ŷ‖² in the LM's own scale and the number of active latents, for `x` [tokens, d_in] of this rank.

        A transcoder has its targets `y` [tokens, d_out]; else they are `x`.
        """
        targets = x if y is None else y
        recon, num_active = self.reconstruct(x)
        error = targets.to(self.mesh.device, torch.float32) - recon
        return error.square().sum().double(), num_active

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [tokens, d_out] of `x` [tokens, d_in], both in the LM's own scale, and active latents."""
        recon, num_active = self.sae.reconstruct(x.to(self.mesh.device, torch.float32) * self.scale)
        return recon / self.out_scale, num_active

    @torch.no_grad()
    def folded(self) -> SAE:
        """A copy of the whole SAE as it stands that takes activations in the LM's own scale, without gradients.

        Where several ranks hold it they all call this, and get it on the CPU.
        """
        state = {name: self._whole(name, t.detach()) for name, t in self.sae.state_dict().items()}
        return self._folded(state)

    @torch.no_grad()
    def export(self) -> tuple[SAE, Tensor] | None:
        """As `folded` and `frequencies`, for one rank alone: None on the others, which keep nothing of it.

        All ranks that hold the SAE call this. It is the first of them that gets it, on the CPU where it is shared.
        """
        mesh = self.mesh
        if mesh.data_rank:
            return None
        keep = mesh.latent_rank == 0
        state = {name: self._whole(name, t.detach(), keep) for name, t in self.sae.state_dict().items()}
        frequencies = self._whole("frequencies", self.firing.frequencies(), keep)
        return (self._folded(state), frequencies) if keep else None

    def _folded(self, state: dict[str, Tensor]) -> SAE:
        sae = empty_like(self.sae, self.config)
        sae.load_state_dict(state, assign=True)
        sae.requires_grad_(False).cast_(torch.float32)
        sae.fold_scales_(self.scale, self.out_scale)
        return sae

    def frequencies(self) -> Tensor:
        """Share of tokens on which each latent fires, float32 [d_sae]; all ranks that hold the SAE call this."""
        return self._whole("frequencies", self.firing.frequencies())

    def _whole(self, name: str, tensor: Tensor, keep: bool = True) -> Tensor:
        """A copy of `tensor`, with the rows of all latents where it has a row for each latent.

        On a mesh on the CPU. Without `keep` this rank takes part in bringing them together, and gets none.
        """
        if self.mesh.latent is None:
            return tensor.clone()
        if name in self.sae.shared or tensor.dim() == 0:
            return tensor.to("cpu", copy=True)
        return collectives.gather_on_host(tensor, self.mesh.latent, keep)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that ranks hold together: on a mesh as DTensors over it."""
        named = {f"weights/{name}": self._placed(name, p.detach()) for name, p in self.sae.named_parameters()}
        named |= {f"buffers/{name}": b for name, b in self.sae.named_buffers()}
        for name, state in self.update.state().items():
            for key, value in state.items():
                named[f"adam/{name}/{key}"] = self._placed(name, value, sliced=self.update.sliced)
        named |= {f"firing/{name}": self._placed(name, t) for name, t in self.firing.tensors().items()}
        return named | {f"window/{name}": t for name, t in self.window.tensors().items()}

    def _placed(self, name: str, tensor: Tensor, *, sliced: bool = False) -> Tensor:
        if name in self.sae.shared or tensor.dim() == 0:
            return tensor
        return rows_of_all(tensor, self.mesh, sliced)

    def rank_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint that are this rank's own."""
        named = {"window_local": self.window.local, "window_active": self.window.num_active}
        if self.optim.accumulation_steps > 1:
            for name, parameter in self.sae.named_parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=gradient_dtype(parameter))
                named[f"grad/{name}"] = parameter.grad
        return named

    def has_rows(self, key: str) -> bool:
        """Whether the tensor `key` of `rank_tensors` has a row for each latent of this rank."""
        return key.startswith("grad/") and key.removeprefix("grad/") not in self.sae.shared

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
