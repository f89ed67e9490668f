"""Writing SAEs to folders, and telling by its files in whose format a folder is."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from bigsae.config import UserError
from bigsae.hub import dictionary_learning, saelens, sparsify
from bigsae.hub.files import write_atomic, write_json
from bigsae.hub.weights import read_json
from bigsae.sae.base import SAE
from bigsae.sae.topk import TopKSAE

Format = Literal["saelens", "sparsify", "dictionary_learning"]
_ROOMS: dict[Format, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}
CONFIGS = ("cfg.json", "config.json")
SPARSITY = "sparsity.safetensors"
# All that the folder of an SAE may hold, in any format.
FILES = (*CONFIGS, *(room.WEIGHTS for room in _ROOMS.values()), SPARSITY)


def default_format(sae: SAE) -> Format:
    """SAELens's, or sparsify's for TopK transcoders, for which SAELens has no class."""
    beyond_saelens = isinstance(sae, TopKSAE) and (sae.is_transcoder or sae.W_skip is not None)
    return "sparsify" if beyond_saelens else "saelens"


def save_sae(
    sae: SAE,
    folder: str | Path,
    frequencies: Tensor | None = None,
    format: Format | None = None,
) -> None:
    """Write `sae`, already in the LM's own scale, so that `sae_lens.SAE.load_from_disk(folder)` reads it.

    TopK transcoders, for which SAELens has no class, are written for `sparsify.SparseCoder.load_from_disk(folder)`;
    `format` says otherwise, and UserError where it cannot hold the SAE. `frequencies` [d_sae], where given, become
    sparsity.safetensors: log10(frequency + 1e-10). The configuration comes last: a folder that has one is whole.
    """
    folder = Path(folder)
    format = format or default_format(sae)
    room = _ROOMS[format]
    config, tensors = room.exported(sae)
    weights = {
        name: t.to("cpu", torch.float32 if t.is_floating_point() else t.dtype).contiguous()
        for name, t in tensors.items()
    }
    write = torch.save if format == "dictionary_learning" else save_file
    write_atomic(folder / room.WEIGHTS, lambda path: write(weights, path))
    if frequencies is not None:
        sparsity = {"sparsity": torch.log10(frequencies.cpu().float() + 1e-10)}
        write_atomic(folder / SPARSITY, lambda path: save_file(sparsity, path))
    if format == "dictionary_learning":
        write_json(folder / "config.json", config)
        (folder / "cfg.json").unlink(missing_ok=True)  # of another format, which would be read in its place
    else:
        write_json(folder / "cfg.json", config)


def read_sae(folder: str | Path) -> SAE:
    """The SAE that bigsae, SAELens, sparsify or dictionary_learning wrote to `folder`, on the CPU, in float32.

    Raises UserError where it holds none that bigsae knows, or one whose weights are not numbers.
    """
    folder = Path(folder)
    sae = _read(folder)
    for name, weights in sae.state_dict().items():
        if weights.is_floating_point() and bool(weights.max().isnan()):  # a maximum of NaNs is one
            raise UserError(
                f"{folder}: its {name} holds NaN: it was broken in training, take an earlier checkpoint"
            )
    return sae


def _read(folder: Path) -> SAE:
    if (folder / "cfg.json").exists():
        # Both weights' files are there where an SAE was saved over one of the other format; cfg.json came last.
        saelens_wrote = "architecture" in read_json(folder / "cfg.json")
        if (folder / sparsify.WEIGHTS).exists() and not saelens_wrote:
            return sparsify.read(folder)
        return saelens.read(folder)
    if (folder / dictionary_learning.WEIGHTS).exists():
        return dictionary_learning.read(folder)
    raise UserError(
        f"{folder} cannot be read as an SAE: it has neither a cfg.json (bigsae, SAELens, sparsify) nor an "
        f"{dictionary_learning.WEIGHTS} (dictionary_learning). Give the folder of one SAE, e.g. runs/x/model.layers.6"
    )
