"""What all formats share: reading JSON and safetensors, checking shapes, and filling an SAE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bigsae.config import UserError
from bigsae.sae.base import SAE


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of an SAE") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration of an SAE")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def counts(config: Mapping[str, Any], path: Path, *names: str) -> tuple[int, ...]:
    """The values of `config`, read from `path`, that must be positive integers."""
    for name in names:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {name} {value!r} must be an integer greater than 0")
    return tuple(config[name] for name in names)


def check_k(k: int, d_sae: int, path: Path) -> None:
    """Find a `k`, read from `path`, that selects more latents than there are."""
    if k > d_sae:
        raise UserError(f"{path}: k {k} exceeds the number of latents {d_sae}")


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Find tensors, read from `path`, other than those of `shapes`."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(shapes):
        raise UserError(f"{path}: its configuration calls for {dict(shapes)}, it holds {found}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, which holds no weights")


def fill(sae: SAE, tensors: Mapping[str, Tensor], metadata: Any) -> SAE:
    """`sae`, built on the meta device, with float32 copies of `tensors` in bigsae's layout; it is not trained."""
    # Copies: what safetensors gives is the file itself, mapped, and the file may change.
    state = {name: torch.empty(t.shape, dtype=torch.float32).copy_(t) for name, t in tensors.items()}
    sae.load_state_dict(state, assign=True)
    sae.metadata = metadata if isinstance(metadata, dict) else {}
    return sae.requires_grad_(False)


def unit_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` in bigsae's layout with decoder rows at norm 1, latents larger instead. Rows of zeros stay."""
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    norm = wide["W_dec"].norm(dim=1)
    norm = torch.where(norm > 0, norm, 1.0)
    return wide | {
        "W_enc": wide["W_enc"] * norm[:, None],
        "b_enc": wide["b_enc"] * norm,
        "W_dec": wide["W_dec"] / norm[:, None],
    }
