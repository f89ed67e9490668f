"""The one place where an architecture's name becomes its class."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from bigsae.checks import resolve_sae
from bigsae.config import SAEConfig
from bigsae.parallel.latents import Latents
from bigsae.sae.base import SAE, Shape
from bigsae.sae.batchtopk import BatchTopKSAE
from bigsae.sae.gated import GatedSAE
from bigsae.sae.jumprelu import JumpReLUSAE
from bigsae.sae.matryoshka import MatryoshkaSAE
from bigsae.sae.standard import StandardSAE
from bigsae.sae.topk import TopKSAE


class _Buildable(Protocol):
    def from_config(self, config: SAEConfig, shape: Shape, device: torch.device) -> SAE: ...


ARCHITECTURES: dict[str, _Buildable] = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka": MatryoshkaSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "standard": StandardSAE,
}


def build_sae(
    config: SAEConfig,
    d_in: int,
    d_sae: int,
    seed: int,
    device: torch.device,
    d_out: int | None = None,
    latents: Latents | None = None,
) -> SAE:
    """The SAE that `config` describes, with its starting weights: the same ones however many ranks hold it.

    `d_out`, where given, makes it a transcoder to activations of that width; `latents` says which part is this rank's.
    """
    config = resolve_sae(config, transcoder=d_out is not None)
    assert config.apply_b_dec_to_input is not None and config.decoder_init_norm is not None
    shape = Shape(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        skip=config.skip,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        normalize="layer_norm" if config.normalize == "layer_norm" else "none",
        autocast=config.autocast,
        slab_mb=config.slab_mb,
        latents=latents or Latents(),
    )
    sae = ARCHITECTURES[config.architecture].from_config(config, shape, device)
    sae.initialise(seed, config.decoder_init_norm)
    sae.cast_(getattr(torch, config.dtype))
    return sae


def empty_like(sae: SAE, config: SAEConfig) -> SAE:
    """An SAE as `sae`, of all latents on one rank, without tensors (on the meta device) and without autocast."""
    shape = replace(sae.shape, autocast=False, latents=Latents())
    return ARCHITECTURES[config.architecture].from_config(config, shape, torch.device("meta"))
