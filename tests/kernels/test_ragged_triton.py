"""The launchers over ragged pairs: on the GPU where there is one, else in Triton's interpreter on CPU."""

import importlib

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def ragged():
    pytest.importorskip("triton")
    return importlib.import_module("bigsae.kernels.ragged_triton")


def _check_compact(ragged, pre_acts, bound, **options):
    above = (pre_acts > bound) | pre_acts.isnan()
    values, latents, counts = ragged.compact_above(pre_acts, bound, **options)
    assert values.dtype == pre_acts.dtype
    assert torch.equal(latents, above.nonzero()[:, 1])
    assert torch.equal(counts, above.sum(1))
    torch.testing.assert_close(values, pre_acts[above], rtol=0, atol=0, equal_nan=True)
    return counts


def _ragged_rows(batch, d_sae, device):
    """Latents ascending in each token, and crow: empty tokens at both ends and within, one with every latent."""
    share = torch.rand(batch, 1).masked_fill(torch.arange(batch)[:, None] % 3 == 0, 0.0)
    share[-1] = 0.0
    share[1 if batch > 2 else 0] = 1.0
    pairs = torch.rand(batch, d_sae) < share
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), pairs.sum(1).cumsum(0)))
    return pairs.nonzero()[:, 1].to(device), crow.to(device), pairs.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["levels", "zeros", "infinite"])
@pytest.mark.parametrize(
    ("rows", "d_sae", "options"),
    [
        (1, 1, {}),
        (3, 101, {}),
        (2, 5000, {}),  # several default tiles
        (2, 101, {"tile": 8, "tiles": 1}),
        (4, 101, {"tile": 8, "tiles": 3}),  # more slices than one program moves, the last of a row cut short
        (3, 96, {"tile": 16, "tiles": 3, "capacity": 48}),  # whole slices
        (4, 101, {"tile": 16, "tiles": 2, "capacity": 3}),  # overflows
    ],
)
def test_compact_above(ragged, make_values, triton_device, rows, d_sae, options, kind, dtype):
    pre_acts = make_values(kind, rows, d_sae, dtype).to(triton_device)
    bound = (torch.randn(d_sae) * 2).round().to(triton_device)
    for b in (bound, torch.full_like(bound, -float("inf"))):
        _check_compact(ragged, pre_acts, b, **options)


def test_compact_above_reads_twice_only_where_a_slice_overflows(ragged, triton_device, monkeypatch):
    """One pair more than the capacity, in one slice alone; every other row stays empty."""
    launches = []

    def counted(name):
        kernel = getattr(ragged, name)

        class Counted:
            def __getitem__(self, grid):
                launches.append(name)
                return kernel[grid]

        monkeypatch.setattr(ragged, name, Counted())

    counted("_find_above_kernel")
    counted("_compact_slots_kernel")
    pre_acts, bound = torch.zeros(3, 40, device=triton_device), torch.zeros(40, device=triton_device)
    for num_pairs, expected in (
        (0, ["_find_above_kernel"]),
        (4, ["_find_above_kernel", "_compact_slots_kernel"]),
        (5, ["_find_above_kernel", "_find_above_kernel"]),
    ):
        pre_acts[1, 17 : 17 + num_pairs] = torch.arange(1.0, num_pairs + 1, device=triton_device)
        launches.clear()
        counts = _check_compact(ragged, pre_acts, bound, tile=8, tiles=2, capacity=4)
        assert counts.tolist() == [0, num_pairs, 0]
        assert launches == expected


def test_compact_above_nan_strides_and_nothing(ragged, triton_device):
    pre_acts = torch.randn(5, 60, device=triton_device)
    pre_acts[::2, 7::9] = float("nan")
    pre_acts[1, 11] = -torch.tensor(float("nan"), device=triton_device)
    bound = torch.full((60,), 3e38, device=triton_device)
    for capacity in (1, 64):
        counts = _check_compact(ragged, pre_acts, bound, tile=8, tiles=2, capacity=capacity)
        assert counts.tolist() == [6, 1, 6, 0, 6]
    _check_compact(ragged, pre_acts[:, ::2].T, bound[:1].expand(5), tile=4, tiles=1)
    _check_compact(ragged, pre_acts[:0], bound)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize(
    ("batch", "d_in", "d_sae"), [(1, 17, 101), (2, 1, 3), (7, 600, 50), (9, 130, 101), (2, 1, 300)]
)
def test_gather_sum_and_dot(ragged, triton_device, batch, d_in, d_sae, dtypes):
    """Small integers, whose sums are exact: any wrong, lost or doubled term shows."""
    latents, crow, pairs = _ragged_rows(batch, d_sae, triton_device)
    coefficients, dense, weight = (
        torch.randint(-1, 2, shape).to(triton_device, dtype)
        for shape, dtype in (
            (latents.shape, dtypes[0]),
            ((batch, d_in), dtypes[0]),
            ((d_sae, d_in), dtypes[1]),
        )
    )
    spread = torch.zeros(batch, d_sae, dtype=torch.float64, device=triton_device)
    spread[pairs] = coefficients.double()
    expected_sum = spread @ weight.double()
    expected_dot = (dense.double() @ weight.double().T)[pairs]
    for dtype in DTYPES:
        total = ragged.gather_sum(coefficients, latents, crow, weight, dtype)
        assert torch.equal(total, expected_sum.to(dtype))
        assert torch.equal(ragged.gather_dot(dense, weight, latents, crow, dtype), expected_dot.to(dtype))


def test_gather_accumulates_in_float32_and_reads_nothing_of_others(ragged, triton_device):
    """bfloat16 sums would lose the ones beside 512. NaN in another token's pairs, or in rows that no pair names, must
    not leak through a mask."""
    weight = torch.ones(4, 600, dtype=torch.bfloat16, device=triton_device)
    weight[0] = float("nan")
    latents = torch.tensor([1] * 5 + [2] * 5 + [3], device=triton_device)
    crow = torch.tensor([0, 0, 10, 11, 11], device=triton_device)
    coefficients = torch.tensor(
        [512.0] + [1] * 9 + [float("nan")], dtype=torch.bfloat16, device=triton_device
    )
    total = ragged.gather_sum(coefficients, latents, crow, weight, torch.float32)
    assert total[:, 0].isnan().tolist() == [False, False, True, False]
    assert torch.equal(
        total[[0, 1, 3]], torch.tensor([[0.0], [521], [0]], device=triton_device).expand(3, 600)
    )
    dense = torch.ones(4, 600, dtype=torch.bfloat16, device=triton_device)
    dense[:, 0] = 512
    dense[[0, 3]] = float("nan")
    assert ragged.gather_dot(dense, weight, latents, crow, torch.float32).tolist() == [1111.0] * 11


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_gather_without_pairs(ragged, triton_device, batch):
    weight, dense = torch.randn(6, 7, device=triton_device), torch.randn(batch, 7, device=triton_device)
    nothing = torch.zeros(0, device=triton_device)
    crow = torch.zeros(batch + 1, dtype=torch.int64, device=triton_device)
    total = ragged.gather_sum(nothing, nothing.long(), crow, weight, torch.float32)
    assert torch.equal(total, torch.zeros_like(dense))
    assert ragged.gather_dot(dense, weight, nothing.long(), crow, torch.bfloat16).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d_sae"), [(0, 3), (1, 1), (1025, 5), (2048, 17)])
def test_jumprelu(ragged, triton_device, n, d_sae, dtype):
    """On a grid of powers of two every value is exact, and many lie on the threshold and on the window's edges."""
    pre_acts = (torch.randint(-8, 9, (n,)) / 8).to(triton_device, dtype)
    latents = torch.randint(0, d_sae, (n,), device=triton_device)
    threshold = (torch.randint(0, 5, (d_sae,)) / 8).to(triton_device)
    g_acts = (torch.randint(-4, 5, (n,)) / 2).to(triton_device, dtype)
    g_active = (torch.randint(-4, 5, (n,)) / 2).to(triton_device)
    bandwidth = 0.5
    t = threshold[latents]
    above, in_window = pre_acts > t, ((pre_acts - t) / bandwidth).abs() < 0.5
    if n > 1000:
        assert (pre_acts == t).any() and ((pre_acts - t).abs() == bandwidth / 2).any() and in_window.any()
        pre_acts[5::97] = float("nan")
        above[5::97] = in_window[5::97] = True

    acts, active = ragged.jumprelu_forward(pre_acts, latents, threshold)
    expected = torch.where(above, pre_acts, 0.0)
    assert acts.dtype == dtype
    torch.testing.assert_close(acts, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(active, above.float())

    d_pre, d_threshold = ragged.jumprelu_backward(pre_acts, latents, threshold, bandwidth, g_acts, g_active)
    assert d_pre.dtype == dtype and torch.equal(d_pre, torch.where(above, g_acts, 0.0))
    expected = torch.where(in_window, -(t * g_acts + g_active) / bandwidth, 0.0)
    assert torch.equal(d_threshold, expected)


def test_jumprelu_backward_with_a_bandwidth_that_is_not_exact(ragged, triton_device):
    pre_acts, g_acts, g_active = torch.randn(3, 300, device=triton_device)
    latents = torch.randint(0, 4, (300,), device=triton_device)
    threshold = torch.rand(4, device=triton_device)
    _, d_threshold = ragged.jumprelu_backward(pre_acts, latents, threshold, 0.3, g_acts, g_active)
    p, t = pre_acts.double(), threshold.double()[latents]
    expected = -(t * g_acts.double() + g_active.double()) / 0.3 * ((p - t).abs() < 0.15)
    assert expected.any()
    torch.testing.assert_close(d_threshold.double(), expected, rtol=1e-5, atol=1e-6)
