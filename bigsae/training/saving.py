"""A run's checkpoints: what of it is kept, and going on from it, also on other ranks or another mesh."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from bigsae.config import UserError
from bigsae.data.tokens import merge_states
from bigsae.parallel import collectives
from bigsae.training import checkpoint
from bigsae.training.saved import Saved, check_saes, check_waiting
from bigsae.training.state import Run

logger = logging.getLogger("bigsae")


def refuse_skipped(run: Run, num_skipped: dict[str, float]) -> None:
    """Stop where a gradient was not finite: `num_skipped` steps of each SAE. Raises UserError, on all ranks."""
    for name, number in num_skipped.items():
        if number:
            raise UserError(
                f"the gradient of {name} was not finite in {number:.0f} of the last steps up to step {run.step}: "
                "lower --optim.lr, and give another --output-dir"
            )


def save(run: Run) -> None:
    """A checkpoint of all there is, unless the newest one holds it already."""
    if run.saved_step == run.step and not run.finished and not run.harvest.refilling:
        return
    skipped = {name: trainer.window.num_skipped.item() for name, trainer in run.trainers.items()}
    refuse_skipped(run, run.of_all_ranks(skipped))
    start = time.perf_counter()
    own = {f"buffer/{key}": t for key, t in run.harvest.buffer.tensors().items()}
    own |= _rank_tensors(run)
    state = {
        "trainers": run.of_all_ranks({name: t.counters() for name, t in run.trainers.items()}),
        "finished": run.finished,
        "initialised": run.initialised,
        "num_unlogged": run.num_unlogged,
        "num_latent": run.mesh.num_latent,
        "owners": {name: job.owner for name, job in run.jobs.items()},
    }
    rank_state = {
        "buffer": run.harvest.buffer.counters(),
        "refilling": run.harvest.refilling,
        "data": run.rows.state_dict(),
    }
    folder = run.out / "checkpoints"
    keep = run.config.checkpoint.keep
    checkpoint.save(folder, run.step, _tensors(run), own, state, rank_state, keep, run.mesh)
    run.saved_step = run.step
    run.clock["time"] += time.perf_counter() - start


def _tensors(run: Run) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": t for name, trainer in run.trainers.items() for key, t in trainer.tensors().items()
    }


def _rank_tensors(run: Run) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": t
        for name, trainer in run.trainers.items()
        for key, t in trainer.rank_tensors().items()
    }


def resume(run: Run) -> None:
    """Go on from the newest whole checkpoint of the run's folder; where there is none, say so and start afresh."""
    whole = checkpoint.checkpoints(run.out / "checkpoints")
    newest = checkpoint.step_of(whole[-1]) if whole else -1
    lowest = -collectives.max_ints([-newest], run.mesh.control)[0]
    if lowest != collectives.max_ints([newest], run.mesh.control)[0]:
        raise UserError(
            f"--resume: not all ranks find the same newest checkpoint in {run.out}: --output-dir must lie on a file "
            "system that all nodes share"
        )
    if not whole:
        logger.warning("--resume: %s holds no whole checkpoint, starting afresh", run.out)
        if run.mesh.is_main:
            run.metrics.truncate_after(-1)
        return
    saved = checkpoint.read_state(whole[-1])
    check_saes(saved, list(run.jobs))
    check_waiting(saved, run.harvest.buffer.bytes_each())
    state = saved.state
    run.step = run.saved_step = checkpoint.step_of(whole[-1])
    run.finished, run.initialised = state["finished"], state["initialised"]
    run.num_unlogged = state["num_unlogged"]
    for name, trainer in run.trainers.items():
        trainer.load_counters(state["trainers"][name])
    same_ranks = saved.num_ranks == run.mesh.num_ranks
    owners = {name: job.owner for name, job in run.jobs.items()}
    same_mesh = same_ranks and state["num_latent"] == run.mesh.num_latent and state["owners"] == owners
    own: dict[str, Tensor] = {}
    waiting = run.harvest.buffer.empty_tensors(saved.ranks[run.mesh.rank]["buffer"]) if same_ranks else {}
    own |= {f"buffer/{key}": t for key, t in waiting.items()}
    own |= _rank_tensors(run) if same_mesh else {}
    checkpoint.load_tensors(saved, _tensors(run), own, run.mesh)
    if same_ranks:
        rank_state = saved.ranks[run.mesh.rank]
        run.harvest.load(waiting, rank_state["buffer"], rank_state["refilling"])
        run.rows.load_state_dict(rank_state["data"])
    else:
        _deal_data(run, saved)
    if not same_mesh:
        _deal_sums(run, saved)
    if run.mesh.is_main:
        run.metrics.truncate_after(run.step)
    logger.info("resumed %s at step %d", whole[-1], run.step)
    if not same_ranks:
        logger.info("it was written by %d ranks, this run has %d: data and buffers are dealt anew", saved.num_ranks,
                    run.mesh.num_ranks)  # fmt: skip


def _deal_data(run: Run, saved: Saved) -> None:
    """Cursors and waiting activations of all ranks that wrote, over those that read: each to one of them."""
    run.rows.load_state_dict(merge_states([rank["data"] for rank in saved.ranks]))
    counts = [sum(rank["buffer"].values()) for rank in saved.ranks]
    total, mesh = sum(counts), run.mesh
    first, end = total * mesh.rank // mesh.num_ranks, total * (mesh.rank + 1) // mesh.num_ranks
    parts: list[dict[str, Tensor]] = []
    begin = 0
    for rank, count in enumerate(counts):
        low, high = max(first - begin, 0), min(end - begin, count)
        begin += count
        if low < high:
            empty = run.harvest.buffer.empty_tensors(saved.ranks[rank]["buffer"])
            named = {f"rank_{rank}/buffer/{key}": t for key, t in empty.items() if key != "generator"}
            checkpoint.read_tensors(saved, named)
            parts.append({key: t[low:high] for key, t in empty.items() if key != "generator"})
    run.harvest.refill_from(parts)


def _deal_sums(run: Run, saved: Saved) -> None:
    """What ranks had summed of their own tokens, metrics and gradients that wait for an update, to one that goes on."""
    for name, trainer in run.trainers.items():
        owner, num_latent = saved.state["owners"][name], saved.state["num_latent"]
        # Of those with the same latents, the ranks that saw different tokens.
        apart = [owner] if owner is not None else range(0, saved.num_ranks, num_latent)
        mesh = trainer.mesh
        for key, own in trainer.rank_tensors().items():
            by_latents = key == "window_active"
            writers = range(saved.num_ranks) if by_latents and owner is None else apart
            own.zero_()
            if mesh.data_rank or (mesh.latent_rank and by_latents):
                continue
            if not trainer.has_rows(key):
                for rank in writers:
                    own += _read_one(saved, f"rank_{rank}/{name}/{key}", own, len(own) if own.dim() else 0)
                continue
            num_parts = num_latent if owner is None else 1
            size, first = trainer.sae.d_sae // num_parts, mesh.latent_rank * len(own)
            for part in range(first // size, -(-(first + len(own)) // size)):
                start, stop = max(first, part * size), min(first + len(own), (part + 1) * size)
                for rank in writers:
                    rows = _read_one(saved, f"rank_{rank + part}/{name}/{key}", own, size)
                    own[start - first : stop - first] += rows[start - part * size : stop - part * size]


def _read_one(saved: Saved, name: str, like: Tensor, num_rows: int) -> Tensor:
    """The tensor `name` of a checkpoint, with as many rows, on the device of `like`, through the host's memory."""
    shape = (num_rows, *like.shape[1:]) if like.dim() else ()
    read = torch.zeros(shape, dtype=like.dtype)
    checkpoint.read_tensors(saved, {name: read})
    return read.to(like.device)
