"""What a plan is made from: the options of a run that decide what it costs, and the machines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigsae.config import (
    BufferConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LMConfig,
    MeshConfig,
    OptimConfig,
    SAEConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class PlanConfig:
    """Tell before a run what it will need and how long it will take, from shapes alone: no weights are read."""

    model: str
    """Hub id or folder of the language model; of its files config.json is enough."""
    hookpoints: tuple[str, ...]
    """As for training."""
    gpus: int = 1
    """GPUs in all, one rank each."""
    gpus_per_node: int = 8
    """GPUs that NVLink connects."""
    gpu: Literal["h100", "h200", "a100", "b200", "cpu"] = "h100"
    """What they are."""
    memory_gib: float | None = None
    """GiB of memory that each has for the run. Default: what that GPU has, less a reserve; unlimited for cpu."""
    tokens: int = 1_000_000_000
    """Length of the run, over all ranks."""
    batch_size_tokens: int = 4096
    """Activations in one step, over all ranks."""
    ctx_len: int = 256
    """Tokens in a row."""
    variants: int = 1
    """SAEs on each hookpoint, as of a --sweep, taken to be as wide as this one."""
    json: bool = False
    """Print the plan as JSON."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def local_gpus(self) -> int:
        """GPUs of the run on one node."""
        return min(self.gpus, self.gpus_per_node)

    def as_run(self) -> TrainConfig:
        """The run that is planned, as far as it is known: without dataset and folder."""
        return TrainConfig(
            model=self.model,
            dataset="",
            hookpoints=self.hookpoints,
            output_dir="",
            tokens=self.tokens,
            batch_size_tokens=self.batch_size_tokens,
            ctx_len=self.ctx_len,
            mesh=self.mesh,
            lm=self.lm,
            # Where there is something to measure on it is held out of a dataset that is not known yet.
            data=DataConfig(
                num_shards=max(DataConfig.num_shards, self.gpus),
                heldout_documents=int(self.eval != EvalConfig()),
            ),
            buffer=self.buffer,
            sae=self.sae,
            optim=self.optim,
            checkpoint=CheckpointConfig(),
            eval=self.eval,
        )
