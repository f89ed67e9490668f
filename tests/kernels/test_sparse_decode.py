import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.decode import gather_dot, gather_sum, sparse_decode
from bigsae.kernels.sparse_grad import LatentMajor

SHAPES = [(1, 17, 101, 1), (7, 17, 101, 5), (33, 40, 1000, 32), (7, 1, 19, 19)]  # (batch, d_in, d_sae, k)
DTYPES = [torch.float32, torch.bfloat16]


def _inputs(shape, act_dtype, weight_dtype, device, pattern="spread"):
    batch, d_in, d_sae, k = shape
    top_indices = torch.rand(batch, d_sae).argsort(1)[:, :k].contiguous()
    if pattern == "hot":
        top_indices[:, 0] = d_sae - 1
    elif pattern == "one latent":
        top_indices[:] = 3
    top_acts = torch.randn(batch, k).to(act_dtype)
    weight = torch.randn(d_sae, d_in).to(weight_dtype)
    d_recon = torch.randn(batch, d_in).to(torch.promote_types(act_dtype, weight_dtype))
    return [t.to(device) for t in (top_acts, top_indices, weight, d_recon)]


def _close(actual, expected, scale):
    """Accumulated in float32, rounded once: the float64 result up to one rounding, and dust of its terms' size."""
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[actual.dtype]
    dust = 1e-12 if actual.dtype == torch.float64 else 2e-6
    assert ((actual.double() - expected).abs() <= rtol * expected.abs() + dust * scale).all()


@pytest.mark.parametrize("pattern", ["spread", "hot", "one latent"])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("act_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(device, shape, act_dtype, weight_dtype, pattern):
    top_acts, top_indices, weight, d_recon = _inputs(shape, act_dtype, weight_dtype, device, pattern)
    top_acts.requires_grad_()
    weight.requires_grad_()
    recon = sparse_decode(top_acts, top_indices, weight, LatentMajor(top_indices, weight.shape[0]))
    recon.backward(d_recon)

    wide = [t.detach().double().requires_grad_() for t in (top_acts, weight)]
    expected = reference.decode(wide[0], top_indices, wide[1])
    expected.backward(d_recon.double())
    with torch.no_grad():
        absolute = [t.abs() for t in wide]
        recon_scale = reference.decode(absolute[0], top_indices, absolute[1])
        act_scale = (d_recon.double().abs() @ absolute[1].T).gather(1, top_indices)
        weight_scale = reference.latent_rows(
            absolute[0], top_indices, d_recon.double().abs(), weight.shape[0]
        )
    assert recon.dtype == torch.promote_types(act_dtype, weight_dtype)
    assert top_acts.grad is not None and top_acts.grad.dtype == act_dtype
    assert weight.grad is not None and weight.grad.dtype == weight_dtype
    _close(recon, expected, recon_scale)
    _close(top_acts.grad, wide[0].grad, act_scale)
    _close(weight.grad, wide[1].grad, weight_scale)


def test_gradcheck(device):
    top_acts, top_indices, weight, _ = _inputs((4, 3, 9, 5), torch.float64, torch.float64, device, "hot")
    top_acts.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: sparse_decode(a, top_indices, w), (top_acts, weight))


def test_only_the_gradients_asked_for(device, monkeypatch):
    top_acts, top_indices, weight, d_recon = _inputs((5, 7, 19, 3), torch.float32, torch.float32, device)
    pattern = LatentMajor(top_indices, 19)
    top_acts.requires_grad_()
    monkeypatch.setattr(LatentMajor, "rows", None)  # calling it would fail
    sparse_decode(top_acts, top_indices, weight, pattern).backward(d_recon)
    assert top_acts.grad is not None and weight.grad is None


def test_strided_inputs(device):
    """Gradients arrive expanded (a sum's backward) and transposed; acts as slices."""
    top_acts, top_indices, weight, d_recon = _inputs((6, 8, 19, 4), torch.float32, torch.float32, device)
    expected = reference.decode(top_acts[::2, 1:], top_indices[::2, 1:], weight)
    actual = gather_sum(top_acts[::2, 1:], top_indices[::2, 1:], weight, dtype=torch.float32)
    torch.testing.assert_close(actual, expected)
    for dense in (d_recon[:1].expand(6, 8), d_recon.T.contiguous().T):
        actual = gather_dot(dense, weight, top_indices, dtype=torch.float32)
        torch.testing.assert_close(actual, (dense @ weight.T).gather(1, top_indices))


def test_errors():
    acts, indices, weight = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="sparse_decode wants"):
        sparse_decode(acts[:, :1], indices, weight)
    with pytest.raises(ValueError, match="the pattern is of"):
        sparse_decode(acts, indices, weight, LatentMajor(indices, 6))
    with pytest.raises(ValueError, match="the pattern is of"):
        sparse_decode(acts, indices, weight, LatentMajor(indices[:2], 5))
