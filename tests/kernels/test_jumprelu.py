import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.encode_above import encode_above, encode_dense, find_above
from bigsae.kernels.jumprelu import jumprelu
from bigsae.kernels.pairs import DensePairs, RaggedPairs

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _grid(*shape):
    """Eighths: exact in bfloat16, and many lie on the threshold and on the window's edges."""
    return torch.randint(-16, 17, shape) / 8


def _pairs(kind, pre_acts, bound):
    """The values and pairs of a dense matrix; what is at or under the bound is left out of ragged ones."""
    if kind == "dense":
        return pre_acts, DensePairs(*pre_acts.shape), torch.ones_like(pre_acts, dtype=torch.bool)
    # Pairs that are not needed do no harm.
    kept = reference.above(pre_acts, bound) | (torch.rand(pre_acts.shape, device=pre_acts.device) < 0.1)
    crow = torch.cat((kept.new_zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)))
    return pre_acts[kept], RaggedPairs(kept.nonzero()[:, 1], crow, pre_acts.shape[1]), kept


@pytest.mark.parametrize("kind", ["dense", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bandwidth", [0.25, 0.5, 4.0])
@pytest.mark.parametrize("shape", [(33, 101), (7, 1), (0, 5)], ids=str)
def test_equals_the_reference(device, shape, bandwidth, threshold_dtype, dtype, kind):
    pre_acts, threshold = _grid(*shape), _grid(shape[1]).abs()
    # Zero a third of the gradients, so that the two parts of the threshold's are told apart.
    d_acts, d_active = (torch.randint(-1, 2, shape) * torch.randint(1, 4, shape) for _ in range(2))

    wide = [t.to(device, torch.float64).requires_grad_() for t in (pre_acts, threshold)]
    expected = reference.jumprelu(*wide, bandwidth)
    d_wide = torch.autograd.grad(expected, wide, [d.to(device).double() for d in (d_acts, d_active)])
    if shape == (33, 101):
        distance = (wide[0] - wide[1]).abs()
        assert (distance == 0).any() and (distance == bandwidth / 2).any() and d_wide[1].any()

    values, pairs, kept = _pairs(kind, pre_acts.to(device, dtype), threshold.to(device) - bandwidth / 2)
    inputs = [values.detach().requires_grad_(), threshold.to(device, threshold_dtype).requires_grad_()]
    acts, active = jumprelu(*inputs, pairs, bandwidth)
    assert acts.dtype == dtype and active.dtype == torch.promote_types(torch.float32, dtype)
    for actual, reference_value in ((acts, expected[0]), (active, expected[1])):
        assert actual.shape == values.shape
        assert torch.equal(actual.double().flatten(), reference_value[kept])
        assert not reference_value[~kept].any()
    grads = torch.autograd.grad(
        (acts, active),
        inputs,
        (
            d_acts.to(device)[kept].view_as(acts).to(dtype),
            d_active.to(device)[kept].view_as(active).to(active),
        ),
    )
    assert grads[0].dtype == dtype and torch.equal(grads[0].double().flatten(), d_wide[0][kept])
    assert grads[1].dtype == threshold_dtype and torch.equal(grads[1], d_wide[1].to(threshold_dtype))


@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_formula_by_hand(device, kind):
    """One latent, threshold 1, bandwidth 1: below, within the window below, at, within above, on its edge, above."""
    pre_acts = torch.tensor([[0.0], [0.75], [1.0], [1.25], [1.5], [3.0]], device=device)
    values, pairs, _ = _pairs(kind, pre_acts, torch.full((), -1.0, device=device))
    values = values.requires_grad_()
    threshold = torch.tensor([1.0], device=device, requires_grad=True)
    acts, active = jumprelu(values, threshold, pairs, 1.0)
    assert acts.flatten().tolist() == [0, 0, 0, 1.25, 1.5, 3]
    assert active.flatten().tolist() == [0, 0, 0, 1, 1, 1]
    d = torch.autograd.grad(acts.sum() + 10 * active.sum(), (values, threshold))
    assert d[0].flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert d[1].tolist() == [-(1 + 10) * 3]
    assert torch.autograd.grad(jumprelu(values, threshold, pairs, 1.0)[0].sum(), threshold)[0].tolist() == [
        -3
    ]
    only_active = jumprelu(values, threshold, pairs, 1.0)[1].sum()
    assert torch.autograd.grad(only_active, values)[0].flatten().tolist() == [0] * 6


@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_nan_reaches_the_loss(device, kind):
    pre_acts = torch.tensor([[float("nan"), 2.0]], device=device)
    threshold = torch.ones(2, device=device)
    values, pairs, _ = _pairs(kind, pre_acts, threshold)
    acts, active = jumprelu(values, threshold, pairs, 1.0)
    assert acts.isnan().flatten().tolist() == [True, False] and active.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ragged_and_dense_objective_agree(device, dtype):
    """A whole objective on both: encode, JumpReLU, decode, a penalty by decoder norms; the loss and every gradient."""
    shapes = ((33, 17), (203, 17), (203,), (203, 19))
    inputs = [torch.randn(*s, device=device, dtype=dtype) for s in shapes]
    inputs.append(4 + torch.rand(203, device=device, dtype=dtype) * 4)
    inputs = [t.requires_grad_() for t in inputs]
    *encoder, W_dec, threshold = inputs
    bandwidth = 2.0

    def objective(pre_acts, pairs):
        acts, active = jumprelu(pre_acts, threshold, pairs, bandwidth)
        norms = pairs.spread(W_dec.norm(dim=1))
        recon = pairs.decode(acts, W_dec)
        loss = recon.square().mean() + pairs.token_sums(torch.tanh(acts * norms) + active).mean()
        return loss, pairs.latent_sums(active), *torch.autograd.grad(loss, inputs)

    bound = threshold.detach() - bandwidth / 2
    pre_acts, pairs = encode_above(*encoder, bound)
    sparse, dense = objective(pre_acts, pairs), objective(*encode_dense(*encoder))
    assert 0 < pairs.num_pairs < 33 * 203 / 3
    assert find_above(*encoder, bound)[1].num_pairs == pairs.num_pairs
    for a, b in zip(sparse, dense, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert (a - b).norm() <= tolerance * b.norm()
