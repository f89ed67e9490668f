"""TopK encoder: dense matmul through one reused slab, selection, and sparse gradients.

The dense part is left to the BLAS. Pre-activations live in a slab of a few rows, so memory does not grow as
batch * d_sae, and the backward touches only the selected latents.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigsae.kernels.decode import gather_sum
from bigsae.kernels.dispatch import backend
from bigsae.kernels.sparse_grad import LatentMajor, weight_gradient
from bigsae.kernels.topk import select_topk

_SLAB_BYTES = 256 * 2**20
_cpu_slabs = threading.local()
# On CPU in float32 oneDNN's matmul by parts that stay in the cache is faster than BLAS's into the slab: [2048, 576] x
# 16,384 on 2 AVX2 cores takes 299 ms by 256 rows (16 MB, which malloc also gives again without page faults), 334 by
# 128 and 371 by 64, where MKL's takes 347 to 406; and the selection finds what it reads in the cache.
_CACHED_BYTES = 16 * 2**20
_LEAST_ROWS = 128


def _slab(rows: int, d_sae: int, like: Tensor) -> Tensor:
    """An uninitialised [rows, d_sae] in the dtype and on the device of `like`.

    On CPU it is kept for the next step (one per thread, at most about _SLAB_BYTES unless slab_rows asks for more):
    fresh pages for 128 MB cost some 60 ms in page faults, a quarter of the matmul that fills them. CUDA's caching
    allocator does the same by itself.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, d_sae)
    num_bytes = rows * d_sae * like.element_size()
    held = getattr(_cpu_slabs, "bytes", None)
    if held is None or held.numel() < num_bytes:
        held = _cpu_slabs.bytes = torch.empty(num_bytes, dtype=torch.uint8)
    return held[:num_bytes].view(like.dtype).view(rows, d_sae)


def default_slab_rows(d_sae: int, x: Tensor) -> int:
    """As many rows of [batch, d_sae] in the dtype of x as fit in 256 MB, at least one."""
    return max(1, _SLAB_BYTES // (d_sae * x.element_size()))


def cached_rows(d_sae: int, element_size: int, batch: int, slab_rows: int) -> int:
    """Rows of [batch, d_sae] that are multiplied at a time where oneDNN does it; 0 where there would be too few."""
    rows = min(_CACHED_BYTES // (d_sae * element_size), slab_rows)
    return rows if rows >= min(_LEAST_ROWS, batch) > 0 else 0


def _has_onednn(x: Tensor) -> bool:
    """Whether torch's own oneDNN can multiply `x`: CPU, float32."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def pre_acts_by_slab(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, slab_rows: int | None
) -> Iterator[tuple[int, Tensor]]:
    """x @ W_enc.T + b_enc in the dtype of x, no autograd: (first row, [rows, d_sae]) by slabs of up to slab_rows rows.

    A slab is overwritten by the next: take from it what is needed before going on.
    """
    batch, d_sae = x.shape[0], W_enc.shape[0]
    if slab_rows is None:
        slab_rows = default_slab_rows(d_sae, x)
    slab_rows = min(slab_rows, max(batch, 1))
    W_enc, b_enc = W_enc.to(x.dtype), b_enc.to(x.dtype)
    part = cached_rows(d_sae, x.element_size(), batch, slab_rows)
    if part and _has_onednn(x):
        for start in range(0, batch, part):
            chunk = x[start : start + part].contiguous()
            yield start, torch.ops.mkldnn._linear_pointwise(chunk, W_enc, b_enc, "none", [], "")
        return
    slab = _slab(slab_rows, d_sae, x)
    for start in range(0, batch, slab_rows):
        chunk = x[start : start + slab_rows]
        yield start, torch.addmm(b_enc, chunk, W_enc.T, out=slab[: chunk.shape[0]])


def select_pre_acts(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mask: Tensor | None, slab_rows: int | None
) -> tuple[Tensor, Tensor]:
    """The k best pre-activations [batch, k] and their indices; masked latents come last, as -inf. No autograd."""
    if mask is not None and backend(x.device) == "torch":
        return _select_compact(x, W_enc, b_enc, k, mask, slab_rows)
    return _select_of_all(x, W_enc, b_enc, k, mask, slab_rows)


def _select_of_all(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mask: Tensor | None, slab_rows: int | None
) -> tuple[Tensor, Tensor]:
    top_values = x.new_empty(x.shape[0], k)
    top_indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    for start, pre_acts in pre_acts_by_slab(x, W_enc, b_enc, slab_rows):
        stop = start + pre_acts.shape[0]
        top_values[start:stop], top_indices[start:stop] = select_topk(pre_acts, k, mask)
    return top_values, top_indices


def _select_compact(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mask: Tensor, slab_rows: int | None
) -> tuple[Tensor, Tensor]:
    """As `_select_of_all`, from the rows of W_enc that the mask leaves: the same result for less work.

    `nonzero` asks for the number of rows, which on a GPU would be a host synchronisation; on CPU it is free.
    """
    alive = mask.nonzero().squeeze(1)
    k_alive = min(k, alive.numel())
    top_values = x.new_full((x.shape[0], k), float("-inf"))
    top_indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    if k_alive > 0:
        values, indices = _select_of_all(x, W_enc[alive], b_enc[alive], k_alive, None, slab_rows)
        top_values[:, :k_alive], top_indices[:, :k_alive] = values, alive[indices]
    # As in a selection over all latents: ties at -inf go to the lowest index.
    top_indices[:, k_alive:] = (~mask).nonzero().squeeze(1)[: k - k_alive]
    return top_values, top_indices


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        mask: Tensor | None,
        relu: bool,
        slab_rows: int | None,
    ) -> tuple[Tensor, Tensor, LatentMajor]:
        top_acts, top_indices = select_pre_acts(x, W_enc, b_enc, k, mask, slab_rows)
        off = None  # where no gradient passes
        if mask is not None:
            off = ~mask[top_indices]
        if relu:
            off = top_acts <= 0 if off is None else off | (top_acts <= 0)
        if off is not None:
            top_acts.masked_fill_(off, 0)
        pattern = LatentMajor(top_indices, W_enc.shape[0])
        ctx.save_for_backward(x, W_enc, off)
        ctx.pattern = pattern
        ctx.b_enc_dtype = b_enc.dtype
        ctx.mark_non_differentiable(top_indices)
        return top_acts, top_indices, pattern

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, off = ctx.saved_tensors
        pattern: LatentMajor = ctx.pattern
        d_pre = grad_outputs[0]
        if off is not None:
            d_pre = d_pre.masked_fill(off, 0)
        dx = dW_enc = db_enc = None
        if ctx.needs_input_grad[0]:
            dx = gather_sum(d_pre, pattern.top_indices, W_enc, dtype=x.dtype)
        if ctx.needs_input_grad[1]:
            dW_enc = weight_gradient(W_enc, pattern, d_pre, x)
        if ctx.needs_input_grad[2]:
            db_enc = pattern.sums(d_pre, dtype=ctx.b_enc_dtype)
        return dx, dW_enc, db_enc, None, None, None, None


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    """Raises ValueError unless these are [batch, d_in], [d_sae, d_in] and [d_sae]."""
    if x.dim() != 2 or W_enc.dim() != 2 or x.shape[1] != W_enc.shape[1]:
        raise ValueError(
            f"x must be [batch, d_in] and W_enc [d_sae, d_in], got {tuple(x.shape)} and {tuple(W_enc.shape)}"
        )
    if b_enc.shape != W_enc.shape[:1]:
        raise ValueError(f"b_enc must be [{W_enc.shape[0]}], got {tuple(b_enc.shape)}")


def _check_selection(k: int, mask: Tensor | None, d_sae: int) -> None:
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must lie in 1..d_sae = {d_sae}, got {k}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (d_sae,)):
        raise ValueError(f"mask must be bool [{d_sae}], got {mask.dtype} {tuple(mask.shape)}")


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    relu: bool = True,
    slab_rows: int | None = None,
) -> tuple[Tensor, Tensor, LatentMajor]:
    """The k largest of x @ W_enc.T + b_enc in each row, differentiable (once) in x, W_enc and b_enc.

    The gradient is that of the selected entries; clamped ones (top_acts <= 0) pass none. Nothing of the size
    [batch, d_sae] is kept: pre-activations pass through a slab of slab_rows rows, and gradients are sparse.

    Args:
        x: [batch, d_in]. The matmul runs in its dtype; W_enc and b_enc are cast to it where theirs differ.
        W_enc: [d_sae, d_in], contiguous.
        b_enc: [d_sae].
        k: how many latents a token selects, 1 <= k <= d_sae.
        mask: [d_sae] bool; only latents where it is True are selected (dead ones, for AuxK). It may leave fewer than
            k: the entries beyond have act 0, a valid index of some other latent, and no gradient.
        relu: clamp the selected values at zero.
        slab_rows: rows of the slab; by default as many as fit in 256 MB.

    Returns:
        top_acts [batch, k] in the dtype of x and top_indices [batch, k] int64, ordered by (pre-activation
        descending, latent ascending), and the LatentMajor of these indices, to hand to `sparse_decode`. Gradients
        are accumulated in float32 and come in the dtypes of their inputs, that of W_enc in its `gradient_dtype`.

    Raises:
        ValueError: if shapes or k do not fit, or mask is not bool [d_sae].
    """
    check_encoder(x, W_enc, b_enc)
    _check_selection(k, mask, W_enc.shape[0])
    if slab_rows is not None and slab_rows < 1:
        raise ValueError(f"slab_rows must be at least 1, got {slab_rows}")
    return _TopKEncode.apply(x, W_enc, b_enc, k, mask, relu, slab_rows)  # pyright: ignore[reportReturnType]
