"""The configuration of a run: frozen dataclasses, one docstring per field (they are the text of `--help`).

A leaf of the import graph: standard library only. `checks` finds what is wrong with the values alone, and resolves the
defaults that depend on other values.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(Exception):
    """A mistake that the user can mend. The message names the flag and the fix; commands print it and exit with 2."""


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Have each UserError within it begin with `flag`, by which the user gave what is wrong."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise type(error)(text if text.startswith(flag) else f"{flag}: {text}") from error.__cause__


# YAML's references make endless values of a few lines.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100


def short(value: Any) -> str:
    """`value`, which may be anything, as a part of a message: its repr, cut where that is long."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"a {type(value).__name__} too long to print"


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
    micro_batch_rows: int | None = None
    """Token rows (of ctx-len) in one forward, on each rank. Decides results to rounding, so it is never tuned by
    timing. Default: from shapes alone, the largest power of two with at most 8,192 tokens (on a CPU 2,048), 2 GiB of
    activations, and what is wanted of forwards at a time (training: half of --buffer.tokens); resumes keep theirs."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository carries. A --config file alone cannot ask for it."""
    autocast: bool = False
    """Run the forward under bfloat16 autocast; for weights in float32."""
    compile: bool = False
    """Compile each decoder layer that holds no hookpoint (torch.compile)."""
    kwargs: str = "{}"
    """JSON object of further arguments of `from_pretrained`, e.g. '{"attn_implementation": "sdpa"}'."""

    @property
    def chosen_rows(self) -> int:
        """`micro_batch_rows`, once it is chosen (`bigsae.lm.micro_batch`)."""
        assert self.micro_batch_rows is not None, "it is chosen when the model's shape is known"
        return self.micro_batch_rows


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
    cached_order: Literal["shuffled", "as_made"] = "shuffled"
    """Order in which --activations are read, before the buffers mix them. shuffled: all rows of the cache in a seeded
    order, another one each epoch. as_made: the order in which a run on the fly, on as many ranks, has them."""
    heldout_documents: int = 0
    """Documents that are never trained on; FVU and L0 on them are logged at the end and every --eval.every steps."""
    heldout_seed: int | None = None
    """Decides which documents are held out. Default: --seed. A run from --activations has the cache's, so that its
    evaluation finds the documents that were kept aside."""
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


Architecture = Literal["topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard"]


@dataclass(frozen=True)
class SAEConfig:
    """The sparse autoencoder and its objective. Fields that only some architectures use say which."""

    architecture: Architecture = "topk"
    """topk: the k largest latents of each token (Gao et al. 2024, arXiv 2406.04093). batchtopk: the k x batch largest
    of a batch (Bussmann et al. 2024, 2412.06410). matryoshka: batchtopk with nested prefixes (Bussmann et al. 2025,
    2503.17547). jumprelu: learnt thresholds (Rajamanoharan et al. 2024, 2407.14435). gated: (2404.16014). standard:
    ReLU with an L1 penalty."""
    expansion_factor: int | None = None
    """d_sae / d_in. Default 16, where --sae.d-sae is not given."""
    d_sae: int | None = None
    """Number of latents, instead of --sae.expansion-factor."""
    k: int | None = None
    """Latents kept per token; on average in batchtopk and matryoshka. Default 32. [topk, batchtopk, matryoshka]"""
    multi_topk: bool = False
    """Add 1/8 of the loss with 4 k latents, so that the SAE also works at another k (Gao et al., appendix A.4).
    [topk]"""
    prefixes: tuple[int, ...] | None = None
    """Widths of the nested SAEs, ascending; d_sae itself is always the last and may be left out. Default: d_sae / 16,
    / 8, / 4, / 2 and d_sae. [matryoshka]"""
    auxk_coefficient: float | None = None
    """Weight of the auxiliary loss by which dead latents learn the residual; 0 turns it off. Default 1/32.
    [topk, batchtopk, matryoshka]"""
    k_aux: int | None = None
    """Dead latents that reconstruct the residual of each token. Default: half the width of what is reconstructed.
    [topk, batchtopk, matryoshka]"""
    sparsity_loss: Literal["step", "tanh", "quadratic", "mean_quadratic"] | None = None
    """What --sae.l0-coefficient weighs, averaged over tokens. step: L0. tanh: the sum of tanh(tanh-scale x act x
    ‖W_dec row‖). quadratic: 2 / target-l0 x (L0 - target-l0)^2; mean_quadratic: the same of the batch's mean L0.
    Default mean_quadratic with --sae.target-l0, else step. [jumprelu]"""
    target_l0: float | None = None
    """L0 that the quadratic sparsity losses steer to. [jumprelu]"""
    l0_coefficient: float | None = None
    """Weight of the sparsity loss. Default 1; of mean_quadratic the width of what is reconstructed / 50. [jumprelu]"""
    tanh_scale: float | None = None
    """Scale of the tanh sparsity loss. Default 4. [jumprelu]"""
    jumprelu_bandwidth: float | None = None
    """Width of the window about the threshold in which it gets a gradient. Default 0.05. [jumprelu]"""
    jumprelu_init_threshold: float | None = None
    """Where all thresholds start. Default: where the first tokens have --sae.target-l0 latents, where that is given,
    else 0.01. [jumprelu]"""
    threshold_lr: float | None = None
    """Peak learning rate of the thresholds. Default: --optim.lr, or 3 / steps where that is more: enough to cross the
    range of pre_acts within a run. [jumprelu]"""
    jumprelu_ste_to_input: bool = False
    """Let the threshold's straight-through gradient reach the encoder as well (as Anthropic does). [jumprelu]"""
    pre_act_coefficient: float | None = None
    """Weight of the loss that lifts dead latents' pre_acts to their thresholds; 0 turns it off. Default 3e-6.
    [jumprelu]"""
    l1_coefficient: float | None = None
    """Weight of the L1 penalty. Default 5. [standard, gated]"""
    p_norm: float | None = None
    """Norm of the latents of a token that the penalty takes. Default 1. [standard]"""
    sparsity_warmup_steps: int | None = None
    """Steps over which the sparsity loss or L1 penalty grows linearly to its full weight. Default: 5 % of the steps.
    [jumprelu, gated, standard]"""
    resample_every_tokens: int | None = None
    """Restart dead latents in the direction of badly reconstructed tokens each time so many tokens are trained
    (Bricken et al. 2023); never in the last fifth of a run. Default: never. [gated, standard]"""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it has not fired for so many tokens, counted over all ranks."""
    output_hookpoint: tuple[str, ...] = ()
    """Train transcoders: what each SAE predicts from its --hookpoints, in the same order. Names as for --hookpoints.
    [topk, batchtopk, jumprelu]"""
    skip: bool = False
    """Give each transcoder a linear path from input to output beside its latents."""
    normalize: Literal["scalar", "layer_norm", "none"] = "scalar"
    """scalar: activations are scaled to a mean norm of sqrt(d_in), which is folded into the weights on export.
    layer_norm: each token is brought to mean 0 and deviation 1, and back by the exported SAE; not for transcoders."""
    init_tokens: int = 65_536
    """First tokens, over all ranks, from which scale, b_dec and thresholds get their starting values. They are trained
    on as well. At most what the buffers hold."""
    init_from: str | None = None
    """Start from the weights of an SAE: its folder, or one with a folder for each hookpoint, as bigsae, SAELens,
    sparsify or dictionary_learning write them."""
    b_dec_init: Literal["geometric_median", "mean", "zeros"] | None = None
    """Where b_dec starts. Default geometric_median, zeros in standard; with --sae.init-from it is what was loaded."""
    apply_b_dec_to_input: bool | None = None
    """Subtract b_dec from the encoder's input. Default True; transcoders never do."""
    normalize_decoder: bool | None = None
    """Keep decoder rows at unit norm: the gradient's parallel part is removed, rows are renormalised after a step.
    Default: True in topk, batchtopk and matryoshka."""
    decoder_init_norm: float | None = None
    """Norm at which decoder rows start, where they are not kept at norm 1. Default: 0.3 in jumprelu and gated, else
    0.1."""
    decoder_lr_factor: float | None = None
    """Learning rate of the decoder rows, as a multiple of --optim.lr. Default 3 where they are kept at norm 1 and
    in gated, else 1: a step turns a long row less than a short one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and optimiser state."""
    autocast: bool = False
    """Compute the encoder's matmul in bfloat16, whatever the weights' type."""
    compile: bool = False
    """Compile the step's forward (torch.compile); of use where its dense part is large."""
    slab_mb: int = 256
    """MiB of pre-activations that exist at a time. Decides memory, and results to rounding alone."""


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
    schedule: Literal["constant", "cosine", "cosine_restarts"] = "constant"
    """Shape between warm-up and decay. cosine falls to --optim.min-factor at the end of the run; cosine_restarts does
    so --optim.num-cycles times."""
    num_cycles: int | None = None
    """Cycles of cosine_restarts. Default 4."""
    min_factor: float | None = None
    """Lowest rate of a cosine, as a part of the peak. Default 0."""
    warmup_steps: int | None = None
    """Linear warm-up. Default: min(1000, 5 % of the steps)."""
    decay_fraction: float = 0.2
    """Last part of the run over which the rate falls linearly to zero, on top of the schedule."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    accumulation_steps: int = 1
    """Batches (of --batch-size-tokens) whose gradients are averaged into one update. Steps count batches."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the gradients of W_enc and W_dec, also in which they travel between ranks."""
    moments_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Data type in which Adam's moments of W_enc and W_dec are kept: that of the weights, or a smaller one, then with
    stochastic rounding."""


@dataclass(frozen=True)
class MeshConfig:
    """How the ranks share the SAEs."""

    latent: int | None = None
    """Ranks that hold one SAE between them, each a part of its latents. Default: chosen from the widths, the ranks of
    a node and the memory; the choice and its reason are logged."""
    shard_optimizer: bool = False
    """Share Adam's moments among the ranks that hold the same latents (ZeRO-1)."""
    distribute_saes: bool = False
    """Give each SAE to one rank instead of having every rank train a copy of each; activations travel to the owner."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving what a resume needs."""

    every: int = 1000
    """Steps between checkpoints; 0 saves at the end of the run alone."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    beside_training: bool = True
    """Copy what is to be saved to the host's memory, and write it to disk while training goes on."""


@dataclass(frozen=True)
class EvalConfig:
    """Measuring on held-out documents (--data.heldout-documents)."""

    every: int = 0
    """Steps between measurements; 0 measures at the end of the run alone."""
    rows: int = 64
    """Most token rows that are measured, over all ranks: the beginnings of the held-out documents, in turn."""
    ce: bool = False
    """Also measure cross-entropy and KL divergence with the reconstructions spliced in, each SAE alone. Loads the whole
    language model."""


@dataclass(frozen=True)
class HubConfig:
    """Pushing the SAEs to the Hub while they are trained. The access token is the environment's HF_TOKEN."""

    repo_id: str | None = None
    """Repository to push to, user/name, in the background; at the end of the run the finished SAEs."""
    push_every: int = 0
    """Steps between pushes; 0 pushes at the end alone. One that fails is left to the next."""
    private: bool = False
    """Make the repository private; one that is there and public is refused."""
    license: str = "unknown"
    """License of the SAEs, by the Hub's name for it, e.g. apache-2.0 or mit."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (--log-with wandb, or a --wandb.project)."""

    project: str | None = None
    """Project of the trackers; default bigsae. Without one, and without --log-with wandb, wandb is not imported."""
    name: str | None = None
    """Name of the run."""
    entity: str | None = None
    """User or team."""
    artifacts: bool = True
    """Keep the SAEs of each checkpoint, and the finished ones, as versions of an artifact."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train sparse autoencoders on the activations of any Hugging Face causal language model."""

    model: str = ""
    """Hub id or folder of the language model. Not needed with --activations."""
    dataset: str = ""
    """Hub id, or a local path: a save_to_disk folder, .jsonl, .parquet, .txt, or a folder of those. Not needed with
    --activations."""
    activations: str | None = None
    """Train from activations on disk, without the language model: a folder that bigsae.cache_activations made, or its
    Hub id (user/name, or user/name@revision). What the cache says of model, dataset, rows and tokens holds then."""
    hookpoints: tuple[str, ...] = ()
    """Modules whose activations are learnt, one SAE each: the model's own names, patterns (model.layers.*.mlp), ranges
    (model.layers.{4,8}), or TransformerLens names; a suffix :input takes a module's input. With --activations those
    of the cache, without TransformerLens names; all where none are given."""
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
    log_with: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers that get these rows as well."""
    peak_tflops: tuple[float, ...] = ()
    """Peak of a rank's device in TFLOP/s, of which lm_mfu and sae_mfu in metrics.jsonl are the shares that are reached:
    in the data type of the language model and in that of the SAE's encoder, or one number for both. Default: NVIDIA's
    figures of dense matmuls for A100, and for H100, H200 and B200 on SXM boards; on other devices the two are left
    out."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --output-dir; starts afresh, and says so, where there is none."""
    timeout: float = 30.0
    """Minutes that a rank waits for another one before the run ends with an error."""
    max_hours: float | None = None
    """Save and stop after so many hours, e.g. before the end of a job; --resume goes on."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Where a loss or gradient is not finite. The update is left out at once on all ranks. stop: the run ends at the
    next log; skip: it goes on; rollback: weights, moments and statistics go back to the newest checkpoint, while the
    data go on, so that what was met is not met again."""
    check_replicas_every: int = 1000
    """Steps between comparisons, bit by bit, of weights that several ranks hold alike; 0: never."""
    sweep: tuple[str, ...] = ()
    """Train a grid of SAEs on each hookpoint from the same forwards: options of --sae and --optim, or seed, with their
    values, e.g. sae.k=16,32 optim.lr=1e-4,2e-4; or the path of a .json file."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def num_steps(self) -> int:
        """Steps in --tokens: whole batches, and whole updates of --optim.accumulation-steps of them."""
        num_batches = self.tokens // self.batch_size_tokens
        return num_batches - num_batches % self.optim.accumulation_steps


_MOST_MINUTES = 60 * 24 * 366


def check_timeout(minutes: float) -> None:
    """Find a `--timeout` that no clock can wait for. Raises UserError."""
    if not 0 < minutes <= _MOST_MINUTES:
        raise UserError(
            f"--timeout {short(minutes)} must be greater than 0 and at most {_MOST_MINUTES}, a year of minutes"
        )


def lm_kwargs(lm: LMConfig) -> dict[str, Any]:
    """`--lm.kwargs` as a dictionary. Raises UserError."""
    try:
        kwargs = json.loads(lm.kwargs)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'--lm.kwargs is not JSON ({error}): write it like \'{{"attn_implementation": "sdpa"}}\''
        ) from None
    if not isinstance(kwargs, dict):
        raise UserError(
            '--lm.kwargs must be a JSON object: write it like \'{"attn_implementation": "sdpa"}\''
        )
    return kwargs
