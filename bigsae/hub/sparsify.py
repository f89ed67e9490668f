"""The format of sparsify (eai-sparsify, checked against 1.3): cfg.json and sae.safetensors, latent-major like ours.

Its SAEs subtract b_dec from the input, its transcoders do not; outputs are as wide as inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigsae.config import UserError, short
from bigsae.hub.weights import check_k, check_tensors, counts, fill, read_json, read_safetensors
from bigsae.sae.base import SAE, Shape
from bigsae.sae.topk import TopKSAE

WEIGHTS = "sae.safetensors"
_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}


def exported(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What cfg.json and the weights' file hold for `sae`. Raises UserError where sparsify cannot hold it."""
    if not isinstance(sae, TopKSAE):
        raise UserError(
            f'sparsify\'s format holds TopK alone, not {sae.architecture}: save it with format="saelens"'
        )
    if sae.d_out != sae.d_in:
        raise UserError(
            f"sparsify's format holds no transcoder whose output is wider or narrower than its input (d_in {sae.d_in}, "
            f"d_out {sae.d_out}); SAELens's has none with TopK: train a batchtopk or jumprelu transcoder"
        )
    if not sae.is_transcoder and (sae.shape.normalize != "none" or not sae.shape.apply_b_dec_to_input):
        raise UserError(
            "sparsify's SAEs subtract b_dec from the input and normalise nothing, this one differs: save it with "
            'format="saelens"'
        )
    norms = sae.W_dec.detach().float().norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(sae.d_sae // sae.d_in, 1),
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-3)),
        "num_latents": sae.d_sae,
        "k": sae.k,
        # Their forward would give the reconstruction from 4 k latents as its output.
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.is_transcoder,
        "d_in": sae.d_in,
        "metadata": sae.metadata | ({"multi_topk": True} if sae.multi_topk else {}),
    }
    return config, {_NAMES[name]: parameter.detach() for name, parameter in sae.named_parameters()}


def read(folder: Path) -> SAE:
    """The SAE or transcoder that bigsae, or sparsify, wrote to `folder`. Raises UserError where it is none of ours."""
    path = folder / "cfg.json"
    config = read_json(path)
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{path}: activation {short(config['activation'])} cannot be loaded; known is topk")
    d_in, k = counts(config, path, "d_in", "k")
    # 0 stands for none, as in sparsify.
    if config.get("num_latents"):
        (d_sae,) = counts(config, path, "num_latents")
    else:
        d_sae = d_in * counts(config, path, "expansion_factor")[0]
    check_k(k, d_sae, path)
    transcode, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    ours = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if skip:
        ours["W_skip"] = (d_in, d_in)
    tensors = read_safetensors(folder / WEIGHTS)
    check_tensors(tensors, {_NAMES[name]: shape for name, shape in ours.items()}, folder / WEIGHTS)
    shape = Shape(d_in, d_sae, d_in if transcode else None, skip=skip, apply_b_dec_to_input=not transcode)
    found = config.get("metadata")
    metadata = (found if isinstance(found, dict) else {}) | (
        {"multi_topk": True} if config.get("multi_topk") else {}
    )
    return fill(TopKSAE(shape, k, device="meta"), {name: tensors[_NAMES[name]] for name in ours}, metadata)
