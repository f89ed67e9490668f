"""From a configuration to trained SAEs: the function behind `bigsae.train`."""

from __future__ import annotations

from bigsae.config import TrainConfig
from bigsae.hub.formats import read_sae
from bigsae.parallel.nodes import lost_peers_named
from bigsae.sae.base import SAE
from bigsae.training import folder
from bigsae.training.loop import train
from bigsae.training.setup import prepare
from bigsae.training.signals import StopSignal
from bigsae.training.state import Run


class Preempted(Exception):
    """The run was told to stop, by signal `number`, and has saved a checkpoint."""

    def __init__(self, number: int | None):
        super().__init__(f"stopped by signal {number}" if number else "stopped together with another rank")
        self.number = number


def train_saes(config: TrainConfig) -> dict[str, SAE]:
    """Train the SAEs of `config`, one for each hookpoint or a sweep's; every rank of the launch calls this.

    Returns them by hookpoint (in a sweep hookpoint/variant), in the LM's own scale; they also lie in
    `config.output_dir`. Raises UserError for what the user can mend, Preempted where a signal ended the run, and
    PeerLost where another rank is gone (go on from both with `resume=True`).
    """
    run = run_training(config)
    if run.mesh.latent is None and run.routing.owners is None:
        return {name: trainer.folded() for name, trainer in run.trainers.items()}
    # No rank has them whole, or not all of them.
    return {name: read_sae(run.out / name) for name in run.jobs}


def run_training(config: TrainConfig) -> Run:
    """As `train_saes`, without what is trained: it lies in `config.output_dir`."""
    with StopSignal(config.max_hours) as stop:
        with lost_peers_named(config.timeout):
            run, close = prepare(config, stop)
        try:
            with lost_peers_named(config.timeout):
                status = train(run)
        except BaseException as error:
            if run.mesh.is_main:
                folder.write_status(config, "failed", run.step, f"{type(error).__name__}: {error}")
            raise
        finally:
            close()
    if status == "preempted":
        raise Preempted(stop.number)
    return run
