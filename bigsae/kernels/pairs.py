"""The (token, latent) pairs on which a step computes: all of them, or for each token some.

An objective is written once, elementwise on values of pairs: `[batch, d_sae]` with DensePairs, `[num_pairs]` with
RaggedPairs. Both have the same methods.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigsae.kernels.dispatch import use_triton
from bigsae.kernels.sparse_grad import LatentMajor, RaggedLatentMajor, weight_gradient


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of this dtype are summed: int64 for integers and bool, else float32 or float64."""
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32


class DensePairs:
    """Every pair: values are [batch, d_sae]."""

    def __init__(self, batch: int, d_sae: int) -> None:
        self.batch = batch
        self.d_sae = d_sae

    def spread(self, vector: Tensor) -> Tensor:
        """[batch, d_sae]: vector[latent] of each pair, differentiable."""
        return vector.expand(self.batch, self.d_sae)

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        """[batch, d_out] = values @ weight, differentiable, in the wider dtype of values and weight [d_sae, d_out]."""
        dtype = torch.promote_types(values.dtype, weight.dtype)
        return values.to(dtype) @ weight.to(dtype)

    def latent_sums(self, values: Tensor) -> Tensor:
        """[d_sae]: sums over the tokens, int64 for integers and bool, else float32 (float64); not differentiable."""
        return values.detach().sum(0, dtype=accumulator(values.dtype))

    def token_sums(self, values: Tensor) -> Tensor:
        """[batch]: sums over a token's pairs, differentiable; dtypes as in `latent_sums`."""
        return values.sum(1, dtype=accumulator(values.dtype))


class RaggedPairs:
    """Some pairs of each token: values are [num_pairs], token by token, latents ascending in a token.

    Attributes:
        latents: [num_pairs] int64, the latent of each pair.
        crow: [batch + 1] int64: the pairs of token t are crow[t]..crow[t + 1].
        d_sae: the number of latents.
    """

    def __init__(self, latents: Tensor, crow: Tensor, d_sae: int) -> None:
        if latents.dim() != 1 or crow.dim() != 1 or latents.dtype != torch.int64 or crow.dtype != torch.int64:
            raise ValueError(
                f"latents must be int64 [num_pairs] and crow int64 [batch + 1], got {latents.dtype} "
                f"{tuple(latents.shape)} and {crow.dtype} {tuple(crow.shape)}"
            )
        self.latents = latents
        self.crow = crow
        self.d_sae = d_sae
        self._same_latents: RaggedPairs | None = None

    @property
    def batch(self) -> int:
        return self.crow.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        return self.latents.shape[0]

    @functools.cached_property
    def tokens(self) -> Tensor:
        """[num_pairs] int64: the token of each pair."""
        tokens = torch.arange(self.batch, device=self.crow.device)
        return torch.repeat_interleave(tokens, self.crow.diff(), output_size=self.num_pairs)

    @functools.cached_property
    def latent_major(self) -> LatentMajor:
        """The pairs in latent-major order: one sort for every gradient and every sum."""
        sorted_as = None if self._same_latents is None else self._same_latents.latent_major
        return RaggedLatentMajor(self.latents, self.tokens, self.batch, self.d_sae, sorted_as)

    def select(self, keep: Tensor) -> "RaggedPairs":
        """The pairs where keep, bool [num_pairs], is True. Their values are values[keep]."""
        num_kept = F.pad(keep.cumsum(0), (1, 0))
        return RaggedPairs(self.latents[keep], num_kept[self.crow], self.d_sae)

    def split(self, prefixes: Sequence[int]) -> "RaggedPairs":
        """The same pairs in batch * G rows: row t * G + g has those of token t in [prefixes[g - 1], prefixes[g]).

        Args:
            prefixes: G ascending numbers of latents, the last of them d_sae.
        """
        if not prefixes or prefixes[-1] != self.d_sae or any(a > b for a, b in pairwise(prefixes)):
            raise ValueError(f"prefixes must ascend to d_sae = {self.d_sae}, got {list(prefixes)}")
        bounds = torch.tensor(prefixes, device=self.latents.device)
        rows = self.tokens * len(prefixes) + torch.bucketize(self.latents, bounds, right=True)
        starts = torch.arange(self.batch * len(prefixes) + 1, device=rows.device)
        parts = RaggedPairs(self.latents, torch.searchsorted(rows, starts), self.d_sae)
        parts._same_latents = self
        return parts

    def spread(self, vector: Tensor) -> Tensor:
        """[num_pairs]: vector[latent] of each pair, differentiable."""
        return _Spread.apply(vector, self)  # pyright: ignore[reportReturnType]

    def decode(self, values: Tensor, weight: Tensor) -> Tensor:
        """[batch, d_out]: the sum over a token's pairs of value * weight[latent], differentiable (once).

        Args:
            values: [num_pairs], float.
            weight: [d_sae, d_out], float.

        Returns:
            The sums in the wider dtype of values and weight, accumulated in float32 (float64 for float64). The
            gradients come in the dtypes of their inputs, that of weight in its `gradient_dtype`.
        """
        if values.shape != self.latents.shape or weight.shape[:1] != (self.d_sae,):
            raise ValueError(
                f"decode wants values [{self.num_pairs}] and weight [{self.d_sae}, d_out], got "
                f"{tuple(values.shape)} and {tuple(weight.shape)}"
            )
        return _Decode.apply(values, weight, self)  # pyright: ignore[reportReturnType]

    def latent_sums(self, values: Tensor) -> Tensor:
        """[d_sae]: sums over the tokens, int64 for integers and bool, else float32 (float64); not differentiable."""
        values = values.detach()
        if not values.dtype.is_floating_point:
            sums = torch.zeros(self.d_sae, dtype=torch.int64, device=values.device)
            return sums.index_add_(0, self.latents, values.long())  # integers: exact in any order
        return self.latent_major.sums(values, dtype=accumulator(values.dtype))

    def token_sums(self, values: Tensor) -> Tensor:
        """[batch]: sums over a token's pairs, differentiable; dtypes as in `latent_sums`."""
        if not values.dtype.is_floating_point:
            return F.pad(values.cumsum(0), (1, 0))[self.crow].diff()
        return _TokenSums.apply(values, self)  # pyright: ignore[reportReturnType]


def gather_sum(coefficients: Tensor, pairs: RaggedPairs, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[batch, d_out]: the sum over a token's pairs of coefficient * weight[latent]; no autograd.

    Args:
        coefficients: [num_pairs]; weight: [d_sae, d_out].
        dtype: of the result; sums are accumulated in float32 (float64 for float64).
    """
    if use_triton(coefficients, weight):
        from bigsae.kernels import ragged_triton

        return ragged_triton.gather_sum(coefficients, pairs.latents, pairs.crow, weight, dtype)
    # embedding_bag wants one dtype, that of its result; it accumulates in float32 for bfloat16.
    wide = functools.reduce(torch.promote_types, (coefficients.dtype, weight.dtype, dtype))
    sums = F.embedding_bag(
        pairs.latents,
        weight.to(wide),
        pairs.crow,
        mode="sum",
        per_sample_weights=coefficients.to(wide),
        include_last_offset=True,
    )
    return sums.to(dtype)


def gather_dot(dense: Tensor, pairs: RaggedPairs, weight: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[num_pairs]: dense[token] . weight[latent] of each pair; no autograd, no [num_pairs, d_out].

    Args:
        dense: [batch, d_out]; weight: [d_sae, d_out].
        dtype: of the result; dot products are accumulated in float32 (float64 for float64).
    """
    if use_triton(dense, weight):
        from bigsae.kernels import ragged_triton

        return ragged_triton.gather_dot(dense, weight, pairs.latents, pairs.crow, dtype)
    wide = functools.reduce(torch.promote_types, (dense.dtype, weight.dtype, dtype))
    # As in decode.py: the backward of embedding_bag for its per_sample_weights is just this.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dense.to(wide).contiguous(),
        weight.to(wide),
        pairs.latents,
        pairs.crow[:-1],
        pairs.tokens,
        0,  # mode: sum
    )
    return dots.to(dtype)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pairs: RaggedPairs) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pairs = pairs
        return gather_sum(values, pairs, weight, dtype=torch.promote_types(values.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        pairs: RaggedPairs = ctx.pairs
        d_out = grad_outputs[0]
        d_values = d_weight = None
        if ctx.needs_input_grad[0]:
            d_values = gather_dot(d_out, pairs, weight, dtype=values.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(weight, pairs.latent_major, values, d_out)
        return d_values, d_weight, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, pairs: RaggedPairs) -> Tensor:
        ctx.pairs = pairs
        return vector[pairs.latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_values = grad_outputs[0]
        return ctx.pairs.latent_major.sums(d_values, dtype=d_values.dtype), None


class _TokenSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pairs: RaggedPairs) -> Tensor:
        ctx.pairs, ctx.dtype = pairs, values.dtype
        wide = values.to(accumulator(values.dtype))
        # unsafe: the checks of the offsets would synchronise with the host.
        return torch.segment_reduce(wide, "sum", offsets=pairs.crow, initial=0, unsafe=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0][ctx.pairs.tokens].to(ctx.dtype), None
