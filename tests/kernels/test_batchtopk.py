import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigsae.kernels import batchtopk, reference
from bigsae.kernels.batchtopk import batchtopk_encode
from bigsae.kernels.global_topk import Ranks
from bigsae.kernels.topk_pairs import own_selection

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 5, 1), (7, 17, 101), (33, 24, 300), (0, 3, 7)]  # (batch, d_in, d_sae)
GUESSES = [None, 0.0, 1e-30, 1.0, 2.3, 1e9, float("inf"), float("nan"), -1.0]


def _integers(batch, d_in, d_sae, dtype, device):
    """Small integers: pre-activations, and so ties, are exact in bfloat16 and in any order of summation."""
    x, W_enc = (torch.randint(-1, 2, (n, d_in), device=device) for n in (batch, d_sae))
    return x.to(dtype), W_enc.to(dtype), torch.randint(-2, 2, (d_sae,), device=device).to(dtype)


def _dense(x, W_enc, b_enc, num_keep):
    """Kept acts [num_pairs], differentiable by autograd, and which of [batch, d_sae] they are."""
    pre_acts = x @ W_enc.T + b_enc
    kept = pre_acts > 0
    kept[kept.clone()] = reference.select_global(pre_acts[kept].detach(), kept.nonzero()[:, 1], num_keep)
    return pre_acts[kept], kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_autograd(device, shape, dtype):
    """Selection, acts and every gradient, exactly, from every guess and in every slab."""
    tensors = _integers(*shape, dtype, device)
    wide = [t.double().requires_grad_() for t in tensors]
    inputs = [t.requires_grad_() for t in tensors]
    num_positive = _dense(*wide, 10**9)[0].numel()
    guesses = [None if g is None else torch.tensor(g, device=device) for g in GUESSES]
    for num_keep in {0, 1, 7, num_positive // 9, num_positive // 2, num_positive, num_positive + 5}:
        expected, kept = _dense(*wide, num_keep)
        d_acts = torch.randint(-4, 5, expected.shape, device=device).to(dtype)
        expected_grads = torch.autograd.grad(expected, wide, d_acts.double())
        for i, guess in enumerate(guesses):
            slab_rows = (None, 1, 5)[i % 3]
            acts, pairs, smallest = batchtopk_encode(*inputs, num_keep, guess, Ranks(), slab_rows=slab_rows)
            assert acts.dtype == dtype and torch.equal(acts, expected.to(dtype))
            assert torch.equal(pairs.latents, kept.nonzero()[:, 1])
            assert torch.equal(pairs.crow.diff(), kept.sum(1)) and pairs.d_sae == shape[2]
            assert smallest == (acts.min() if acts.numel() else 0) and smallest.dtype == torch.float32
            grads = torch.autograd.grad(acts, inputs, d_acts)
            for grad, tensor, expected_grad in zip(grads, inputs, expected_grads, strict=True):
                assert grad.dtype == tensor.dtype and torch.equal(grad, expected_grad.to(dtype))


def test_gradcheck(device):
    sizes = ((4, 3), (11, 3), (11,))
    inputs = [torch.randn(*s, dtype=torch.float64, device=device, requires_grad=True) for s in sizes]
    for num_keep in (9, 100):
        assert torch.autograd.gradcheck(
            lambda *a, n=num_keep: batchtopk_encode(*a, n, None, Ranks())[0], inputs
        )


def test_master_weights_stay_wide(device):
    """bfloat16 tokens, float32 weights: the matmul runs in bfloat16, the weights' gradients come in float32."""
    x, W_enc, b_enc = _integers(33, 17, 101, torch.float32, device)
    W_enc.requires_grad_()
    acts, pairs, smallest = batchtopk_encode(x.bfloat16(), W_enc, b_enc, 200, None, Ranks())
    expected, kept = _dense(x, W_enc, b_enc, 200)
    assert acts.dtype == torch.bfloat16 and torch.equal(acts.float(), expected)
    assert torch.equal(pairs.latents, kept.nonzero()[:, 1]) and smallest == expected.min()
    (grad,) = torch.autograd.grad(acts.sum(), W_enc)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), W_enc)[0]) and grad.dtype == torch.float32


@pytest.fixture
def searches(monkeypatch):
    """The bounds that were searched."""
    bounds = []
    find = batchtopk._find_candidates

    def counted(*args):
        bounds.append(args[3].item())
        return find(*args)

    monkeypatch.setattr(batchtopk, "_find_candidates", counted)
    return bounds


def test_how_often_it_searches(device, searches):
    x, W_enc, b_enc = (torch.randn(*s, device=device) for s in ((512, 20), (700, 20), (700,)))
    _, _, smallest = batchtopk_encode(x, W_enc, b_enc, 512 * 8, None, Ranks())
    assert len(searches) == 1  # the estimate is good enough
    for factor, num_searches in ((1.0, 1), (1.1, 1), (0.5, 1), (1.3, 2), (1e6, 2)):
        searches.clear()
        batchtopk_encode(x, W_enc, b_enc, 512 * 8, smallest * factor, Ranks())
        assert len(searches) == num_searches and searches == sorted(searches, reverse=True)
    for guess in (None, smallest, torch.zeros((), device=device)):
        searches.clear()
        acts, _, smallest_positive = batchtopk_encode(x, W_enc, b_enc, 512 * 700, guess, Ranks())
        assert acts.numel() < 512 * 700 and (acts > 0).all() and smallest_positive == acts.min()
        assert searches[-1] == 0 and 0 not in searches[:-1]


def test_an_estimate_from_a_token_unlike_the_others(device, searches, monkeypatch):
    monkeypatch.setattr(batchtopk, "_NUM_SAMPLED", 1)
    x, W_enc, b_enc = _integers(64, 20, 70, torch.float32, device)
    x[0] *= 1e4
    expected, kept = _dense(x, W_enc, b_enc, 600)
    for guess in (None, torch.tensor(1e6, device=device)):
        searches.clear()
        acts, pairs, _ = batchtopk_encode(x, W_enc, b_enc, 600, guess, Ranks())
        assert torch.equal(acts, expected) and torch.equal(pairs.latents, kept.nonzero()[:, 1])
        assert searches[-1] == 0 and len(set(searches)) == len(searches) == (3 if guess is None else 4)


def test_nan_reaches_the_acts(device):
    x, W_enc, b_enc = _integers(9, 6, 40, torch.float32, device)
    x[3] = float("nan")
    for guess in (None, torch.tensor(2.0, device=device), torch.tensor(float("nan"), device=device)):
        acts, pairs, smallest = batchtopk_encode(x, W_enc, b_enc, 50, guess, Ranks(), slab_rows=2)
        assert acts.isnan().tolist() == (pairs.tokens == 3).tolist() and acts.isnan().sum() == 40
        assert smallest == acts[~acts.isnan()].min()
    acts, pairs, smallest = batchtopk_encode(x * float("nan"), W_enc, b_enc, 50, None, Ranks(), slab_rows=2)
    # All equal: the lowest latents.
    assert acts.isnan().all() and smallest.isnan()
    assert pairs.latents.sort().values.tolist() == sorted([*range(5)] * 9 + [5] * 5)


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any op returns, but for the slab's bytes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("guess", [None, 0.0])
def test_nothing_of_the_size_of_the_dense_latents(device, monkeypatch, guess, value):
    """Nor of that of its positive half, where the bound is far too low or everything NaN."""
    monkeypatch.setattr(batchtopk, "_NUM_SAMPLED", 4096)
    batch, d_in, d_sae, num_keep = 2048, 8, 512, 1024
    tensors = (torch.randn(*s, device=device) * value for s in ((batch, d_in), (d_sae, d_in), (d_sae,)))
    x, W_enc, b_enc = (t.requires_grad_() for t in tensors)
    with _LargestTensor() as largest:
        guess = None if guess is None else torch.tensor(guess, device=device)
        acts, _, _ = batchtopk_encode(x, W_enc, b_enc, num_keep, guess, Ranks(), slab_rows=64)
        acts.sum().backward()
    # The candidates held, a slab more, and two coordinates of each of them.
    assert largest.numel <= 2 * (4 * num_keep + 64 * d_sae) < batch * d_sae // 8


def test_only_the_gradients_asked_for(device):
    tensors = _integers(5, 4, 50, torch.float32, device)
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        batchtopk_encode(*inputs, 20, None, Ranks())[0].sum().backward()
        assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]
    assert not batchtopk_encode(*tensors, 20, None, Ranks())[0].requires_grad


def test_errors():
    x, W_enc, b_enc = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5)
    with pytest.raises(ValueError, match="W_enc"):
        batchtopk_encode(x[:, :2], W_enc, b_enc, 1, None, Ranks())
    with pytest.raises(ValueError, match="b_enc must be"):
        batchtopk_encode(x, W_enc, b_enc[:4], 1, None, Ranks())


@pytest.mark.parametrize("guess", [None, 1e9, 1e-9])
def test_a_selection_beside_it(device, guess, monkeypatch):
    """AuxK's, from the first pass' slabs: also where its bound is too high, or so low that pairs are left out."""
    x, W_enc, b_enc = (torch.randn(*s, device=device) for s in ((40, 6), (90, 6), (90,)))
    mask = torch.rand(90, device=device) < 0.3
    selection, num_taken = own_selection(7, 90, mask=mask), []
    take = selection.take
    monkeypatch.setattr(selection, "take", lambda slab: (num_taken.append(len(slab)), take(slab)))
    guess = None if guess is None else torch.tensor(guess, device=device)
    acts, pairs, _ = batchtopk_encode(
        x, W_enc, b_enc, 30, guess, Ranks(), slab_rows=3, selections=[selection]
    )
    assert sum(num_taken) == 40  # once, however often a bound fails
    values, latents = reference.select_topk(x @ W_enc.T + b_enc, 7, mask)
    assert torch.equal(selection.latents.sort(1).values, latents.sort(1).values)
    torch.testing.assert_close(selection.values.sort(1, descending=True).values, values)
    without, same, _ = batchtopk_encode(x, W_enc, b_enc, 30, guess, Ranks(), slab_rows=3)
    assert torch.equal(acts, without) and torch.equal(pairs.latents, same.latents)
