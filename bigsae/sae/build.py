"""The one place where an architecture's name becomes its class."""

from __future__ import annotations

import torch

from bigsae.config import SAEConfig
from bigsae.sae.base import SAE
from bigsae.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[TopKSAE]] = {"topk": TopKSAE}


def build_sae(config: SAEConfig, d_in: int, d_sae: int, seed: int, device: torch.device) -> SAE:
    """The SAE that `config` describes, with its starting weights: the same ones on every rank."""
    sae = ARCHITECTURES[config.architecture].from_config(config, d_in, d_sae, device)
    sae.initialise(seed)
    return sae
