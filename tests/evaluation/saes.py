"""A tiny language model, text, and SAEs in its place, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import bigsae
from bigsae.hub.formats import save_sae
from bigsae.sae.base import SAE
from bigsae.sae.build import build_sae
from tests.launch import write_corpus
from tests.models import tiny_llama

D_MODEL, D_SAE, CTX_LEN = 32, 96, 16
RESIDUAL, MLP_IN, MLP_OUT = "model.layers.0", "model.layers.1.mlp:input", "model.layers.1.mlp"


def write_model(folder: Path) -> Path:
    """A Llama of three layers in `lm`, and `corpus.jsonl`."""
    tiny_llama(folder / "lm", num_layers=3)
    write_corpus(folder / "corpus.jsonl", num_documents=8)
    return folder


def make_sae(architecture: Any = "topk", seed: int = 0, d_out: int | None = None, **fields: Any) -> SAE:
    """An SAE of random weights about which nothing is zero, for the tiny model's activations."""
    config = bigsae.SAEConfig(architecture=architecture, d_sae=D_SAE, **fields)
    sae = build_sae(config, D_MODEL, D_SAE, seed, torch.device("cpu"), d_out)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (*sae.encoder_biases, "b_dec"):
            parameter = sae.get_parameter(name)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if sae.W_skip is not None:
            sae.W_skip.copy_(0.1 * torch.randn(sae.W_skip.shape, generator=generator))
    return sae.requires_grad_(False)


def residual_sae() -> SAE:
    sae = make_sae(k=6)
    sae.metadata = {"model_name": "some/model", "hook_name": RESIDUAL, "context_size": CTX_LEN}
    return sae


def transcoder() -> SAE:
    sae = make_sae(seed=1, d_out=D_MODEL, k=5, skip=True)
    sae.metadata = {"hook_name": MLP_IN, "hook_name_out": MLP_OUT}
    return sae


def write_saes(folder: Path) -> tuple[str, str]:
    """Folders of `residual_sae` and `transcoder`."""
    save_sae(residual_sae(), folder / "residual")
    save_sae(transcoder(), folder / "transcoder")
    return str(folder / "residual"), str(folder / "transcoder")
