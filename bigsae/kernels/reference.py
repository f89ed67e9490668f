"""The oracle: every op in plain dense torch, in any float dtype. Obvious rather than fast.

`encode`, `decode` and `jumprelu` are differentiable by autograd; `latent_rows` and `latent_sums` are the sparse
gradients.
"""

import torch
from torch import Tensor


def select_topk(values: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k first of each row by (value descending, index ascending).

    Args:
        values: [batch, d_sae], any float dtype.
        k: how many, 1 <= k <= d_sae.
        mask: [d_sae] bool; latents where it is False count as -inf.

    Returns:
        top_values [batch, k] and top_indices [batch, k] int64.

    Raises:
        ValueError: if k is not in 1..d_sae.
    """
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"k must lie in 1..d_sae = {values.shape[1]}, got {k}")
    if mask is not None:
        values = values.masked_fill(~mask, float("-inf"))
    # A stable sort keeps equal values in the order of their indices: this is the tie rule.
    ordered, order = torch.sort(values, dim=1, descending=True, stable=True)
    return ordered[:, :k], order[:, :k]


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, mask: Tensor | None = None, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Dense encoder, then the k best pre-activations: top_acts [batch, k], top_indices [batch, k] int64.

    Args:
        x: [batch, d_in]; W_enc: [d_sae, d_in]; b_enc: [d_sae].
        mask: [d_sae] bool, latents that may be selected. Where fewer than k may, the rest have act 0.
        relu: clamp the selected values at zero.
    """
    values, indices = select_topk(x @ W_enc.T + b_enc, k, mask)
    if relu:
        values = torch.relu(values)
    if mask is not None:
        values = torch.where(mask[indices], values, torch.zeros_like(values))
    return values, indices


def scatter_dense(coefficients: Tensor, top_indices: Tensor, d_sae: int) -> Tensor:
    """Spreads [batch, k] coefficients over [batch, d_sae]; coefficients of a repeated index add up."""
    dense = coefficients.new_zeros(coefficients.shape[0], d_sae)
    return dense.scatter_add(1, top_indices, coefficients)


def decode(top_acts: Tensor, top_indices: Tensor, weight: Tensor) -> Tensor:
    """[batch, d_in] = sum over j of top_acts[:, j] * weight[top_indices[:, j]]."""
    return scatter_dense(top_acts, top_indices, weight.shape[0]) @ weight


def latent_rows(coefficients: Tensor, top_indices: Tensor, dense: Tensor, d_sae: int) -> Tensor:
    """[d_sae, d_in]: out[l] = sum over (b, j) with top_indices[b, j] == l of coefficients[b, j] * dense[b]."""
    return scatter_dense(coefficients, top_indices, d_sae).T @ dense


def latent_sums(coefficients: Tensor, top_indices: Tensor, d_sae: int) -> Tensor:
    """[d_sae]: the sum of the coefficients of each latent."""
    return scatter_dense(coefficients, top_indices, d_sae).sum(0)


def select_global(values: Tensor, latents: Tensor, num_keep: int) -> Tensor:
    """[n] bool: the num_keep first by (value descending, latent ascending, place in the list ascending)."""
    by_latent = torch.argsort(latents, stable=True)
    order = by_latent[torch.sort(values[by_latent], descending=True, stable=True).indices]
    keep = torch.zeros_like(latents, dtype=torch.bool)
    keep[order[:num_keep]] = True
    return keep


def above(pre_acts: Tensor, bound: Tensor) -> Tensor:
    """[batch, d_sae] bool: which pre_acts [batch, d_sae] exceed bound [] or [d_sae], or are NaN."""
    return (pre_acts.double() > bound.double()) | pre_acts.isnan()


def jumprelu(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """pre_acts [batch, d_sae] above threshold [d_sae], else 0; and 1 there, else 0. Gradients are straight-through.

    The derivative of both steps by the threshold is that of a ramp of width `bandwidth` about it, with pre_acts there
    taken to equal the threshold: -threshold / bandwidth and -1 / bandwidth within the window, 0 outside.
    """
    with torch.no_grad():
        active = (pre_acts > threshold).to(pre_acts.dtype)
        slope = ((pre_acts - threshold).abs() / bandwidth < 0.5) / -bandwidth
    ramp = slope * (threshold - threshold.detach())  # zero, but for its gradient
    return pre_acts * active + threshold.detach() * ramp, active + ramp


def shortfall(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, dead: Tensor
) -> Tensor:
    """[]: what the pre-activations of the latents `dead` [n] lack to their thresholds, times decoder norms, in all."""
    pre_acts = torch.nn.functional.linear(x, W_enc, b_enc)
    return ((threshold - pre_acts).relu() * W_dec.norm(dim=1))[:, dead].sum()
