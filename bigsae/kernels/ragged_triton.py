# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
"""Triton kernels over ragged pairs: finding them, gathered sums and dot products, and JumpReLU.

Pairs are (token, latent), token by token and with latents ascending in a token; crow [batch + 1] says where each
token's pairs begin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigsae.kernels.dispatch import on_its_device

# A row is cut into slices of TILES tiles of TILE latents each; one program walks one slice.
TILE = 2048
TILES = 4
# Pairs a slice may have before the rows are read twice: 1 in 32 of its latents, where SAEs select far fewer. The slots
# then take about a tenth of the memory of bfloat16 rows.
CAPACITY = 256

_BLOCK = 1024


@triton.jit
def _find_above_kernel(
    pre_acts_ptr,  # [rows, d_sae]
    bound_ptr,  # [d_sae] float32
    starts_ptr,  # [rows * num_slices] int64: where in values and latents a slice's pairs go
    values_ptr,
    latents_ptr,
    counts_ptr,  # [rows * num_slices] int32
    d_sae,
    capacity,  # pairs beyond it are counted and not written
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """One slice of one row."""
    row = tl.program_id(0).to(tl.int64)
    job = row * tl.num_programs(1) + tl.program_id(1)
    out = tl.load(starts_ptr + job)
    first = tl.program_id(1) * (TILE * TILES)
    count = tl.zeros((), tl.int32)
    for start in range(first, min(first + TILE * TILES, d_sae), TILE):
        latents = start + tl.arange(0, TILE)
        valid = latents < d_sae
        pre_acts = tl.load(pre_acts_ptr + row * d_sae + latents, mask=valid, other=0.0)
        value = pre_acts.to(tl.float32)
        bound = tl.load(bound_ptr + latents, mask=valid, other=0.0)
        above = valid & ((value > bound) | (value != value))
        taken = above.to(tl.int32)
        places = count + tl.cumsum(taken, axis=0) - taken
        kept = above & (places < capacity)
        tl.store(values_ptr + out + places, pre_acts, mask=kept)
        tl.store(latents_ptr + out + places, latents.to(latents_ptr.dtype.element_ty), mask=kept)
        count += tl.sum(taken, axis=0)
    tl.store(counts_ptr + job, count)


@triton.jit
def _compact_slots_kernel(
    slot_values_ptr,  # [num_jobs, capacity]
    slot_latents_ptr,  # [num_jobs, capacity] int32
    counts_ptr,  # [num_jobs] int32
    starts_ptr,  # [num_jobs] int64
    values_ptr,  # [n]
    latents_ptr,  # [n] int64
    num_jobs,
    capacity,
    JOBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """JOBS slices: the filled slots of each go to where its pairs start."""
    jobs = tl.program_id(0) * JOBS + tl.arange(0, JOBS)
    counts = tl.load(counts_ptr + jobs, mask=jobs < num_jobs, other=0)
    starts = tl.load(starts_ptr + jobs, mask=jobs < num_jobs, other=0)
    slots = jobs.to(tl.int64) * capacity
    for first in range(0, tl.max(counts, axis=0), BLOCK):
        places = first + tl.arange(0, BLOCK)
        filled = places[None, :] < counts[:, None]
        sources = slots[:, None] + places[None, :]
        targets = starts[:, None] + places[None, :]
        tl.store(
            values_ptr + targets, tl.load(slot_values_ptr + sources, mask=filled, other=0.0), mask=filled
        )
        latents = tl.load(slot_latents_ptr + sources, mask=filled, other=0)
        tl.store(latents_ptr + targets, latents.to(tl.int64), mask=filled)


@triton.jit
def _gather_sum_kernel(
    coefficients_ptr,  # [n]
    latents_ptr,  # [n] int64
    crow_ptr,  # [batch + 1] int64
    weight_ptr,  # [d_sae, d_in]
    out_ptr,  # [batch, d_in]
    d_in,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, BLOCK_D columns: its rows are added in blocks of BLOCK_K, counted from its first pair."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = cols < d_in
    stop = tl.load(crow_ptr + token + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(tl.load(crow_ptr + token), stop, BLOCK_K):
        pairs = first + tl.arange(0, BLOCK_K)
        latents = tl.load(latents_ptr + pairs, mask=pairs < stop, other=0)
        coefficients = tl.load(coefficients_ptr + pairs, mask=pairs < stop, other=0.0).to(tl.float32)
        valid = (pairs < stop)[:, None] & in_row[None, :]
        rows = tl.load(weight_ptr + latents[:, None] * d_in + cols[None, :], mask=valid, other=0.0)
        total += tl.sum(coefficients[:, None] * rows.to(tl.float32), axis=0)
    tl.store(out_ptr + token * d_in + cols, total.to(out_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _gather_dot_kernel(
    dense_ptr,  # [batch, d_in]
    weight_ptr,  # [d_sae, d_in]
    latents_ptr,  # [n] int64
    crow_ptr,  # [batch + 1] int64
    out_ptr,  # [n]
    d_in,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token: of its blocks of BLOCK_K pairs, every num_programs(1)-th, dot products over all of d_in."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(crow_ptr + token) + tl.program_id(1) * BLOCK_K
    stop = tl.load(crow_ptr + token + 1)
    for first in range(start, stop, tl.num_programs(1) * BLOCK_K):
        pairs = first + tl.arange(0, BLOCK_K)
        latents = tl.load(latents_ptr + pairs, mask=pairs < stop, other=0)
        total = tl.zeros((BLOCK_K,), tl.float32)
        for first_col in range(0, d_in, BLOCK_D):
            cols = first_col + tl.arange(0, BLOCK_D)
            dense = tl.load(dense_ptr + token * d_in + cols, mask=cols < d_in, other=0.0).to(tl.float32)
            valid = (pairs < stop)[:, None] & (cols < d_in)[None, :]
            rows = tl.load(weight_ptr + latents[:, None] * d_in + cols[None, :], mask=valid, other=0.0)
            total += tl.sum(rows.to(tl.float32) * dense[None, :], axis=1)
        tl.store(out_ptr + pairs, total.to(out_ptr.dtype.element_ty), mask=pairs < stop)


@triton.jit
def _jumprelu_forward_kernel(
    pre_acts_ptr,  # [n]
    latents_ptr,  # [n] int64
    threshold_ptr,  # [d_sae]
    acts_ptr,  # [n]
    active_ptr,  # [n] float32
    n,
    BLOCK: tl.constexpr,
):
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = pairs < n
    pre_acts = tl.load(pre_acts_ptr + pairs, mask=valid, other=0.0)
    latents = tl.load(latents_ptr + pairs, mask=valid, other=0)
    threshold = tl.load(threshold_ptr + latents, mask=valid, other=0.0).to(tl.float32)
    # Not greater-than, here and below: a NaN counts as above and stays NaN.
    closed = pre_acts.to(tl.float32) <= threshold
    tl.store(acts_ptr + pairs, tl.where(closed, 0.0, pre_acts).to(acts_ptr.dtype.element_ty), mask=valid)
    tl.store(active_ptr + pairs, tl.where(closed, 0.0, 1.0), mask=valid)


@triton.jit
def _jumprelu_backward_kernel(
    pre_acts_ptr,  # [n]
    latents_ptr,  # [n] int64
    threshold_ptr,  # [d_sae]
    g_acts_ptr,  # [n]
    g_active_ptr,  # [n]
    d_pre_ptr,  # [n]
    d_threshold_ptr,  # [n] float32
    bandwidth,
    n,
    BLOCK: tl.constexpr,
):
    pairs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = pairs < n
    pre_acts = tl.load(pre_acts_ptr + pairs, mask=valid, other=0.0).to(tl.float32)
    latents = tl.load(latents_ptr + pairs, mask=valid, other=0)
    threshold = tl.load(threshold_ptr + latents, mask=valid, other=0.0).to(tl.float32)
    g_acts = tl.load(g_acts_ptr + pairs, mask=valid, other=0.0).to(tl.float32)
    g_active = tl.load(g_active_ptr + pairs, mask=valid, other=0.0).to(tl.float32)
    d_pre = tl.where(pre_acts <= threshold, 0.0, g_acts)
    tl.store(d_pre_ptr + pairs, d_pre.to(d_pre_ptr.dtype.element_ty), mask=valid)
    # Triton's `/` is approximate in float32, and the edge of the rectangle must not depend on that.
    far = tl.abs(tl.div_rn(pre_acts - threshold, bandwidth)) >= 0.5
    d_threshold = -tl.div_rn(threshold * g_acts + g_active, bandwidth)
    tl.store(d_threshold_ptr + pairs, tl.where(far, 0.0, d_threshold), mask=valid)


@on_its_device
def compact_above(
    pre_acts: Tensor, bound: Tensor, *, tile: int = TILE, tiles: int = TILES, capacity: int = CAPACITY
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries above the bounds of their columns, row by row, columns ascending; NaN counts as above.

    The rows are read once, into `capacity` slots for each slice, and the filled slots are then moved together. Where
    some slice has more, the rows are read again, and the pairs written to where the counts say that they belong.
    Their number is the one value that the host waits for.

    Args:
        pre_acts: [rows, d_sae].
        bound: [d_sae] float32; entries equal to it are not above.
        tile: latents read at once, a power of two.
        tiles: tiles to a slice.
        capacity: pairs of a slice that the first reading keeps.

    Returns:
        values [n] in the dtype of pre_acts, latents [n] int64, and counts [rows] int64.
    """
    pre_acts, bound = pre_acts.contiguous(), bound.contiguous()
    (rows, d_sae), device = pre_acts.shape, pre_acts.device
    if rows == 0:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return pre_acts.new_empty(0), nothing, nothing
    tile = min(tile, triton.next_power_of_2(d_sae))
    num_slices = triton.cdiv(d_sae, tile * tiles)
    num_jobs = rows * num_slices
    counts = torch.empty(num_jobs, dtype=torch.int32, device=device)

    def find(starts: Tensor, values: Tensor, latents: Tensor, capacity: int) -> None:
        _find_above_kernel[(rows, num_slices)](
            pre_acts,
            bound,
            starts,
            values,
            latents,
            counts,
            d_sae,
            capacity,
            TILE=tile,
            TILES=tiles,
            num_warps=4,
        )

    capacity = min(capacity, tile * tiles)
    slot_values = torch.empty(num_jobs * capacity, dtype=pre_acts.dtype, device=device)
    slot_latents = torch.empty(num_jobs * capacity, dtype=torch.int32, device=device)
    find(torch.arange(num_jobs, device=device) * capacity, slot_values, slot_latents, capacity)

    stops = counts.cumsum(0, dtype=torch.int64)
    starts = stops - counts
    n, largest = torch.stack((stops[-1], counts.max().long())).tolist()
    values = torch.empty(n, dtype=pre_acts.dtype, device=device)
    latents = torch.empty(n, dtype=torch.int64, device=device)
    if largest > capacity:
        find(starts, values, latents, largest)
    elif n > 0:
        options = {"JOBS": 16, "BLOCK": 32, "num_warps": 4}
        _compact_slots_kernel[(triton.cdiv(num_jobs, options["JOBS"]),)](
            slot_values, slot_latents, counts, starts, values, latents, num_jobs, capacity, **options
        )
    return values, latents, counts.view(rows, num_slices).sum(1, dtype=torch.int64)


@on_its_device
def gather_sum(
    coefficients: Tensor, latents: Tensor, crow: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """[batch, d_in]: out[t] = sum over the pairs i of token t of coefficients[i] * weight[latents[i]], in `dtype`."""
    coefficients, weight = coefficients.contiguous(), weight.contiguous()
    latents, crow = latents.contiguous(), crow.contiguous()
    batch, d_in = crow.numel() - 1, weight.shape[1]
    out = torch.empty((batch, d_in), dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    block_d = min(triton.next_power_of_2(d_in), 512)
    # Narrow rows, as of a bias, leave room for more of them: some row may have a pair for every token of the batch.
    block_k = min(4096 // block_d, 256)
    _gather_sum_kernel[(batch, triton.cdiv(d_in, block_d))](
        coefficients, latents, crow, weight, out, d_in, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4
    )
    return out


@on_its_device
def gather_dot(dense: Tensor, weight: Tensor, latents: Tensor, crow: Tensor, dtype: torch.dtype) -> Tensor:
    """[n]: out[i] = dense[the token of pair i] . weight[latents[i]], in `dtype`."""
    dense, weight = dense.contiguous(), weight.contiguous()
    latents, crow = latents.contiguous(), crow.contiguous()
    batch, d_in = dense.shape
    out = torch.empty(latents.numel(), dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    block_k = 32
    block_d = min(triton.next_power_of_2(d_in), 128)
    # As many programs as the pairs of a token fill on average, which needs no word from the device.
    programs = min(triton.cdiv(out.numel(), batch * block_k), 65535)
    _gather_dot_kernel[(batch, programs)](
        dense, weight, latents, crow, out, d_in, BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4
    )
    return out


@on_its_device
def jumprelu_forward(pre_acts: Tensor, latents: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """acts [n]: pre_acts where above threshold[latents], else 0; active [n] float32: 1 there, else 0.

    A NaN counts as above.
    """
    pre_acts, latents, threshold = pre_acts.contiguous(), latents.contiguous(), threshold.contiguous()
    n = pre_acts.numel()
    acts = torch.empty(n, dtype=pre_acts.dtype, device=pre_acts.device)
    active = torch.empty(n, dtype=torch.float32, device=pre_acts.device)
    if n > 0:
        grid = (triton.cdiv(n, _BLOCK),)
        _jumprelu_forward_kernel[grid](pre_acts, latents, threshold, acts, active, n, BLOCK=_BLOCK)
    return acts, active


@on_its_device
def jumprelu_backward(
    pre_acts: Tensor, latents: Tensor, threshold: Tensor, bandwidth: float, g_acts: Tensor, g_active: Tensor
) -> tuple[Tensor, Tensor]:
    """Straight-through gradients: d_pre [n] in the dtype of pre_acts, and float32 [n], to sum over each latent's pairs.

    With u = (pre_acts - threshold) / bandwidth, that of the threshold is -(threshold * g_acts + g_active) / bandwidth
    where |u| < 1/2, else 0; d_pre is g_acts where pre_acts > threshold, else 0. A NaN counts as in both.
    """
    pre_acts, latents, threshold = pre_acts.contiguous(), latents.contiguous(), threshold.contiguous()
    g_acts, g_active = g_acts.contiguous(), g_active.contiguous()
    n = pre_acts.numel()
    d_pre = torch.empty(n, dtype=pre_acts.dtype, device=pre_acts.device)
    d_threshold = torch.empty(n, dtype=torch.float32, device=pre_acts.device)
    if n > 0:
        _jumprelu_backward_kernel[(triton.cdiv(n, _BLOCK),)](
            pre_acts, latents, threshold, g_acts, g_active, d_pre, d_threshold, bandwidth, n, BLOCK=_BLOCK
        )
    return d_pre, d_threshold
