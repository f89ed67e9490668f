"""The selections over several ranks are those of one rank with all their tokens, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bigsae.kernels.batchtopk import batchtopk_encode
from bigsae.kernels.global_topk import Ranks, select_global
from bigsae.parallel import collectives
from tests.distributed.ranks import run_ranks

D_SAE = 37
NUM_TOKENS = 23
CASES = [
    ("normal", torch.float32), ("normal", torch.float64), ("levels", torch.bfloat16), ("levels", torch.float32),
    ("equal", torch.float16), ("nan", torch.bfloat16),
]  # fmt: skip
# How many tokens each rank has: uneven, and none at all.
SPLITS = {2: [(2, 21), (0, 23), (11, 12)], 3: [(1, 3, 19), (9, 0, 14), (14, 9, 0)]}


def _ranks() -> Ranks:
    sum_ = functools.partial(collectives.sum_, group=dist.group.WORLD)
    return Ranks(dist.get_rank(), dist.get_world_size(), sum_)


def _pairs(kind: str, dtype: torch.dtype, start: int = 0, stop: int = NUM_TOKENS) -> tuple[Tensor, Tensor]:
    """Values and latents of the tokens start..stop."""
    values = torch.randn(NUM_TOKENS, D_SAE, generator=torch.Generator().manual_seed(1))
    if kind == "levels":
        values = (values * 1.5).round()
    elif kind == "equal":
        values = torch.where(values > 0, 0.75, -1.0)
    elif kind == "nan":
        values[::2, ::3] = float("nan")
    values = values[start:stop].to(dtype)
    above = ~(values <= 0)
    return values[above], above.nonzero()[:, 1]


def _select(start: int, stop: int, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    """(kept by token, smallest) of each case and each number to keep."""
    results = []
    for kind, dtype in CASES:
        num_pairs = _pairs(kind, dtype)[0].numel()
        values, latents = _pairs(kind, dtype, start, stop)
        for num_keep in (0, 1, 45, num_pairs // 2, num_pairs - 1, num_pairs + 1):
            results.append(select_global(values, latents, num_keep, D_SAE, ranks))
    return results


def _encode(start: int, stop: int, ranks: Ranks) -> list[tuple[Tensor, ...]]:
    """(acts, latents, pairs per token, dx, smallest, dW_enc, db_enc); the tokens 8..14 have no positive pre_act."""
    generator = torch.Generator().manual_seed(2)
    # Small integers, so that no order of summation shows.
    x, W_enc = (torch.randint(-1, 2, (n, 9), generator=generator).float() for n in (NUM_TOKENS, D_SAE))
    x[8:15] = 0
    x, W_enc = x[start:stop].requires_grad_(), W_enc.requires_grad_()
    b_enc = torch.zeros(D_SAE, requires_grad=True)
    results = []
    for num_keep in (1, 40, 150, 10**4):
        for guess in (None, torch.tensor(2.0), torch.tensor(50.0)):
            acts, pairs, smallest = batchtopk_encode(x, W_enc, b_enc, num_keep, guess, ranks)
            dx, dW_enc, db_enc = torch.autograd.grad(acts, (x, W_enc, b_enc), acts.detach())
            shared = (smallest, ranks.sum_(dW_enc), ranks.sum_(db_enc))
            results.append((acts.detach(), pairs.latents, pairs.crow.diff(), dx, *shared))
    return results


def _both(num_ranks: int) -> list[tuple[list, list]]:
    ranks = _ranks()
    results = []
    for split in SPLITS[num_ranks]:
        start = sum(split[: ranks.rank])
        stop = start + split[ranks.rank]
        results.append((_select(start, stop, ranks), _encode(start, stop, ranks)))
    return results


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_equal_to_one_rank(num_ranks):
    by_rank = run_ranks(num_ranks, _both, num_ranks)
    expected = _select(0, NUM_TOKENS, Ranks()), _encode(0, NUM_TOKENS, Ranks())
    # How many of a result's tensors are by token; the rest is the same on all ranks.
    for kind, num_by_token in enumerate((1, 4)):
        for parts in zip(*by_rank, strict=True):
            for *theirs, ours in zip(*(part[kind] for part in parts), expected[kind], strict=True):
                for i, tensor in enumerate(ours):
                    if i < num_by_token:
                        assert torch.equal(torch.cat([t[i] for t in theirs]), tensor)
                    else:
                        assert all(torch.equal(t[i].nan_to_num(-1), tensor.nan_to_num(-1)) for t in theirs)
