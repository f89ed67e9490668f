"""The gradient of a bias that all tokens subtract before the encoder, without one gradient for each token.

pre_acts = W_enc (x - b_dec) + b_enc changes with b_dec as it does with b_enc, but for -W_enc: b_dec's gradient is
-b_enc's @ W_enc. That is one product of a vector and a matrix, where a gradient [batch, d_in] of the encoder's input,
of which b_dec wants only the sum over the tokens, gathers a row of W_enc for each of the batch * k selected latents.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _BiasOfCentred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, b_dec: Tensor, W_enc: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc)
        ctx.b_dec_dtype = b_dec.dtype
        return b_enc.view_as(b_enc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (W_enc,) = ctx.saved_tensors
        d_b_enc = grad_outputs[0]
        d_b_dec = None
        if ctx.needs_input_grad[1]:
            d_b_dec = -(d_b_enc.to(W_enc.dtype) @ W_enc).to(ctx.b_dec_dtype)
        return d_b_enc, d_b_dec, None


def centre(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
    """x - b_dec as a constant, and b_enc with the gradient that b_dec has from all their pre-activations.

    Of what is made of W_enc (x - b_dec) + b_enc alone, and linear in it, every gradient is right but that of x, which
    gets none: it is the tokens.

    Args:
        x: [batch, d_in]; W_enc: [d_sae, d_in]; b_enc: [d_sae]; b_dec: [d_in].

    Raises:
        ValueError: if x wants a gradient.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("a training step gives no gradient to its tokens: detach x")
    return x - b_dec.detach(), _BiasOfCentred.apply(b_enc, b_dec, W_enc)  # pyright: ignore[reportReturnType]
