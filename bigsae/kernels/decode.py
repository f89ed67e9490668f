"""Sparse decode: each token's reconstruction as a sum over its k latents, and the gradients of that sum."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigsae.kernels.dispatch import use_triton
from bigsae.kernels.sparse_grad import LatentMajor, weight_gradient


def gather_sum(coefficients: Tensor, top_indices: Tensor, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[batch, d_in] = sum over j of coefficients[:, j] * weight[top_indices[:, j]]; no autograd.

    Args:
        coefficients: [batch, k]; top_indices: [batch, k] int64; weight: [d_sae, d_in].
        dtype: of the result; sums are accumulated in float32 (float64 for float64).
    """
    if use_triton(coefficients, weight):
        from bigsae.kernels import decode_triton

        return decode_triton.gather_sum(coefficients, top_indices, weight, dtype)
    # embedding_bag wants one dtype. It accumulates in float32 for bfloat16, so the wider of the two is enough.
    wide = torch.promote_types(coefficients.dtype, weight.dtype)
    sums = F.embedding_bag(top_indices, weight.to(wide), per_sample_weights=coefficients.to(wide), mode="sum")
    return sums.to(dtype)


def gather_dot(dense: Tensor, weight: Tensor, top_indices: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[batch, k]: out[b, j] = dense[b] . weight[top_indices[b, j]]; no autograd, no [batch, k, d_in].

    Args:
        dense: [batch, d_in]; weight: [d_sae, d_in]; top_indices: [batch, k] int64.
        dtype: of the result; dot products are accumulated in float32 (float64 for float64).
    """
    if use_triton(dense, weight):
        from bigsae.kernels import decode_triton

        return decode_triton.gather_dot(dense, weight, top_indices, dtype)
    batch, k = top_indices.shape
    wide = torch.promote_types(dense.dtype, weight.dtype)
    # The backward of embedding_bag for its per_sample_weights is just this; autograd would run the forward first.
    # 3 ms at [2048, 576], k 32, where a chunked gather and bmm takes 90 and sparse.sampled_addmm 24.
    tokens = torch.arange(batch, device=top_indices.device)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dense.to(wide).contiguous(),
        weight.to(wide),
        top_indices.flatten(),
        tokens * k,
        tokens.repeat_interleave(k),
        0,  # mode: sum
    )
    return dots.view(batch, k).to(dtype)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_acts: Tensor, weight: Tensor, pattern: LatentMajor) -> Tensor:
        ctx.save_for_backward(top_acts, weight)
        ctx.pattern = pattern
        dtype = torch.promote_types(top_acts.dtype, weight.dtype)
        return gather_sum(top_acts, pattern.top_indices, weight, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        top_acts, weight = ctx.saved_tensors
        pattern: LatentMajor = ctx.pattern
        d_recon = grad_outputs[0]
        d_top_acts = d_weight = None
        if ctx.needs_input_grad[0]:
            d_top_acts = gather_dot(d_recon, weight, pattern.top_indices, dtype=top_acts.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(weight, pattern, top_acts, d_recon)
        return d_top_acts, d_weight, None


def sparse_decode(
    top_acts: Tensor, top_indices: Tensor, weight: Tensor, pattern: LatentMajor | None = None
) -> Tensor:
    """[batch, d_in] = sum over j of top_acts[:, j] * weight[top_indices[:, j]], differentiable (once).

    Neither direction holds anything of the size [batch, d_sae] or [batch, k, d_in].

    Args:
        top_acts: [batch, k], float.
        top_indices: [batch, k] int64, each in 0..d_sae-1.
        weight: [d_sae, d_in], float, contiguous.
        pattern: the latent-major order of these same top_indices, as `topk_encode` returns it, so that the pairs are
            sorted once a step; made anew where it is None.

    Returns:
        [batch, d_in] in the wider dtype of top_acts and weight, accumulated in float32. The gradients come in the
        dtypes of their inputs, that of weight in its `gradient_dtype`.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if top_acts.shape != top_indices.shape or top_acts.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"sparse_decode wants top_acts and top_indices [batch, k] and weight [d_sae, d_in], got "
            f"{tuple(top_acts.shape)}, {tuple(top_indices.shape)}, {tuple(weight.shape)}"
        )
    if pattern is None:
        pattern = LatentMajor(top_indices, weight.shape[0])
    elif pattern.d_sae != weight.shape[0] or pattern.top_indices.shape != top_indices.shape:
        raise ValueError(
            f"the pattern is of {tuple(pattern.top_indices.shape)} indices into {pattern.d_sae} latents; top_indices "
            f"has shape {tuple(top_indices.shape)} and weight {weight.shape[0]} rows"
        )
    return _SparseDecode.apply(top_acts, weight, pattern)  # pyright: ignore[reportReturnType]
