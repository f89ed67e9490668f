"""BatchTopK encoder (Bussmann et al. 2024, arXiv 2412.06410): the largest pre-activations of the global batch.

A lower bound of the smallest that is kept is guessed, only pre-activations above it leave the slab, and of these the
largest of all ranks are selected. Where the guess was too high, a lower one is tried: the result does not depend on it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigsae.kernels.encode import Selection, check_encoder, pre_acts_by_slab
from bigsae.kernels.encode_above import attach, compact_above
from bigsae.kernels.global_topk import Ranks, select_global
from bigsae.kernels.pairs import RaggedPairs

_NUM_SAMPLED = 2**21  # pre-activations, of which a first bound is estimated


def _estimate_smallest(x: Tensor, W_enc: Tensor, b_enc: Tensor, num_keep: int, ranks: Ranks) -> Tensor:
    """About the smallest value that will be kept ([], the same on all ranks), from some tokens of each rank."""
    batch, d_sae = x.shape[0], W_enc.shape[0]
    global_batch = int(ranks.sum_(torch.tensor([batch], device=x.device)))
    totals = torch.zeros(2, device=x.device)
    if batch > 0:
        sample = x[:: -(-batch * d_sae // _NUM_SAMPLED)]
        pre_acts = F.linear(sample, W_enc.to(x.dtype), b_enc.to(x.dtype)).flatten().float()
        k = max(1, num_keep * sample.shape[0] // global_batch)
        kth = torch.topk(pre_acts, min(k, pre_acts.numel())).values[-1]
        totals = torch.stack((kth.nan_to_num(0.0), (~kth.isnan()).float()))
    kth_sum, num_estimates = ranks.sum_(totals)
    return kth_sum / num_estimates.clamp(min=1)


def _bounds(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, num_keep: int, guess: Tensor | None, ranks: Ranks
) -> Iterator[Tensor]:
    """Ever lower bounds [], the last one 0; the same on all ranks."""
    bound = None
    if guess is not None:
        bound = (0.9 * guess.detach().float()).nan_to_num(0.0).clamp(min=0)
        yield bound
    estimate = (0.8 * _estimate_smallest(x, W_enc, b_enc, num_keep, ranks)).clamp(min=0)
    bound = estimate if bound is None else torch.minimum(estimate, bound / 2)
    yield bound
    yield bound / 2
    yield torch.zeros_like(bound)


def _join(parts: list[tuple[Tensor, Tensor, Tensor]], d_sae: int) -> tuple[Tensor, RaggedPairs]:
    values, latents, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, RaggedPairs(latents, F.pad(counts.cumsum(0), (1, 0)), d_sae)


def _find_candidates(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    bound: Tensor,
    num_keep: int,
    slab_rows: int | None,
    selections: Sequence[Selection],
) -> tuple[Tensor, RaggedPairs]:
    """As `find_above`, but of more than num_keep pairs it may leave out what the num_keep first of them precede.

    So memory is bounded also where the bound is far too low, or everything NaN.
    """
    d_sae = W_enc.shape[0]
    bound = bound.expand(d_sae).contiguous()
    no_pairs, no_counts = torch.empty(2, 0, dtype=torch.int64, device=x.device)
    for selection in selections:
        selection.begin(x)
    parts, num_held = [(x.new_empty(0), no_pairs, no_counts)], 0
    for _, pre_acts in pre_acts_by_slab(x, W_enc, b_enc, slab_rows):
        if num_held > 4 * num_keep:
            values, pairs = _join(parts, d_sae)
            keep, _ = select_global(values, pairs.latents, num_keep, d_sae, Ranks())
            pairs = pairs.select(keep)
            parts, num_held = [(values[keep], pairs.latents, pairs.crow.diff())], num_keep
        for selection in selections:
            selection.take(pre_acts)
        parts.append(compact_above(pre_acts, bound))
        num_held += parts[-1][0].numel()
    return _join(parts, d_sae)


@torch.no_grad()
def _select(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    num_keep: int,
    guess: Tensor | None,
    ranks: Ranks,
    first: int,
    slab_rows: int | None,
    selections: Sequence[Selection],
) -> tuple[Tensor, RaggedPairs, Tensor]:
    for bound in _bounds(x, W_enc, b_enc, num_keep, guess, ranks):
        values, pairs = _find_candidates(x, W_enc, b_enc, bound, num_keep, slab_rows, selections)
        selections = ()  # filled
        num_found = int(ranks.sum_(torch.tensor([values.numel()], device=x.device)))
        if num_found >= num_keep or float(bound) == 0:
            break
    # At least as many as there are: it decides no more than how many digits are looked at.
    d_sae = W_enc.shape[0] * ranks.num_ranks
    keep, smallest = select_global(values, first + pairs.latents, num_keep, d_sae, ranks)
    return values[keep], pairs.select(keep), smallest


def batchtopk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    num_keep: int,
    guess: Tensor | None,
    ranks: Ranks,
    *,
    first: int = 0,
    slab_rows: int | None = None,
    selections: Sequence[Selection] = (),
) -> tuple[Tensor, RaggedPairs, Tensor]:
    """The num_keep largest positive x @ W_enc.T + b_enc of all ranks' tokens, differentiable (once).

    Of equal ones the lower latents are kept, and of one latent's the earlier tokens; a rank's tokens come before those
    of the next rank. Nothing of the size [batch, d_sae] is kept: pre-activations pass through a slab of slab_rows rows,
    and gradients are sparse.

    Args:
        x: [batch, d_in], this rank's tokens. The matmul runs in its dtype; W_enc and b_enc are cast to it.
        W_enc: [d_sae, d_in], contiguous; b_enc: [d_sae]: those of all latents, or a part of them, as many on all ranks.
        num_keep: how many of all ranks' together; fewer are kept where fewer are positive. NaN counts as the largest.
        guess: [], the same on all ranks: about the smallest value that will be kept, such as that of the previous step.
            Estimated where it is None. It decides the work to be done, not the result.
        ranks: who selects together.
        first: number of this rank's first latent among all latents, where it holds a part of them.
        slab_rows: rows of the slab; by default as many as fit in 256 MB.
        selections: filled from the same pre-activations, as by `select`.

    Returns:
        acts [num_pairs] in the dtype of x, the pairs of this rank that are kept, and the smallest value that any rank
        keeps (float32 [], 0 where none is kept). Gradients are as those of `attach`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_encoder(x, W_enc, b_enc)
    values, pairs, smallest = _select(x, W_enc, b_enc, num_keep, guess, ranks, first, slab_rows, selections)
    return attach(values, pairs, x, W_enc, b_enc), pairs, smallest
