"""Opening a trained SAE."""

from __future__ import annotations

from pathlib import Path

import torch

from bigsae.hub.saelens import read_sae
from bigsae.sae.base import SAE


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """The SAE in `folder`, e.g. "runs/x/model.layers.6", on `device`. It takes activations in the LM's own scale.

    Reads what bigsae writes and SAELens's TopK SAEs. Raises UserError where `folder` holds neither.
    """
    return read_sae(folder).to(device)
