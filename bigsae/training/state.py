"""Everything that a run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bigsae.config import TrainConfig
from bigsae.data.harvest import Harvest
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.training.metrics import MetricsFile
from bigsae.training.pusher import Pusher
from bigsae.training.routing import Routing
from bigsae.training.saver import Saver
from bigsae.training.signals import StopSignal
from bigsae.training.throughput import Throughput
from bigsae.training.trackers import Trackers
from bigsae.training.trainer import SAETrainer
from bigsae.training.variants import Job
from bigsae.training.watch import Heartbeat


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
    jobs: dict[str, Job]
    """All SAEs of the run, by name."""
    trainers: dict[str, SAETrainer]
    """Of those SAEs that this rank trains, alone or with others."""
    routing: Routing
    metadata: dict[str, Any]
    """What each exported SAE says of its origin."""
    trackers: Trackers
    pusher: Pusher | None
    """On the main rank, where the SAEs go to the Hub."""
    stop: StopSignal
    saver: Saver
    """Writes checkpoints."""
    heartbeat: Heartbeat
    """Shows where a run hangs."""
    throughput: Throughput
    step: int = 0
    """Steps that are done."""
    num_unlogged: int = 0
    """Of them, since the last log."""
    initialised: bool = False
    """Whether scales and starts of b_dec are known."""
    finished: bool = False
    """Whether the newest checkpoint is that of a run which has ended."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""
    usual_losses: dict[str, float] = field(default_factory=dict)
    """Running mean of the logged losses of each SAE."""
    num_rollbacks: dict[int, int] = field(default_factory=dict)
    """Returns to the checkpoint of each step, where numbers were not finite."""
    metrics: MetricsFile = field(init=False)
    clock: dict[str, float] = field(default_factory=dict)
    """Where time, harvest and steps stood at the last log."""

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.out / "metrics.jsonl")

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    def log_to_trackers(self, values: dict[str, float], step: int) -> None:
        """Have all trackers log `values`."""
        self.trackers.log(values, step)

    def of_all_ranks(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` of this rank's SAEs as those of all SAEs, by name, in the order of the jobs."""
        if self.routing.owners is not None:
            parts = collectives.objects(values, self.mesh.control)
            values = {name: value for part in parts for name, value in part.items()}
        return {name: values[name] for name in self.jobs}
