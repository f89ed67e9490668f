"""Candidates of several ranks, all in this process."""

import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.topk import select_topk
from bigsae.kernels.topk_pairs import _places

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("kind", ["real", "ties", "NaN", "-inf", "signed zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_ranks", "k"), [(2, 5), (3, 7), (4, 40), (3, 60)])
def test_places_are_those_of_a_selection_over_all_latents(device, num_ranks, k, dtype, kind):
    values = torch.randn(33, num_ranks * 20, device=device)
    if kind == "ties":
        values = values.mul(2).round()
    if kind == "NaN":
        values[values > 1] = float("nan")
        values[:, ::7] = -float("nan")
    if kind == "-inf":
        values[:, : num_ranks * 15] = float("-inf")
    if kind == "signed zeros":
        values = torch.where(values > 0, 0.0, -0.0)
    values = values.to(dtype)
    columns = min(k, 20)
    own = [select_topk(part.contiguous(), columns) for part in values.split(20, dim=1)]
    all_ranks = torch.cat([of_rank for of_rank, _ in own])
    found = torch.full((33, num_ranks * 20), k, device=device)
    for rank, (of_rank, latents) in enumerate(own):
        places = _places(of_rank, k, rank, lambda _: all_ranks)
        found.scatter_(1, rank * 20 + latents, places)
    _, order = reference.select_topk(values, k)
    expected = torch.full_like(found, k).scatter_(1, order, torch.arange(k, device=device).expand(33, -1))
    assert torch.equal(found, expected)
