"""JumpReLU and its step function, with straight-through gradients of the threshold (arXiv 2407.14435)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigsae.kernels.dispatch import use_triton
from bigsae.kernels.pairs import DensePairs, RaggedPairs, accumulator


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre_acts: Tensor,
        threshold: Tensor,
        pairs: DensePairs | RaggedPairs,
        bandwidth: float,
        to_input: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.pairs, ctx.bandwidth, ctx.to_input = pairs, bandwidth, to_input
        if isinstance(pairs, RaggedPairs) and use_triton(pre_acts, threshold):
            from bigsae.kernels import ragged_triton

            ctx.save_for_backward(pre_acts, threshold)
            return ragged_triton.jumprelu_forward(pre_acts, pairs.latents, threshold)
        # Not greater-than: a NaN stays NaN, and so reaches the loss.
        closed = pre_acts <= pairs.spread(threshold)
        ctx.save_for_backward(pre_acts, threshold, closed)
        return pre_acts.masked_fill(closed, 0), closed.logical_not().to(accumulator(pre_acts.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        pre_acts, threshold, *closed = ctx.saved_tensors
        pairs: DensePairs | RaggedPairs = ctx.pairs
        d_acts, d_active = grad_outputs
        if isinstance(pairs, RaggedPairs) and not closed:
            from bigsae.kernels import ragged_triton

            d_pre, d_pairs = ragged_triton.jumprelu_backward(
                pre_acts, pairs.latents, threshold, ctx.bandwidth, d_acts, d_active
            )
        else:
            d_pre = d_acts.masked_fill(closed[0], 0)
            spread = pairs.spread(threshold.to(d_active.dtype))
            far = (pre_acts - spread).div_(ctx.bandwidth).abs_() >= 0.5
            d_pairs = (spread * d_acts).add_(d_active).div_(-ctx.bandwidth).masked_fill_(far, 0)
        if ctx.to_input:
            d_pre = d_pre - d_pairs.to(d_pre.dtype)
        return d_pre, pairs.latent_sums(d_pairs).to(threshold.dtype), None, None, None


def jumprelu(
    pre_acts: Tensor,
    threshold: Tensor,
    pairs: DensePairs | RaggedPairs,
    bandwidth: float,
    *,
    to_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """pre_acts where they exceed the threshold, else 0; and 1 where they do, else 0. Differentiable (once).

    The gradients are straight-through, rect(u) being 1 where |u| < 1/2:
        d pre_acts = d_acts where pre_acts > threshold; the step function gives it none.
        d threshold = the sums over tokens of -(threshold * d_acts + d_active) / bandwidth
            * rect((pre_acts - threshold) / bandwidth).

    Args:
        pre_acts: [batch, d_sae] with DensePairs, [num_pairs] with RaggedPairs, which must then hold all pairs with
            pre_act > threshold - bandwidth / 2: the others have neither value nor gradient.
        threshold: [d_sae].
        bandwidth: width of the window in which the threshold gets a gradient.
        to_input: give pre_acts the negative of the threshold's gradient at their pair as well: both functions depend
            on pre_acts - threshold there (Conerly et al. 2025, as SAELens's jumprelu_ste_to_input).

    Returns:
        acts in the dtype of pre_acts and active in float32 (float64 for float64), both shaped like pre_acts. A NaN
        counts as above and stays NaN.
    """
    return _JumpReLU.apply(pre_acts, threshold, pairs, bandwidth, to_input)  # pyright: ignore[reportReturnType]
