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
from bigsae.training.checkpoint import NotSaved
from bigsae.training.saved import Saved, check_saes, check_waiting
from bigsae.training.state import Run

logger = logging.getLogger("bigsae")


# A run that has gone back to one checkpoint so often ends.
_MOST_ROLLBACKS = 3


def met_nonfinite(run: Run, num_skipped: dict[str, float]) -> bool:
    """Do as --on-nonfinite says where a loss or gradient was not: in `num_skipped` of the last steps of each SAE.

    The same on all ranks. Returns whether the run went back to a checkpoint. Raises UserError where it is to stop.
    """
    broken = {name: number for name, number in num_skipped.items() if number}
    if not broken:
        return False
    name, number = next(iter(broken.items()))
    what = (
        f"loss or gradient of {name} was not finite in {number:.0f} of the last steps up to step {run.step}"
    )
    policy = run.config.on_nonfinite
    if policy == "stop":
        raise UserError(
            f"{what}: lower --optim.lr and give another --output-dir, or let --on-nonfinite skip such steps"
        )
    if policy == "skip":
        logger.warning("%s: they changed no weights, and the run goes on", what)
        return False
    _roll_back(run, what)
    return True


def _roll_back(run: Run, what: str) -> None:
    """Go back to the newest checkpoint with all but the data, which go on: other tokens come."""
    settle(run)
    newest = checkpoint.newest_whole(run.out / "checkpoints", run.mesh)
    if newest is None:
        raise UserError(f"{what}, and there is no checkpoint to go back to: lower --checkpoint.every")
    step = checkpoint.step_of(newest)
    run.num_rollbacks[step] = run.num_rollbacks.get(step, 0) + 1
    if run.num_rollbacks[step] > _MOST_ROLLBACKS:
        raise UserError(
            f"{what}, after {_MOST_ROLLBACKS} returns to step {step}: lower --optim.lr and give another --output-dir"
        )
    logger.warning("%s: back to step %d, with the data that come next", what, step)
    saved = checkpoint.read_state(newest)
    _load_trainers(run, saved, {})
    run.step, run.num_unlogged = step, saved.state["num_unlogged"]
    if run.mesh.is_main:
        run.metrics.truncate_after(step)
    run.saved_step = None  # the one there is has the data that were met
    save(run)


def settle(run: Run) -> None:
    """Wait for the checkpoint that is being written. One that could not be written is said: the next may be."""
    try:
        step = run.saver.wait()
    except NotSaved as error:
        logger.error(
            "a checkpoint could not be written (%s): the run goes on, and its checkpoints before it are whole: make "
            "room in --output-dir %s", error, run.out,
        )  # fmt: skip
    else:
        run.saved_step = run.saved_step if step is None else step


def save_last(run: Run) -> None:
    """The checkpoint with which a run ends. Raises UserError where it cannot be written."""
    save(run)
    try:
        step = run.saver.wait()
    except NotSaved as error:
        raise UserError(
            f"--output-dir {run.out}: the last checkpoint could not be written ({error}): make room; --resume goes on "
            f"from {'the start' if run.saved_step is None else f'step {run.saved_step}'}"
        ) from error
    run.saved_step = run.saved_step if step is None else step


def save(run: Run) -> None:
    """Begin a checkpoint of all there is, unless the newest one holds it already."""
    start = time.perf_counter()
    settle(run)
    if run.saved_step == run.step and not run.finished and not run.harvest.refilling:
        return
    if run.config.on_nonfinite != "skip":  # the next log tells of those
        skipped = {name: trainer.window.num_skipped.item() for name, trainer in run.trainers.items()}
        if met_nonfinite(run, run.of_all_ranks(skipped)):
            return
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
    run.saver.start(run.step, _tensors(run), own, state, rank_state)
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
    step = checkpoint.step_of(whole[-1]) if whole else -1
    lowest = -collectives.max_ints([-step], run.mesh.control)[0]
    if lowest != collectives.max_ints([step], run.mesh.control)[0]:
        raise UserError(
            f"--resume: not all ranks find the same newest checkpoint in {run.out}: --output-dir must lie on a file "
            "system that all nodes share"
        )
    if not whole:
        logger.warning("--resume: %s holds no whole checkpoint, starting afresh", run.out)
        if run.mesh.is_main:
            run.metrics.truncate_after(-1)
        return
    newest = checkpoint.newest_whole(run.out / "checkpoints", run.mesh)
    assert newest is not None
    saved = checkpoint.read_state(newest)
    check_saes(saved, list(run.jobs))
    check_waiting(saved, run.harvest.buffer.bytes_each())
    state = saved.state
    run.step = run.saved_step = checkpoint.step_of(newest)
    run.finished, run.initialised = state["finished"], state["initialised"]
    run.num_unlogged = state["num_unlogged"]
    same_ranks = saved.num_ranks == run.mesh.num_ranks
    waiting = run.harvest.buffer.empty_tensors(saved.ranks[run.mesh.rank]["buffer"]) if same_ranks else {}
    _load_trainers(run, saved, {f"buffer/{key}": t for key, t in waiting.items()})
    if same_ranks:
        rank_state = saved.ranks[run.mesh.rank]
        run.harvest.load(waiting, rank_state["buffer"], rank_state["refilling"])
        run.rows.load_state_dict(rank_state["data"])
    else:
        _deal_data(run, saved)
    if run.mesh.is_main:
        run.metrics.truncate_after(run.step)
    logger.info("resumed %s at step %d", newest, run.step)
    if not same_ranks:
        logger.info("it was written by %d ranks, this run has %d: data and buffers are dealt anew", saved.num_ranks,
                    run.mesh.num_ranks)  # fmt: skip


def _load_trainers(run: Run, saved: Saved, own: dict[str, Tensor]) -> None:
    """Fill the trainers, and `own` of this rank, from `saved`, whatever mesh wrote it."""
    state = saved.state
    for name, trainer in run.trainers.items():
        trainer.load_counters(state["trainers"][name])
    owners = {name: job.owner for name, job in run.jobs.items()}
    same_mesh = (saved.num_ranks, state["num_latent"]) == (run.mesh.num_ranks, run.mesh.num_latent)
    same_mesh = same_mesh and state["owners"] == owners
    own = own | (_rank_tensors(run) if same_mesh else {})
    checkpoint.load_tensors(saved, _tensors(run), own, run.mesh)
    if not same_mesh:
        _deal_sums(run, saved)


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
