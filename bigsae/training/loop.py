"""The run itself: fill, step, log, measure, save, until the tokens, the data or the user say stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bigsae.config import TrainConfig, UserError
from bigsae.data.harvest import Harvest
from bigsae.hub.formats import save_sae
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.training import checkpoint
from bigsae.training.folder import write_status
from bigsae.training.heldout import measure_heldout
from bigsae.training.metrics import MetricsFile
from bigsae.training.progress import ProgressBar
from bigsae.training.signals import StopSignal
from bigsae.training.trainer import SAETrainer

logger = logging.getLogger("bigsae")

# Steps between two questions to all ranks whether one was told to stop. Refills ask before each of their forwards.
_CONTROL_INTERVAL = 10


@dataclass
class Run:
    """Everything that a run is made of."""

    config: TrainConfig
    mesh: Mesh
    harvest: Harvest
    rows: Any
    """TokenRows: where the data stands."""
    heldout: Tensor | None
    """[rows, ctx_len] ids that are never trained on, the same on every rank."""
    trainers: dict[str, SAETrainer]
    """One for each hookpoint that is read."""
    targets: dict[str, str]
    """The hookpoint that each of them predicts: for an SAE the one it reads."""
    metadata: dict[str, Any]
    """What each exported SAE says of its origin."""
    log_to_trackers: Callable[[dict[str, float], int], None]
    stop: StopSignal
    finished: bool = False
    """Whether the newest checkpoint is that of a run which has ended."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""
    metrics: MetricsFile = field(init=False)
    _clock: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.out / "metrics.jsonl")

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return next(iter(self.trainers.values())).step


def train(run: Run) -> str:
    """Run to the end, or until stopped. Returns the status: "finished" or "preempted"."""
    if run.finished:
        logger.info("%s is finished: nothing to do", run.out)
        return "finished"
    with ProgressBar(run.config.num_steps, run.step, shown=run.mesh.is_main) as bar:
        _restart_clock(run)
        status, reason = _steps(run, bar)
        run.finished = status == "finished"
        if run.finished:
            _log(run, bar)
            bar.activity("measuring")
            if not _measures_now(run):
                _measure(run)
            bar.activity("saving")
            _export(run)
        _save(run)
    if run.mesh.is_main:
        write_status(run.config, status, run.step, reason)
    return status


def _steps(run: Run, bar: ProgressBar) -> tuple[str, str]:
    config = run.config
    while run.step < config.num_steps:
        bar.activity("harvesting")
        filled = run.harvest.fill(run.step, lambda: run.stop.number is not None)
        if run.step == 0 and run.saved_step is None:
            _check_one_batch(run)
        if not filled:
            return _why_not_filled(run)
        bar.activity("training")
        _initialise(run)
        batch = run.harvest.read()
        for name, (x, y) in _inputs_and_targets(run, batch).items():
            run.trainers[name].train_step(x, y)
        bar.advance(run.step)
        if run.step % config.log_every == 0:
            _log(run, bar)
        if _measures_now(run):
            _measure(run)
        if run.step == config.num_steps:
            break
        if config.checkpoint.every and run.step % config.checkpoint.every == 0:
            _save(run)
        if run.step % _CONTROL_INTERVAL == 0 and _someone_stops(run):
            return _stopped(run)
    return "finished", "all tokens trained"


def _inputs_and_targets(run: Run, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """For each trainer what it reads, and what it predicts where that is something else."""
    return {
        name: (batch[name], batch[target] if target != name else None) for name, target in run.targets.items()
    }


def _measures_now(run: Run) -> bool:
    every = run.config.eval.every
    return every > 0 and run.step > 0 and run.step % every == 0


def _someone_stops(run: Run) -> bool:
    return bool(collectives.max_ints([run.stop.number is not None], run.mesh.control)[0])


def _stopped(run: Run) -> tuple[str, str]:
    logger.info("told to stop: saving a checkpoint at step %d, --resume goes on from there", run.step)
    return "preempted", f"signal {run.stop.number or 'to another rank'}"


def _why_not_filled(run: Run) -> tuple[str, str]:
    if run.harvest.refilling:
        return _stopped(run)
    return "finished", f"the data ended after {run.config.data.epochs} epochs"


def _check_one_batch(run: Run) -> None:
    """Refuse a dataset that cannot fill the first batch without repeating itself."""
    num_rows = run.rows.num_first_epoch_rows
    too_short = num_rows is not None and num_rows * run.config.ctx_len < run.harvest.batch_tokens
    if collectives.max_ints([too_short], run.mesh.control)[0]:
        raise UserError(
            f"--dataset {run.config.dataset} holds less than one batch: lower --batch-size-tokens "
            f"{run.config.batch_size_tokens} or take a larger dataset"
        )


def _initialise(run: Run) -> None:
    """Before the first step: scale and b_dec from the first tokens, which are trained on afterwards."""
    if all(trainer.initialised for trainer in run.trainers.values()):
        return
    per_rank = min(run.config.sae.init_tokens // run.mesh.num_ranks, run.config.buffer.tokens)
    # Where the data ended within the first filling, every rank gives what each of them has.
    num_tokens = collectives.min_int(min(max(per_rank, 1), run.harvest.buffer.num_unread), run.mesh.control)
    first = {name: x.to(run.mesh.device) for name, x in run.harvest.buffer.peek(num_tokens).items()}
    for name, (x, y) in _inputs_and_targets(run, first).items():
        run.trainers[name].initialise(x, y)


def _restart_clock(run: Run) -> None:
    run._clock = {"time": time.perf_counter(), "harvest": run.harvest.seconds, "step": run.step}


def _log(run: Run, bar: ProgressBar) -> None:
    """One row for each hookpoint, on the progress bar and to the trackers; stops where numbers are no numbers."""
    if next(iter(run.trainers.values())).window.num_steps == 0:
        return
    metrics = {name: trainer.read_metrics() for name, trainer in run.trainers.items()}
    seconds = time.perf_counter() - run._clock["time"]
    num_tokens = (run.step - run._clock["step"]) * run.config.batch_size_tokens
    lm_share = (run.harvest.seconds - run._clock["harvest"]) / seconds
    timing = {
        "tokens_per_second": num_tokens / seconds,
        "lm_time_share": lm_share,
        "sae_time_share": 1 - lm_share,
    }
    _restart_clock(run)
    for name, values in metrics.items():
        _refuse_skipped(run, name, values["num_skipped_steps"])
        lr = run.trainers[name].peak_lr * run.trainers[name].schedule(run.step - 1)
        _write_row(run, name, values | {"lr": lr} | timing)
    bar.show(run.step, next(iter(metrics.values())) | timing)


def _refuse_skipped(run: Run, hookpoint: str, num_skipped: float) -> None:
    if num_skipped:
        raise UserError(
            f"the gradient of {hookpoint} was not finite in {num_skipped:.0f} of the last steps up to step {run.step}: "
            "lower --optim.lr, and give another --output-dir"
        )


def _write_row(run: Run, hookpoint: str, values: dict[str, float]) -> None:
    if not run.mesh.is_main:
        return
    row = {"step": run.step, "tokens": run.step * run.config.batch_size_tokens, "hookpoint": hookpoint}
    run.metrics.write(row | values)
    run.log_to_trackers({f"{hookpoint}/{key}": value for key, value in values.items()}, run.step)


def _measure(run: Run) -> None:
    """FVU and L0 on the held-out rows."""
    if run.heldout is None:
        return
    start = time.perf_counter()
    rows, keep = run.heldout, run.harvest.trained_on(run.heldout)
    measured = measure_heldout(
        rows, keep, run.harvest.extract, run.trainers, run.targets, run.harvest.micro_batch_rows, run.mesh
    )
    for name, values in measured.items():
        _write_row(run, name, values)
    run._clock["time"] += time.perf_counter() - start  # tokens/s is the training's


def _export(run: Run) -> None:
    """Each SAE, folded, to <output_dir>/<hookpoint>/."""
    for name, trainer in run.trainers.items():
        frequencies = trainer.firing.frequencies()
        if run.mesh.is_main:
            sae = trainer.folded()
            num_tokens = trainer.step * run.config.batch_size_tokens
            sae.metadata = run.metadata | {"hook_name": name, "training_tokens": num_tokens}
            if run.targets[name] != name:
                sae.metadata["hook_name_out"] = run.targets[name]
            save_sae(sae, run.out / name, frequencies)


def _save(run: Run) -> None:
    """A checkpoint of all there is, unless the newest one holds it already."""
    if run.saved_step == run.step and not run.finished and not run.harvest.refilling:
        return
    for name, trainer in run.trainers.items():
        _refuse_skipped(run, name, trainer.window.num_skipped.item())
    start = time.perf_counter()
    tensors = {
        f"{name}/{key}": t for name, trainer in run.trainers.items() for key, t in trainer.tensors().items()
    }
    own = {f"buffer/{key}": t for key, t in run.harvest.buffer.tensors().items()}
    own |= _rank_tensors(run)
    state: dict[str, Any] = {"trainers": {name: trainer.counters() for name, trainer in run.trainers.items()}}
    state["finished"] = run.finished
    rank_state = {
        "buffer": run.harvest.buffer.counters(),
        "refilling": run.harvest.refilling,
        "data": run.rows.state_dict(),
    }
    folder = run.out / "checkpoints"
    checkpoint.save(folder, run.step, tensors, own, state, rank_state, run.config.checkpoint.keep, run.mesh)
    run.saved_step = run.step
    run._clock["time"] += time.perf_counter() - start


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
    if (
        -collectives.max_ints([-newest], run.mesh.control)[0]
        != collectives.max_ints([newest], run.mesh.control)[0]
    ):
        raise UserError(
            f"--resume: not all ranks find the same newest checkpoint in {run.out}: --output-dir must lie on a file "
            "system that all nodes share"
        )
    if not whole:
        logger.warning("--resume: %s holds no whole checkpoint, starting afresh", run.out)
        if run.mesh.is_main:
            run.metrics.truncate_after(-1)
        return
    state, rank_state = checkpoint.read_state(whole[-1], run.mesh)
    run.finished = state["finished"]
    for name, trainer in run.trainers.items():
        trainer.load_counters(state["trainers"][name])
    tensors = {
        f"{name}/{key}": t for name, trainer in run.trainers.items() for key, t in trainer.tensors().items()
    }
    waiting = run.harvest.buffer.empty_tensors(rank_state["buffer"])
    own = {f"buffer/{key}": t for key, t in waiting.items()}
    own |= _rank_tensors(run)
    checkpoint.load_tensors(whole[-1], tensors, own, run.mesh)
    run.harvest.load(waiting, rank_state["buffer"], rank_state["refilling"])
    run.rows.load_state_dict(rank_state["data"])
    run.saved_step = run.step
    if run.mesh.is_main:
        run.metrics.truncate_after(run.step)
    logger.info("resumed %s at step %d", whole[-1], run.step)
