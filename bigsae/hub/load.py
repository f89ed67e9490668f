"""Opening a trained SAE."""

from __future__ import annotations

from pathlib import Path

import torch

from bigsae.hub.formats import read_sae
from bigsae.sae.base import SAE


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE in `folder`, e.g. "runs/x/model.layers.6", on `device`. It takes activations in the LM's own scale.

    Reads what bigsae, SAELens, sparsify and dictionary_learning write. Raises UserError where `folder` holds none.
    """
    return read_sae(folder).to(device)
