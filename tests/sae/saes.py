"""Small SAEs of every architecture with weights that leave nothing at zero or one, and activations for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigsae.config import SAEConfig
from bigsae.sae.base import SAE
from bigsae.sae.build import build_sae
from bigsae.sae.losses import DeadLatents, StepContext, StepOutput, global_moments

D_IN, D_SAE, D_OUT, K, BATCH = 12, 40, 9, 5, 33
CPU = torch.device("cpu")


def make_sae(config: SAEConfig, d_out: int | None = None, seed: int = 0) -> SAE:
    """An SAE, or a transcoder to `d_out`, whose biases are all below zero."""
    sae = build_sae(config, D_IN, D_SAE, seed, CPU, d_out)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "threshold":
                parameter.copy_(noise.abs())
            else:
                parameter.add_(0.2 * noise)
        for name in set(sae.encoder_biases) - {"threshold"}:
            sae.get_parameter(name).copy_(-sae.get_parameter(name).abs())
    return sae


def make_x(sae: SAE, seed: int = 1, batch: int = BATCH) -> Tensor:
    """[batch, D_IN] about a long mean; but the encoder's input is 0 for the first two: none of their latents fire."""
    x = torch.randn(batch, D_IN, generator=torch.Generator().manual_seed(seed)) + 2
    x[:2] = 0
    if sae.shape.apply_b_dec_to_input and not sae.is_transcoder:
        x[:2] = sae.b_dec.detach()
    return x


def make_batch(sae: SAE, seed: int = 1, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Inputs as `make_x`, and targets: the same, or for a transcoder [batch, d_out]."""
    x = make_x(sae, seed, batch)
    if not sae.is_transcoder:
        return x, x
    return x, torch.randn(batch, sae.d_out, generator=torch.Generator().manual_seed(seed + 1)) - 1


def dead_latents(num_dead: int) -> Tensor:
    """bool [D_SAE], some of them True."""
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))[:num_dead]] = True
    return mask


def make_context(y: Tensor, dead: Tensor | None = None, **fields: Any) -> StepContext:
    """The context of a step on all tokens of a batch with the targets `y`."""
    return StepContext(
        global_moments(y, len(y), None),
        DeadLatents(dead, dead.sum().float()) if dead is not None else None,
        **fields,
    )


def run_step(
    sae: SAE, x: Tensor, y: Tensor, dead: Tensor | None = None, **fields: Any
) -> tuple[StepOutput, dict[str, Tensor]]:
    """What the training forward gives, and every parameter's gradient."""
    sae.zero_grad()
    output = sae.training_forward(x, y, make_context(y, dead, **fields))
    output.loss.backward()
    grads = {}
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad.clone()
    return output, grads


def assert_same(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to 5e-6 of the largest value."""
    expected = expected.detach().to(found.dtype)
    atol = 5e-6 * expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found.detach(), expected, rtol=0, atol=atol, msg=lambda message: f"{what}: {message}"
    )


def assert_same_grads(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same gradients, all of which say something, of the same parameters."""
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert expected[name].abs().max() > 1e-5, name
        assert_same(grad, expected[name], name)
