import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.topk import select_topk

KINDS = ["normal", "levels", "equal", "zeros", "negative", "infinite"]
# (batch, d_sae, k): rows in one block and in several, one and two rounds of tiles, with and without tails, none.
SHAPES = [(1, 1, 1), (7, 17, 17), (33, 101, 1), (7, 1000, 5), (5, 1000, 1000), (300, 4099, 7), (3, 16384, 32)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_reference(make_values, device, kind, shape, dtype, masked):
    batch, d_sae, k = shape
    values = make_values(kind, batch, d_sae, dtype).to(device)
    mask = torch.rand(d_sae, device=device) < 0.4 if masked else None
    top_values, top_indices = select_topk(values, k, mask)
    expected_values, expected_indices = reference.select_topk(values, k, mask)
    assert top_values.dtype == dtype and top_indices.dtype == torch.int64
    assert torch.equal(top_indices, expected_indices)
    assert torch.equal(top_values, expected_values)


def test_float64(make_values, device):
    values = make_values("levels", 7, 1000, torch.float64).to(device)
    assert torch.equal(select_topk(values, 5)[1], reference.select_topk(values, 5)[1])


def test_order_by_hand(device):
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0, -0.0, 0.0, -1.0, -0.0, 0.0]], device=device)
    for select in (select_topk, reference.select_topk):
        top_values, top_indices = select(values, 4)
        assert top_indices.tolist() == [[1, 3, 2, 4], [0, 1, 2, 4]]
        assert top_values.tolist() == [[3.0, 3.0, 2.0, 2.0], [0.0] * 4]


def test_ties_across_tiles_and_boundary(device):
    """The k-th value occurs once in each of many tiles, most of them not needed: the lowest indices win."""
    values = torch.full((2, 8192), -5.0, device=device)
    values[:, 63::64] = 1.0
    values[0, 8000] = 2.0
    _, top_indices = select_topk(values, 5)
    assert top_indices.tolist() == [[8000, 63, 127, 191, 255], [63, 127, 191, 255, 319]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_comes_first_whatever_its_sign(make_values, device, dtype):
    values = make_values("levels", 9, 3000, dtype).to(device)
    values[::2, 100::701] = float("nan")
    values[1::2, 50::997] = -torch.tensor(float("nan"), dtype=dtype, device=device)
    _, top_indices = select_topk(values, 11)
    assert torch.equal(top_indices, reference.select_topk(values, 11)[1])


def test_masked_latents_come_last(make_values, device):
    values = make_values("normal", 7, 500, torch.float32).to(device)
    mask = torch.zeros(500, dtype=torch.bool, device=device)
    mask[torch.tensor([3, 77, 401])] = True
    top_values, top_indices = select_topk(values, 6, mask)
    assert torch.equal(
        top_indices[:, :3].sort(dim=1).values, torch.tensor([[3, 77, 401]], device=device).expand(7, 3)
    )
    assert torch.isneginf(top_values[:, 3:]).all()


def test_strided_rows_and_no_rows(make_values, device):
    values = make_values("levels", 40, 2000, torch.float32).to(device)
    for view in (values[::3, ::2], values[:, 100:1101], values.T):
        assert torch.equal(select_topk(view, 9)[1], reference.select_topk(view, 9)[1])
    top_values, top_indices = select_topk(values[:0], 9)
    assert top_values.shape == top_indices.shape == (0, 9)


def test_input_is_not_changed(make_values, device):
    values = make_values("zeros", 5, 2000, torch.float32).to(device)
    before = values.clone()
    select_topk(values, 3, torch.arange(2000, device=device) % 2 == 0)
    assert torch.equal(values.view(torch.int32), before.view(torch.int32))


def test_errors():
    values = torch.zeros(2, 10)
    for k in (0, 11):
        with pytest.raises(ValueError, match="k must lie in"):
            select_topk(values, k)
        with pytest.raises(ValueError, match="k must lie in"):
            reference.select_topk(values, k)
    with pytest.raises(ValueError, match="values must be"):
        select_topk(values[0], 1)
    for mask in (torch.ones(10), torch.ones(9, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask must be bool"):
            select_topk(values, 1, mask)


@pytest.mark.parametrize("kind", ["real", "ties", "one tie at the end", "NaN", "all of them"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_any_order_the_same_are_selected(device, dtype, kind):
    """Each value at its index, each index once; ties across the end and NaN as where order is asked for."""
    values = torch.randn(300, 400, device=device)
    if kind == "ties":
        values = values.mul(2).round()
    if kind == "one tie at the end":
        values[7], values[7, 100:200] = -1.0, 1.0  # of 100 equal ones the first k
    if kind == "NaN":
        values[values > 1.5] = float("nan")
    values = values.to(dtype)
    k = 400 if kind == "all of them" else 37
    top_values, top_indices = select_topk(values, k, ordered=False)
    _, expected = reference.select_topk(values, k)
    assert torch.equal(top_indices.sort(1).values, expected.sort(1).values)
    assert torch.equal(top_values.nan_to_num(99.0), values.gather(1, top_indices).nan_to_num(99.0))
    again, same = select_topk(values.clone(), k, ordered=False)
    assert torch.equal(again.nan_to_num(99.0), top_values.nan_to_num(99.0)) and torch.equal(same, top_indices)
