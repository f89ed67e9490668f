import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigsae.kernels import encode_above as module
from bigsae.kernels import reference
from bigsae.kernels.encode_above import attach, encode_above, encode_dense, find_above
from bigsae.kernels.jumprelu import jumprelu
from bigsae.kernels.pairs import DensePairs, RaggedPairs

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 17, 101), (7, 17, 1000), (150, 5, 64), (70, 3, 1), (3, 4, 15)]  # (batch, d_in, d_sae)
pytestmark = pytest.mark.usefixtures("poisoned")


def _integers(batch, d_in, d_sae, dtype, device):
    """Small integers: pre-activations, and so ties with the bound, are exact in bfloat16 and in any order."""
    x, W_enc = (torch.randint(-1, 2, (n, d_in), device=device) for n in (batch, d_sae))
    return x.to(dtype), W_enc.to(dtype), torch.randint(-2, 2, (d_sae,), device=device).to(dtype)


def _bound(kind, d_sae, device):
    bounds = {
        "one": torch.tensor(2.0),
        "none": torch.tensor(float("inf")),
        "every": torch.tensor(-float("inf")),
    }
    # Many pre-activations equal their bound, or lie less than a bfloat16's precision beside it.
    close = torch.randint(-1, 5, (d_sae,)) + torch.randint(-1, 2, (d_sae,)) * 1e-6
    return bounds.get(kind, close).to(device)


def _check_found(values, pairs, pre_acts, bound):
    above = reference.above(pre_acts, bound)
    tokens, latents = above.nonzero(as_tuple=True)
    assert isinstance(pairs, RaggedPairs) and pairs.d_sae == pre_acts.shape[1]
    assert torch.equal(pairs.tokens, tokens) and torch.equal(pairs.latents, latents)
    assert torch.equal(pairs.crow, F.pad(above.sum(1).cumsum(0), (1, 0)))
    torch.testing.assert_close(values, pre_acts[above], rtol=0, atol=0, equal_nan=True)  # dtype too
    return above


@pytest.mark.parametrize("kind", ["one", "many", "none", "every"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_autograd(device, shape, dtype, kind):
    """The pairs, their values and every gradient, exactly, against float64 autograd through [batch, d_sae]."""
    inputs = _integers(*shape, dtype, device)
    bound = _bound(kind, shape[2], device)
    wide = [t.double().requires_grad_() for t in inputs]
    pre_acts = wide[0] @ wide[1].T + wide[2]
    d_pre = torch.randint(-4, 5, pre_acts.shape, device=device).to(dtype)

    inputs = [t.requires_grad_() for t in inputs]
    for slab_rows in (None, 1, 5):
        values, pairs = find_above(*inputs, bound, slab_rows=slab_rows)
        assert not values.requires_grad
        above = _check_found(values, pairs, pre_acts.detach().to(dtype), bound)
    expected = torch.autograd.grad(pre_acts, wide, d_pre.double() * above)
    values, pairs = encode_above(*inputs, bound)
    grads = torch.autograd.grad(values, inputs, d_pre[above])
    # Rounded once from exact sums. Of ties between two bfloat16s torch's embedding_bag takes the one farther from zero.
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 0.0)
    for grad, tensor, expected_grad in zip(grads, inputs, expected, strict=True):
        assert grad.dtype == tensor.dtype
        torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_is_not_rounded(device, dtype):
    """Bounds between two neighbouring bfloat16s, beyond their range, and NaN."""
    x = torch.tensor(
        [[1.0], [1 + 2**-7], [float("inf")], [float("nan")], [-1 - 2**-7], [-0.0]], device=device
    )
    W_enc, b_enc = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    for bound in (
        1.0,
        1 + 2**-12,
        1 - 2**-12,
        1 + 2**-7 + 2**-12,
        3.4e38,
        -1 - 2**-12,
        0.0,
        1e-45,
        float("nan"),
    ):
        for b in (torch.tensor(bound), torch.tensor([bound]), torch.tensor(bound, dtype=torch.float64)):
            values, pairs = find_above(x.to(dtype), W_enc, b_enc, b.to(device))
            _check_found(values, pairs, x.to(dtype), b.to(device))


@pytest.mark.parametrize("d_sae", [64, 101])
def test_nan_and_infinity(device, d_sae):
    """NaN counts as above, in values, weights and biases."""
    x, W_enc, b_enc = _integers(70, 5, d_sae, torch.float32, device)
    x[3, 2], W_enc[7, 1], b_enc[9], b_enc[11], x[69] = *[float("nan")] * 3, float("inf"), -float("inf")
    bound = torch.full((), 100.0, device=device)
    values, pairs = find_above(x, W_enc, b_enc, bound)
    above = _check_found(values, pairs, x @ W_enc.T + b_enc, bound)
    assert above[3].all() and above[:, 7].all() and above[:, 9].all() and not above[0, 0]


def test_same_pre_acts_as_the_slab_of_topk(device):
    """Real-valued, and in the dtype of x: bit for bit what one dense matmul gives."""
    x, W_enc, b_enc = (torch.randn(*s, device=device) for s in ((300, 24), (1000, 24), (1000,)))
    bound = torch.rand(1000, device=device) * 8
    values, pairs = find_above(x, W_enc, b_enc, bound)
    _check_found(values, pairs, torch.addmm(b_enc, x, W_enc.T), bound)
    narrow, pairs = find_above(x.bfloat16(), W_enc, b_enc, bound)
    pre_acts = torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc.bfloat16().T)
    _check_found(narrow, pairs, pre_acts, bound)


def test_master_weights_stay_wide(device):
    """bfloat16 tokens, float32 weights: the matmul runs in bfloat16, the weights' gradients come in float32."""
    x, W_enc, b_enc = _integers(33, 17, 101, torch.float32, device)
    W_enc.requires_grad_()
    b_enc.requires_grad_()
    bound = torch.tensor(1.5, device=device)
    grads = []
    for tokens in (x.bfloat16(), x):
        values, _ = encode_above(tokens, W_enc, b_enc, bound)
        d_pre = torch.full_like(values, 1 + 2**-7)  # exact in bfloat16, its sums are not
        grads.append(torch.autograd.grad(values, [W_enc, b_enc], d_pre))
    for narrow, wide in zip(*grads, strict=True):
        assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


def test_gradcheck(device):
    inputs = [
        torch.randn(*s, dtype=torch.float64, device=device, requires_grad=True)
        for s in ((4, 3), (11, 3), (11,))
    ]
    values, pairs = find_above(*inputs, torch.tensor(0.3, device=device))
    assert pairs.num_pairs > 0

    def at_pairs(x, W_enc, b_enc):
        current = (x @ W_enc.T + b_enc).detach()[pairs.tokens, pairs.latents]
        return attach(current, pairs, x, W_enc, b_enc)

    assert torch.equal(at_pairs(*inputs), values)
    assert torch.autograd.gradcheck(at_pairs, inputs)
    assert torch.autograd.gradcheck(lambda *args: encode_dense(*args)[0], inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_dense(device, dtype):
    """In the dtype of x; float32 weights get float32 gradients."""
    x, W_enc, b_enc = _integers(7, 17, 101, torch.float32, device)
    inputs = [t.requires_grad_() for t in (x.to(dtype), W_enc, b_enc)]
    pre_acts, pairs = encode_dense(*inputs)
    assert isinstance(pairs, DensePairs) and (pairs.batch, pairs.d_sae) == (7, 101)
    assert pre_acts.dtype == dtype and torch.equal(pre_acts.float(), x @ W_enc.T + b_enc)
    d_pre = torch.randint(-1, 2, (7, 101), device=device).to(dtype)
    wide = [t.detach().requires_grad_() for t in (x, W_enc, b_enc)]
    expected = torch.autograd.grad(torch.addmm(wide[2], wide[0], wide[1].T), wide, d_pre.float())
    for grad, tensor, e in zip(torch.autograd.grad(pre_acts, inputs, d_pre), inputs, expected, strict=True):
        assert grad.dtype == tensor.dtype and torch.equal(grad, e.to(grad.dtype))


def test_only_the_gradients_asked_for(device):
    tensors = _integers(5, 4, 50, torch.float32, device)
    bound = torch.zeros((), device=device)
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        encode_above(*inputs, bound)[0].sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
    assert not encode_above(*tensors, bound)[0].requires_grad


class _LargestTensor(TorchDispatchMode):
    """Records the most bytes of any tensor that an op returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_nothing_of_the_size_of_the_dense_latents(device, monkeypatch):
    """Nothing is larger than a weight matrix: no [batch, d_sae], no [num_pairs, d_in], forward or backward."""
    monkeypatch.setattr(module, "_ROWS_PER_BLOCK", 16)
    batch, d_in, d_sae = 512, 32, 1024
    inputs = [t.requires_grad_() for t in _integers(batch, d_in, d_sae, torch.float32, device)]
    W_dec = torch.randn(d_sae, d_in, device=device, requires_grad=True)
    threshold = torch.full((d_sae,), 9.0, device=device, requires_grad=True)
    with _LargestTensor() as largest:
        values, pairs = find_above(*inputs, threshold - 0.5, slab_rows=16)
        acts, active = jumprelu(attach(values, pairs, *inputs), threshold, pairs, 1.0)
        (pairs.decode(acts, W_dec).square().sum() + pairs.token_sums(active).sum()).backward()
    assert d_sae < pairs.num_pairs < batch * d_sae / 20
    assert largest.bytes == 4 * d_sae * d_in


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_step_equals_the_torch_path(triton_device, monkeypatch, dtype):
    """A JumpReLU step through the Triton launchers, forward and every gradient, against torch's own ops on CPU."""
    shapes = ((4, 17), (37, 17), (37,), (37, 17))
    tensors = [torch.randint(-1, 2, s).to(dtype) for s in shapes]
    tensors.append(torch.randint(2, 5, (37,)).float())
    d_recon, d_active = torch.randint(-1, 2, (4, 17)).to(dtype), torch.randint(-1, 2, (4,)).float()

    def step(device):
        inputs = [t.to(device, copy=True).requires_grad_() for t in tensors]
        *encoder, W_dec, threshold = inputs
        pre_acts, pairs = encode_above(*encoder, threshold.detach() - 1)
        acts, active = jumprelu(pre_acts, threshold, pairs, 2.0)
        recon, sums = pairs.decode(acts, W_dec), pairs.token_sums(active * pairs.spread(threshold))
        torch.autograd.backward((recon, sums), (d_recon.to(device), d_active.to(device)))
        return [
            t.cpu() for t in (pre_acts, pairs.latents, pairs.crow, recon, sums, *(i.grad for i in inputs))
        ]

    expected = step(torch.device("cpu"))
    assert expected[0].numel() > 20
    names = ("pairs", "encode_above", "jumprelu", "sparse_grad")
    calls = []
    for name in names:
        target = importlib.import_module(f"bigsae.kernels.{name}")
        monkeypatch.setattr(target, "use_triton", lambda *t, name=name: calls.append(name) or True)
    actual = step(triton_device)
    assert set(calls) == set(names)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_tokens(device):
    inputs = [t.requires_grad_() for t in _integers(0, 6, 40, torch.float32, device)]
    values, pairs = encode_above(*inputs, torch.zeros(40, device=device))
    assert (pairs.batch, pairs.num_pairs, pairs.crow.tolist()) == (0, 0, [0])
    pairs.decode(values, inputs[1]).sum().backward()
    assert inputs[1].grad is not None and not inputs[1].grad.any()


def test_errors():
    x, W_enc, b_enc, bound = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(5)
    with pytest.raises(ValueError, match="W_enc"):
        find_above(x[:, :2], W_enc, b_enc, bound)
    with pytest.raises(ValueError, match="b_enc must be"):
        encode_dense(x, W_enc, b_enc[:4])
    with pytest.raises(ValueError, match="bound must be"):
        find_above(x, W_enc, b_enc, bound[:4])
    with pytest.raises(ValueError, match="slab_rows"):
        find_above(x, W_enc, b_enc, bound, slab_rows=0)
    values, pairs = find_above(x, W_enc, b_enc, bound - 1)
    with pytest.raises(ValueError, match="do not fit"):
        attach(values[1:], pairs, x, W_enc, b_enc)
