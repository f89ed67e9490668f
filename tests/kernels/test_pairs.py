import pytest
import torch

from bigsae.kernels import reference
from bigsae.kernels.pairs import DensePairs, RaggedPairs, gather_dot, gather_sum
from bigsae.kernels.sparse_grad import LatentMajor

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 17, 101), (7, 17, 101), (33, 40, 1000), (7, 1, 1), (5, 3, 8)]  # (batch, d_out, d_sae)
KINDS = ["spread", "gaps", "hot", "none", "every"]


def _mask(kind, batch, d_sae):
    """[batch, d_sae] bool: the pairs."""
    if kind == "none":
        return torch.zeros(batch, d_sae, dtype=torch.bool)
    mask = torch.rand(batch, d_sae) < (1.0 if kind == "every" else 0.1)
    if kind == "gaps":  # empty tokens, also the first and the last, and a full one
        mask[::3] = mask[-1] = False
        mask[batch // 2] = True
    elif kind == "hot":
        mask[:, d_sae // 2] = True
    return mask


def _ragged(mask, device):
    tokens, latents = mask.nonzero(as_tuple=True)
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
    return RaggedPairs(latents.to(device), crow.to(device), mask.shape[1]), tokens.to(device)


def _integers(*shape):
    """Small ones: sums are exact in float32, so any wrong, lost or doubled term shows."""
    return torch.randint(-4, 5, shape)


def _rounded_once(actual, exact):
    """From an exact sum. Of ties between two bfloat16s torch's embedding_bag takes the one farther from zero."""
    rtol = 2**-8 if actual.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_autograd(device, shape, weight_dtype, value_dtype, kind):
    """Every op on pairs, and every gradient, against float64 autograd on the dense matrix of the same values."""
    batch, d_out, d_sae = shape
    mask = _mask(kind, batch, d_sae)
    values, weight, vector = _integers(batch, d_sae), _integers(d_sae, d_out), _integers(d_sae)
    d_recon, d_token = _integers(batch, d_out).to(device), _integers(batch).to(device)

    dense, wide_weight, wide_vector = (
        t.to(device, torch.float64).requires_grad_() for t in (values, weight, vector)
    )
    used = dense * mask.to(device)
    wide = (used @ wide_weight, (mask.to(device) * wide_vector).sum(1))
    torch.autograd.backward(wide, [d.double() for d in (d_recon, d_token)])

    ragged, _ = _ragged(mask, device)
    for pairs in [ragged, DensePairs(batch, d_sae)] if kind == "every" else [ragged]:
        is_ragged = isinstance(pairs, RaggedPairs)
        taken = values[mask] if is_ragged else values
        inputs = [
            t.to(device, dtype).requires_grad_()
            for t, dtype in ((taken, value_dtype), (weight, weight_dtype), (vector, value_dtype))
        ]
        spread = pairs.spread(inputs[2])
        assert spread.shape == taken.shape and spread.dtype == value_dtype
        assert torch.equal(spread, (vector.expand(batch, -1)[mask].view(taken.shape)).to(spread))
        recon, sums = pairs.decode(inputs[0], inputs[1]), pairs.token_sums(spread)
        assert recon.dtype == torch.promote_types(value_dtype, weight_dtype) and sums.dtype == torch.float32
        _rounded_once(recon, wide[0])
        _rounded_once(sums, wide[1])
        grads = torch.autograd.grad((recon, sums), inputs, (d_recon.to(recon.dtype), d_token.float()))
        expected = [dense.grad, wide_weight.grad, wide_vector.grad]
        if is_ragged:
            expected[0] = dense.grad[mask.to(device)]
        for grad, tensor, reference_grad in zip(grads, inputs, expected, strict=True):
            assert grad.dtype == tensor.dtype
            assert reference_grad is not None
            _rounded_once(grad, reference_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.float32, torch.float64])
def test_sums(device, kind, dtype):
    """Integers and bools in int64, floats in at least float32."""
    values, mask = _integers(33, 101).to(dtype), _mask(kind, 33, 101)
    ragged, _ = _ragged(mask, device)
    wide = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    expected = torch.where(mask, values, torch.zeros((), dtype=dtype)).to(
        device, wide.get(dtype, torch.int64)
    )
    cases = [(ragged, values[mask].to(device))]
    if kind == "every":
        cases.append((DensePairs(33, 101), values.to(device)))
    for pairs, taken in cases:
        for actual, dim in ((pairs.latent_sums(taken), 0), (pairs.token_sums(taken), 1)):
            torch.testing.assert_close(actual, expected.sum(dim), rtol=0, atol=0)  # dtypes too


def test_accumulated_in_float32(device):
    """4,096 ones: in bfloat16 a running sum would stop at 256."""
    latents = torch.zeros(4096, dtype=torch.int64, device=device)
    column = RaggedPairs(latents, torch.arange(4097, device=device), 2)
    row = RaggedPairs(latents, torch.tensor([0, 0, 4096], device=device), 2)
    ones = torch.ones(4096, dtype=torch.bfloat16, device=device)
    assert column.latent_sums(ones).tolist() == [4096.0, 0.0]
    assert row.token_sums(ones).tolist() == [0.0, 4096.0]
    assert row.decode(ones, ones.view(2, 2048)).tolist() == [[0.0] * 2048, [4096.0] * 2048]


@pytest.mark.parametrize("kind", KINDS)
def test_select(device, kind):
    mask = _mask(kind, 9, 50)
    ragged, _ = _ragged(mask, device)
    kept = mask & (torch.rand(9, 50) < 0.5)
    selected, expected = ragged.select(kept[mask].to(device)), _ragged(kept, device)[0]
    assert torch.equal(selected.latents, expected.latents) and torch.equal(selected.crow, expected.crow)
    assert (selected.d_sae, selected.batch, selected.num_pairs) == (50, 9, kept.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefixes", [[50], [1, 50], [3, 3, 20, 49, 50], [0, 25, 50]], ids=str)
def test_split(device, kind, prefixes):
    mask, values, weight = _mask(kind, 9, 50), _integers(9, 50), _integers(50, 6).double().to(device)
    ragged, _ = _ragged(mask, device)
    parts = ragged.split(prefixes)
    assert (parts.batch, parts.num_pairs, parts.d_sae) == (9 * len(prefixes), ragged.num_pairs, 50)
    taken = values[mask].double().to(device).requires_grad_()
    weight.requires_grad_()
    actual = parts.decode(taken, weight)
    dense = (values * mask).double().to(device).requires_grad_()
    starts = [0, *prefixes[:-1]]
    expected = torch.stack([dense[:, a:b] @ weight[a:b] for a, b in zip(starts, prefixes, strict=True)], 1)
    assert torch.equal(actual.view(9, len(prefixes), 6), expected)
    d_parts = _integers(*actual.shape).double().to(device)
    d_taken, d_weight = torch.autograd.grad(actual, (taken, weight), d_parts)
    d_dense, expected_d_weight = torch.autograd.grad(expected, (dense, weight), d_parts.view(expected.shape))
    assert torch.equal(d_taken, d_dense[mask.to(device)]) and torch.equal(d_weight, expected_d_weight)
    assert torch.equal(parts.latent_sums(taken), ragged.latent_sums(taken))


def test_sorted_once_and_stably(device, monkeypatch):
    """One sort for every gradient and sum of the pairs and of their splits; tokens ascend within a latent."""
    sorts, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **kw: sorts.append(1) or sort(*a, **kw))
    ragged = RaggedPairs(
        torch.tensor([0, 3, 0, 2, 3], device=device), torch.tensor([0, 2, 2, 5], device=device), 5
    )
    assert ragged.tokens.tolist() == [0, 0, 2, 2, 2]
    weight, vector = (
        torch.randn(5, 4, device=device, requires_grad=True),
        torch.ones(5, device=device, requires_grad=True),
    )
    assert not sorts
    values = ragged.spread(vector)
    parts = ragged.split([2, 5])
    (ragged.decode(values, weight).sum() + parts.decode(values, weight).sum()).backward()
    ragged.latent_sums(values)
    parts.latent_sums(values)
    assert len(sorts) == 1
    major = ragged.latent_major
    assert major.latents.tolist() == [0, 0, 2, 3, 3] and major.tokens.tolist() == [0, 2, 2, 0, 2]
    assert major.crow.tolist() == [0, 2, 2, 3, 5, 5] and major.counts.tolist() == [2, 0, 1, 2, 0]
    assert parts.latent_major.tokens.tolist() == [0, 4, 5, 1, 5]


def test_same_bits_every_time(device):
    mask = _mask("hot", 300, 50)
    values, dense = torch.randn(int(mask.sum()), device=device), torch.randn(300, 65, device=device)
    first = None
    for _ in range(3):
        pairs = _ragged(mask, device)[0]
        result = (pairs.latent_major.rows(values, dense), pairs.latent_sums(values), pairs.token_sums(values))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize("kind", ["gaps", "none"])
def test_gradcheck(device, kind):
    mask = _mask(kind, 4, 9)
    pairs, _ = _ragged(mask, device)
    values, weight, vector = (
        torch.randn(*s, dtype=torch.float64, device=device, requires_grad=True)
        for s in ((int(mask.sum()),), (9, 3), (9,))
    )
    assert torch.autograd.gradcheck(
        lambda v, w, u: (pairs.decode(v, w), pairs.token_sums(v), pairs.spread(u)), (values, weight, vector)
    )


def test_real_values_keep_their_precision(device):
    """float32 results against float64, to the dust of their terms' size; strided gradients too."""
    batch, d_out, d_sae = 33, 40, 1000
    mask = _mask("hot", batch, d_sae)
    pairs, tokens = _ragged(mask, device)
    values, weight = torch.randn(pairs.num_pairs, device=device), torch.randn(d_sae, d_out, device=device)
    dense = torch.randn(d_out, batch, device=device).T
    spread = torch.zeros(batch, d_sae, dtype=torch.float64, device=device)
    spread[tokens, pairs.latents] = values.double()
    cases = [
        (gather_sum(values, pairs, weight, dtype=torch.float32), spread @ weight.double(), 10.0),
        (
            gather_dot(dense, pairs, weight, dtype=torch.float32),
            (dense.double() @ weight.double().T)[mask.to(device)],
            6.0,
        ),
        (pairs.latent_major.rows(values, dense), spread.T @ dense.double(), 6.0),
    ]
    for actual, expected, scale in cases:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * scale)


def test_only_the_gradients_asked_for(device, monkeypatch):
    pairs, _ = _ragged(_mask("spread", 5, 19), device)
    values = torch.ones(pairs.num_pairs, device=device, requires_grad=True)
    weight = torch.ones(19, 7, device=device)
    monkeypatch.setattr(LatentMajor, "rows", None)  # calling it would fail
    pairs.decode(values, weight).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [7.0] * pairs.num_pairs


@pytest.mark.parametrize("batch", [0, 3])
def test_no_pairs(device, batch):
    crow = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    pairs = RaggedPairs(crow[:0], crow, 7)
    values, weight = torch.empty(0, device=device, requires_grad=True), torch.randn(7, 5, device=device)
    weight.requires_grad_()
    for used in (pairs, pairs.select(crow[:0].bool()), pairs.split([7])):
        recon = used.decode(values, weight)
        assert torch.equal(recon, torch.zeros(batch, 5, device=device))
        (recon.sum() + used.token_sums(values).sum() + used.spread(weight[:, 0]).sum()).backward()
    assert weight.grad is not None and not weight.grad.any()
    assert torch.equal(
        reference.scatter_dense(values.view(1, 0), crow[None, :0], 7).sum(0), pairs.latent_sums(values)
    )


def test_errors():
    crow = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="latents must be int64"):
        RaggedPairs(torch.zeros(2, dtype=torch.int32), crow, 5)
    pairs = RaggedPairs(torch.zeros(2, dtype=torch.int64), crow, 5)
    for values, weight in ((torch.ones(3), torch.ones(5, 2)), (torch.ones(2), torch.ones(4, 2))):
        with pytest.raises(ValueError, match="decode wants values"):
            pairs.decode(values, weight)
    for prefixes in ([], [2, 4], [3, 2, 5], [5, 6]):
        with pytest.raises(ValueError, match="prefixes must ascend"):
            pairs.split(prefixes)
