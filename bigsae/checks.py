"""What can be wrong with a configuration's values alone, and the defaults that depend on other values.

Everything raises `UserError`, which names the flag and the fix.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from bigsae.config import (
    DataConfig,
    EvalConfig,
    HubConfig,
    OptimConfig,
    SAEConfig,
    TrainConfig,
    UserError,
    check_timeout,
    lm_kwargs,
    short,
)

_TOPK = ("topk", "batchtopk", "matryoshka")
_L1 = ("gated", "standard")
_PENALISED = ("jumprelu", *_L1)
_TRANSCODERS = ("topk", "batchtopk", "jumprelu")

_THRESHOLD_TRAVEL = 3.0
_DECODER_INIT_NORM = {"jumprelu": 0.3, "gated": 0.3}
_DECODER_LR_FACTOR = {"gated": 3.0}
_B_DEC_INIT = {"standard": "zeros"}
# A moment in bfloat16 times (1 - this) rounds to itself: half a unit in its last place.
_BFLOAT16_BETA2 = 2**-8
# No count of tokens or latents, and no coefficient, is larger; what is would overflow far from here.
_LARGEST = 2**48
_SEEDS = 2**64
_MOST_SHARDS = 2**20
RESAMPLING_PART = 0.8
"""Latents are not resampled after this part of a run: they need the rest of it to settle."""

# Fields of SAEConfig that not every architecture uses: which do, and the default there (None: resolved elsewhere, or
# truly nothing).
_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "k": (_TOPK, 32),
    "multi_topk": (("topk",), False),
    "prefixes": (("matryoshka",), None),
    "auxk_coefficient": (_TOPK, 1 / 32),
    "k_aux": (_TOPK, None),
    "sparsity_loss": (("jumprelu",), "step"),
    "target_l0": (("jumprelu",), None),
    "l0_coefficient": (("jumprelu",), None),
    "tanh_scale": (("jumprelu",), 4.0),
    "jumprelu_bandwidth": (("jumprelu",), 0.05),
    "jumprelu_init_threshold": (("jumprelu",), 0.01),
    "threshold_lr": (("jumprelu",), None),
    "jumprelu_ste_to_input": (("jumprelu",), False),
    "pre_act_coefficient": (("jumprelu",), 3e-6),
    "l1_coefficient": (_L1, 5.0),
    "p_norm": (("standard",), 1.0),
    "sparsity_warmup_steps": (_PENALISED, None),
    "resample_every_tokens": (_L1, None),
    "output_hookpoint": (_TRANSCODERS, ()),
}


def resolve_sae(sae: SAEConfig, transcoder: bool = False) -> SAEConfig:
    """`sae` with the defaults of its architecture in place of None. Resolving twice is resolving once."""
    defaults = {name: default for name, (used_by, default) in _FIELDS.items() if sae.architecture in used_by}
    if sae.target_l0 is not None:
        defaults |= {"sparsity_loss": "mean_quadratic", "jumprelu_init_threshold": None}
    defaults["normalize_decoder"] = sae.architecture in _TOPK
    normalized = defaults["normalize_decoder"] if sae.normalize_decoder is None else sae.normalize_decoder
    defaults["decoder_init_norm"] = 1.0 if normalized else _DECODER_INIT_NORM.get(sae.architecture, 0.1)
    defaults["decoder_lr_factor"] = 3.0 if normalized else _DECODER_LR_FACTOR.get(sae.architecture, 1.0)
    defaults["apply_b_dec_to_input"] = not transcoder
    defaults["b_dec_init"] = _B_DEC_INIT.get(sae.architecture, "geometric_median")
    return replace(sae, **{name: value for name, value in defaults.items() if getattr(sae, name) is None})


def resolve_d_sae(sae: SAEConfig, d_in: int) -> int:
    """Number of latents for activations of width `d_in`. Raises UserError where k or the prefixes do not fit."""
    d_sae = sae.d_sae if sae.d_sae is not None else (sae.expansion_factor or 16) * d_in
    fix = "raise --sae.d-sae" if sae.d_sae is not None else "raise --sae.expansion-factor"
    k = resolve_sae(sae).k
    if k is not None and k * (4 if sae.multi_topk else 1) > d_sae:
        what = f"4 x --sae.k {k} (for --sae.multi-topk)" if sae.multi_topk else f"--sae.k {k}"
        raise UserError(f"{what} exceeds d_sae {d_sae}: {fix} or lower --sae.k")
    if sae.prefixes and sae.prefixes[-1] > d_sae:
        raise UserError(f"--sae.prefixes {sae.prefixes[-1]} exceeds d_sae {d_sae}: {fix} or lower it")
    if sae.target_l0 is not None and sae.target_l0 > d_sae:
        raise UserError(
            f"--sae.target-l0 {sae.target_l0:g} exceeds d_sae {d_sae}: {fix} or lower --sae.target-l0"
        )
    return d_sae


def check_latent(num_latent: int | None, num_ranks: int) -> None:
    """Find a `--mesh.latent` that does not divide the ranks. Raises UserError."""
    _positive("--mesh.latent", num_latent)
    if num_latent is not None and num_ranks % num_latent:
        raise UserError(
            f"--mesh.latent {num_latent} does not divide the {num_ranks} ranks: set it to a divisor of {num_ranks}"
        )


def check_mesh_options(config: TrainConfig) -> None:
    """Find options of --mesh that would do nothing. Raises UserError."""
    mesh = config.mesh
    if mesh.distribute_saes and (mesh.latent is not None or mesh.shard_optimizer):
        other = "--mesh.latent" if mesh.latent is not None else "--mesh.shard-optimizer"
        raise UserError(
            f"--mesh.distribute-saes gives each SAE to one rank, so {other} does nothing: leave one out"
        )


def check_divides(d_sae: int, num_latent: int) -> None:
    """Find a number of ranks that cannot share `d_sae` latents equally. Raises UserError."""
    if d_sae % num_latent:
        raise UserError(
            f"--mesh.latent {num_latent} does not divide d_sae {d_sae}: set --sae.d-sae to a multiple of {num_latent}, "
            "or another --mesh.latent"
        )


def resolve_prefixes(sae: SAEConfig, d_sae: int) -> tuple[int, ...]:
    """Matryoshka's widths, ascending; the last is d_sae."""
    prefixes = sae.prefixes or tuple(d_sae // part for part in (16, 8, 4, 2) if d_sae // part)
    return (*sorted({p for p in prefixes if p < d_sae}), d_sae)


def resolve_lr(optim: OptimConfig, d_sae: int) -> float:
    """Peak learning rate; the default is Gao et al.'s scaling with width (arXiv 2406.04093, appendix A.3)."""
    return optim.lr if optim.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)


def resolve_threshold_lr(sae: SAEConfig, peak_lr: float, num_steps: int | None) -> float:
    """Peak learning rate of JumpReLU's thresholds.

    Adam moves a parameter by at most about its rate a step. While the encoder learns to tell latents apart, thresholds
    have to follow pre_acts over a range of about one; at the weights' rate a short run ends before they have.
    """
    if sae.threshold_lr is not None:
        return sae.threshold_lr
    return max(peak_lr, _THRESHOLD_TRAVEL / num_steps) if num_steps is not None else peak_lr


def check_sae(sae: SAEConfig, transcoder: bool = False) -> None:
    """Find what is wrong with the SAE's values alone. Raises UserError."""
    _refuse_unused(sae, transcoder or bool(sae.output_hookpoint))
    if sae.d_sae is not None and sae.expansion_factor is not None:
        raise UserError("--sae.d-sae and --sae.expansion-factor both set the width: give one of them")
    for name in (
        "k", "d_sae", "expansion_factor", "init_tokens", "dead_after_tokens", "k_aux", "target_l0", "tanh_scale",
        "jumprelu_bandwidth", "threshold_lr", "p_norm", "resample_every_tokens", "decoder_init_norm",
        "decoder_lr_factor", "slab_mb",
    ):  # fmt: skip
        _positive(_flag(name), getattr(sae, name))
    for name in (
        "auxk_coefficient", "l0_coefficient", "pre_act_coefficient", "l1_coefficient", "jumprelu_init_threshold",
        "sparsity_warmup_steps",
    ):  # fmt: skip
        _at_least(_flag(name), getattr(sae, name), 0)
    prefixes = sae.prefixes or ()
    for width in prefixes:
        _not_beyond("--sae.prefixes", width)
    if any(a >= b for a, b in zip((0, *prefixes), prefixes, strict=False)):
        raise UserError(f"--sae.prefixes {' '.join(map(short, prefixes[:8]))} must be positive and ascend")
    _refuse_combinations(sae)


def _refuse_unused(sae: SAEConfig, transcoder: bool) -> None:
    """A field that the architecture does not use is an error, not silence."""
    defaults = {f.name: f.default for f in fields(sae)}
    for name, (used_by, _) in _FIELDS.items():
        if sae.architecture not in used_by and getattr(sae, name) != defaults[name]:
            raise UserError(
                f"{_flag(name)} is not used by --sae.architecture {sae.architecture} (only by {', '.join(used_by)}): "
                "leave it out, or None where --config sets it"
            )
    if transcoder and sae.architecture not in _TRANSCODERS:
        raise UserError(
            f"--sae.architecture {sae.architecture} makes no transcoders: take {', '.join(_TRANSCODERS)}"
        )
    if sae.skip and not transcoder:
        raise UserError("--sae.skip is for transcoders: set --sae.output-hookpoint, or leave it out")
    if transcoder and sae.apply_b_dec_to_input:
        raise UserError(
            "--sae.apply-b-dec-to-input True is not for transcoders, whose b_dec is the output's: drop it"
        )
    if transcoder and sae.normalize == "layer_norm":
        raise UserError(
            "--sae.normalize layer_norm is not for transcoders: a token's deviation says nothing of the output's. "
            "Use scalar or none"
        )


def _refuse_combinations(sae: SAEConfig) -> None:
    """Fields that contradict, or undo, each other."""
    if sae.k_aux is not None and sae.auxk_coefficient == 0:
        raise UserError("--sae.k-aux does nothing with --sae.auxk-coefficient 0: leave one of them out")
    quadratic = sae.sparsity_loss in (None, "quadratic", "mean_quadratic")
    if sae.target_l0 is not None and not quadratic:
        raise UserError(
            f"--sae.target-l0 does nothing with --sae.sparsity-loss {sae.sparsity_loss}: use quadratic"
        )
    if sae.sparsity_loss in ("quadratic", "mean_quadratic") and sae.target_l0 is None:
        raise UserError(f"--sae.sparsity-loss {sae.sparsity_loss} needs --sae.target-l0: set it")
    if sae.tanh_scale is not None and sae.sparsity_loss != "tanh":
        raise UserError("--sae.tanh-scale does nothing without --sae.sparsity-loss tanh: set it")
    unit = resolve_sae(sae).normalize_decoder
    if unit and sae.decoder_init_norm is not None:
        raise UserError(
            "--sae.decoder-init-norm does nothing where decoder rows are kept at norm 1: leave it out, or set "
            "--sae.normalize-decoder False"
        )
    if sae.autocast and sae.dtype == "bfloat16":
        raise UserError("--sae.autocast does nothing with --sae.dtype bfloat16: leave one of them out")
    if sae.init_from is not None:
        for name in ("b_dec_init", "decoder_init_norm", "jumprelu_init_threshold"):
            if getattr(sae, name) is not None:
                raise UserError(f"{_flag(name)} does nothing with --sae.init-from: leave one of them out")


def check_optim(optim: OptimConfig) -> None:
    """Find what is wrong with the optimiser's values alone. Raises UserError."""
    _positive("--optim.lr", optim.lr)
    _positive("--optim.eps", optim.eps)
    _positive("--optim.num-cycles", optim.num_cycles)
    _positive("--optim.accumulation-steps", optim.accumulation_steps)
    for flag, beta in (("--optim.beta1", optim.beta1), ("--optim.beta2", optim.beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"{flag} {beta} must be at least 0 and below 1")
    for flag, part in (
        ("--optim.decay-fraction", optim.decay_fraction),
        ("--optim.min-factor", optim.min_factor),
    ):
        if part is not None and not 0 <= part <= 1:
            raise UserError(f"{flag} {part} must lie between 0 and 1")
    _at_least("--optim.warmup-steps", optim.warmup_steps, 0)
    _at_least("--optim.grad-clip", optim.grad_clip, 0)
    if optim.num_cycles is not None and optim.schedule != "cosine_restarts":
        raise UserError("--optim.num-cycles does nothing without --optim.schedule cosine_restarts: set it")
    if optim.grad_dtype == "bfloat16" and optim.accumulation_steps > 1:
        raise UserError(
            "--optim.grad-dtype bfloat16 would round each sum of gradients that --optim.accumulation-steps "
            f"{optim.accumulation_steps} gathers: leave one of them out"
        )
    if optim.min_factor is not None and optim.schedule == "constant":
        raise UserError("--optim.min-factor does nothing with --optim.schedule constant: leave it out")


def check_together(sae: SAEConfig, optim: OptimConfig, num_tokens: int | None) -> None:
    """Find what SAE, optimiser and length of the run (None: not known) make of each other. Raises UserError."""
    if sae.dtype == "bfloat16" and 1 - optim.beta2 < _BFLOAT16_BETA2:
        raise UserError(
            f"--optim.beta2 {optim.beta2} is too slow for --sae.dtype bfloat16, in which Adam's second moment would "
            "never fall: set --optim.beta2 0.99"
        )
    if num_tokens is None:
        return
    if sae.resample_every_tokens is not None and sae.dead_after_tokens >= RESAMPLING_PART * num_tokens:
        raise UserError(
            f"--sae.resample-every-tokens does nothing: no latent can be dead (--sae.dead-after-tokens "
            f"{sae.dead_after_tokens}) before the last fifth of {num_tokens} tokens: lower --sae.dead-after-tokens"
        )


def check_sources(config: TrainConfig) -> None:
    """Find a run that says neither what to read nor what is read already. Raises UserError."""
    for flag, value in (("--model", config.model), ("--dataset", config.dataset)):
        if not value:
            raise UserError(f"{flag} is needed: give it, or --activations to train from activations on disk")
    if config.data.cached_order != DataConfig.cached_order and config.activations is None:
        raise UserError("--data.cached-order does nothing without --activations: leave it out")


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
        ("--max-hours", config.max_hours),
    ):
        _positive(flag, value)
    for flag, value in (
        ("--checkpoint.every", config.checkpoint.every),
        ("--checkpoint.keep", config.checkpoint.keep),
        ("--eval.every", config.eval.every),
        ("--hub.push-every", config.hub.push_every),
        ("--check-replicas-every", config.check_replicas_every),
        ("--data.heldout-documents", config.data.heldout_documents),
    ):
        _at_least(flag, value, 0)
    if config.data.heldout_seed is not None:
        _at_least("--data.heldout-seed", config.data.heldout_seed, 0)
    if len(config.peak_tflops) > 2:
        raise UserError(
            "--peak-tflops takes one number, or two: of the language model's data type, of the SAE's"
        )
    for peak in config.peak_tflops:
        _positive("--peak-tflops", peak)
    _at_least("--ctx-len", config.ctx_len, 2)
    if not 0 <= config.seed < _SEEDS:
        raise UserError(f"--seed {short(config.seed)} must be at least 0 and below 2^64")
    check_timeout(config.timeout)
    if config.data.num_shards > _MOST_SHARDS:
        raise UserError(
            f"--data.num-shards {config.data.num_shards} must be at most {_MOST_SHARDS}: each has a cursor in memory"
        )
    check_sae(config.sae)
    check_optim(config.optim)
    check_together(config.sae, config.optim, config.tokens)
    check_mesh_options(config)
    _check_sizes(config, num_ranks)
    if config.lm.autocast and config.lm.dtype != "float32":
        raise UserError(
            f"--lm.autocast does nothing for weights in {config.lm.dtype}: set --lm.dtype float32"
        )
    if config.data.heldout_seed is not None and not config.data.heldout_documents:
        raise UserError("--data.heldout-seed needs documents to hold out: set --data.heldout-documents")
    if config.eval != EvalConfig() and not config.data.heldout_documents:
        raise UserError(
            "--eval.every, --eval.rows and --eval.ce need documents to measure on: set --data.heldout-documents"
        )
    if config.eval.ce and config.activations is not None:
        raise UserError(
            "--eval.ce needs the language model, which --activations does without: leave it out, and measure the SAEs "
            "with bigsae.evaluate"
        )
    wandb = "wandb" in config.log_with or config.wandb.project is not None
    if not wandb and (config.wandb.name or config.wandb.entity or not config.wandb.artifacts):
        raise UserError(
            "--wandb.name and --wandb.entity, and --wandb.no-artifacts, do nothing without --wandb.project or "
            "--log-with wandb: set it"
        )
    if config.hub.repo_id is None and config.hub != HubConfig():
        raise UserError("--hub.push-every, --hub.private and --hub.license need a --hub.repo-id: set it")
    lm_kwargs(config.lm)


def _check_sizes(config: TrainConfig, num_ranks: int) -> None:
    """Batch, buffer, shards and length against each other and the ranks."""
    if config.batch_size_tokens % num_ranks:
        raise UserError(
            f"--batch-size-tokens {config.batch_size_tokens} is not divisible by {num_ranks} ranks: "
            f"set it to a multiple of {num_ranks}"
        )
    if config.tokens < config.batch_size_tokens:
        raise UserError(
            f"--tokens {config.tokens} is less than one batch: lower --batch-size-tokens {config.batch_size_tokens}"
        )
    if not config.num_steps:
        raise UserError(
            f"--tokens {config.tokens} is less than one update of {config.optim.accumulation_steps} batches: lower "
            "--optim.accumulation-steps or --batch-size-tokens"
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


def _flag(name: str) -> str:
    return f"--sae.{name.replace('_', '-')}"


def _positive(flag: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UserError(f"{flag} {short(value)} must be greater than 0")
    _not_beyond(flag, value)


def _at_least(flag: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise UserError(f"{flag} {short(value)} must be at least {least}")
    _not_beyond(flag, value)


def _not_beyond(flag: str, value: float | None) -> None:
    if value is not None and value > _LARGEST:
        raise UserError(f"{flag} {short(value)} is beyond all that can be meant: lower it")
