"""What all formats share: reading JSON and safetensors, checking shapes, and filling an SAE."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bigsae.config import UserError, short
from bigsae.sae.base import SAE


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of an SAE") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): save or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration of an SAE: give the folder of an SAE")
    return values


# Others cannot be told apart from garbage, or be copied into float32.
_WEIGHTS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_REASON = 200


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of weights in `path`, on the CPU."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:_REASON]
        raise UserError(f"{path} cannot be read ({reason}): save or download it again") from None
    _check_types(tensors, path)
    return tensors


def _check_types(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _WEIGHTS:
            raise UserError(f"{path}: {short(name)} is {tensor.dtype}, which holds no weights")


MOST = 2**31
"""More latents, or a wider activation, there are not; products of two of these can be printed and compared."""


def counts(config: Mapping[str, Any], path: Path, *names: str) -> tuple[int, ...]:
    """The values of `config`, read from `path`, that must be positive integers."""
    for name in names:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {name} {short(value)} must be an integer greater than 0")
        if value > MOST:
            raise UserError(f"{path}: {name} {short(value)} is beyond all that an SAE can have")
    return tuple(config[name] for name in names)


def check_k(k: int, d_sae: int, path: Path) -> None:
    """Find a `k`, read from `path`, that selects more latents than there are."""
    if k > d_sae:
        raise UserError(f"{path}: k {k} exceeds the number of latents {d_sae}")


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Find tensors, read from `path`, other than those of `shapes`."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        if found.get(name) != shape:
            there = f"{list(found[name])}" if name in found else f"no such tensor, only {_names(found)}"
            raise UserError(f"{path}: its configuration calls for {name} {list(shape)}, it holds {there}")
    if more := found.keys() - shapes.keys():
        raise UserError(f"{path}: its configuration does not call for {_names(more)}, which it holds")
    _check_types(tensors, path)


def _names(names: Iterable[str]) -> str:
    """As much of `names` as a message takes."""
    return short(sorted(names))


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
