"""From a configuration to trained SAEs: the function behind `bigsae.train`."""

from __future__ import annotations

from bigsae.config import TrainConfig
from bigsae.sae.base import SAE
from bigsae.training import folder
from bigsae.training.loop import train
from bigsae.training.setup import prepare
from bigsae.training.signals import StopSignal


class Preempted(Exception):
    """The run was told to stop, by signal `number`, and has saved a checkpoint."""

    def __init__(self, number: int | None):
        super().__init__(f"stopped by signal {number}" if number else "stopped together with another rank")
        self.number = number


def train_saes(config: TrainConfig) -> dict[str, SAE]:
    """Train one SAE for each hookpoint of `config`; every rank of the launch calls this.

    Returns them by hookpoint, in the LM's own scale; they also lie in `config.output_dir`. Raises UserError for what
    the user can mend, and Preempted where a signal ended the run (go on with `resume=True`).
    """
    with StopSignal() as stop:
        run, close = prepare(config, stop)
        try:
            status = train(run)
        except BaseException as error:
            if run.mesh.is_main:
                folder.write_status(config, "failed", run.step, f"{type(error).__name__}: {error}")
            raise
        finally:
            close()
    if status == "preempted":
        raise Preempted(stop.number)
    return {name: trainer.folded() for name, trainer in run.trainers.items()}
