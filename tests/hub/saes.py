"""SAEs of every architecture with weights that leave nothing at zero or one, and activations for them."""

from __future__ import annotations

from typing import Any

import torch

from bigsae.config import Architecture, SAEConfig
from bigsae.sae.base import SAE
from bigsae.sae.build import build_sae

D_IN, D_SAE, D_OUT, K = 24, 72, 20, 5
# What training divided activations by: the SAE's own scale is near 1, the LM's is not.
SCALE = 50.0


def activations() -> torch.Tensor:
    """[4, 64, D_IN] as a language model gives them: large, about a long mean."""
    generator = torch.Generator().manual_seed(0)
    return SCALE * (torch.randn(4, 64, D_IN, generator=generator) + mean())


def mean() -> torch.Tensor:
    """[D_IN]: the mean of the activations in the SAE's own scale."""
    return 3 * torch.randn(D_IN, generator=torch.Generator().manual_seed(1))


def random_sae(architecture: Architecture, d_out: int | None = None, **fields: Any) -> SAE:
    """An SAE, or a transcoder to `d_out`, as configured by `fields`, its scale folded as at the end of a training."""
    config = SAEConfig(architecture=architecture, **fields)
    sae = build_sae(config, D_IN, D_SAE, 0, torch.device("cpu"), d_out)
    generator = torch.Generator().manual_seed(2)
    spreads = {"W_enc": D_IN**-0.5, "W_dec": 0.5, "W_skip": D_IN**-0.5, "threshold": 0.2}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(spreads.get(name, 0.3) * torch.randn(parameter.shape, generator=generator))
        if "threshold" in dict(sae.named_parameters()):
            sae.get_parameter("threshold").abs_()
        if "threshold" in dict(sae.named_buffers()):
            sae.get_buffer("threshold").fill_(0.7)
        if not sae.is_transcoder and sae.shape.normalize == "none":
            sae.b_dec.add_(mean())
    if sae.shape.normalize == "none":
        sae.fold_scales_(1 / SCALE, 1 / (2 * SCALE) if sae.is_transcoder else 1 / SCALE)
    sae.metadata = {"model_name": "some/model", "hook_name": "model.layers.6"}
    return sae.requires_grad_(False)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest value."""
    assert expected.abs().max() > 1e-2  # it says something
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def assert_computes(found: Any, expected: SAE, x: torch.Tensor) -> None:
    """`found`, in whatever library, has the latents and the output of `expected`, some of which fire."""
    with torch.no_grad():
        latents = expected.encode(x)
        assert 0.01 < (latents > 0).float().mean() < 0.8
        assert_same(found.encode(x), latents)
        assert_same(found(x), expected(x))
