# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""Triton top-k: tile maxima, the first k tiles, then the first k values of those tiles.

The rule by which k tiles suffice stands in `topk.py`. Floats are compared as int32 keys of the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigsae.kernels.dispatch import on_its_device

TILE = 64
_MAX_BLOCK = 4096


@triton.jit
def _load_keys(values_ptr, mask_ptr, row, cols, valid, d_sae, HAS_MASK: tl.constexpr):
    """The values at columns cols of a row, and their keys; the key where not valid is below every value's."""
    value = tl.load(values_ptr + row * d_sae + cols, mask=valid, other=0.0).to(tl.float32)
    if HAS_MASK:
        kept = tl.load(mask_ptr + cols, mask=valid, other=0)
        value = tl.where(kept != 0, value, float("-inf"))
    # IEEE floats are sign and magnitude: flipping the magnitude of the negatives makes their bits order as integers.
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(value == 0.0, 0, key)  # -0.0 equals 0.0
    key = tl.where(value != value, 0x7FFFFFFF, key)  # as in torch.sort, NaN of either sign comes first
    return value, tl.where(valid, key, -0x80000000).to(tl.int32)


@triton.jit
def _tile_maxima_kernel(
    values_ptr,  # [batch, d_sae]
    mask_ptr,  # [d_sae] uint8, read if HAS_MASK
    maxima_ptr,  # [batch, num_tiles] int32 keys
    d_sae,
    num_tiles,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    cols = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    _, keys = _load_keys(values_ptr, mask_ptr, row, cols, cols < d_sae, d_sae, HAS_MASK)
    tl.store(maxima_ptr + row * num_tiles + tiles, tl.max(keys, axis=1), mask=tiles < num_tiles)


@triton.jit
def _load_items(
    values_ptr,
    mask_ptr,
    maxima_ptr,
    tiles_ptr,
    row,
    items,
    num_items,
    d_sae,
    k,
    SOURCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Items of a row, as (number of the item, value, key). See `_select_row_kernel` for SOURCE."""
    valid = items < num_items
    if SOURCE == "maxima":
        keys = tl.load(maxima_ptr + row * num_items + items, mask=valid, other=-0x80000000)
        return items, keys.to(tl.float32), keys
    if SOURCE == "tiles":
        tile = tl.load(tiles_ptr + row * k + items // TILE, mask=valid, other=0).to(tl.int32)
        cols = tile * TILE + items % TILE
        valid = valid & (cols < d_sae)
    else:
        cols = items
    values, keys = _load_keys(values_ptr, mask_ptr, row, cols, valid, d_sae, HAS_MASK)
    return cols, values, keys


@triton.jit
def _select_row_kernel(
    values_ptr,  # [batch, d_sae]
    mask_ptr,  # [d_sae] uint8
    maxima_ptr,  # [batch, num_items] int32, if SOURCE is "maxima"
    tiles_ptr,  # [batch, k] int64 ascending, if SOURCE is "tiles"
    out_values_ptr,  # [batch, k], not written if SOURCE is "maxima"
    out_indices_ptr,  # [batch, k] int64
    num_items,
    d_sae,
    k,
    SOURCE: tl.constexpr,  # "maxima": items are tiles; "tiles": the latents in tiles_ptr; "values": all latents
    HAS_MASK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the first k items by (key descending, item ascending), written in ascending order of the items."""
    row = tl.program_id(0).to(tl.int64)
    # The k-th largest key by bisection: the greatest bound that at least k keys reach. int64, since the difference
    # of two int32 keys overflows int32.
    low = tl.full((), -0x80000000, tl.int64)
    high = tl.full((), 0x7FFFFFFF, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        reached = tl.zeros((), tl.int32)
        for start in range(0, num_items, BLOCK):
            items = start + tl.arange(0, BLOCK)
            _, _, keys = _load_items(
                values_ptr,
                mask_ptr,
                maxima_ptr,
                tiles_ptr,
                row,
                items,
                num_items,
                d_sae,
                k,
                SOURCE,
                HAS_MASK,
                TILE,
            )
            reached += tl.sum((keys >= middle).to(tl.int32), axis=0)
        low = tl.where(reached >= k, middle, low)
        # Exactly k reach it: any bound between the k-th and the next key serves as well as the k-th key itself.
        high = tl.where(reached == k, middle, tl.where(reached > k, high, middle - 1))

    above = tl.zeros((), tl.int32)
    for start in range(0, num_items, BLOCK):
        items = start + tl.arange(0, BLOCK)
        _, _, keys = _load_items(
            values_ptr,
            mask_ptr,
            maxima_ptr,
            tiles_ptr,
            row,
            items,
            num_items,
            d_sae,
            k,
            SOURCE,
            HAS_MASK,
            TILE,
        )
        above += tl.sum((keys > low).to(tl.int32), axis=0)

    written = tl.zeros((), tl.int32)
    ties_seen = tl.zeros((), tl.int32)
    for start in range(0, num_items, BLOCK):
        items = start + tl.arange(0, BLOCK)
        numbers, values, keys = _load_items(
            values_ptr,
            mask_ptr,
            maxima_ptr,
            tiles_ptr,
            row,
            items,
            num_items,
            d_sae,
            k,
            SOURCE,
            HAS_MASK,
            TILE,
        )
        tie = (keys == low).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, axis=0) - tie
        take = (keys > low) | ((tie != 0) & (tie_rank < k - above))
        taken = take.to(tl.int32)
        slots = row * k + written + tl.cumsum(taken, axis=0) - taken
        tl.store(out_indices_ptr + slots, numbers.to(tl.int64), mask=take)
        if SOURCE != "maxima":
            tl.store(out_values_ptr + slots, values.to(out_values_ptr.dtype.element_ty), mask=take)
        written += tl.sum(taken, axis=0)
        ties_seen += tl.sum(tie, axis=0)


@on_its_device
def select_topk(
    values: Tensor, k: int, mask: Tensor | None = None, *, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """Launches the kernels; arguments and result as `bigsae.kernels.topk.select_topk`, which checks them.

    tile: latents to a tile, a power of two.
    """
    values = values.contiguous()
    batch, d_sae = values.shape
    found = torch.empty((batch, k), dtype=values.dtype, device=values.device)
    indices = torch.empty((batch, k), dtype=torch.int64, device=values.device)
    if batch == 0:
        return found, indices
    mask_bytes = (
        values if mask is None else mask.contiguous().view(torch.uint8)
    )  # unused pointers are any tensor
    options = {"HAS_MASK": mask is not None, "TILE": tile}

    def select_rows(maxima: Tensor, tiles: Tensor, out_indices: Tensor, num_items: int, source: str) -> None:
        block = min(triton.next_power_of_2(num_items), _MAX_BLOCK)
        _select_row_kernel[(batch,)](
            values,
            mask_bytes,
            maxima,
            tiles,
            found,
            out_indices,
            num_items,
            d_sae,
            k,
            SOURCE=source,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
            **options,
        )

    num_tiles = triton.cdiv(d_sae, tile)
    if num_tiles <= 2 * k:  # the tiles would keep half the row or more
        select_rows(indices, indices, indices, d_sae, "values")
    else:
        maxima = torch.empty((batch, num_tiles), dtype=torch.int32, device=values.device)
        tiles = torch.empty((batch, k), dtype=torch.int64, device=values.device)
        tiles_per_program = max(1, 2048 // tile)
        grid = (batch, triton.cdiv(num_tiles, tiles_per_program))
        _tile_maxima_kernel[grid](
            values, mask_bytes, maxima, d_sae, num_tiles, TILES=tiles_per_program, **options
        )
        select_rows(maxima, indices, tiles, num_tiles, "maxima")
        select_rows(maxima, tiles, indices, k * tile, "tiles")
    # The winners stand in ascending order of their indices, so a stable sort by value completes the order.
    top_values, order = torch.sort(found, dim=1, descending=True, stable=True)
    return top_values, indices.gather(1, order)
