# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
"""Triton kernels of the latent-major gradients: one program a latent, hot latents split, no atomics.

The sorted pairs are cut into chunks of equal length. A chunk whose pairs are all of one latent is summed by a program
of its own into `partial`; the program of a latent then adds, in this order, the pairs before its first whole chunk,
the partial sums of its whole chunks, and the pairs after the last. The order follows from the sorted list alone, and
no program walks more than two chunks of pairs and one row of `partial` for each whole chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigsae.kernels.dispatch import on_its_device
from bigsae.kernels.sparse_grad import LatentMajor

CHUNK = 128


@triton.jit
def _sum_pairs(
    tokens_ptr,
    coefficients_ptr,
    dense_ptr,
    start,
    stop,
    cols,
    d_in,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_D] float32: the sum of coefficient * dense row over the sorted pairs start..stop-1."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, stop, BLOCK_N):
        pairs = first + tl.arange(0, BLOCK_N)
        tokens = tl.load(tokens_ptr + pairs, mask=pairs < stop, other=0)
        coefficients = tl.load(coefficients_ptr + pairs, mask=pairs < stop, other=0.0).to(tl.float32)
        valid = (pairs < stop)[:, None] & (cols < d_in)[None, :]
        rows = tl.load(dense_ptr + tokens[:, None] * d_in + cols[None, :], mask=valid, other=0.0)
        total += tl.sum(coefficients[:, None] * rows.to(tl.float32), axis=0)
    return total


@triton.jit
def _whole_chunks_kernel(
    latents_ptr,  # [num_pairs] int32, ascending
    tokens_ptr,  # [num_pairs] int64
    coefficients_ptr,  # [num_pairs], sorted as the pairs are
    dense_ptr,  # [batch, d_in]
    partial_ptr,  # [num_pairs // CHUNK, d_in] float32; rows of chunks with several latents are not written
    d_in,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    if tl.load(latents_ptr + start) == tl.load(latents_ptr + start + CHUNK - 1):
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _sum_pairs(
            tokens_ptr, coefficients_ptr, dense_ptr, start, start + CHUNK, cols, d_in, BLOCK_N, BLOCK_D
        )
        tl.store(partial_ptr + chunk * d_in + cols, total, mask=cols < d_in)


@triton.jit
def _latent_rows_kernel(
    crow_ptr,  # [d_sae + 1] int64
    tokens_ptr,
    coefficients_ptr,
    dense_ptr,
    partial_ptr,
    out_ptr,  # [d_sae, d_in]
    d_in,
    ADD: tl.constexpr,  # to what out holds
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(crow_ptr + latent)
    stop = tl.load(crow_ptr + latent + 1)
    first_whole = (start + CHUNK - 1) // CHUNK
    end_whole = stop // CHUNK
    # No whole chunk: the head takes all pairs.
    has_whole = end_whole > first_whole
    head_stop = tl.where(has_whole, first_whole * CHUNK, stop)
    tail_start = tl.where(has_whole, end_whole * CHUNK, stop)
    total = _sum_pairs(
        tokens_ptr, coefficients_ptr, dense_ptr, start, head_stop, cols, d_in, BLOCK_N, BLOCK_D
    )
    for chunk in range(first_whole, end_whole):
        total += tl.load(partial_ptr + chunk * d_in + cols, mask=cols < d_in, other=0.0)
    total += _sum_pairs(
        tokens_ptr, coefficients_ptr, dense_ptr, tail_start, stop, cols, d_in, BLOCK_N, BLOCK_D
    )
    mask = cols < d_in
    if ADD:
        mask &= stop > start  # AuxK's pairs are those of a few latents
        total += tl.load(out_ptr + latent * d_in + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + latent * d_in + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


@on_its_device
def latent_rows(
    pattern: LatentMajor,
    coefficients: Tensor,
    dense: Tensor,
    dtype: torch.dtype,
    *,
    add_to: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Launches the kernels; arguments and result as `LatentMajor.rows`, which checks them.

    chunk: pairs to a chunk, a power of two.
    """
    coefficients, dense = coefficients.flatten()[pattern.order], dense.contiguous()
    d_in = dense.shape[1]
    out = add_to
    if out is None:
        out = torch.empty((pattern.d_sae, d_in), dtype=dtype, device=dense.device)
    if out.numel() == 0:
        return out
    num_chunks = coefficients.numel() // chunk
    partial = torch.empty((num_chunks, d_in), dtype=torch.float32, device=dense.device)
    options = {
        "CHUNK": chunk,
        "BLOCK_N": min(chunk, 8),
        "BLOCK_D": min(triton.next_power_of_2(d_in), 512),
        "num_warps": 4,
    }
    num_blocks = triton.cdiv(d_in, options["BLOCK_D"])
    if num_chunks > 0:
        _whole_chunks_kernel[(num_chunks, num_blocks)](
            pattern.latents, pattern.tokens, coefficients, dense, partial, d_in, **options
        )
    _latent_rows_kernel[(pattern.d_sae, num_blocks)](
        pattern.crow,
        pattern.tokens,
        coefficients,
        dense,
        partial,
        out,
        d_in,
        ADD=add_to is not None,
        **options,
    )
    return out
