"""The run itself: fill, step, log, measure, save, until the tokens, the data or the user say stop."""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor

from bigsae.config import UserError
from bigsae.parallel import collectives
from bigsae.training.folder import write_status
from bigsae.training.heldout import measure_heldout
from bigsae.training.heldout_ce import measure_heldout_ce
from bigsae.training.progress import ProgressBar
from bigsae.training.publish import export_saes, publish, publish_finished
from bigsae.training.saving import met_nonfinite, save, save_last, settle
from bigsae.training.state import Run
from bigsae.training.throughput import sae_flops
from bigsae.training.trainer import SAETrainer
from bigsae.training.variants import Job
from bigsae.training.watch import check_replicas

logger = logging.getLogger("bigsae")

# Steps between two questions to all ranks whether one was told to stop. Refills ask before each of their forwards.
_CONTROL_INTERVAL = 10
# A loss so many times the running mean of those logged before, which takes in each at this rate, is worth a warning.
_SPIKE, _SPIKE_RATE = 3.0, 0.2


def train(run: Run) -> str:
    """Run to the end, or until stopped. Returns the status: "finished" or "preempted"."""
    if run.finished:
        logger.info("%s is finished: nothing to do", run.out)
        return "finished"
    shown = run.mesh.is_main
    with ProgressBar(run.config.num_steps, run.step, shown=shown) as bar, run.heartbeat.watching():
        _restart_clock(run)
        try:
            status, reason = _steps(run, bar)
            while status == "finished" and _log(run, bar):
                status, reason = _steps(run, bar)
        except UserError:
            settle(run)  # what was to be saved was whole: a resume may begin there
            raise
        run.finished = status == "finished"
        if run.finished:
            bar.activity("measuring")
            if not _measures_now(run):
                _measure(run)
            bar.activity("saving")
            export_saes(run, run.out)
        save_last(run)
        left_out = _left_out(run)
        if run.mesh.is_main:
            write_status(run.config, status, run.step, reason, left_out)
        if run.finished:
            bar.activity("publishing")
            publish_finished(run)
    return status


def _left_out(run: Run) -> dict[str, int]:
    """What of all ranks' data came into no row, which is told."""
    own = run.rows.left_out()
    total = collectives.sum_(torch.tensor(list(own.values()), dtype=torch.int64), run.mesh.control)
    left_out = dict(zip(own, total.tolist(), strict=True))
    if any(left_out.values()):
        logger.info(
            "of the data read so far, over all ranks: %s",
            ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in left_out.items()),
        )
    return left_out


def _steps(run: Run, bar: ProgressBar) -> tuple[str, str]:
    config = run.config
    while run.step < config.num_steps:
        bar.activity("harvesting")
        filled = run.harvest.fill(run.step, lambda: _asked(run))
        if run.step == 0 and run.saved_step is None:
            _check_one_batch(run)
        if not filled:
            return _why_not_filled(run)
        bar.activity("training")
        _initialise(run)
        batch = run.routing(run.harvest.read())
        for name, trainer in run.trainers.items():
            trainer.train_step(*_inputs_and_targets(run.jobs[name], batch))
        run.step += 1
        run.num_unlogged += 1
        run.heartbeat.beat()
        bar.advance(run.step)
        if run.step % config.log_every == 0:
            _log(run, bar)
        if config.check_replicas_every and run.step % config.check_replicas_every == 0:
            check_replicas(run.trainers, run.step, run.mesh.control)
        if _measures_now(run):
            _measure(run)
        if run.step == config.num_steps:
            break
        if config.checkpoint.every and run.step % config.checkpoint.every == 0:
            save(run)
        publish(run)
        if run.step % _CONTROL_INTERVAL == 0 and _someone_stops(run):
            return _stopped(run)
    return "finished", "all tokens trained"


def _asked(run: Run) -> bool:
    """Before each forward of a refill: whether this rank is to stop."""
    run.heartbeat.beat()
    return run.stop.asked


def _inputs_and_targets(job: Job, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What the SAE reads, and what it predicts where that is something else."""
    return batch[job.reads], batch[job.predicts] if job.predicts != job.reads else None


def _measures_now(run: Run) -> bool:
    every = run.config.eval.every
    return every > 0 and run.step > 0 and run.step % every == 0


def _someone_stops(run: Run) -> bool:
    return bool(collectives.max_ints([run.stop.asked], run.mesh.control)[0])


def _stopped(run: Run) -> tuple[str, str]:
    logger.info("told to stop: saving a checkpoint at step %d, --resume goes on from there", run.step)
    if run.stop.number is not None:
        return "preempted", f"signal {run.stop.number}"
    return "preempted", f"--max-hours {run.config.max_hours}" if run.stop.asked else "signal to another rank"


def _why_not_filled(run: Run) -> tuple[str, str]:
    if run.harvest.refilling:
        return _stopped(run)
    return "finished", f"the data ended after {run.config.data.epochs} epochs"


def _check_one_batch(run: Run) -> None:
    """Refuse a dataset that cannot fill the first batch without repeating itself."""
    num_rows = run.rows.num_first_epoch_rows
    too_short = num_rows is not None and num_rows * run.config.ctx_len < run.harvest.batch_tokens
    if collectives.max_ints([too_short], run.mesh.control)[0]:
        config = run.config
        source = (
            f"--activations {config.activations}" if config.activations else f"--dataset {config.dataset}"
        )
        raise UserError(
            f"{source} holds less than one batch: lower --batch-size-tokens "
            f"{run.config.batch_size_tokens} or take a larger dataset"
        )


def _initialise(run: Run) -> None:
    """Before the first step: scale and b_dec from the first tokens, which are trained on afterwards."""
    if run.initialised:
        return
    per_rank = min(run.config.sae.init_tokens // run.mesh.num_ranks, run.config.buffer.tokens)
    # Where the data ended within the first filling, every rank gives what each of them has.
    num_tokens = collectives.min_int(min(max(per_rank, 1), run.harvest.buffer.num_unread), run.mesh.control)
    first, device = run.harvest.buffer.peek(num_tokens), run.mesh.device
    # One hookpoint after the other: these are many more tokens than a batch.
    for pair in dict.fromkeys((job.reads, job.predicts) for job in run.jobs.values()):
        routed = run.routing({name: first[name] for name in dict.fromkeys(pair)})
        for name, trainer in run.trainers.items():
            job = run.jobs[name]
            if (job.reads, job.predicts) == pair:
                x, y = _inputs_and_targets(job, routed)
                trainer.initialise(x.to(device), y.to(device) if y is not None else None)
    run.initialised = True


def _restart_clock(run: Run) -> None:
    run.clock = {"time": time.perf_counter(), "harvest": run.harvest.seconds, "step": run.step}


def _log(run: Run, bar: ProgressBar) -> bool:
    """One row for each SAE, on the progress bar and to the trackers.

    Returns whether the run went back to a checkpoint instead, as numbers were no numbers (--on-nonfinite).
    """
    if not run.num_unlogged:
        return False
    metrics = run.of_all_ranks({name: _read_metrics(trainer) for name, trainer in run.trainers.items()})
    seconds = time.perf_counter() - run.clock["time"]
    num_tokens = (run.step - run.clock["step"]) * run.config.batch_size_tokens
    lm_seconds = run.harvest.seconds - run.clock["harvest"]
    timing = {
        "tokens_per_second": num_tokens / seconds,
        "lm_time_share": lm_seconds / seconds,
        "sae_time_share": 1 - lm_seconds / seconds,
        **_throughput(run, metrics, lm_seconds, seconds - lm_seconds),
    }
    run.num_unlogged = 0
    _restart_clock(run)
    if met_nonfinite(run, {name: values["num_skipped_steps"] for name, values in metrics.items()}):
        return True
    for name, values in metrics.items():
        _tell_spikes(run, name, values["loss"])
        _write_row(run, name, values | timing)
    bar.show(run.step, next(iter(metrics.values())) | timing)
    return False


def _throughput(
    run: Run, metrics: dict[str, dict[str, float]], lm_seconds: float, sae_seconds: float
) -> dict[str, float]:
    """Operations a second of this rank, and what part of its device's peak they are."""
    flops = sum(
        sae_flops(trainer, run.config.batch_size_tokens, metrics[name])
        for name, trainer in run.trainers.items()
    )
    return run.throughput.metrics(run.harvest.num_tokens, lm_seconds, flops, sae_seconds)


def _tell_spikes(run: Run, name: str, loss: float) -> None:
    """Warn of a loss far above those that were logged before it."""
    usual = run.usual_losses.get(name, loss)
    if loss > _SPIKE * usual:
        logger.warning(
            "the loss of %s jumped to %.4g at step %d, from about %.4g", name, loss, run.step, usual
        )
    if math.isfinite(loss):
        run.usual_losses[name] = usual + _SPIKE_RATE * (loss - usual)


def _read_metrics(trainer: SAETrainer) -> dict[str, float]:
    return trainer.read_metrics() | {"lr": trainer.peak_lr * trainer.schedule(trainer.step - 1)}


def _write_row(run: Run, name: str, values: dict[str, float]) -> None:
    if not run.mesh.is_main:
        return
    job = run.jobs[name]
    row = {"step": run.step, "tokens": run.step * run.config.batch_size_tokens, "hookpoint": job.reads}
    if job.variant.name:
        row["variant"] = job.variant.name
    values = {key: value for key, value in values.items() if math.isfinite(value)}  # JSON knows no others
    run.metrics.write(row | values)
    run.log_to_trackers({f"{name}/{key}": value for key, value in values.items()}, run.step)


def _measure(run: Run) -> None:
    """FVU and L0 on the held-out rows, and cross-entropy with --eval.ce."""
    if run.heldout is None:
        return
    start = time.perf_counter()
    rows, keep = run.heldout, run.harvest.trained_on(run.heldout)
    measured = measure_heldout(
        rows, keep, run.harvest.extract, run.trainers, run.jobs, run.routing, run.harvest.micro_batch_rows
    )
    measured = run.of_all_ranks(measured)
    if run.config.eval.ce:
        extract, rows_at_once = run.harvest.extract, run.harvest.micro_batch_rows
        of_model = measure_heldout_ce(
            rows, keep, extract, run.trainers, run.jobs, run.routing.mesh, rows_at_once
        )
        measured = {name: values | of_model[name] for name, values in measured.items()}
    for name, values in measured.items():
        _write_row(run, name, values)
    run.clock["time"] += time.perf_counter() - start  # tokens/s is the training's
