"""SAELens's format (checked against 6.54), which is also the native one: cfg.json, sae_weights.safetensors,
sparsity.safetensors. SAELens keeps W_enc as [d_in, d_sae]; this is the one place that transposes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigsae.config import UserError
from bigsae.hub.files import write_atomic, write_json
from bigsae.sae.base import SAE
from bigsae.sae.topk import TopKSAE

# The version whose reader these files were checked with; SAELens refuses to read files of versions before 6.0.
_SAELENS_VERSION = "6.54.12"


def save_sae(sae: SAE, folder: str | Path, frequencies: Tensor | None = None) -> None:
    """Write `sae`, already in the LM's own scale, so that `sae_lens.SAE.load_from_disk(folder)` reads it.

    `frequencies` [d_sae], where given, become sparsity.safetensors: log10(frequency + 1e-10). cfg.json comes last:
    a folder that has one is whole.
    """
    folder = Path(folder)
    tensors = {
        "W_enc": sae.W_enc.detach().T,
        "W_dec": sae.W_dec.detach(),
        "b_enc": sae.b_enc.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    weights = {name: t.to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    write_atomic(folder / "sae_weights.safetensors", lambda path: save_file(weights, path))
    if frequencies is not None:
        sparsity = {"sparsity": torch.log10(frequencies.cpu().float() + 1e-10)}
        write_atomic(folder / "sparsity.safetensors", lambda path: save_file(sparsity, path))
    config = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **sae.saelens_config(),
        "metadata": {"sae_lens_version": _SAELENS_VERSION, **sae.metadata},
    }
    write_json(folder / "cfg.json", config)


def read_sae(folder: str | Path) -> SAE:
    """The SAE that `save_sae`, or SAELens, wrote to `folder`. Raises UserError where it cannot be one of ours."""
    folder = Path(folder)
    config = _read_config(folder / "cfg.json")
    _refuse_other_kinds(config, folder)
    try:
        tensors = load_file(folder / "sae_weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/sae_weights.safetensors cannot be read: {error}") from None
    d_in, d_sae, k = (config.get(name) for name in ("d_in", "d_sae", "k"))
    if not (
        isinstance(d_in, int)
        and isinstance(d_sae, int)
        and isinstance(k, int)
        and 0 < k <= d_sae
        and d_in > 0
    ):
        raise UserError(f"{folder}/cfg.json: d_in {d_in!r}, d_sae {d_sae!r}, k {k!r} describe no TopK SAE")
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != shapes:
        raise UserError(f"{folder}: cfg.json calls for {shapes}, sae_weights.safetensors holds {found}")
    sae = TopKSAE(d_in, d_sae, k)
    tensors["W_enc"] = tensors["W_enc"].T
    if config.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norm(tensors)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(tensors[name])
    metadata = config.get("metadata")
    sae.metadata = metadata if isinstance(metadata, dict) else {}
    return sae.requires_grad_(False)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of an SAE") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration of an SAE")
    return config


def _refuse_other_kinds(config: dict[str, Any], folder: Path) -> None:
    expected = {
        "architecture": ("topk",),
        "normalize_activations": ("none",),
        "reshape_activations": ("none",),
    }
    for name, known in expected.items():
        value = config.get(name, known[0] if name != "architecture" else None)
        if value not in known:
            raise UserError(
                f"{folder}/cfg.json: {name} {value!r} cannot be loaded; known is {', '.join(known)}"
            )
    if config.get("apply_b_dec_to_input") is False:
        raise UserError(f"{folder}/cfg.json: apply_b_dec_to_input false cannot be loaded")


def _fold_decoder_norm(tensors: dict[str, Tensor]) -> None:
    """Make an SAE whose pre_acts are multiplied by ‖W_dec‖ one with unit decoder rows (the same function)."""
    norm = tensors["W_dec"].norm(dim=1)
    tensors["W_enc"] = tensors["W_enc"] * norm[:, None]
    tensors["b_enc"] = tensors["b_enc"] * norm
    tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
