"""JumpReLU's loss of dead latents: what their pre-activations lack to their thresholds, in parts of the latents.

All of [batch, dead latents] may be nearly all of [batch, d_sae], so the backward computes each part again.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigsae.kernels.sparse_grad import gradient_sum

# Pairs of (token, dead latent) that exist at a time, and least latents of a part: thinner matmuls waste their input.
_PAIRS_AT_ONCE = 2**18
_LEAST_LATENTS = 128


def _parts(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, dead: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Some of `dead`, their rows of W_enc in the dtype of x and of W_dec, the latter's norms, and what x lacks."""
    size = max(_PAIRS_AT_ONCE // max(len(x), 1), _LEAST_LATENTS)
    for own in dead.split(size):
        encoder, decoder = W_enc[own].to(x.dtype), W_dec[own]
        lack = threshold[own] - F.linear(x, encoder, b_enc[own].to(x.dtype))
        yield own, encoder, decoder, decoder.norm(dim=1), lack.relu_()


class _Shortfall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, dead: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_enc, threshold, W_dec, dead)
        total = threshold.new_zeros(())
        for _, _, _, norms, lack in _parts(x, W_enc, b_enc, threshold, W_dec, dead):
            total += (lack.sum(0) * norms).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, threshold, W_dec, dead = ctx.saved_tensors
        d_total = grad_outputs[0]
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        d_b_enc, d_threshold = torch.zeros_like(b_enc), torch.zeros_like(threshold)
        d_W_enc, W_enc_sum = gradient_sum(W_enc)
        d_W_dec, W_dec_sum = gradient_sum(W_dec)
        for own, encoder, decoder, norms, lack in _parts(x, W_enc, b_enc, threshold, W_dec, dead):
            directions = decoder / norms.clamp(min=torch.finfo(norms.dtype).tiny).unsqueeze(1)
            W_dec_sum.index_add_(
                0, own, (d_total * lack.sum(0)).unsqueeze(1).mul(directions).to(W_dec_sum.dtype)
            )
            d_lack = (lack > 0) * (d_total * norms)
            d_sums = d_lack.sum(0)
            d_threshold[own] = d_sums.to(d_threshold.dtype)
            d_b_enc[own] = -d_sums.to(d_b_enc.dtype)
            d_lack = d_lack.to(x.dtype)
            if dx is not None:
                dx.addmm_(d_lack, encoder, alpha=-1)
            W_enc_sum.index_add_(0, own, (d_lack.T @ x).to(W_enc_sum.dtype), alpha=-1)
        return dx, d_W_enc, d_b_enc, d_threshold, d_W_dec, None


def shortfall(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, dead: Tensor
) -> Tensor:
    """[]: the sum over tokens and dead latents of relu(threshold - pre_act) times the norm of the decoder row.

    Differentiable (once) in all but `dead`.

    Args:
        x: [batch, d_in]. The matmul runs in its dtype.
        W_enc: [d_sae, d_in]; b_enc: [d_sae]; threshold: [d_sae] float32 (or float64); W_dec: [d_sae, d_out].
        dead: [n] int64, no two alike.

    Returns:
        The sum in the dtype of threshold. Gradients come in the dtypes of their inputs, those of the matrices in their
        `gradient_dtype`, or are made in, or added to, their `grad` at once (`add_in_place`).
    """
    return _Shortfall.apply(x, W_enc, b_enc, threshold, W_dec, dead)  # pyright: ignore[reportReturnType]
