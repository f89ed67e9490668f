import pytest
import torch
from torch import Tensor

from bigsae.kernels import reference, sparse_grad
from bigsae.kernels.encode import select
from bigsae.kernels.sparse_grad import LatentMajor, add_in_place
from bigsae.kernels.topk_pairs import own_selection, topk_pairs

DTYPES = [torch.float32, torch.bfloat16]


def _indices(pattern, batch, k, d_sae):
    if pattern == "all to one":
        return torch.full((batch, k), d_sae - 1)
    if pattern == "few latents":  # most latents are never selected
        return torch.randint(0, min(4, d_sae), (batch, k)) * ((d_sae - 1) // 4)
    return torch.rand(batch, d_sae).argsort(1)[:, :k].contiguous()


@pytest.mark.parametrize("pattern", ["spread", "few latents", "all to one"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 17, 101, 1), (7, 17, 101, 5), (33, 40, 1000, 32), (7, 3, 19, 19)], ids=str
)
def test_rows_and_sums(device, shape, dtype, pattern):
    batch, d_in, d_sae, k = shape
    top_indices = _indices(pattern, batch, k, d_sae).to(device)
    # Small integers: sums are exact in float32, so any wrong, lost or doubled term shows.
    coefficients = torch.randint(-8, 9, (batch, k), device=device).to(dtype)
    dense = torch.randint(-8, 9, (batch, d_in), device=device).to(dtype)
    latent_major = LatentMajor(top_indices, d_sae)
    rows, sums = latent_major.rows(coefficients, dense), latent_major.sums(coefficients)
    assert rows.dtype == sums.dtype == dtype
    wide = reference.latent_rows(coefficients.double(), top_indices, dense.double(), d_sae)
    assert torch.equal(rows, wide.to(dtype))  # rounded once, from an exact sum
    assert torch.equal(sums, reference.latent_sums(coefficients.double(), top_indices, d_sae).to(dtype))
    assert torch.equal(latent_major.rows(coefficients, dense, dtype=torch.float32).double(), wide)
    counts = torch.bincount(top_indices.flatten(), minlength=d_sae)
    assert torch.equal(latent_major.counts, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_added_to_what_is_there(device, dtype, monkeypatch):
    """In parts; the sum is rounded once."""
    monkeypatch.setattr(sparse_grad, "_WIDE_ELEMENTS", 40)
    top_indices = _indices("spread", 33, 8, 101).to(device)
    coefficients = torch.randint(-8, 9, (33, 8), device=device).float()
    dense = torch.randint(-8, 9, (33, 17), device=device).float()
    total = torch.randint(-8, 9, (101, 17), device=device).to(dtype)
    before, latent_major = total.double().clone(), LatentMajor(top_indices, 101)
    assert latent_major.rows(coefficients, dense, add_to=total) is total
    wide = before + reference.latent_rows(coefficients.double(), top_indices, dense.double(), 101)
    assert torch.equal(total, wide.to(dtype))


@pytest.mark.parametrize("ragged", [False, True])
def test_a_weight_of_two_uses_sums_its_gradients_in_place(device, ragged):
    """As autograd would; and autograd does it where there is nothing to add to."""

    def loss(W_enc: Tensor, W_dec: Tensor) -> Tensor:
        total = x.new_zeros(())
        for k in (2, 5):
            gather = (lambda values: values) if ragged else None
            selection = own_selection(k, 40)
            select(x, W_enc, x.new_zeros(40), [selection], None)
            selected = topk_pairs(selection, x, W_enc, x.new_zeros(40), gather=gather)
            total = total + (selected.decode(W_dec) - x).square().sum()
        return total

    x = torch.randn(33, 17, device=device)
    weights = [torch.randn(40, 17, device=device).requires_grad_() for _ in range(2)]
    loss(*weights).backward()
    expected = [weight.grad for weight in weights]
    for weight in weights:
        add_in_place(weight)
        weight.grad = None
    loss(*weights).backward()
    assert all(torch.equal(w.grad, e) for w, e in zip(weights, expected, strict=True))
    sums = [torch.ones_like(weight) for weight in weights]
    for weight, total in zip(weights, sums, strict=True):
        weight.grad = total
    loss(*weights).backward()
    for weight, total, e in zip(weights, sums, expected, strict=True):
        assert weight.grad is total
        torch.testing.assert_close(total, 1 + e)


def test_sums_are_accumulated_in_float32(device):
    """4,096 ones and a latent of its own: in bfloat16 a running sum would stop at 256."""
    top_indices = torch.zeros(4096, 1, dtype=torch.int64, device=device)
    ones = torch.ones(4096, 1, dtype=torch.bfloat16, device=device)
    assert LatentMajor(top_indices, 2).sums(ones).tolist() == [4096.0, 0.0]


def test_same_bits_every_time(device):
    top_indices = _indices("few latents", 300, 8, 50).to(device)
    coefficients, dense = torch.randn(300, 8, device=device), torch.randn(300, 65, device=device)
    first = LatentMajor(top_indices, 50).rows(coefficients, dense)
    for _ in range(3):
        assert torch.equal(LatentMajor(top_indices, 50).rows(coefficients, dense), first)


def test_sorted_once_and_stably(device, monkeypatch):
    top_indices = torch.tensor([[2, 0], [0, 2], [2, 3]], device=device)
    latent_major = LatentMajor(top_indices, 5)
    assert latent_major.order.tolist() == [1, 2, 0, 3, 4, 5]
    assert latent_major.tokens.tolist() == [0, 1, 0, 1, 2, 2]
    assert latent_major.latents.tolist() == [0, 0, 2, 2, 2, 3]
    assert latent_major.crow.tolist() == [0, 2, 2, 5, 6, 6]
    monkeypatch.setattr(torch, "sort", None)  # another sort would fail
    coefficients = torch.ones(3, 2, device=device)
    latent_major.rows(coefficients, coefficients)
    assert latent_major.sums(coefficients).tolist() == [2.0, 0.0, 3.0, 1.0, 0.0]


def test_no_tokens(device):
    latent_major = LatentMajor(torch.empty(0, 3, dtype=torch.int64, device=device), 7)
    rows = latent_major.rows(torch.empty(0, 3, device=device), torch.empty(0, 5, device=device))
    assert torch.equal(rows, torch.zeros(7, 5, device=device))


def test_errors():
    with pytest.raises(ValueError, match="top_indices must be int64"):
        LatentMajor(torch.zeros(3, 2, dtype=torch.int32), 4)
    latent_major = LatentMajor(torch.zeros(3, 2, dtype=torch.int64), 4)
    for coefficients, dense in ((torch.ones(3, 3), torch.ones(3, 5)), (torch.ones(3, 2), torch.ones(4, 5))):
        with pytest.raises(ValueError, match="do not fit top_indices"):
            latent_major.rows(coefficients, dense)
