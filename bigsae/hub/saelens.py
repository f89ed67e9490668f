"""SAELens's format (checked against 6.54), which is also the native one: cfg.json, sae_weights.safetensors,
sparsity.safetensors. SAELens keeps W_enc as [d_in, d_sae]; this is the one place that transposes it.

It has no class for BatchTopK: an SAE with one threshold is a JumpReLU SAE whose thresholds are equal, and read as one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bigsae.config import UserError, short
from bigsae.hub.weights import check_k, check_tensors, counts, fill, read_json, read_safetensors, unit_decoder
from bigsae.sae.base import SAE, Shape
from bigsae.sae.gated import GatedSAE
from bigsae.sae.jumprelu import JumpReLUSAE
from bigsae.sae.standard import StandardSAE
from bigsae.sae.topk import TopKSAE

WEIGHTS = "sae_weights.safetensors"
# The version whose reader these files were checked with; SAELens reads files of versions before 6.0 in another way.
_VERSION = "6.54.12"

# Tensors [d_sae] of each of SAELens's architectures that is read.
_VECTORS: dict[str, tuple[str, ...]] = {
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "standard": ("b_enc",),
    "transcoder": ("b_enc",),
    "skip_transcoder": ("b_enc",),
    "jumprelu_transcoder": ("b_enc", "threshold"),
    "jumprelu_skip_transcoder": ("b_enc", "threshold"),
}
# What versions before 6.0 have beside the SAE's own configuration, and is kept.
_METADATA = ("model_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path")
_CLASSES = {"gated": GatedSAE, "standard": StandardSAE}


def exported(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What cfg.json and the weights' file hold for `sae`. Raises UserError where SAELens has no class for it."""
    extra = sae.saelens_config()
    if (sae.is_transcoder or sae.W_skip is not None) and not extra["architecture"].endswith("transcoder"):
        fix = 'save it with format="sparsify"' if isinstance(sae, TopKSAE) else "it cannot be saved"
        raise UserError(f"SAELens has no class for a {sae.architecture} transcoder: {fix}")
    assert not (sae.is_transcoder and sae.shape.normalize != "none")
    tensors = sae.saelens_tensors()
    tensors["W_enc"] = tensors["W_enc"].T
    config = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.shape.apply_b_dec_to_input and not sae.is_transcoder,
        "normalize_activations": sae.shape.normalize,
        "reshape_activations": "none",
        **extra,
        # Last: what was read from a file of an older version is written as this one.
        "metadata": sae.metadata | {"sae_lens_version": _VERSION},
    }
    if sae.is_transcoder:
        config["d_out"] = sae.d_out
    return config, tensors


def read(folder: Path) -> SAE:
    """The SAE that bigsae, or SAELens, wrote to `folder`. Raises UserError where it cannot be one of ours."""
    path = folder / "cfg.json"
    config = _as_version_6(read_json(path), path)
    _refuse_other_kinds(config, path)
    architecture = config["architecture"]
    transcoder = architecture.endswith("transcoder")
    d_in, d_sae = counts(config, path, "d_in", "d_sae")
    d_out = counts(config, path, "d_out")[0] if transcoder else d_in
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    shapes |= dict.fromkeys(_VECTORS[architecture], (d_sae,))
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    tensors = read_safetensors(folder / WEIGHTS)
    _drop_scaling_factor(tensors, folder / WEIGHTS)
    check_tensors(tensors, shapes, folder / WEIGHTS)
    shape = Shape(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out if transcoder else None,
        skip="skip" in architecture,
        apply_b_dec_to_input=not transcoder and config.get("apply_b_dec_to_input", True),
        normalize=cast(Literal["none", "layer_norm"], config.get("normalize_activations", "none")),
    )
    tensors["W_enc"] = tensors["W_enc"].T
    if architecture == "topk":
        (k,) = counts(config, path, "k")
        check_k(k, d_sae, path)
        if config.get("rescale_acts_by_decoder_norm"):
            tensors = unit_decoder(tensors)
        return fill(TopKSAE(shape, k, device="meta"), tensors, config.get("metadata"))
    if architecture in ("transcoder", "skip_transcoder"):
        # Those have a ReLU, which is a JumpReLU with thresholds of 0.
        tensors["threshold"] = torch.zeros(d_sae)
    return fill(
        _CLASSES.get(architecture, JumpReLUSAE)(shape, device="meta"), tensors, config.get("metadata")
    )


def _refuse_other_kinds(config: dict[str, Any], path: Path) -> None:
    """Find what makes of the same weights another function than ours."""
    transcoder = str(config.get("architecture")).endswith("transcoder")
    # Each with the values that are known, and the one that is meant where none is given.
    known: dict[str, tuple[tuple[Any, ...], Any]] = {
        "architecture": (tuple(_VECTORS), None),
        "normalize_activations": (("none",) if transcoder else ("none", "layer_norm"), "none"),
        "reshape_activations": (("none",), "none"),
        "apply_b_dec_to_input": ((False,) if transcoder else (True, False), not transcoder),
        "rescale_acts_by_decoder_norm": ((True, False), False),
    }
    for name, (values, default) in known.items():
        value = config.get(name, default)
        if value not in values:
            raise UserError(
                f"{path}: {name} {short(value)} cannot be loaded; known is {', '.join(str(v) for v in values)}"
            )


def _as_version_6(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """`config` with the names of SAELens 6, if an older version wrote it, as SAELens itself reads it.

    Those have everything about model and data at the top, and TopK's k among arguments of the activation function.
    """
    metadata = config.get("metadata")
    version = config.get("sae_lens_version") or (
        isinstance(metadata, dict) and metadata.get("sae_lens_version")
    )
    if version and not str(version).startswith(("0.", "1.", "2.", "3.", "4.", "5.")):
        return config
    hook_name = config.get("hook_name", config.get("hook_point"))
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    metadata = {name: config[name] for name in _METADATA if name in config} | {"hook_name": hook_name}
    renamed = {"architecture": "standard"} | config | {"metadata": metadata}
    if "hook_z" in str(hook_name):
        renamed.setdefault("reshape_activations", "hook_z")
    if isinstance(config.get("normalize_activations"), bool):
        renamed["normalize_activations"] = (
            "expected_average_only_in" if config["normalize_activations"] else "none"
        )
    elif config.get("normalize_activations") is None:
        renamed["normalize_activations"] = "none"
    if activation == "topk":
        arguments = config.get("activation_fn_kwargs")
        renamed |= {"architecture": "topk", "k": arguments.get("k") if isinstance(arguments, dict) else None}
    elif activation != "relu":
        # SAELens 6 would take it for a ReLU.
        raise UserError(
            f"{path}: activation function {short(activation)} cannot be loaded; known is relu, topk"
        )
    return renamed


def _drop_scaling_factor(tensors: dict[str, Tensor], path: Path) -> None:
    """Older versions wrote a factor on latents for finetuning, ones unless it was used."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise UserError(f"{path}: its scaling_factor (finetuning_scaling_factor) cannot be loaded")
