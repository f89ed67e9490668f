"""Builds a run from its configuration: what can be wrong is found before any weights are read."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils.logging import disable_progress_bar

from bigsae.checks import check, check_sources, resolve_d_sae
from bigsae.config import TrainConfig
from bigsae.data.harvest import Harvest
from bigsae.data.text import open_text
from bigsae.kernels.dispatch import backend
from bigsae.lm.activations import Extractor
from bigsae.lm.flops import forward_work
from bigsae.lm.hookpoints import locate, resolve_targets
from bigsae.lm.loading import (
    download_lm,
    load_lm,
    local_bytes,
    meta_model,
    process_groups,
    resolve_layout,
)
from bigsae.lm.micro_batch import activation_elements, refill_tokens, with_rows
from bigsae.parallel.mesh import Mesh, build_mesh
from bigsae.parallel.nodes import errors_shared, first_on_node, limit_waits
from bigsae.training import folder
from bigsae.training.cached import (
    FoundCache,
    cached_harvest,
    cached_targets,
    find_cache,
    open_cache,
    with_origin,
)
from bigsae.training.checkpoint import checkpoints, take_up_leftovers
from bigsae.training.heldout_ce import check_order
from bigsae.training.publish import PUSHED
from bigsae.training.pusher import Pusher, open_pusher
from bigsae.training.routing import Routing
from bigsae.training.saver import Saver
from bigsae.training.saving import resume
from bigsae.training.sharing import build_trainers, check_mesh, choose_mesh
from bigsae.training.signals import StopSignal
from bigsae.training.start import load_start
from bigsae.training.state import Run
from bigsae.training.supply import build_harvest
from bigsae.training.throughput import throughput
from bigsae.training.trackers import Trackers
from bigsae.training.variants import (
    Job,
    Variant,
    check_variants,
    make_jobs,
    variants,
    with_sweep_read,
)
from bigsae.training.watch import Heartbeat

logger = logging.getLogger("bigsae")


def prepare(config: TrainConfig, stop: StopSignal) -> tuple[Run, Callable[[], None]]:
    """The run that `config` describes, resumed where it asks for that, and a function that closes it."""
    trackers = Trackers(config)
    mesh = build_mesh()
    limit_waits((mesh.world, mesh.control), config.timeout)
    if not mesh.is_main:
        datasets.disable_progress_bars()
        disable_progress_bar()
    with errors_shared(mesh):
        if config.resume and mesh.is_main:
            take_up_leftovers(Path(config.output_dir) / "checkpoints")
    config = folder.with_saved_rows(config)
    cache = None
    if config.activations:
        with first_on_node(mesh):
            cache = find_cache(config.activations)
        config = with_origin(config, cache)
    check_sources(config)
    check(config, mesh.num_ranks)
    config = with_sweep_read(config)
    made = variants(config)
    check_variants(config, made)
    folder.check_folder(config)
    with errors_shared(mesh):
        around = _Around(mesh, trackers, open_pusher(config) if mesh.is_main else None, stop)
    if cache is not None:
        return _prepare_cached(config, cache, around, made)
    layout = resolve_layout(config.lm, mesh.num_ranks, mesh.num_local_ranks)
    with first_on_node(mesh):
        meta, lm_config = meta_model(config.model, config.lm)
    targets = resolve_targets(config.hookpoints, config.sae.output_hookpoint, meta)
    sites = locate(meta, list({h.name: h for pair in targets for h in pair}.values()))
    widths = {site.name: site.d_in for site in sites}
    config = _with_rows(config, activation_elements(meta, sites), mesh)
    targets.sort(key=lambda pair: list(widths).index(pair[0].name))  # as the forward meets them
    names = [(read.name, predicted.name) for read, predicted in targets]
    jobs = _checked_jobs(config, names, made, widths, mesh)
    if config.eval.ce:
        check_order(jobs, list(widths))
    with errors_shared(mesh):
        with first_on_node(mesh):
            text = open_text(config.dataset, config.data, config.model, config.lm, lm_config, config.ctx_len)
        rows = text.rows(config.seed, mesh.rank, mesh.num_ranks)
        rows.begin()
        heldout = text.heldout(config.seed, config.eval.rows, mesh.num_ranks, "--eval.rows")

    with first_on_node(mesh):
        download_lm(config.model, config.lm, meta)
    model = load_lm(config.model, config.lm, meta, layout, mesh.device, sites, all_layers=config.eval.ce)
    limit_waits(process_groups(model), config.timeout)
    harvest = build_harvest(config, widths, rows, Extractor(model, sites), text.kept, mesh)
    flops = forward_work(meta, sites).flops(config.ctx_len)
    description = f"language model {layout}"
    given = _Given(harvest, rows, heldout, text.prepend_bos, description, local_bytes(model), flops)
    return _begin(config, given, around, jobs, widths)


@dataclass(frozen=True)
class _Around:
    """What a run has about it wherever its activations come from."""

    mesh: Mesh
    trackers: Trackers
    pusher: Pusher | None
    stop: StopSignal


@dataclass(frozen=True)
class _Given:
    """Where a run's activations come from, ready to give them."""

    harvest: Harvest
    rows: Any
    heldout: Tensor
    prepend_bos: bool
    description: str
    lm_bytes: int
    lm_flops: float
    """Of a token's way to the last hookpoint."""


def _prepare_cached(
    config: TrainConfig,
    found: FoundCache,
    around: _Around,
    made: list[Variant],
) -> tuple[Run, Callable[[], None]]:
    """As `prepare`, from a cache: there is no language model."""
    targets = cached_targets(config, found.index)
    wanted = {name for pair in targets for name in pair}
    widths = {name: d_in for name, d_in in found.index.hookpoints.items() if name in wanted}
    mesh = around.mesh
    # Where the cache does not say how it was made, what is read twice over is all there is.
    config = _with_rows(config, 2 * sum(widths.values()), mesh)
    jobs = _checked_jobs(config, targets, made, widths, mesh)
    with first_on_node(mesh):
        cache = open_cache(found, tuple(widths))
    harvest, rows, heldout = cached_harvest(config, cache, found.name, mesh)
    description = f"activations of {found.name} ({found.index.num_activations:,}, {found.index.dtype})"
    given = _Given(harvest, rows, heldout, found.index.prepend_bos, description, 0, 0.0)
    return _begin(config, given, around, jobs, widths)


def _with_rows(config: TrainConfig, num_elements: float, mesh: Mesh) -> TrainConfig:
    """`config` with the rows of a forward in place of None: no more than a refill, of half of the buffer, takes."""
    refill = refill_tokens(config.buffer)
    return replace(config, lm=with_rows(config.lm, config.ctx_len, num_elements, refill, mesh.device.type))


def _from_scratch(config: TrainConfig) -> bool:
    return not (config.resume and checkpoints(Path(config.output_dir) / "checkpoints"))


def _checked_jobs(
    config: TrainConfig,
    targets: list[tuple[str, str]],
    made: list[Variant],
    widths: dict[str, int],
    mesh: Mesh,
) -> list[Job]:
    """The run's SAEs, once mesh and starts are known to fit them. Raises UserError."""
    num_owners = mesh.num_ranks if config.mesh.distribute_saes and mesh.num_ranks > 1 else None
    jobs = make_jobs(targets, made, widths, num_owners)
    check_mesh(config, jobs, widths, mesh.num_ranks)
    if _from_scratch(config):
        for job in jobs:
            load_start(job.variant.sae, job.reads, len(targets) == 1)
    return jobs


def _begin(
    config: TrainConfig,
    given: _Given,
    around: _Around,
    jobs: list[Job],
    widths: dict[str, int],
) -> tuple[Run, Callable[[], None]]:
    """The run of what is `given`, resumed where `config` asks for that, and a function that closes it."""
    harvest, rows = given.harvest, given.rows
    mesh = choose_mesh(config, around.mesh, jobs, widths)
    from_scratch = _from_scratch(config)
    trainers = build_trainers(config, mesh, jobs, widths, from_scratch=from_scratch)
    run = Run(
        config,
        mesh,
        harvest,
        rows,
        given.heldout if len(given.heldout) else None,
        {job.name: job for job in jobs},
        trainers,
        Routing(mesh, jobs),
        _metadata(config, given.prepend_bos),
        around.trackers,
        around.pusher,
        around.stop,
        Saver(
            Path(config.output_dir) / "checkpoints",
            config.checkpoint.keep,
            mesh,
            config.timeout,
            beside=config.checkpoint.beside_training,
        ),
        Heartbeat(config.timeout),
        throughput(config, mesh.device, given.lm_flops),
    )
    _announce(run, given)
    if config.resume:
        resume(run)
    if not run.finished:
        around.trackers.start(config, run.saved_step)
    if mesh.is_main and not run.finished:
        folder.write_config(config)
        folder.write_status(config, "running", run.step, "")

    def close() -> None:
        rows.close()
        around.trackers.finish()
        if around.pusher is not None:
            around.pusher.stop()
            shutil.rmtree(run.out / PUSHED, ignore_errors=True)

    return run, close


def _metadata(config: TrainConfig, prepend_bos: bool) -> dict[str, Any]:
    """What an exported SAE says of its origin, in SAELens's terms."""
    return {
        "bigsae_version": version("bigsae"),
        "model_name": config.model,
        "model_class_name": "AutoModelForCausalLM",
        "dataset_path": config.dataset,
        "context_size": config.ctx_len,
        "prepend_bos": prepend_bos,
        # What SAELens, too, would open the language model with.
        "model_from_pretrained_kwargs": {"revision": config.lm.revision} if config.lm.revision else {},
    }


def _announce(run: Run, given: _Given) -> None:
    """What this run got: ranks, device, LM layout, SAEs, kernels, bytes per rank."""
    mesh = run.mesh
    tensors = [t for trainer in run.trainers.values() for t in trainer.tensors().values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    sae_bytes = sum(t.numel() * t.element_size() for t in local)
    mib = [f"{n / 2**20:,.0f} MiB" for n in (given.lm_bytes, sae_bytes, run.harvest.buffer.num_bytes())]
    logger.info("%d ranks on %s, %s, kernels %s", mesh.num_ranks, mesh.device.type, given.description,
                backend(mesh.device))  # fmt: skip
    logger.info("%d rows of %d tokens at a time (--lm.micro-batch-rows)", run.harvest.micro_batch_rows,
                run.harvest.ctx_len)  # fmt: skip
    for job in run.jobs.values():
        where = "" if job.owner is None else f", on rank {job.owner}"
        d_in = run.harvest.buffer.storage[job.reads].shape[1]
        logger.info("SAE %s: %s, %d x %d%s", job.name, job.variant.sae.architecture, d_in,
                    resolve_d_sae(job.variant.sae, d_in), where)  # fmt: skip
    logger.info("bytes per rank: language model %s, SAE weights, moments and statistics %s, buffer %s", *mib)
