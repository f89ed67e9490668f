"""TopK encoder: dense matmul through one reused slab, selection, and sparse gradients.

The dense part is left to the BLAS. Pre-activations live in a slab of a few rows, so memory does not grow as
batch * d_sae, and the backward touches only the selected latents.
"""

import threading
from collections.abc import Iterator, Sequence
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
# Of a slab, from which the columns of a mask are taken at a time.
_ROWS_AT_ONCE = 256


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
    if slab_rows is not None and slab_rows < 1:
        raise ValueError(f"slab_rows must be at least 1, got {slab_rows}")
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


class Selection:
    """The k largest pre-activations of each token, taken from one slab after the other.

    Several selections take from the same slabs: AuxK's of dead latents wants no matmul of its own.

    Attributes:
        k: how many latents of all ranks.
        values: [batch, columns] in the dtype of the tokens, -inf where no more latents may be selected; with `columns`
            k, or d_own where a rank of several holds fewer latents.
        latents: [batch, columns] int64, the latents of these values.
    """

    def __init__(
        self, k: int, columns: int | None = None, mask: Tensor | None = None, *, ordered: bool = True
    ) -> None:
        """`mask` [d_own] bool: the latents that may be selected. `ordered`: each token's largest first."""
        self.k, self.mask = k, mask
        self._columns, self._ordered = columns or k, ordered
        self._num_left, self._left = self._columns, None
        if mask is not None and backend(mask.device) == "torch":
            # `nonzero` asks for a number, which on a GPU would be a host synchronisation; on CPU it is free.
            self._left = mask.nonzero().squeeze(1)
            self._num_left = min(len(self._left), self._columns)

    def begin(self, x: Tensor) -> None:
        """Room for the tokens `x` [batch, d_in]."""
        self.values = x.new_empty(len(x), self._columns)
        self.latents = torch.empty(len(x), self._columns, dtype=torch.int64, device=x.device)
        self._num_taken = 0
        if self._num_left < self._columns:
            assert self.mask is not None
            self.values.fill_(float("-inf"))
            # As in a selection over all latents: ties at -inf go to the lowest index.
            self.latents[:, self._num_left :] = (~self.mask).nonzero()[: self._columns - self._num_left, 0]

    def take(self, pre_acts: Tensor) -> None:
        """The next tokens' pre_acts [rows, d_own]."""
        for block in pre_acts.split(_ROWS_AT_ONCE if self._left is not None else max(len(pre_acts), 1)):
            rows = slice(self._num_taken, self._num_taken + len(block))
            self._num_taken = rows.stop
            if self._left is None:
                values, latents = select_topk(block, self._columns, self.mask, ordered=self._ordered)
            elif self._num_left:
                values, latents = select_topk(
                    block.index_select(1, self._left), self._num_left, ordered=self._ordered
                )
                latents = self._left[latents]
            else:
                continue
            self.values[rows, : self._num_left], self.latents[rows, : self._num_left] = values, latents

    def off(self) -> Tensor | None:
        """[batch, columns] bool: where a latent stands that may not be selected. None where there is none."""
        if self.mask is None or (self._left is not None and self._num_left == self._columns):
            return None
        return ~self.mask[self.latents]


@torch.no_grad()
def select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, selections: Sequence[Selection], slab_rows: int | None = None
) -> None:
    """Fill `selections` from x @ W_enc.T + b_enc, which passes through a slab of slab_rows rows (by default 256 MB).

    Args:
        x: [batch, d_in]. The matmul runs in its dtype; W_enc [d_own, d_in] and b_enc [d_own] are cast to it.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_encoder(x, W_enc, b_enc)
    for selection in selections:
        selection.begin(x)
    for _, pre_acts in pre_acts_by_slab(x, W_enc, b_enc, slab_rows):
        for selection in selections:
            selection.take(pre_acts)


class _AttachTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        pattern: LatentMajor,
        off: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, off)
        ctx.pattern, ctx.b_enc_dtype = pattern, b_enc.dtype
        return values.view_as(values) if off is None else values.masked_fill(off, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, off = ctx.saved_tensors
        pattern: LatentMajor = ctx.pattern
        d_pre = grad_outputs[0]
        if off is not None:
            d_pre = d_pre.masked_fill(off, 0)
        dx = dW_enc = db_enc = None
        if ctx.needs_input_grad[1]:
            dx = gather_sum(d_pre, pattern.top_indices, W_enc, dtype=x.dtype)
        if ctx.needs_input_grad[2]:
            dW_enc = weight_gradient(W_enc, pattern, d_pre, x)
        if ctx.needs_input_grad[3]:
            db_enc = pattern.sums(d_pre, dtype=ctx.b_enc_dtype)
        return None, dx, dW_enc, db_enc, None, None


def attach_selection(
    selection: Selection, x: Tensor, W_enc: Tensor, b_enc: Tensor, relu: bool
) -> tuple[Tensor, LatentMajor]:
    """The acts [batch, k] of a filled selection, differentiable as those of `topk_encode`, and their LatentMajor."""
    off = selection.off()
    if relu:
        negative = selection.values <= 0
        off = negative if off is None else off | negative
    pattern = LatentMajor(selection.latents, W_enc.shape[0])
    acts = _AttachTopK.apply(selection.values, x, W_enc, b_enc, pattern, off)
    return acts, pattern  # pyright: ignore[reportReturnType]


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    """Raises ValueError unless these are [batch, d_in], [d_sae, d_in] and [d_sae]."""
    if x.dim() != 2 or W_enc.dim() != 2 or x.shape[1] != W_enc.shape[1]:
        raise ValueError(
            f"x must be [batch, d_in] and W_enc [d_sae, d_in], got {tuple(x.shape)} and {tuple(W_enc.shape)}"
        )
    if b_enc.shape != W_enc.shape[:1]:
        raise ValueError(f"b_enc must be [{W_enc.shape[0]}], got {tuple(b_enc.shape)}")


def check_selection(k: int, mask: Tensor | None, d_sae: int) -> None:
    """Raises ValueError unless k lies in 1..d_sae and mask is None or bool [d_sae]."""
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
    check_selection(k, mask, W_enc.shape[0])
    selection = Selection(k, mask=mask)
    select(x, W_enc, b_enc, [selection], slab_rows)
    acts, pattern = attach_selection(selection, x, W_enc, b_enc, relu)
    return acts, selection.latents, pattern
