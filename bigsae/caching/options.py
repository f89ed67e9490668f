"""What a cache is made from. Standard library and `config` alone, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from bigsae.config import DataConfig, LMConfig, TrainConfig, UserError


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Write the activations of a language model to disk, for `bigsae.train --activations`."""

    model: str
    """Hub id or folder of the language model."""
    dataset: str
    """Hub id, or a local path: a save_to_disk folder, .jsonl, .parquet, .txt, or a folder of those. Read once."""
    hookpoints: tuple[str, ...]
    """Modules whose activations are written, all from one forward; named as for training."""
    output_dir: str
    """Folder of the cache, on a file system that all nodes share."""
    tokens: int
    """Activations of each hookpoint, over all ranks; fewer where the dataset ends before."""
    ctx_len: int = 256
    """Tokens in a row."""
    seed: int = 0
    """Decides the order of the documents."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type in which activations are written."""
    shard_tokens: int = 65_536
    """Tokens in a shard. Each rank gathers a shard in memory before it is written; what a kill costs is less than
    one shard a rank."""
    heldout_rows: int = 64
    """Most token rows of --data.heldout-documents that are kept aside, over all ranks."""
    resume: bool = False
    """Go on after the last shards in --output-dir that all ranks have written."""
    timeout: float = 30.0
    """Minutes that a rank waits for another one before it ends with an error."""
    push_to_hub: str | None = None
    """Upload the finished cache to this dataset repository, user/name. With --resume also one made before."""
    private: bool = False
    """Make that repository private; one that is there and public is refused."""
    lm: LMConfig = field(default_factory=LMConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def as_run(self, num_ranks: int) -> TrainConfig:
        """The training on the fly whose rows and activations these are."""
        return TrainConfig(
            model=self.model,
            dataset=self.dataset,
            hookpoints=self.hookpoints,
            output_dir=self.output_dir,
            tokens=self.tokens,
            batch_size_tokens=num_ranks,
            ctx_len=self.ctx_len,
            seed=self.seed,
            timeout=self.timeout,
            lm=self.lm,
            data=replace(self.data, epochs=1),
        )


@dataclass(frozen=True)
class VerifyConfig:
    """Compare each file of a cache with its checksum."""

    verify: str
    """Folder of a finished cache."""


def check_options(config: CacheConfig) -> None:
    """Find what is wrong with the values that training has not. Raises UserError."""
    if config.data.epochs not in (None, 1):
        raise UserError(
            f"--data.epochs {config.data.epochs}: a cache holds every document once: leave it out"
        )
    for flag, value in (("--shard-tokens", config.shard_tokens), ("--heldout-rows", config.heldout_rows)):
        if value < 1:
            raise UserError(f"{flag} {value} must be greater than 0")
    if config.private and not config.push_to_hub:
        raise UserError("--private does nothing without --push-to-hub: set it")
