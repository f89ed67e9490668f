"""JumpReLU's loss of dead latents against the reference, in parts of any size."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bigsae.kernels import reference, shortfall
from bigsae.kernels.sparse_grad import add_in_place

SHAPE = (13, 7, 300, 5)  # batch, d_in, d_sae, d_out


def inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, W_enc, b_enc, threshold, W_dec: leaves. One decoder row is zero."""
    batch, d_in, d_sae, d_out = SHAPE
    tensors = [torch.randn(batch, d_in), torch.randn(d_sae, d_in), torch.randn(d_sae), torch.rand(d_sae)]
    tensors.append(torch.randn(d_sae, d_out))
    tensors[4][50] = 0
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(device, wide if i == 3 else dtype).requires_grad_() for i, t in enumerate(tensors)]


def dead_latents(device: torch.device, num: int) -> Tensor:
    return torch.randperm(SHAPE[2], device=device)[:num].sort().values


@pytest.mark.parametrize("least", [1, 64, 1000])
@pytest.mark.parametrize("num", [0, 1, 150, 300])
def test_value_and_gradients(device, num, least, monkeypatch):
    monkeypatch.setattr(shortfall, "_PAIRS_AT_ONCE", 1)
    monkeypatch.setattr(shortfall, "_LEAST_LATENTS", least)
    ours, dead = inputs(device, torch.float64), dead_latents(device, num)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    got, expected = shortfall.shortfall(*ours, dead), reference.shortfall(*theirs, dead)
    torch.testing.assert_close(got, expected)
    (3 * got).backward()
    (3 * expected).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bfloat16_is_near_the_reference_in_float32(device):
    ours, dead = inputs(device, torch.bfloat16), dead_latents(device, 200)
    theirs = [t.detach().float().requires_grad_() for t in ours]
    got, expected = shortfall.shortfall(*ours, dead), reference.shortfall(*theirs, dead)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)
    got.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == a.dtype
        assert (a.grad.float() - b.grad).norm() < 0.02 * b.grad.norm()


def test_it_adds_to_a_gradient_in_place(device):
    tensors, dead = inputs(device, torch.float32), dead_latents(device, 100)
    shortfall.shortfall(*tensors, dead).backward()
    alone = [t.grad for t in tensors]
    sums = {}
    for i in (1, 4):
        add_in_place(tensors[i])
        tensors[i].grad = None
    shortfall.shortfall(*tensors, dead).backward()
    for i in (1, 4):
        assert torch.equal(tensors[i].grad, alone[i])
        sums[i] = tensors[i].grad = torch.ones_like(tensors[i])
    shortfall.shortfall(*tensors, dead).backward()
    for i, total in sums.items():
        assert tensors[i].grad is total
        torch.testing.assert_close(total, 1 + alone[i])


def addmm_flops(_: torch.Size, a: torch.Size, b: torch.Size, **__: object) -> int:
    """Of the in-place product, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def test_tokens_without_a_gradient(device):
    """As a training step has them: a product less, and every other gradient is the same."""
    ours, dead = inputs(device, torch.float64), dead_latents(device, 150)
    in_place = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=in_place) as with_it:
        shortfall.shortfall(*ours, dead).backward()
    x, *others = [t.detach().clone() for t in ours]
    with FlopCounterMode(display=False, custom_mapping=in_place) as without:
        shortfall.shortfall(x, *[t.requires_grad_() for t in others], dead).backward()
    assert x.grad is None
    assert with_it.get_total_flops() - without.get_total_flops() == 2 * x.numel() * 150
    for a, b in zip(ours[1:], others, strict=True):
        assert torch.equal(a.grad, b.grad)
