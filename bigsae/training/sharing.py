"""Who trains which SAE: the mesh, chosen where no flag says it, and this rank's trainers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bigsae.checks import check_divides, check_latent, resolve_d_sae, resolve_sae
from bigsae.config import TrainConfig, UserError
from bigsae.parallel import collectives
from bigsae.parallel.allocating import enough_memory
from bigsae.parallel.choose import choose_latent
from bigsae.parallel.memory import sae_shape
from bigsae.parallel.mesh import Mesh, alone, share_latents
from bigsae.parallel.nodes import limit_waits
from bigsae.training.checkpoint import checkpoints, read_state
from bigsae.training.start import load_start
from bigsae.training.trainer import SAETrainer
from bigsae.training.variants import Job

logger = logging.getLogger("bigsae")

# What the language model's activations, the allocator's gaps and the communication's own buffers may take.
_LEFT_FREE = 0.15


def check_mesh(config: TrainConfig, jobs: Sequence[Job], widths: Mapping[str, int], num_ranks: int) -> None:
    """Find a mesh that does not fit the ranks or a width, before anything large is read. Raises UserError."""
    check_latent(config.mesh.latent, num_ranks)
    for job in jobs:
        d_sae = resolve_d_sae(job.variant.sae, widths[job.reads])
        check_divides(d_sae, config.mesh.latent or 1)
        if config.mesh.shard_optimizer and d_sae % num_ranks:
            raise UserError(
                f"--mesh.shard-optimizer: {num_ranks} ranks cannot share the moments of {d_sae} latents equally: set "
                f"--sae.d-sae to a multiple of {num_ranks}"
            )


def choose_mesh(config: TrainConfig, mesh: Mesh, jobs: Sequence[Job], widths: Mapping[str, int]) -> Mesh:
    """`mesh` with as many ranks to an SAE as --mesh.latent says, or as its widths and memory make best; logged.

    A resume on as many ranks goes on with what its checkpoint had: other sums would round otherwise. Called when the
    language model and the buffer are there, so that what they leave is known.
    """
    if mesh.num_ranks == 1 or config.mesh.distribute_saes:
        return mesh
    num_latent, reason = config.mesh.latent, "--mesh.latent"
    if num_latent is None:
        num_latent, reason = _saved_latent(config, mesh), "as in the checkpoint"
    if num_latent is None:
        shapes = [
            sae_shape(
                resolve_sae(job.variant.sae, transcoder=job.predicts != job.reads),
                job.variant.optim,
                widths[job.reads],
                resolve_d_sae(job.variant.sae, widths[job.reads]),
                widths[job.predicts] if job.predicts != job.reads else None,
            )
            for job in jobs
        ]
        choice = choose_latent(
            shapes,
            mesh.num_ranks,
            mesh.num_local_ranks,
            config.batch_size_tokens,
            _free_bytes(mesh),
            shard_optimizer=config.mesh.shard_optimizer,
            accumulates=config.optim.accumulation_steps > 1,
            first_tokens=config.sae.init_tokens,
            act_bytes=getattr(torch, config.buffer.dtype).itemsize,
            other_width=sum(widths.values()) - max(widths.values()),
        )
        num_latent, reason = choice.num_latent, choice.reason
    shared = share_latents(mesh, num_latent)
    limit_waits((shared.data, shared.latent), config.timeout)
    logger.info("SAE mesh: data %d x latent %d (%s)", shared.num_data, shared.num_latent, reason)
    return shared


def _saved_latent(config: TrainConfig, mesh: Mesh) -> int | None:
    """Ranks to an SAE when the checkpoint was written that a resume begins with; None where it cannot say."""
    whole = checkpoints(Path(config.output_dir) / "checkpoints") if config.resume else []
    if not whole:
        return None
    saved = read_state(whole[-1])
    shared = all(owner is None for owner in saved.state["owners"].values())
    return saved.state["num_latent"] if shared and saved.num_ranks == mesh.num_ranks else None


def _free_bytes(mesh: Mesh) -> int | None:
    """What the least free rank has for its SAEs; None on CPU, where memory is shared and swapped."""
    if mesh.device.type != "cuda":
        return None
    free = int(torch.cuda.mem_get_info(mesh.device)[0] * (1 - _LEFT_FREE))
    return collectives.min_int(free, mesh.control)


def build_trainers(
    config: TrainConfig, mesh: Mesh, jobs: Sequence[Job], widths: Mapping[str, int], *, from_scratch: bool
) -> dict[str, SAETrainer]:
    """The trainers of those `jobs` that are this rank's; `from_scratch`: no checkpoint will be read into them."""
    only = len({job.reads for job in jobs}) == 1
    trainers = {}
    for job in jobs:
        if job.owner not in (None, mesh.rank):
            continue
        sae = job.variant.sae
        d_sae = resolve_d_sae(sae, widths[job.reads])
        with enough_memory(
            f"{d_sae} latents of SAE {job.name}",
            "lower --sae.d-sae or --sae.expansion-factor, or use more ranks",
        ):
            trainers[job.name] = SAETrainer(
                sae,
                job.variant.optim,
                widths[job.reads],
                config.num_steps,
                job.variant.seed,
                mesh if job.owner is None else alone(mesh.device),
                d_out=widths[job.predicts] if job.predicts != job.reads else None,
                start=load_start(sae, job.reads, only) if from_scratch else None,
                shard_optimizer=config.mesh.shard_optimizer,
            )
    return trainers
