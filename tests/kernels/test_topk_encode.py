import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigsae.kernels import reference
from bigsae.kernels.decode import sparse_decode
from bigsae.kernels.encode import select, topk_encode
from bigsae.kernels.sparse_grad import LatentMajor
from bigsae.kernels.topk_pairs import own_selection, topk_pairs

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 17, 101, 1), (7, 17, 1000, 5), (33, 24, 1000, 32), (7, 5, 19, 19)]  # (batch, d_in, d_sae, k)
# mask: which latents may be selected
MASKS = {"no mask": None, "half": 0.5, "two": 2, "none": 0.0, "all": 1.0}


def _integers(batch, d_in, d_sae, dtype, device):
    """Small integers: pre-activations, and so ties, are exact in bfloat16 and in any order of summation."""
    x, W_enc = (torch.randint(-1, 2, (n, d_in), device=device) for n in (batch, d_sae))
    return x.to(dtype), W_enc.to(dtype), torch.randint(-2, 2, (d_sae,), device=device).to(dtype)


def _mask(share, d_sae, device):
    if share is None:
        return None
    if share == 2:
        return torch.arange(d_sae, device=device) % (d_sae - 1) == 0  # the first and the last
    return torch.rand(d_sae, device=device) < share


@pytest.mark.parametrize("share", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_autograd(device, shape, dtype, relu, share):
    """Forward and every gradient, exactly, against float64 autograd through the dense [batch, d_sae]."""
    batch, d_in, d_sae, k = shape
    inputs = _integers(batch, d_in, d_sae, dtype, device)
    mask = _mask(share, d_sae, device)
    d_acts = torch.randint(-4, 5, (batch, k), device=device).to(dtype)
    wide = [t.double().requires_grad_() for t in inputs]
    expected_acts, expected_indices = reference.encode(*wide, k, mask, relu)
    expected_acts.backward(d_acts.double())

    inputs = [t.requires_grad_() for t in inputs]
    for slab_rows in (None, 1, 5):
        top_acts, top_indices, latent_major = topk_encode(
            *inputs, k, mask=mask, relu=relu, slab_rows=slab_rows
        )
        assert torch.equal(top_indices, expected_indices)
        assert torch.equal(top_acts, expected_acts.to(dtype))
        assert isinstance(latent_major, LatentMajor) and latent_major.top_indices.shape == (batch, k)
        for tensor, reference_input, grad in zip(
            inputs, wide, torch.autograd.grad(top_acts, inputs, d_acts), strict=True
        ):
            assert reference_input.grad is not None
            assert grad.dtype == tensor.dtype
            assert torch.equal(grad, reference_input.grad.to(dtype))


def test_clamped_latents_pass_no_gradient(device):
    x, W_enc = torch.ones(1, 1, device=device), torch.tensor([[2.0], [-1.0], [0.0]], device=device)
    W_enc.requires_grad_()
    top_acts, top_indices, _ = topk_encode(x, W_enc, torch.zeros(3, device=device), 3)
    assert top_indices.tolist() == [[0, 2, 1]]
    assert top_acts.tolist() == [[2.0, 0.0, 0.0]]
    top_acts.sum().backward()
    assert W_enc.grad is not None and W_enc.grad.tolist() == [[1.0], [0.0], [0.0]]


@pytest.mark.parametrize("relu", [True, False])
def test_fewer_latents_than_k(device, relu):
    """What lies beyond the mask is inert: act 0, an index of its own, no gradient."""
    x, W_enc, b_enc = (t.requires_grad_() for t in _integers(9, 6, 40, torch.float32, device))
    mask = torch.arange(40, device=device) % 20 == 7
    top_acts, top_indices, _ = topk_encode(x, W_enc, b_enc + 100, 8, mask=mask, relu=relu)
    assert (top_acts[:, :2] > 0).all()
    assert (top_acts[:, 2:] == 0).all()
    assert top_indices[:, 2:].tolist() == [[0, 1, 2, 3, 4, 5]] * 9
    top_acts.sum().backward()
    assert b_enc.grad is not None and W_enc.grad is not None
    assert b_enc.grad.tolist() == (mask * 9.0).tolist()
    assert not W_enc.grad[~mask].any() and W_enc.grad[mask].any()


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck(device, relu):
    inputs = [
        torch.randn(*s, dtype=torch.float64, device=device, requires_grad=True)
        for s in ((4, 3), (11, 3), (11,))
    ]
    assert torch.autograd.gradcheck(lambda *args: topk_encode(*args, 5, relu=relu)[0], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autoencoder_gradients(device, dtype):
    """Encode, decode and loss with real-valued inputs, given the same selection as float64 autograd."""
    batch, d_in, d_sae, k = 33, 17, 1000, 5
    tensors = [torch.randn(*s) for s in ((batch, d_in), (d_sae, d_in), (d_sae,), (d_sae, d_in))]
    x, W_enc, b_enc, W_dec = (t.to(device, dtype).requires_grad_() for t in tensors)
    top_acts, top_indices, latent_major = topk_encode(x, W_enc, b_enc, k)
    loss = sparse_decode(top_acts, top_indices, W_dec, latent_major).sub(x.detach()).double().pow(2).sum()
    loss.backward()

    wide = [t.detach().double().requires_grad_() for t in (x, W_enc, b_enc, W_dec)]
    acts = torch.relu((wide[0] @ wide[1].T + wide[2]).gather(1, top_indices))
    expected = (reference.decode(acts, top_indices, wide[3]) - x.detach().double()).pow(2).sum()
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss.item() / expected.item() - 1) < tolerance
    for tensor, reference_input in zip((x, W_enc, b_enc, W_dec), wide, strict=True):
        assert tensor.grad is not None and reference_input.grad is not None
        error = (tensor.grad.double() - reference_input.grad).norm() / reference_input.grad.norm()
        assert error < tolerance


def test_master_weights_stay_wide(device):
    """bfloat16 tokens, float32 weights: the matmul runs in bfloat16, the weights' gradients come in float32."""
    x, W_enc, b_enc = _integers(33, 17, 101, torch.float32, device)
    d_acts = torch.full((33, 5), 1 + 2**-7, device=device)  # exact in bfloat16, its sums are not
    W_enc.requires_grad_()
    b_enc.requires_grad_()
    narrow = torch.autograd.grad(
        topk_encode(x.bfloat16(), W_enc, b_enc, 5)[0], [W_enc, b_enc], d_acts.bfloat16()
    )
    wide = torch.autograd.grad(topk_encode(x, W_enc, b_enc, 5)[0], [W_enc, b_enc], d_acts)
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_only_the_gradients_asked_for(device):
    tensors = _integers(5, 4, 50, torch.float32, device)
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        topk_encode(*inputs, 3)[0].sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
    with torch.no_grad():
        assert not topk_encode(*tensors, 3)[0].requires_grad


class _LargestTensor(TorchDispatchMode):
    """Records the largest floating tensor that any op returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_of_the_size_of_the_dense_latents(device, masked):
    """Nothing is larger than a weight matrix: no [batch, d_sae], no [batch, k, d_in], forward or backward."""
    batch, d_in, d_sae, k = 256, 32, 1024, 16
    x, W_enc, b_enc = (t.requires_grad_() for t in _integers(batch, d_in, d_sae, torch.float32, device))
    W_dec = torch.randn(d_sae, d_in, device=device, requires_grad=True)
    mask = torch.rand(d_sae, device=device) < 0.6 if masked else None
    with _LargestTensor() as sparse:
        top_acts, top_indices, latent_major = topk_encode(x, W_enc, b_enc, k, mask=mask, slab_rows=16)
        sparse_decode(top_acts, top_indices, W_dec, latent_major).pow(2).sum().backward()
    assert sparse.numel == d_sae * d_in
    with _LargestTensor() as dense:
        reference.decode(*reference.encode(x, W_enc, b_enc, k, mask), W_dec).pow(2).sum().backward()
    assert dense.numel == batch * d_sae


def test_the_sort_is_shared(device, monkeypatch):
    sorts = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **kw: sorts.append(1) or sort(*a, **kw))
    x, W_enc, b_enc = (t.requires_grad_() for t in _integers(9, 6, 40, torch.float32, device))
    W_dec = torch.randn(40, 6, device=device, requires_grad=True)
    top_acts, top_indices, latent_major = topk_encode(x, W_enc, b_enc, 4)
    selection_sorts = len(sorts)
    sparse_decode(top_acts, top_indices, W_dec, latent_major).pow(2).sum().backward()
    assert len(sorts) == selection_sorts + 1


def test_no_tokens(device):
    x, W_enc, b_enc = (t.requires_grad_() for t in _integers(0, 6, 40, torch.float32, device))
    top_acts, top_indices, latent_major = topk_encode(x, W_enc, b_enc, 4)
    sparse_decode(top_acts, top_indices, W_enc, latent_major).sum().backward()
    assert W_enc.grad is not None and not W_enc.grad.any()


def test_errors():
    x, W_enc, b_enc = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5)
    with pytest.raises(ValueError, match="W_enc"):
        topk_encode(x[:, :2], W_enc, b_enc, 1)
    with pytest.raises(ValueError, match="b_enc must be"):
        topk_encode(x, W_enc, b_enc[:4], 1)
    with pytest.raises(ValueError, match="k must lie"):
        topk_encode(x, W_enc, b_enc, 6)
    with pytest.raises(ValueError, match="mask must be bool"):
        topk_encode(x, W_enc, b_enc, 1, mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="slab_rows"):
        topk_encode(x, W_enc, b_enc, 1, slab_rows=0)


@pytest.mark.parametrize("num_left", [0, 3, 12, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_selections_of_the_same_pre_activations(device, dtype, num_left):
    """The k largest, and those of a mask in any order: each as by itself, forward and gradients."""
    x, W_enc, b_enc = _integers(33, 17, 40, dtype, device)
    mask = torch.zeros(40, dtype=torch.bool, device=device)
    mask[torch.randperm(40)[:num_left]] = True
    W_dec = torch.randint(-4, 5, (40, 6), device=device).to(dtype)
    inputs = [t.clone().requires_grad_() for t in (x, W_enc, b_enc, W_dec)]
    largest, masked = own_selection(5, 40), own_selection(8, 40, mask=mask)
    select(*(t.detach() for t in inputs[:3]), [largest, masked], 7)
    sums = [
        topk_pairs(selection, *inputs[:3], relu=relu).decode(inputs[3])
        for selection, relu in ((largest, True), (masked, False))
    ]
    wide = [t.double().requires_grad_() for t in (x, W_enc, b_enc, W_dec)]
    expected = [
        reference.decode(*reference.encode(*wide[:3], k, of, relu), wide[3])
        for k, of, relu in ((5, None, True), (8, mask, False))
    ]
    d_sums = torch.randint(-2, 3, (2, 33, 6), device=device)
    grads = torch.autograd.grad(sums, inputs, list(d_sums.to(sums[0].dtype)))
    wide_grads = torch.autograd.grad(expected, wide, list(d_sums.double()))
    for value, wanted in zip((*sums, *grads), (*expected, *wide_grads), strict=True):
        torch.testing.assert_close(
            value.double(), wanted, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-6
        )


def test_more_latents_than_there_are():
    """On several ranks, of those of all of them."""
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.d_sae = 40, got 41"):
        own_selection(41, 40)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.d_sae = 80, got 81"):
        own_selection(81, 40, 2)
    assert own_selection(41, 40, 2).k == 41
    with pytest.raises(ValueError, match=r"mask must be bool \[40\]"):
        own_selection(8, 40, mask=torch.ones(39, dtype=torch.bool))
