# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
"""Triton kernels of the sparse decode: a weighted sum of gathered rows, and dot products with gathered rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigsae.kernels.dispatch import on_its_device


@triton.jit
def _gather_sum_kernel(
    coefficients_ptr,  # [batch, k]
    indices_ptr,  # [batch, k] int64
    weight_ptr,  # [d_sae, d_in]
    out_ptr,  # [batch, d_in]
    k,
    d_in,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, BLOCK_D columns: the k rows are added in blocks of BLOCK_K, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = cols < d_in
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, k, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        latents = tl.load(indices_ptr + row * k + slots, mask=slots < k, other=0).to(tl.int64)
        coefficients = tl.load(coefficients_ptr + row * k + slots, mask=slots < k, other=0.0).to(tl.float32)
        valid = (slots < k)[:, None] & in_row[None, :]
        rows = tl.load(weight_ptr + latents[:, None] * d_in + cols[None, :], mask=valid, other=0.0).to(
            tl.float32
        )
        total += tl.sum(coefficients[:, None] * rows, axis=0)
    tl.store(out_ptr + row * d_in + cols, total.to(out_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _gather_dot_kernel(
    dense_ptr,  # [batch, d_in]
    weight_ptr,  # [d_sae, d_in]
    indices_ptr,  # [batch, k] int64
    out_ptr,  # [batch, k]
    k,
    d_in,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, BLOCK_K of its latents: dot products over all of d_in."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    latents = tl.load(indices_ptr + row * k + slots, mask=slots < k, other=0).to(tl.int64)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, d_in, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        dense = tl.load(dense_ptr + row * d_in + cols, mask=cols < d_in, other=0.0).to(tl.float32)
        valid = (slots < k)[:, None] & (cols < d_in)[None, :]
        rows = tl.load(weight_ptr + latents[:, None] * d_in + cols[None, :], mask=valid, other=0.0).to(
            tl.float32
        )
        total += tl.sum(rows * dense[None, :], axis=1)
    tl.store(out_ptr + row * k + slots, total.to(out_ptr.dtype.element_ty), mask=slots < k)


@on_its_device
def gather_sum(coefficients: Tensor, top_indices: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, d_in] = sum over j of coefficients[:, j] * weight[top_indices[:, j]], in `dtype`."""
    coefficients, top_indices, weight = (
        coefficients.contiguous(),
        top_indices.contiguous(),
        weight.contiguous(),
    )
    batch, k = top_indices.shape
    d_in = weight.shape[1]
    out = torch.empty((batch, d_in), dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    block_d = min(triton.next_power_of_2(d_in), 512)
    block_k = min(triton.next_power_of_2(k), 8)
    grid = (batch, triton.cdiv(d_in, block_d))
    _gather_sum_kernel[grid](
        coefficients, top_indices, weight, out, k, d_in, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4
    )
    return out


@on_its_device
def gather_dot(dense: Tensor, weight: Tensor, top_indices: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, k]: out[b, j] = dense[b] . weight[top_indices[b, j]], in `dtype`."""
    dense, weight, top_indices = dense.contiguous(), weight.contiguous(), top_indices.contiguous()
    batch, k = top_indices.shape
    d_in = weight.shape[1]
    out = torch.empty((batch, k), dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    block_k = min(triton.next_power_of_2(k), 32)
    block_d = min(triton.next_power_of_2(d_in), 128)
    grid = (batch, triton.cdiv(k, block_k))
    _gather_dot_kernel[grid](
        dense, weight, top_indices, out, k, d_in, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4
    )
    return out
