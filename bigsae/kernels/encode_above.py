"""Encoder of a varying number of latents per token: all pre-activations above a bound, and their sparse gradients.

The dense part goes through the one reused slab of `encode.py`, so memory does not grow as batch * d_sae.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigsae.kernels.dispatch import use_triton
from bigsae.kernels.encode import check_encoder, pre_acts_by_slab
from bigsae.kernels.pairs import DensePairs, RaggedPairs, gather_sum
from bigsae.kernels.sparse_grad import weight_gradient

# On a Zen 4 core, [2048, 16384] with 32 above in each row: 31 ms, whatever the bounds, where the matmul takes 424 and
# `nonzero` of all comparisons 180. Maxima of tiles (topk.py) take 23 if all bounds are equal, 75 if they vary.
_ROWS_PER_BLOCK = 64
_EIGHT_TRUE = 0x0101010101010101


def _round_down(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest values of this dtype that are at most `bound`: above it lie the same values of this dtype."""
    rounded = bound.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, float("-inf")))
    return torch.where(rounded > bound, below, rounded)


def _compact_block(pre_acts: Tensor, bound: Tensor, below: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `compact_above`. `below`: bool [at least rows, d_sae or more], for use here, True beyond d_sae.

    Eight bools are looked at as one integer: few of them hold a pair.
    """
    rows, d_sae = pre_acts.shape
    below = below[:rows]
    torch.le(pre_acts, bound, out=below[:, :d_sae])  # False for NaN
    eights = (below.view(torch.int64) != _EIGHT_TRUE).view(-1).nonzero().squeeze(1)
    found, place = below.view(-1, 8)[eights].logical_not_().nonzero(as_tuple=True)
    flat = eights[found] * 8 + place
    tokens = flat // below.shape[1]
    latents = flat - tokens * below.shape[1]
    values = pre_acts.view(-1)[tokens * d_sae + latents]
    return values, latents, torch.bincount(tokens, minlength=rows)


def compact_above(pre_acts: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values [n] and latents [n] int64 of the entries of [rows, d_sae] above bound [d_sae], and counts [rows] int64."""
    if use_triton(pre_acts, bound):
        from bigsae.kernels import ragged_triton

        return ragged_triton.compact_above(pre_acts, bound)
    width = -(-pre_acts.shape[1] // 8) * 8
    below = torch.ones(_ROWS_PER_BLOCK, width, dtype=torch.bool, device=pre_acts.device)
    # Nothing exceeds a NaN.
    bound = _round_down(bound.nan_to_num(float("inf"), float("inf"), float("-inf")), pre_acts.dtype)
    parts = [_compact_block(block, bound, below) for block in pre_acts.split(_ROWS_PER_BLOCK)]
    values, latents, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, latents, counts


@torch.no_grad()
def find_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, bound: Tensor, *, slab_rows: int | None = None
) -> tuple[Tensor, RaggedPairs]:
    """All pairs whose pre-activation x @ W_enc.T + b_enc lies above the bound, without autograd.

    Args:
        x: [batch, d_in]. The matmul runs in its dtype, as in `topk_encode`.
        W_enc: [d_sae, d_in], contiguous.
        b_enc: [d_sae].
        bound: [] or [d_sae], float; a pair is above if pre_act > bound, or if pre_act is NaN, so that it reaches the
            loss. Compared without rounding.
        slab_rows: rows of the slab; by default as many as fit in 256 MB.

    Returns:
        The pre-activations [num_pairs] in the dtype of x, and their pairs.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_encoder(x, W_enc, b_enc)
    d_sae = W_enc.shape[0]
    if bound.shape not in ((), (d_sae,)):
        raise ValueError(f"bound must be [] or [{d_sae}], got {tuple(bound.shape)}")
    bound = bound.expand(d_sae).contiguous()
    parts = [compact_above(pre_acts, bound) for _, pre_acts in pre_acts_by_slab(x, W_enc, b_enc, slab_rows)]
    if not parts:
        parts = [(x.new_empty(0), *torch.empty(2, 0, dtype=torch.int64, device=x.device))]
    values, latents, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, RaggedPairs(latents, F.pad(counts.cumsum(0), (1, 0)), d_sae)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: RaggedPairs
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.pairs, ctx.b_enc_dtype = pairs, b_enc.dtype
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        pairs: RaggedPairs = ctx.pairs
        d_pre = grad_outputs[0]
        dx = dW_enc = db_enc = None
        if ctx.needs_input_grad[1]:
            dx = gather_sum(d_pre, pairs, W_enc, dtype=x.dtype)
        if ctx.needs_input_grad[2]:
            dW_enc = weight_gradient(W_enc, pairs.latent_major, d_pre, x)
        if ctx.needs_input_grad[3]:
            db_enc = pairs.latent_major.sums(d_pre, dtype=ctx.b_enc_dtype)
        return None, dx, dW_enc, db_enc, None


def attach(values: Tensor, pairs: RaggedPairs, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """`values` with the gradient (once) of x @ W_enc.T + b_enc at `pairs`; nothing of the size [batch, d_sae].

    Args:
        values: [num_pairs], the pre-activations at pairs, as `find_above` gives them; itself it gets no gradient.
        x: [batch, d_in]; W_enc: [d_sae, d_in]; b_enc: [d_sae].

    Returns:
        values. Gradients are accumulated in float32 (float64 for float64) and come in the dtypes of their inputs, that
        of W_enc in its `gradient_dtype`.
    """
    if values.shape != pairs.latents.shape or x.shape[0] != pairs.batch or W_enc.shape[0] != pairs.d_sae:
        raise ValueError(
            f"values {tuple(values.shape)}, x {tuple(x.shape)} and W_enc {tuple(W_enc.shape)} do not fit "
            f"{pairs.num_pairs} pairs of {pairs.batch} tokens and {pairs.d_sae} latents"
        )
    return _Attach.apply(values, x, W_enc, b_enc, pairs)  # pyright: ignore[reportReturnType]


def encode_above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, bound: Tensor, *, slab_rows: int | None = None
) -> tuple[Tensor, RaggedPairs]:
    """The pre-activations above the bound and their pairs, as `find_above`, with the gradient of `attach`."""
    values, pairs = find_above(x, W_enc, b_enc, bound, slab_rows=slab_rows)
    return attach(values, pairs, x, W_enc, b_enc), pairs


def encode_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, DensePairs]:
    """All pre-activations x @ W_enc.T + b_enc, [batch, d_sae] in the dtype of x, differentiable; and their pairs."""
    check_encoder(x, W_enc, b_enc)
    pre_acts = F.linear(x, W_enc.to(x.dtype), b_enc.to(x.dtype))
    return pre_acts, DensePairs(x.shape[0], W_enc.shape[0])
