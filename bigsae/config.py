"""The configuration of a run: frozen dataclasses, one docstring per field (they are the text of `--help`).

A leaf of the import graph: standard library only. Whatever can be wrong with the *values alone* is found by
`check`; what needs the model or the data is found where those are opened, before weights are read where it can be.
Both raise `UserError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class UserError(Exception):
    """A mistake that the user can mend. The message names the flag and the fix; commands print it and exit with 2."""


@dataclass(frozen=True)
class LMConfig:
    """How the language model is held and run."""

    shard_size: int | None = None
    """Ranks that hold one copy of the model between them (FSDP2). 1 replicates it on each rank. Default: what the
    accelerate configuration says (FSDP: all ranks; HYBRID_SHARD: the ranks of a node), else 1."""
    replicate_size: int | None = None
    """Copies of the sharded model (HSDP). Default: ranks / shard-size."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the model's weights and of its forward."""
    micro_batch_rows: int = 8
    """Token rows (of ctx-len) in one forward, on each rank. Decides results to rounding, so it is never tuned by
    timing."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository carries."""
    kwargs: str = "{}"
    """JSON object of further arguments of `from_pretrained`, e.g. '{"attn_implementation": "sdpa"}'."""


@dataclass(frozen=True)
class DataConfig:
    """From the dataset to rows of tokens."""

    split: str = "train"
    """Split of the dataset."""
    name: str | None = None
    """Configuration name of a Hub dataset, e.g. sample-10BT."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the Hub."""
    text_column: str = "text"
    """Column that holds the text. Ignored where the dataset has `input_ids`."""
    streaming: bool = False
    """Stream the dataset instead of downloading and indexing it."""
    epochs: int | None = None
    """Stop after so many passes over the data. By default a new epoch begins, in a new order, until --tokens are
    trained."""
    num_shards: int = 64
    """Virtual shards that the documents are dealt to, fixed for a run. Ranks own shards."""
    heldout_documents: int = 0
    """Documents that are never trained on; FVU and L0 on them are logged at the end and every --eval.every steps."""
    drop_first_position: bool = True
    """Leave position 0 of each row out of training and normalisation: an attention sink in most models."""
    drop_special_tokens: bool = True
    """Leave the tokenizer's special tokens out of training and normalisation."""


@dataclass(frozen=True)
class BufferConfig:
    """The shuffled activations that wait on each rank."""

    tokens: int = 262_144
    """Activations that each rank holds per hookpoint; refilled when half of them are used."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type in which they wait."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the rank's accelerator where it has one; cpu: pinned host memory."""


@dataclass(frozen=True)
class SAEConfig:
    """The sparse autoencoder and its objective."""

    architecture: Literal["topk"] = "topk"
    """topk: the k largest latents of each token (Gao et al. 2024, arXiv 2406.04093)."""
    k: int = 32
    """Latents that are kept per token."""
    expansion_factor: int | None = None
    """d_sae / d_in. Default 16, where --sae.d-sae is not given."""
    d_sae: int | None = None
    """Number of latents, instead of --sae.expansion-factor."""
    normalize: Literal["scalar", "none"] = "scalar"
    """scalar: activations are scaled to a mean norm of sqrt(d_in), which is folded into the weights on export."""
    init_tokens: int = 65_536
    """First tokens, over all ranks, from which the scale and the start of b_dec are estimated. They are trained on as
    well. At most what the buffers hold."""
    b_dec_init: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    """Where b_dec starts."""
    normalize_decoder: bool = True
    """Keep decoder rows at unit norm: the gradient's parallel part is removed, rows are renormalised after a step."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for so many tokens, counted over all ranks."""
    auxk_coefficient: float = 1 / 32
    """Weight of the auxiliary loss by which dead latents learn the residual; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents that reconstruct the residual of each token. Default: d_in / 2."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam and the schedule of its learning rate."""

    lr: float | None = None
    """Peak learning rate. Default: 2e-4 / sqrt(d_sae / 2^14) (Gao et al. 2024)."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Shape between warm-up and decay; cosine falls to zero at the end of the run."""
    warmup_steps: int | None = None
    """Linear warm-up. Default: min(1000, 5 % of the steps)."""
    decay_fraction: float = 0.2
    """Last part of the run over which the rate falls linearly to zero, on top of the schedule."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving what a resume needs."""

    every: int = 1000
    """Steps between checkpoints; 0 saves at the end of the run alone."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""


@dataclass(frozen=True)
class EvalConfig:
    """Measuring on held-out documents (--data.heldout-documents)."""

    every: int = 0
    """Steps between measurements; 0 measures at the end of the run alone."""
    rows: int = 64
    """Most token rows that are measured, over all ranks: the beginnings of the held-out documents, in turn."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside metrics.jsonl."""

    project: str | None = None
    """Project to log to. Without it wandb is not imported."""
    name: str | None = None
    """Name of the run."""
    entity: str | None = None
    """User or team."""


@dataclass(frozen=True)
class TrainConfig:
    """Train sparse autoencoders on the activations of any Hugging Face causal language model."""

    model: str
    """Hub id or folder of the language model."""
    dataset: str
    """Hub id, or a local path: a save_to_disk folder, .jsonl, .parquet, .txt, or a folder of those."""
    hookpoints: tuple[str, ...]
    """Modules whose activations are learnt, one SAE each: the model's own names, patterns (model.layers.*.mlp), ranges
    (model.layers.{4,8}), or TransformerLens names; a suffix :input takes a module's input."""
    output_dir: str
    """Folder of the run, on a file system that all nodes share."""
    tokens: int
    """Length of the run and of its schedules, over all ranks."""
    batch_size_tokens: int = 4096
    """Activations in one step, over all ranks."""
    ctx_len: int = 256
    """Tokens in a row."""
    seed: int = 0
    """Decides every random number."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --output-dir; starts afresh, and says so, where there is none."""
    lm: LMConfig = field(default_factory=LMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def num_steps(self) -> int:
        """Whole steps in --tokens."""
        return self.tokens // self.batch_size_tokens


def resolve_d_sae(sae: SAEConfig, d_in: int) -> int:
    """Number of latents for activations of width `d_in`. Raises UserError where k does not fit into it."""
    d_sae = sae.d_sae if sae.d_sae is not None else (sae.expansion_factor or 16) * d_in
    if sae.k > d_sae:
        fix = "raise --sae.d-sae" if sae.d_sae is not None else "raise --sae.expansion-factor"
        raise UserError(f"--sae.k {sae.k} exceeds d_sae {d_sae}: {fix} or lower --sae.k")
    return d_sae


def resolve_lr(optim: OptimConfig, d_sae: int) -> float:
    """Peak learning rate; the default is Gao et al.'s scaling with width (arXiv 2406.04093, appendix A.3)."""
    return optim.lr if optim.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)


def check_sae(sae: SAEConfig) -> None:
    """Find what is wrong with the SAE's values alone. Raises UserError."""
    if sae.d_sae is not None and sae.expansion_factor is not None:
        raise UserError("--sae.d-sae and --sae.expansion-factor both set the width: give one of them")
    _positive("--sae.k", sae.k)
    _positive("--sae.d-sae", sae.d_sae)
    _positive("--sae.expansion-factor", sae.expansion_factor)
    _positive("--sae.init-tokens", sae.init_tokens)
    _positive("--sae.dead-after-tokens", sae.dead_after_tokens)
    _positive("--sae.k-aux", sae.k_aux)
    _at_least("--sae.auxk-coefficient", sae.auxk_coefficient, 0)
    if sae.k_aux is not None and not sae.auxk_coefficient:
        raise UserError("--sae.k-aux does nothing with --sae.auxk-coefficient 0: leave one of them out")


def check_optim(optim: OptimConfig) -> None:
    """Find what is wrong with the optimiser's values alone. Raises UserError."""
    _positive("--optim.lr", optim.lr)
    _positive("--optim.eps", optim.eps)
    for flag, beta in (("--optim.beta1", optim.beta1), ("--optim.beta2", optim.beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"{flag} {beta} must be at least 0 and below 1")
    if not 0 <= optim.decay_fraction <= 1:
        raise UserError(f"--optim.decay-fraction {optim.decay_fraction} must lie between 0 and 1")
    _at_least("--optim.warmup-steps", optim.warmup_steps, 0)
    _at_least("--optim.grad-clip", optim.grad_clip, 0)


def check(config: TrainConfig, num_ranks: int) -> None:
    """Find what is wrong with the values alone, for a run on `num_ranks` ranks. Raises UserError."""
    if not config.hookpoints:
        raise UserError("--hookpoints names no module: give at least one, e.g. --hookpoints model.layers.6")
    for flag, value in (
        ("--tokens", config.tokens),
        ("--batch-size-tokens", config.batch_size_tokens),
        ("--log-every", config.log_every),
        ("--buffer.tokens", config.buffer.tokens),
        ("--lm.micro-batch-rows", config.lm.micro_batch_rows),
        ("--lm.shard-size", config.lm.shard_size),
        ("--lm.replicate-size", config.lm.replicate_size),
        ("--data.num-shards", config.data.num_shards),
        ("--data.epochs", config.data.epochs),
        ("--eval.rows", config.eval.rows),
    ):
        _positive(flag, value)
    for flag, value in (
        ("--checkpoint.every", config.checkpoint.every),
        ("--checkpoint.keep", config.checkpoint.keep),
        ("--eval.every", config.eval.every),
        ("--data.heldout-documents", config.data.heldout_documents),
        ("--seed", config.seed),
    ):
        _at_least(flag, value, 0)
    _at_least("--ctx-len", config.ctx_len, 2)
    check_sae(config.sae)
    check_optim(config.optim)
    if config.batch_size_tokens % num_ranks:
        raise UserError(
            f"--batch-size-tokens {config.batch_size_tokens} is not divisible by {num_ranks} ranks: "
            f"set it to a multiple of {num_ranks}"
        )
    if config.tokens < config.batch_size_tokens:
        raise UserError(
            f"--tokens {config.tokens} is less than one batch: lower --batch-size-tokens {config.batch_size_tokens}"
        )
    if config.buffer.tokens < config.batch_size_tokens // num_ranks:
        raise UserError(
            f"--buffer.tokens {config.buffer.tokens} is smaller than a rank's part of a batch "
            f"({config.batch_size_tokens // num_ranks}): raise --buffer.tokens or lower --batch-size-tokens"
        )
    if config.data.num_shards < num_ranks:
        raise UserError(
            f"--data.num-shards {config.data.num_shards} leaves ranks without data: raise it to {num_ranks} or more"
        )
    if config.eval != EvalConfig() and not config.data.heldout_documents:
        raise UserError(
            "--eval.every and --eval.rows need documents to measure on: set --data.heldout-documents"
        )
    if config.wandb.project is None and config.wandb != WandbConfig():
        raise UserError("--wandb.name and --wandb.entity do nothing without --wandb.project: set it")
    lm_kwargs(config.lm)


def lm_kwargs(lm: LMConfig) -> dict[str, Any]:
    """`--lm.kwargs` as a dictionary. Raises UserError."""
    try:
        kwargs = json.loads(lm.kwargs)
    except json.JSONDecodeError as error:
        raise UserError(
            f'--lm.kwargs is not JSON ({error}): write it like \'{{"attn_implementation": "sdpa"}}\''
        ) from None
    if not isinstance(kwargs, dict):
        raise UserError(
            '--lm.kwargs must be a JSON object: write it like \'{"attn_implementation": "sdpa"}\''
        )
    return kwargs


def _positive(flag: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{flag} {value} must be greater than 0")


def _at_least(flag: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise UserError(f"{flag} {value} must be at least {least}")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str) -> Any:
    """The configuration dataclass `cls` from plain JSON values, e.g. those of a run's config.json.

    Unknown names and values of the wrong type raise UserError, which names them under `where`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where}: unknown option {unknown[0]!r}; known are {', '.join(sorted(hints))}")
    built = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            built[name] = from_dict(typing.cast(type, hint), value, f"{where}: {name}")
        else:
            built[name] = _typed(hint, value, f"{where}: {name}")
    try:
        return cls(**built)
    except TypeError:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in built and _required(f)]
        raise UserError(f"{where}: option {missing[0]!r} is missing") from None


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(arguments[0], item, where) for item in value)
        raise UserError(f"{where}: expected a list, found {value!r}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


def read_config(path: str | Path) -> TrainConfig:
    """A run's configuration from its config.json. Raises UserError where it is absent or malformed."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {path} is not JSON: {error}") from None
    return from_dict(TrainConfig, values, f"--config {path}")
