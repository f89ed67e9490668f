import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.sparse_grad import LatentMajor

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
