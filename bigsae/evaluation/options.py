"""What an evaluation is made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigsae.config import DataConfig, LMConfig, UserError, WandbConfig, lm_kwargs


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure sparse autoencoders on a language model: what they reconstruct, and what the model makes of it."""

    saes: tuple[str, ...]
    """Folders of SAEs or transcoders that bigsae, SAELens, sparsify or dictionary_learning wrote, or of whole runs of
    bigsae."""
    model: str | None = None
    """Hub id or folder of the language model. Default: the one that the SAEs name, with the --lm.revision, dtype,
    autocast and kwargs of their run where these are left at their defaults."""
    dataset: str | None = None
    """Hub id or local path, as for training. Default: the dataset of the run that the first SAE lies in, with the run's
    --data, --seed and --ctx-len; so the documents that the run, or its cache, held out, where it did."""
    hookpoints: tuple[str, ...] = ()
    """What each of --saes reads, in their order. Default: what they say themselves."""
    output_hookpoints: tuple[str, ...] = ()
    """What each transcoder predicts, in the order of --saes. Default: what they say themselves."""
    rows: int = 64
    """Most token rows that are measured, over all ranks."""
    ctx_len: int | None = None
    """Tokens in a row. Default: what the first SAE was trained with, else 256."""
    seed: int = 0
    """Decides which documents are measured, and in --data.heldout-documents which are held out."""
    ce: bool = True
    """Measure cross-entropy and KL divergence with the reconstructions spliced in. Loads the whole language model;
    without it the layers up to the last hookpoint."""
    ablate_everywhere: bool = False
    """Ablate every position, also those that are left out by --data.drop-first-position and
    --data.drop-special-tokens. SAELens does."""
    dense_above: float = 0.1
    """A latent is dense that fires on more than this part of the tokens."""
    output: str | None = None
    """File for the results, as JSON."""
    json: bool = False
    """Print the results as JSON, not as a table."""
    timeout: float = 30.0
    """Minutes that a rank waits for another one before the evaluation ends with an error."""
    lm: LMConfig = field(default_factory=LMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def check_options(config: EvaluateConfig) -> None:
    """Find what is wrong with the values alone. Raises UserError."""
    if not config.saes:
        raise UserError("--saes is empty: give one folder or more")
    for flag, value in (
        ("--rows", config.rows),
        ("--timeout", config.timeout),
        ("--dense-above", config.dense_above),
        ("--lm.micro-batch-rows", config.lm.micro_batch_rows),
        ("--lm.shard-size", config.lm.shard_size),
        ("--lm.replicate-size", config.lm.replicate_size),
        ("--data.num-shards", config.data.num_shards),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{flag} {value} must be greater than 0")
    if config.ctx_len is not None and config.ctx_len < 2:
        raise UserError(f"--ctx-len {config.ctx_len} must be at least 2")
    if config.dataset is None and config.data != DataConfig():
        raise UserError("--data.… does nothing without --dataset: set it, or leave --data.… out")
    if config.dataset is None and config.seed:
        raise UserError("--seed does nothing without --dataset: set it, or leave --seed out")
    for flag, given in (
        ("--data.epochs", config.data.epochs != DataConfig.epochs),
        ("--data.cached-order", config.data.cached_order != DataConfig.cached_order),
        ("--wandb.no-artifacts", config.wandb.artifacts != WandbConfig.artifacts),
    ):
        if given:
            raise UserError(f"{flag} is of training and does nothing here: leave it out")
    if config.data.heldout_seed is not None and not config.data.heldout_documents:
        raise UserError("--data.heldout-seed needs documents that are held out: set --data.heldout-documents")
    if config.ablate_everywhere and not config.ce:
        raise UserError("--ablate-everywhere does nothing with --no-ce: leave one of them out")
    if config.lm.autocast and config.lm.dtype != "float32":
        raise UserError(
            f"--lm.autocast does nothing for weights in {config.lm.dtype}: set --lm.dtype float32"
        )
    if config.wandb.project is None and (config.wandb.name or config.wandb.entity):
        raise UserError("--wandb.name and --wandb.entity do nothing without --wandb.project: set it")
    lm_kwargs(config.lm)
