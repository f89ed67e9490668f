"""A plan: what a run on a given mesh takes of memory, links and time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bigsae.checks import resolve_d_sae, resolve_sae
from bigsae.parallel.memory import (
    DTYPE_BYTES,
    SAEBytes,
    SAEShape,
    all_bytes,
    buffer_bytes,
    checkpoint_bytes,
    sae_bytes,
    sae_shape,
)
from bigsae.planning.gpus import GPU, GPUS, Resource, usable_bytes
from bigsae.planning.model import LMFacts
from bigsae.planning.options import PlanConfig
from bigsae.planning.stages import Mesh, Stage, buffer_stage, lm_stage, sae_stages


@dataclass(frozen=True)
class Bytes:
    """Bytes on one rank, by what they are for."""

    lm: int
    """Its shard of the language model."""
    lm_unsharded: int
    """Layers that are whole while a forward goes through them."""
    lm_activations: int
    buffer: int
    buffer_on_host: bool
    saes: tuple[SAEBytes, ...]
    accumulates: bool
    other_batches: int = 0
    """Of a step: what it holds of the hookpoints whose SAEs are not in their turn."""

    @property
    def lm_step(self) -> int:
        """What a forward needs beside what stays."""
        return self.lm_unsharded + self.lm_activations

    @property
    def sae_kept(self) -> int:
        """Of all SAEs of the rank, from step to step."""
        gradients = sum(s.gradients for s in self.saes) if self.accumulates else 0
        return sum(s.kept for s in self.saes) + gradients

    @property
    def sae_step(self) -> int:
        """What the step of one SAE needs beside it."""
        return all_bytes(self.saes, accumulates=self.accumulates) - self.sae_kept + self.other_batches

    @property
    def checkpoint_copy(self) -> int:
        """In the host's memory, of what a checkpoint that is written beside training holds of this rank.

        A rank copies all that it holds, also where others hold the same; its buffer full.
        """
        return self.buffer + self.sae_kept

    @property
    def peak(self) -> int:
        """The most at a time in the GPU's memory: forwards and steps take turns."""
        buffer = 0 if self.buffer_on_host else self.buffer
        return self.lm + buffer + self.sae_kept + max(self.lm_step, self.sae_step)


@dataclass(frozen=True)
class Estimate:
    """A run on one mesh."""

    mesh: Mesh
    reason: str
    """Why the SAEs are held like that."""
    bytes: Bytes
    memory: int | None
    """Bytes that tensors can have; None where that is not known."""
    checkpoint: int
    """Bytes of a checkpoint on disk, with full buffers."""
    stages: tuple[Stage, ...]
    """Of a step without dead latents."""
    auxk_stages: tuple[Stage, ...]
    """Of a step with dead latents; empty without AuxK."""

    @property
    def fits(self) -> bool:
        """Whether the memory is enough, or not known."""
        return self.memory is None or self.bytes.peak <= self.memory

    def step_seconds(self, gpu: GPU, *, with_auxk: bool = False) -> float:
        """Of a step, harvest and all: its stages run one after the other."""
        stages = self.auxk_stages if with_auxk else self.stages
        return sum(stage.seconds(gpu) for stage in stages)

    def binding(self, gpu: GPU) -> Resource:
        """The resource that most of a step waits for."""
        waits: dict[Resource, float] = {}
        for stage in self.stages:
            waits[stage.bound(gpu)] = waits.get(stage.bound(gpu), 0.0) + stage.seconds(gpu)
        return max(waits, key=lambda resource: waits[resource])


def gpu_of(config: PlanConfig) -> GPU:
    """The GPU of a plan."""
    return GPUS[config.gpu]


def memory_of(config: PlanConfig) -> int | None:
    """Bytes that tensors can have on each GPU of a plan; None where that is not known."""
    if config.memory_gib is not None:
        return int(config.memory_gib * 2**30)
    return usable_bytes(gpu_of(config))


def shapes_of(config: PlanConfig, facts: LMFacts) -> list[SAEShape]:
    """The SAEs of a run, in the order of the forward. Raises UserError where a width does not fit its options."""
    sae = resolve_sae(config.sae, transcoder=bool(config.sae.output_hookpoint))
    shapes = []
    for reads, predicts in facts.targets:
        d_in = facts.widths[reads]
        d_out = facts.widths[predicts] if config.sae.output_hookpoint else None
        shapes.append(sae_shape(sae, config.optim, d_in, resolve_d_sae(sae, d_in), d_out))
    return shapes * config.variants


def bytes_of(config: PlanConfig, facts: LMFacts, saes: Sequence[SAEShape], mesh: Mesh) -> Bytes:
    """Bytes on each rank; of distributed SAEs on the rank that has most."""
    micro_batch = config.lm.chosen_rows * config.ctx_len
    on_gpu = config.gpu != "cpu"
    return Bytes(
        lm=facts.local_bytes(config.lm, mesh.shard_size),
        lm_unsharded=facts.unsharded_bytes(config.lm, mesh.shard_size, ahead=on_gpu),
        lm_activations=facts.activation_bytes(config.lm, micro_batch)
        + facts.logits_bytes(config.lm, config.lm.chosen_rows, config.ctx_len),
        buffer=_buffer(config, facts),
        buffer_on_host=on_gpu and config.buffer.device == "cpu",
        saes=tuple(
            sae_bytes(
                shape,
                mesh.num_latent,
                mesh.num_data,
                config.batch_size_tokens,
                config.mesh.shard_optimizer,
                first_tokens(config),
                DTYPE_BYTES[config.buffer.dtype],
            )
            for shape in own_saes(saes, mesh)
        ),
        accumulates=config.optim.accumulation_steps > 1,
        other_batches=config.batch_size_tokens
        // mesh.num_data
        * (sum(facts.widths.values()) - max(facts.widths.values()))
        * DTYPE_BYTES[config.buffer.dtype],
    )


def _buffer(config: PlanConfig, facts: LMFacts) -> int:
    headroom = config.lm.chosen_rows * config.ctx_len
    return buffer_bytes(list(facts.widths.values()), config.buffer.tokens, headroom, config.buffer.dtype)


def first_tokens(config: PlanConfig) -> int:
    """Tokens of all ranks from which an SAE is initialised."""
    return min(config.sae.init_tokens, config.buffer.tokens * config.gpus)


def own_saes(saes: Sequence[SAEShape], mesh: Mesh) -> list[SAEShape]:
    """The SAEs that a rank holds, or a part of; of distributed ones those of the rank that has most."""
    if not mesh.distribute:
        return list(saes)
    widest = sorted(saes, key=lambda s: s.d_sae * (s.d_in + s.d_out), reverse=True)
    return widest[: math.ceil(len(saes) / mesh.num_ranks)]


def estimate(config: PlanConfig, facts: LMFacts, mesh: Mesh, reason: str) -> Estimate:
    """What the run of `config` takes on `mesh`."""
    saes = shapes_of(config, facts)
    own = own_saes(saes, mesh)
    forward = [lm_stage(config, facts, mesh), buffer_stage(config, facts, mesh)]
    stages = (*forward, *sae_stages(config, own, mesh, with_auxk=False))
    auxk = (*forward, *sae_stages(config, own, mesh, with_auxk=True))
    return Estimate(
        mesh=mesh,
        reason=reason,
        bytes=bytes_of(config, facts, saes, mesh),
        memory=memory_of(config),
        checkpoint=checkpoint_bytes(
            saes,
            _buffer(config, facts),
            config.gpus,
            mesh.num_data if config.optim.accumulation_steps > 1 else 0,
        ),
        stages=stages,
        auxk_stages=auxk if any(s.k_aux for s in own) else (),
    )
