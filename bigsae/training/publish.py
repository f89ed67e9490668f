"""The SAEs as they leave a run: to its folder at the end, and on the way to the Hub and to trackers."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from bigsae.hub.formats import save_sae
from bigsae.parallel import collectives
from bigsae.training.state import Run

logger = logging.getLogger("bigsae")

# In the run's folder: being written, and being pushed.
_WRITTEN, _PUSHED = ".saes", ".pushed"


def export_saes(run: Run, folder: Path) -> None:
    """Each SAE as it stands, folded, to its folder in `folder`, which all ranks see; all ranks call this."""
    for name, trainer in run.trainers.items():
        exported = trainer.export()
        if exported is None:
            continue
        job, (sae, frequencies) = run.jobs[name], exported
        num_tokens = run.step * run.config.batch_size_tokens
        sae.metadata = run.metadata | {"hook_name": job.reads, "training_tokens": num_tokens}
        if job.predicts != job.reads:
            sae.metadata["hook_name_out"] = job.predicts
        save_sae(sae, folder / name, frequencies)
    collectives.barrier(run.mesh.control)


def publish(run: Run) -> None:
    """After a step, on all ranks: begin what is due of --hub.push-every, and of --checkpoint.every for trackers."""
    busy = run.pusher is not None and run.pusher.busy()
    pushes = _due(run, run.config.hub.push_every)
    logs = run.trackers.takes_saes and _due(run, run.config.checkpoint.every)
    if pushes and collectives.max_ints([busy], run.mesh.control)[0]:
        logger.info("the last push goes on: the SAEs of step %d are left out", run.step)
        pushes = False
    if not pushes and not logs:
        return
    start = time.perf_counter()
    written = _write(run)
    if run.mesh.is_main:
        if logs:
            run.trackers.log_saes(written, run.step)
        if pushes:
            assert run.pusher is not None
            run.pusher.start(_to_be_pushed(run, written), run.step)
        else:
            shutil.rmtree(written)
    run.clock["time"] += time.perf_counter() - start  # tokens/s is the training's


def publish_finished(run: Run) -> None:
    """At the end, on all ranks: the finished SAEs to trackers and the Hub, which is waited for."""
    if run.trackers.takes_saes:
        written = _write(run)
        if run.mesh.is_main:
            run.trackers.log_saes(written, run.step)
            shutil.rmtree(written)
    if run.pusher is not None:
        run.pusher.push_last(run.out, run.step, run.stop)
        shutil.rmtree(run.out / _PUSHED, ignore_errors=True)


def _due(run: Run, every: int) -> bool:
    return every > 0 and run.step % every == 0


def _write(run: Run) -> Path:
    """A folder with the SAEs as they stand."""
    folder = run.out / _WRITTEN
    if run.mesh.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    collectives.barrier(run.mesh.control)
    export_saes(run, folder)
    return folder


def _to_be_pushed(run: Run, written: Path) -> Path:
    """`written` as a folder that stays while it is pushed, with what the model card tells of."""
    folder = run.out / _PUSHED
    shutil.rmtree(folder, ignore_errors=True)
    written.rename(folder)
    for name in ("config.json", "metrics.jsonl", "status.json"):
        if (run.out / name).exists():
            shutil.copyfile(run.out / name, folder / name)
    return folder
