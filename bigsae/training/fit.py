"""Training on activations that are already there: no language model, same step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sized

import torch
from torch import Tensor

from bigsae.checks import check_latent, check_optim, check_sae, check_together
from bigsae.config import MeshConfig, OptimConfig, SAEConfig, UserError
from bigsae.parallel.mesh import Mesh, build_mesh, share_latents
from bigsae.sae.base import SAE
from bigsae.training.start import load_start
from bigsae.training.trainer import SAETrainer

Batch = Tensor | tuple[Tensor, Tensor]
logger = logging.getLogger("bigsae")


def fit(
    batches: Iterable[Batch],
    sae: SAEConfig | None = None,
    optim: OptimConfig | None = None,
    *,
    seed: int = 0,
    num_steps: int | None = None,
    mesh: MeshConfig | None = None,
) -> SAE:
    """Train an SAE on `batches`: global [batch, d_in] tensors, the same ones on every rank of the process group.

    Pairs ([batch, d_in], [batch, d_out]) train a transcoder, which predicts the second from the first.
    Each rank trains on its own rows of a batch, or with `mesh.latent` on its own latents, so the result does not depend
    on the ranks or the mesh; by default every rank holds a copy. The learning rate's schedule needs the number of
    batches: `num_steps`, or `len(batches)` where it has one; else nothing decays.
    Returns the SAE in the scale of the activations. Raises UserError for configurations and batches that don't fit.
    """
    sae, optim = sae or SAEConfig(), optim or OptimConfig()
    return fit_trainer(batches, sae, optim, seed=seed, num_steps=num_steps, mesh=mesh).folded()


def fit_trainer(
    batches: Iterable[Batch],
    sae: SAEConfig,
    optim: OptimConfig,
    *,
    seed: int,
    num_steps: int | None,
    mesh: MeshConfig | None = None,
) -> SAETrainer:
    """As `fit`, but returns the trainer: weights in the trained scale, optimiser and statistics with them."""
    if num_steps is None and isinstance(batches, Sized):
        num_steps = len(batches)
    if num_steps is None and optim.schedule != "constant":
        raise UserError(f"fit: optim.schedule {optim.schedule} needs the number of batches: pass num_steps")
    if num_steps is None:
        logger.warning(
            "fit: the number of batches is not known, so the learning rate will not decay: pass num_steps"
        )
    shard_optimizer = mesh is not None and mesh.shard_optimizer
    mesh_of_ranks = _mesh(mesh)
    parts = (_own_part(batch, mesh_of_ranks) for batch in batches)
    first = list(_first_parts(parts, sae.init_tokens, mesh_of_ranks.num_data))
    if not first:
        raise UserError("fit: batches is empty: give at least one [batch, d_in] tensor")
    inputs, targets = torch.cat([x for x, _ in first]), [y for _, y in first if y is not None]
    if sae.output_hookpoint:
        raise UserError(
            "fit: output_hookpoint is for a language model: give batches of pairs (input, target) instead"
        )
    check_sae(sae, transcoder=bool(targets))
    check_optim(optim)
    check_together(sae, optim, None)
    d_out = targets[0].shape[1] if targets else None
    trainer = SAETrainer(
        sae,
        optim,
        inputs.shape[1],
        num_steps,
        seed,
        mesh_of_ranks,
        d_out=d_out,
        start=load_start(sae),
        shard_optimizer=shard_optimizer,
    )
    device = mesh_of_ranks.device
    trainer.initialise(inputs.to(device), torch.cat(targets).to(device) if targets else None)
    del inputs, targets
    while first:
        trainer.train_step(*first.pop(0))
    for part in parts:
        trainer.train_step(*part)
    if left := trainer.step % optim.accumulation_steps:
        logger.warning("fit: the last %d batches make no whole update: they were not trained on", left)
    if num_skipped := int(trainer.window.num_skipped):
        raise UserError(
            f"fit: the gradient was not finite in {num_skipped} of {trainer.step} steps: look for NaN or inf in "
            "batches, or lower optim.lr"
        )
    return trainer


Part = tuple[Tensor, Tensor | None]


def _mesh(config: MeshConfig | None) -> Mesh:
    mesh = build_mesh()
    if config is None:
        return mesh
    if config.distribute_saes:
        raise UserError("fit: mesh.distribute_saes is for several SAEs: leave it out")
    check_latent(config.latent, mesh.num_ranks)
    return share_latents(mesh, config.latent or 1)


def _first_parts(parts: Iterator[Part], num_tokens: int, num_data: int) -> Iterator[Part]:
    """Parts of the first batches that hold `num_tokens` tokens over all ranks: the same batches on every rank."""
    while num_tokens > 0 and (part := next(parts, None)) is not None:
        num_tokens -= len(part[0]) * num_data
        yield part


def _own_part(batch: Batch, mesh: Mesh) -> Part:
    """This rank's rows of a global batch [batch, d_in], and of its targets where it has any."""
    if isinstance(batch, Tensor):
        return _own_rows(batch, mesh), None
    x, y = batch
    if len(x) != len(y):
        raise UserError(f"fit: a batch has {len(x)} inputs and {len(y)} targets: give as many of both")
    return _own_rows(x, mesh), _own_rows(y, mesh)


def _own_rows(batch: Tensor, mesh: Mesh) -> Tensor:
    if batch.ndim != 2 or len(batch) % mesh.num_ranks:
        raise UserError(
            f"fit: a batch of shape {tuple(batch.shape)} cannot be cut into {mesh.num_ranks} equal parts: "
            "give [batch, d_in] tensors whose batch is a multiple of the number of ranks"
        )
    size = len(batch) // mesh.num_data
    return batch[mesh.data_rank * size : (mesh.data_rank + 1) * size]
