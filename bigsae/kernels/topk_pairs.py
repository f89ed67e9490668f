"""The k largest latents of each token, of an SAE whose latents lie on one rank or on several.

On several, each rank selects among its own latents, then all together. A rank's k best are sorted by (value descending,
latent ascending), and ranks hold ascending latents. So in the list of all ranks' candidates, by rank, place ascending
is latent ascending among equal values: values alone are exchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigsae.kernels.decode import sparse_decode
from bigsae.kernels.encode import Selection, attach_selection, check_selection, default_slab_rows
from bigsae.kernels.encode_above import attach
from bigsae.kernels.pairs import RaggedPairs
from bigsae.kernels.sparse_grad import LatentMajor
from bigsae.kernels.topk import ordered_bits

# What a candidate takes while its token is decided: it is there as it came, as an integer that is made of it, and has a
# place (those of this rank, of two or more).
_CANDIDATE_BYTES = 16

Gather = Callable[[Tensor], Tensor]
"""From a tensor [n, ...] to those of all ranks, by rank, [ranks * n, ...]."""


@dataclass(frozen=True)
class TopK:
    """k latents of each token, on one rank: `acts` [batch, k], differentiable, and `indices`, largest first."""

    acts: Tensor
    indices: Tensor
    pattern: LatentMajor | None

    def first(self, k: int) -> "TopK":
        """The k largest alone."""
        return TopK(self.acts[:, :k].contiguous(), self.indices[:, :k].contiguous(), None)

    def decode(self, weight: Tensor) -> Tensor:
        """[batch, d_out]: what they add up to in rows of `weight` [d_sae, d_out]; differentiable."""
        return sparse_decode(self.acts, self.indices, weight, self.pattern)

    def firing_counts(self, d_sae: int) -> Tensor:
        """[d_sae] int32: tokens on which each latent has a value > 0."""
        fired = (self.acts.detach() > 0).to(torch.int32)
        counts = torch.zeros(d_sae, dtype=torch.int32, device=fired.device)
        return counts.scatter_add_(0, self.indices.flatten(), fired.flatten())


@dataclass(frozen=True)
class OwnOfTopK:
    """Of the k latents of each token those that this rank holds: `acts` [num_pairs], differentiable, at `pairs`."""

    acts: Tensor
    pairs: RaggedPairs
    places: Tensor
    """[num_pairs] int64: each one's place among its token's k, 0 the largest."""

    def first(self, k: int) -> "OwnOfTopK":
        """Those among the k largest alone."""
        keep = self.places < k
        return OwnOfTopK(self.acts[keep], self.pairs.select(keep), self.places[keep])

    def decode(self, weight: Tensor) -> Tensor:
        """[batch, d_out]: what they add up to in rows of `weight` [d_own, d_out]; differentiable."""
        return self.pairs.decode(self.acts, weight)

    def firing_counts(self, d_sae: int) -> Tensor:
        """[d_own] int64: tokens on which each latent has a value > 0."""
        assert d_sae == self.pairs.d_sae
        return self.pairs.latent_sums((self.acts.detach() > 0).to(torch.int32))


@torch.no_grad()
def _own_of(
    selection: Selection, d_own: int, relu: bool, slab: int, rank: int, num_ranks: int, gather: Gather
) -> tuple[Tensor, RaggedPairs, Tensor]:
    """Values, pairs and places of what is left of this rank's candidates when those of all ranks are compared.

    `slab`: pre-activations that exist at a time on each rank.
    """
    values, latents, k = selection.values, selection.latents, selection.k
    columns = values.shape[1]
    # A few tokens at a time, on all ranks: of all of them the candidates may be more than the slab.
    num_tokens = max(slab * values.element_size() // (_CANDIDATE_BYTES * columns * num_ranks), 1)
    place_of = torch.cat([_places(part, k, rank, gather) for part in values.split(num_tokens)])
    keep = place_of < k
    # Without value and gradient: masked latents, and under the ReLU what is not positive. A NaN stays.
    keep &= ~(values == float("-inf")) if not relu else ~(values <= 0)
    latents, order = latents.masked_fill(~keep, d_own).sort(1)
    keep = keep.gather(1, order)
    crow = F.pad(keep.sum(1).cumsum(0), (1, 0))
    pairs = RaggedPairs(latents[keep], crow, d_own)
    return values.gather(1, order)[keep], pairs, place_of.gather(1, order)[keep]


def _places(values: Tensor, k: int, rank: int, gather: Gather) -> Tensor:
    """[batch, columns] int64: the place of each of this rank's candidates among those of all ranks, at most k.

    Each rank's are in order, so a place is the sum of how many of each rank's come before.
    """
    batch, columns = values.shape
    descending = ~ordered_bits(values)
    places = torch.arange(columns, device=values.device).repeat(batch, 1)
    for other, theirs in enumerate(gather(values).view(-1, batch, columns)):
        if other != rank:  # of equal ones a lower rank's come first
            places += torch.searchsorted(~ordered_bits(theirs), descending, right=other < rank)
    return places.clamp_(max=k)


def own_selection(k: int, d_own: int, num_ranks: int = 1, mask: Tensor | None = None) -> Selection:
    """What each of `num_ranks` ranks, with `d_own` latents each, has to select for `topk_pairs`.

    Args:
        k: how many latents of all ranks a token selects.
        mask: [d_own] bool; only latents where it is True are selected, on one rank in any order.

    Raises:
        ValueError: if there are fewer latents than k, or mask is not bool [d_own].
    """
    check_selection(k, None, d_own * num_ranks)
    check_selection(1, mask, d_own)
    return Selection(k, min(k, d_own), mask, ordered=mask is None or num_ranks > 1)


def topk_pairs(
    selection: Selection,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather | None = None,
    *,
    relu: bool = True,
    slab_rows: int | None = None,
) -> TopK | OwnOfTopK:
    """The k largest of each token's pre-activations of all ranks: of them what this rank holds, differentiable.

    Args:
        selection: an `own_selection`, filled (`select`) from the same x, W_enc and b_enc.
        x: [batch, d_in], the same tokens on every rank.
        W_enc, b_enc: [d_own, d_in] and [d_own], this rank's latents; as many on every rank.
        rank: the number of this rank of `num_ranks`; lower ones hold lower latents.
        gather: exchanges the candidates; None where one rank holds all latents.
        relu: clamp selected values at zero; on several ranks those that are not positive, which then have neither value
            nor gradient, are left out.
        slab_rows: rows of the slab, which bounds what is exchanged at a time; as many on every rank.
    """
    if gather is None:
        acts, pattern = attach_selection(selection, x, W_enc, b_enc, relu)
        return TopK(acts, selection.latents, pattern)
    d_own = W_enc.shape[0]
    slab = (slab_rows or default_slab_rows(d_own, x)) * d_own
    values, pairs, places = _own_of(selection, d_own, relu, slab, rank, num_ranks, gather)
    return OwnOfTopK(attach(values, pairs, x, W_enc, b_enc), pairs, places)
