"""Gradients of latent-major weights from a step's selected latents: one sort, used for every matrix and bias."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bigsae.kernels.dispatch import use_triton

# Elements of a gradient's float32 rows that exist at a time where the gradient itself is of another dtype.
_WIDE_ELEMENTS = 2**18


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight takes its gradient: its `grad_dtype` where it is a parameter that has one."""
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


def add_in_place(weight: Tensor) -> None:
    """Have this module's gradients of the parameter `weight` made in, or added to, its `grad`, from now on.

    Autograd adds up the gradients of a weight's uses when they all exist, each as large as the weight.
    """
    weight.adds_in_place = True  # pyright: ignore[reportAttributeAccessIssue]


def _in_place(weight: Tensor) -> bool:
    return getattr(weight, "adds_in_place", False)


def gradient_sum(weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """For a backward that adds up a gradient of `weight` itself: what it returns to autograd, and what it adds to."""
    total = weight.grad if _in_place(weight) else None
    if total is None:
        total = torch.zeros_like(weight, dtype=gradient_dtype(weight))
    if not _in_place(weight):
        return total, total
    weight.grad = total
    return None, total


def weight_gradient(
    weight: Tensor, pattern: "LatentMajor", coefficients: Tensor, dense: Tensor
) -> Tensor | None:
    """For a backward: the `rows` of `pattern` as the gradient of `weight`, None where they are in its `grad`."""
    if not _in_place(weight):
        return pattern.rows(coefficients, dense, dtype=gradient_dtype(weight))
    if weight.grad is None:
        weight.grad = pattern.rows(coefficients, dense, dtype=gradient_dtype(weight))
    else:
        pattern.rows(coefficients, dense, add_to=weight.grad)
    return None


class LatentMajor:
    """The selected (token, latent) pairs of a step in latent-major order, sorted once, when first asked for.

    One object serves the encoder's and the decoder's gradients, the biases' and the counts. The sort is stable, so
    the pairs of a latent stand in the order of their tokens and every sum has a fixed order: no atomics, the same
    bits on every run.

    Attributes:
        top_indices: [batch, k] int64, each in 0..d_sae-1.
        batch: the number of tokens.
        d_sae: the number of rows of what `rows` and `sums` return.
    """

    def __init__(self, top_indices: Tensor, d_sae: int) -> None:
        if top_indices.dim() != 2 or top_indices.dtype != torch.int64:
            raise ValueError(
                f"top_indices must be int64 [batch, k], got {top_indices.dtype} {tuple(top_indices.shape)}"
            )
        self.top_indices = top_indices.detach()
        self.batch = top_indices.shape[0]
        self.d_sae = d_sae

    @functools.cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        # int32 keys halve the passes of the radix sort; a latent index always fits.
        return torch.sort(self.top_indices.flatten().int(), stable=True)

    @property
    def latents(self) -> Tensor:
        """[batch * k] int32: the latent of each pair, ascending."""
        return self._sorted[0]

    @property
    def order(self) -> Tensor:
        """[batch * k] int64: where each pair of the sorted list stands in the flattened [batch, k]."""
        return self._sorted[1]

    @functools.cached_property
    def tokens(self) -> Tensor:
        """[batch * k] int64: the token of each pair of the sorted list."""
        return self.order // max(self.top_indices.shape[1], 1)

    @functools.cached_property
    def crow(self) -> Tensor:
        """[d_sae + 1] int64: the pairs of latent l are crow[l]..crow[l + 1] of the sorted list."""
        bounds = torch.arange(self.d_sae + 1, dtype=torch.int32, device=self.top_indices.device)
        # Not bincount: on CUDA that synchronises with the host, and adds by atomics.
        return torch.searchsorted(self.latents, bounds)

    @property
    def counts(self) -> Tensor:
        """[d_sae] int64: how many pairs each latent has. A clamped (zero) selected value counts as well."""
        return self.crow.diff()

    def rows(
        self,
        coefficients: Tensor,
        dense: Tensor,
        *,
        dtype: torch.dtype | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """The gradient of a latent-major matrix.

        Args:
            coefficients: [batch, k], one for each selected latent.
            dense: [batch, d_in].
            dtype: of the result; by default the wider of the two inputs'.
            add_to: [d_sae, d_in], which the result, in float32 before it is rounded, is added to and which is
                returned.

        Returns:
            [d_sae, d_in]: out[l] = sum over (b, j) with top_indices[b, j] == l of coefficients[b, j] * dense[b],
            accumulated in float32 (float64 for float64) in ascending order of (b, j). Unselected latents get zeros.

        Raises:
            ValueError: if the shapes do not fit top_indices.
        """
        if coefficients.shape != self.top_indices.shape or dense.shape[0] != self.batch:
            raise ValueError(
                f"coefficients {tuple(coefficients.shape)} and dense {tuple(dense.shape)} do not fit top_indices "
                f"{tuple(self.top_indices.shape)}"
            )
        if add_to is not None:
            dtype = add_to.dtype
        dtype = dtype or torch.promote_types(coefficients.dtype, dense.dtype)
        if use_triton(coefficients, dense):
            from bigsae.kernels import sparse_grad_triton

            return sparse_grad_triton.latent_rows(self, coefficients, dense, dtype, add_to=add_to)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        coefficients = coefficients.flatten().index_select(0, self.order).to(wide)
        dense = dense.to(wide)
        if dtype == wide and add_to is None:
            return _bags(self.tokens, dense, self.crow, coefficients)
        out = add_to
        if out is None:
            out = torch.zeros(self.d_sae, dense.shape[1], dtype=dtype, device=dense.device)
        self._add_rows(out, coefficients, dense)
        return out

    def _add_rows(self, out: Tensor, coefficients: Tensor, dense: Tensor) -> None:
        """Add to `out` the rows of those latents that have pairs (of AuxK's, a few), some of them at a time."""
        latents = self.counts.nonzero().squeeze(1)
        bounds = torch.cat((self.crow[latents], self.crow[-1:]))
        ends = bounds.tolist()
        size = max(_WIDE_ELEMENTS // max(dense.shape[1], 1), 1)
        for first in range(0, len(latents), size):
            own = latents[first : first + size]
            start, stop = ends[first], ends[first + len(own)]
            rows = _bags(
                self.tokens[start:stop],
                dense,
                bounds[first : first + len(own) + 1] - start,
                coefficients[start:stop],
            )
            if out.dtype == rows.dtype:
                out.index_add_(0, own, rows)
            else:  # in float32 before it is rounded
                rows += out.index_select(0, own)
                out.index_copy_(0, own, rows.to(out.dtype))

    def sums(self, coefficients: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """[d_sae]: the sum of each latent's coefficients ([batch, k]); a bias gradient. See `rows`."""
        ones = coefficients.new_ones(self.batch, 1)
        return self.rows(coefficients, ones, dtype=dtype).squeeze(1)


def _bags(tokens: Tensor, dense: Tensor, crow: Tensor, coefficients: Tensor) -> Tensor:
    """A bag per latent. Of the stock ops this is the fastest: half the time of a CSR matmul by MKL."""
    return F.embedding_bag(
        tokens, dense, crow, mode="sum", per_sample_weights=coefficients, include_last_offset=True
    )


class RaggedLatentMajor(LatentMajor):
    """The same where tokens have varying numbers of latents: num_pairs pairs, token by token, for the batch * k.

    Coefficients, and the top_indices, are then [num_pairs].
    """

    def __init__(
        self, latents: Tensor, tokens: Tensor, batch: int, d_sae: int, sorted_as: LatentMajor | None = None
    ) -> None:
        """`latents` and `tokens` of each pair, [num_pairs] int64. `sorted_as`: of the same latents, sorted already."""
        self.top_indices = latents.detach()
        self.batch = batch
        self.d_sae = d_sae
        if sorted_as is not None:
            self._sorted, self.crow = sorted_as._sorted, sorted_as.crow
        self.tokens = tokens[self.order]
