"""The Triton launchers themselves: on the GPU where there is one, else in Triton's interpreter on CPU."""

import importlib

import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.decode import sparse_decode
from bigsae.kernels.encode import topk_encode
from bigsae.kernels.sparse_grad import LatentMajor

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poisoned")


def _small_integers(rows, cols):
    """Sums of these are exact in float32, so any wrong, lost or doubled term shows, and stay small enough to be exact
    in bfloat16: Triton's interpreter truncates where the GPU rounds to nearest."""
    return torch.randint(-1, 2, (rows, cols))


def _launcher(name):
    pytest.importorskip("triton")
    return importlib.import_module(f"bigsae.kernels.{name}_triton")


@pytest.mark.parametrize("kind", ["normal", "levels", "zeros", "infinite"])
@pytest.mark.parametrize(
    ("batch", "d_sae", "k", "tile", "dtype"),
    [
        (1, 1, 1, 8, torch.float32),
        (2, 17, 17, 8, torch.bfloat16),
        (2, 101, 1, 8, torch.float32),
        (2, 500, 5, 16, torch.bfloat16),
        (1, 1001, 6, 64, torch.float32),
    ],
)
def test_select_topk(make_values, triton_device, batch, d_sae, k, tile, kind, dtype):
    values = make_values(kind, batch, d_sae, dtype).to(triton_device)
    for mask in (None, torch.rand(d_sae, device=triton_device) < 0.5):
        top_values, top_indices = _launcher("topk").select_topk(values, k, mask, tile=tile)
        expected_values, expected_indices = reference.select_topk(values, k, mask)
        assert torch.equal(top_indices, expected_indices)
        assert torch.equal(top_values, expected_values)


@pytest.mark.parametrize("k", [9, 40])  # with and without tiles
def test_select_topk_in_several_blocks(make_values, triton_device, monkeypatch, k):
    """Rows longer than what a program holds at once, at every stage."""
    topk = _launcher("topk")
    monkeypatch.setattr(topk, "_MAX_BLOCK", 32)
    values = make_values("levels", 2, 150, torch.bfloat16).to(triton_device)
    assert torch.equal(topk.select_topk(values, k, tile=4)[1], reference.select_topk(values, k)[1])


def test_select_topk_nan_and_empty(make_values, triton_device):
    values = make_values("levels", 2, 300, torch.float32).to(triton_device)
    values[::2, 100::70] = float("nan")
    values[1::2, 50::99] = -torch.tensor(float("nan"), device=triton_device)
    select_topk = _launcher("topk").select_topk
    assert torch.equal(select_topk(values, 9, tile=8)[1], reference.select_topk(values, 9)[1])
    assert select_topk(values[:0], 9)[0].shape == (0, 9)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize(("batch", "d_in", "d_sae", "k"), [(1, 17, 101, 1), (7, 600, 50, 5), (9, 1, 101, 40)])
def test_gather_sum_and_dot(triton_device, batch, d_in, d_sae, k, dtypes):
    coefficients, dense = (_small_integers(batch, n).to(triton_device, dtypes[0]) for n in (k, d_in))
    weight = _small_integers(d_sae, d_in).to(triton_device, dtypes[1])
    top_indices = torch.randint(0, d_sae, (batch, k), device=triton_device)
    decode = _launcher("decode")
    expected_sum = reference.decode(coefficients.double(), top_indices, weight.double())
    expected_dot = (dense.double() @ weight.double().T).gather(1, top_indices)
    for dtype in DTYPES:
        assert torch.equal(
            decode.gather_sum(coefficients, top_indices, weight, dtype), expected_sum.to(dtype)
        )
        assert torch.equal(decode.gather_dot(dense, weight, top_indices, dtype), expected_dot.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae", "k", "chunk"),
    [(1, 17, 19, 1, 8), (33, 17, 13, 5, 2), (33, 17, 13, 5, 8), (33, 17, 5, 5, 128), (8, 520, 4, 2, 4)],
)
def test_latent_rows(triton_device, batch, d_in, d_sae, k, chunk, dtype):
    """Spread latents, hot ones that span several chunks, and all pairs of one latent."""
    coefficients, dense = (_small_integers(batch, n).to(triton_device, dtype) for n in (k, d_in))
    latent_rows = _launcher("sparse_grad").latent_rows
    for latents in (d_sae, min(3, d_sae), 1):
        top_indices = torch.randint(0, latents, (batch, k), device=triton_device)
        pattern = LatentMajor(top_indices, d_sae)
        expected = reference.latent_rows(coefficients.double(), top_indices, dense.double(), d_sae)
        assert expected.abs().max() <= 256
        assert torch.equal(latent_rows(pattern, coefficients, dense, dtype, chunk=chunk), expected.to(dtype))
        total = _small_integers(d_sae, d_in).to(triton_device, dtype)
        sums = (total.double() + expected).to(dtype)
        assert latent_rows(pattern, coefficients, dense, dtype, add_to=total, chunk=chunk) is total
        assert torch.equal(total, sums)


def test_latent_rows_have_a_fixed_order(triton_device):
    """The same bits, also where the tokens before shift a hot latent's pairs in the sorted list."""
    top_indices = torch.ones(60, 1, dtype=torch.int64, device=triton_device)
    coefficients, dense = torch.randn(60, 1, device=triton_device), torch.randn(60, 9, device=triton_device)
    latent_rows = _launcher("sparse_grad").latent_rows
    results = [
        latent_rows(LatentMajor(top_indices, 3), coefficients, dense, torch.float32, chunk=8)
        for _ in range(2)
    ]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0][1], (coefficients * dense).sum(0))
    assert not results[0][[0, 2]].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_step_equals_the_torch_path(triton_device, monkeypatch, dtype, masked):
    """topk_encode and sparse_decode through Triton, forward and every gradient, against torch's own ops on CPU."""
    pytest.importorskip("triton")
    batch, d_in, d_sae, k = 5, 17, 101, 5
    shapes = ((batch, d_in), (d_sae, d_in), (d_sae,), (d_sae, d_in))
    values = [torch.randint(-1, 2, s).to(dtype) for s in shapes]
    d_recon = torch.randint(-1, 2, (batch, d_in)).to(dtype)
    mask = torch.arange(d_sae) % 30 == 3 if masked else None  # four latents: fewer than k

    def step(device):
        inputs = [v.to(device, copy=True).requires_grad_() for v in values]
        top_acts, top_indices, latent_major = topk_encode(
            *inputs[:3], k, mask=None if mask is None else mask.to(device)
        )
        recon = sparse_decode(top_acts, top_indices, inputs[3], latent_major)
        recon.backward(d_recon.to(device))
        return [t.cpu() for t in (top_acts, top_indices, recon, *(i.grad for i in inputs)) if t is not None]

    expected = step(torch.device("cpu"))
    calls = []
    for name in ("topk", "decode", "sparse_grad"):
        module = importlib.import_module(f"bigsae.kernels.{name}")
        monkeypatch.setattr(module, "use_triton", lambda *t, name=name: calls.append(name) or True)
    monkeypatch.setattr(importlib.import_module("bigsae.kernels.encode"), "backend", lambda device: "triton")
    actual = step(triton_device)
    assert set(calls) == {"topk", "decode", "sparse_grad"}
    assert len(actual) == len(expected) == 7
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
