"""The largest values of all ranks together (BatchTopK, arXiv 2412.06410): radix select by summed histograms.

No value leaves its rank. The boundary is found digit by digit from the top: each pass counts the digits of what is
still undecided, and only the counts (at most 16 KB) are summed over the ranks. Counts are integers, so the result is
the same for every number of ranks, and nothing is read by the host.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT_BITS = 11
_BITS_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks that select together; by default there is one. Each of them makes the same calls."""

    rank: int = 0
    num_ranks: int = 1
    sum_: Callable[[Tensor], Tensor] = _alone
    """Replaces a tensor by its sum over the ranks, and returns it."""


def _find_kth(
    keys: Tensor, num_bits: int, candidates: Tensor, num_keep: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """The num_keep-th largest of all ranks' keys that are candidates.

    Args:
        keys: [n] int64, each in 0..2**num_bits - 1.
        candidates: [n] bool.
        num_keep: [1] int64; where there are fewer candidates, it is taken as their number.

    Returns:
        that key [1]; the candidates equal to it [n] bool; how many of those ([1], over all ranks) belong to the
        num_keep largest: 0 where there is no candidate at all, and the key means nothing.
    """
    num_digits = -(-num_bits // _DIGIT_BITS)
    width = -(-num_bits // num_digits)
    last = (1 << width) - 1
    kth = torch.zeros_like(num_keep)
    for shift in range((num_digits - 1) * width, -1, -width):
        backward = last - (keys >> shift & last)  # so that a running sum counts from the largest digit
        counts = torch.zeros(last + 1, dtype=torch.int64, device=keys.device)
        counts = ranks.sum_(counts.scatter_add_(0, backward, candidates.long()))
        reached = counts.cumsum(0)
        num_keep = torch.minimum(num_keep, reached[-1:])
        found = torch.searchsorted(reached, num_keep)
        # gather: indexing with a tensor of one element would have the host read it
        num_keep = num_keep - (reached - counts).gather(0, found)
        kth = (kth << width) + (last - found)
        candidates = candidates & (backward == found)
    return kth, candidates, num_keep


def select_global(
    values: Tensor, latents: Tensor, num_keep: int, d_sae: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """The num_keep first of all ranks' pairs by (value descending, latent ascending, token ascending).

    Args:
        values: [n] of this rank, in the order of their tokens; > 0, or NaN, which counts as the largest. A rank's
            tokens come before those of the next rank. Any float dtype, the same on all ranks.
        latents: [n] int64, each in 0..d_sae-1.
        num_keep: how many of all ranks' together; all of them where there are fewer.
        ranks: who selects together; n may differ between them, and be 0.

    Returns:
        keep [n] bool, and the smallest value that any rank keeps, float32 [] (0 where none is kept), on every rank.
    """
    assert num_keep >= 0
    if num_keep == 0:
        return torch.zeros_like(latents, dtype=torch.bool), values.new_zeros((), dtype=torch.float32)
    values = values.detach()
    num_bits = values.element_size() * 8 - 1
    integer = _BITS_OF_SIZE[values.element_size()]
    # The bits of floats > 0 order as integers; all NaNs are made the same one, above infinity.
    bits = values.view(integer).long().masked_fill_(values.isnan(), (1 << num_bits) - 1)
    wanted = torch.full((1,), num_keep, dtype=torch.int64, device=values.device)
    kth, ties, wanted = _find_kth(bits, num_bits, torch.ones_like(bits, dtype=torch.bool), wanted, ranks)
    smallest = torch.where(wanted > 0, kth.to(integer).view(values.dtype).float(), 0.0).squeeze(0)

    # Of the pairs tied at the smallest value, the lowest latents; of the pairs of the last such latent, the first
    # tokens: those of this rank come after all of the ranks before.
    backward = d_sae - 1 - latents
    kth_latent, last, wanted = _find_kth(backward, max(1, (d_sae - 1).bit_length()), ties, wanted, ranks)
    counts = torch.zeros(ranks.num_ranks, dtype=torch.int64, device=values.device)
    counts[ranks.rank] = last.sum()
    wanted = wanted - ranks.sum_(counts)[: ranks.rank].sum()
    keep = (bits > kth) | (ties & (backward > kth_latent)) | (last & (last.cumsum(0) <= wanted))
    return keep, smallest
