import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigsae.kernels import reference
from bigsae.kernels.global_topk import Ranks, select_global

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _pairs(kind, num_tokens, d_sae, dtype, device):
    """Values and latents of about a third of all pairs, token by token."""
    values = torch.randn(num_tokens, d_sae)
    if kind == "levels":
        values = values.abs().mul(1.5).ceil()
    elif kind == "equal":
        values = torch.where(values > 0.4, 0.75, -1.0)
    elif kind == "tiny":  # subnormal in float16 and the wider ones
        values = values * 1e-6
    elif kind == "extreme":
        values[values > 1.5] = float("inf")
        values[::3, ::5] = float("nan")
        values[1::3, ::7] = -torch.tensor(float("nan"))
    values = torch.where(torch.rand(num_tokens, d_sae) < 0.7, values, -1.0).to(dtype)
    above = ~(values <= 0)
    return values[above].to(device), above.nonzero()[:, 1].to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 2), (23, 40), (40, 2049)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "levels", "equal", "tiny", "extreme"])
def test_equals_reference(device, kind, shape, dtype):
    num_tokens, d_sae = shape
    values, latents = _pairs(kind, num_tokens, d_sae, dtype, device)
    n = values.numel()
    before = values.clone()
    for num_keep in {0, 1, 2, 3, 5, n // 3, n // 2, n - 1, n, n + 1, 2 * n + 7} - {-1}:
        keep, smallest = select_global(values, latents, num_keep, d_sae, Ranks())
        assert keep.dtype == torch.bool and torch.equal(
            keep, reference.select_global(values, latents, num_keep)
        )
        kept = values[keep].float()
        kept = kept[~kept.isnan()] if not kept.isnan().all() else kept
        expected = kept.min() if kept.numel() > 0 else torch.tensor(0.0)
        assert smallest.shape == () and smallest.dtype == torch.float32
        assert torch.equal(smallest.cpu().nan_to_num(-1), expected.cpu().nan_to_num(-1))
    assert torch.equal(values.nan_to_num(-1), before.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_to_keep(device, dtype):
    values, latents = _pairs("levels", 7, 11, dtype, device)
    order = reference.select_global(values, latents, 0)
    for num_keep in range(values.numel() + 3):
        keep, _ = select_global(values, latents, num_keep, 11, Ranks())
        assert torch.equal(keep, reference.select_global(values, latents, num_keep))
        assert not (order & ~keep).any() and keep.sum() == min(num_keep, values.numel())
        order = keep


def test_order_by_hand(device):
    nan = float("nan")
    values = torch.tensor([2.0, 1.0, 2.0, 3.0, 2.0, nan, 2.0, 1.0], device=device)
    latents = torch.tensor([4, 6, 3, 5, 4, 0, 1, 2], device=device)
    order = [5, 3, 6, 2, 0, 4, 7, 1]
    smallest = [0.0, nan, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]
    for num_keep in range(9):
        keep, kept = select_global(values, latents, num_keep, 7, Ranks())
        assert keep.nonzero().squeeze(1).tolist() == sorted(order[:num_keep])
        assert str(kept.item()) == str(smallest[num_keep])


def test_neighbouring_floats(device):
    """Values that differ in their last bit alone, over every digit of the search."""
    bits = torch.tensor([1, 2, 2047, 2048, 2**22 - 1, 2**22, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000])
    values = bits.int().view(torch.float32)[torch.randperm(10)].to(device)
    latents = torch.zeros(10, dtype=torch.int64, device=device)
    for num_keep in range(11):
        keep, smallest = select_global(values, latents, num_keep, 1, Ranks())
        assert torch.equal(values[keep].sort().values, values.sort().values[10 - num_keep :])
        assert smallest == (values[keep].min() if num_keep else 0)


class _HostReads(TorchDispatchMode):
    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_by_the_host(device):
    values, latents = _pairs("levels", 23, 40, torch.float32, device)
    with _HostReads() as reads:
        select_global(values, latents, 50, 40, Ranks())
        assert reads.num_reads == 0
        values[values > 1].sum().item()
    assert reads.num_reads > 0


@pytest.mark.parametrize("num_keep", [0, 1, 10])
def test_no_pairs(device, num_keep):
    values = torch.empty(0, device=device)
    keep, smallest = select_global(values, values.long(), num_keep, 5, Ranks())
    assert keep.shape == (0,) and keep.dtype == torch.bool and smallest == 0
