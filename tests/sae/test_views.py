"""What an SAE is beyond its objective: encode, decode and forward, folding, starting weights, normalisation, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigsae.config import OptimConfig, SAEConfig
from bigsae.sae.base import SAE, Shape, layer_norm
from bigsae.sae.batchtopk import BatchTopKSAE
from bigsae.sae.build import ARCHITECTURES, build_sae
from bigsae.sae.losses import StepContext, global_moments
from bigsae.sae.topk import TopKSAE
from bigsae.training.fit import fit_trainer
from tests.sae.saes import (
    BATCH,
    CPU,
    D_IN,
    D_OUT,
    D_SAE,
    K,
    assert_same,
    dead_latents,
    make_batch,
    make_context,
    make_sae,
    make_x,
    run_step,
)

# Architecture, what is configured, d_out.
KINDS: list[tuple[str, dict[str, Any], int | None]] = [
    *[(name, {}, None) for name in ARCHITECTURES],
    *[(name, {}, D_OUT) for name in ("topk", "batchtopk", "jumprelu")],
    *[(name, {"skip": True}, D_OUT) for name in ("topk", "batchtopk", "jumprelu")],
    ("standard", {"apply_b_dec_to_input": False}, None),
    ("gated", {"apply_b_dec_to_input": False}, None),
]
FIELDS: dict[str, dict[str, Any]] = {
    **{name: {"k": K} for name in ("topk", "batchtopk", "matryoshka")},
    "jumprelu": {"jumprelu_bandwidth": 1.0, "l0_coefficient": 0.02},
    **{name: {"l1_coefficient": 0.1} for name in ("gated", "standard")},
}
kinds = pytest.mark.parametrize(
    ("architecture", "fields", "d_out"),
    KINDS,
    ids=["-".join([name, *fields, *(["transcoder"] if d_out else [])]) for name, fields, d_out in KINDS],
)
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def some_sae(architecture: str, d_out: int | None = None, **fields: Any) -> SAE:
    """One that has trained, as far as that shows: BatchTopK's threshold stands where a batch put it."""
    fields = FIELDS[architecture] | fields
    sae = make_sae(SAEConfig(architecture=architecture, **fields), d_out)  # pyright: ignore[reportArgumentType]
    if isinstance(sae, BatchTopKSAE):
        with torch.enable_grad():
            run_step(sae, *make_batch(sae))
        assert sae.threshold > 0
    return sae


@kinds
def test_gradients_reach_the_input(architecture, fields, d_out):
    """Attribution differentiates `sae(x)`: the gradient is that of decode and encode, and of a skip."""
    sae = some_sae(architecture, d_out, **fields)
    x, weights = make_x(sae), torch.randn(BATCH, sae.d_out, generator=torch.Generator().manual_seed(7))
    ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    (sae(ours) * weights).sum().backward()
    expected = sae.decode(sae.encode(dense))
    if sae.W_skip is not None:
        expected = expected + dense @ sae.W_skip.T
    (expected * weights).sum().backward()
    assert ours.grad is not None and dense.grad is not None and dense.grad.abs().max() > 0
    assert_same(ours.grad, dense.grad)


@kinds
@torch.no_grad()
def test_views_agree(architecture, fields, d_out):
    """`forward` is `decode` of `encode` and a transcoder's skip, in any number of dimensions."""
    sae = some_sae(architecture, d_out, **fields)
    x = make_x(sae)
    latents = sae.encode(x)
    assert latents.shape == (BATCH, D_SAE) and not (latents < 0).any()
    assert 0.02 < (latents > 0).float().mean() < 0.6
    expected = sae.decode(latents)
    if sae.W_skip is not None:
        expected = expected + x @ sae.W_skip.T
    assert_same(sae(x), expected)
    recon, num_active = sae.reconstruct(x.view(3, 11, D_IN))
    assert recon.shape == (3, 11, sae.d_out)
    assert_same(recon.view(BATCH, -1), expected)
    assert int(num_active) == int((latents > 0).sum())
    assert_same(sae.encode(x.view(3, 11, D_IN)), latents.view(3, 11, D_SAE))
    assert_same(sae.decode(latents.view(3, 11, D_SAE)), sae.decode(latents).view(3, 11, -1))
    assert_same(sae(x[4]), expected[4])
    assert sae(x[:0]).shape == (0, sae.d_out) and sae.encode(x[:0]).shape == (0, D_SAE)
    if isinstance(sae, TopKSAE):
        acts, indices = sae.encode_sparse(x.view(3, 11, D_IN))
        assert acts.shape == indices.shape == (3, 11, K)
        assert torch.equal(latents.view(3, 11, D_SAE).gather(-1, indices), acts)
        assert int((acts > 0).sum()) == int(num_active)


def test_a_transcoder_never_subtracts_b_dec():
    """Whatever its shape says: b_dec is of the output's space, also where that is as wide as the input's."""
    sae = TopKSAE(Shape(D_IN, D_SAE, d_out=D_IN), K)
    sae.b_dec.data.fill_(1.0)
    x = torch.randn(BATCH, D_IN)
    assert torch.equal(sae.encoder_input(x), x)


@kinds
def test_the_training_forward_trains_what_forward_computes(architecture, fields, d_out):
    """The same reconstruction and latents; BatchTopK's where its threshold selects what this batch did."""
    sae = some_sae(architecture, d_out, **fields)
    x, y = make_batch(sae)
    if isinstance(
        sae, BatchTopKSAE
    ):  # of this very batch, the smallest that is kept exceeds no more than itself
        sae.threshold.copy_(sae.smallest * (1 - 1e-5))
    output, _ = run_step(sae, x, y, dead_latents(3))
    if isinstance(sae, BatchTopKSAE):  # as if its threshold lay just below the smallest that this batch keeps
        sae.threshold.copy_(sae.smallest * (1 - 1e-5))
    assert_same(output.residual, y - sae(x))
    assert int(output.num_active) == int((sae.encode(x) > 0).sum())
    assert output.firing_counts.tolist() == (sae.encode(x) > 0).sum(0).tolist()


@kinds
@torch.no_grad()
def test_folding_the_scales_keeps_the_function(architecture, fields, d_out):
    sae = some_sae(architecture, d_out, **fields)
    s_in, s_out = 0.25, 3.0 if d_out else 0.25
    x = make_x(sae)
    latents, recon = sae.encode(x), sae(x)
    sae.fold_scales_(s_in, s_out)
    assert_same(sae.encode(x / s_in), latents / s_in)
    assert_same(sae(x / s_in), recon / s_out)


@torch.no_grad()
def test_folding_there_and_back_keeps_batchtopks_next_step():
    """What a training goes on from: threshold and guess, in the units of pre_acts."""
    sae = some_sae("batchtopk")
    before = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    sae.fold_scales_(0.5, 0.5)
    assert sae.threshold == 2 * before["threshold"] and sae.smallest == 2 * before["smallest"]
    sae.fold_scales_(2.0, 2.0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in sae.named_buffers())


@pytest.mark.parametrize("d_out", [None, 3])
@architectures
def test_initial_weights_do_not_depend_on_what_else_is_made(architecture, d_out):
    """A block of latents has the same start whether it is made alone or with others, and follows the seed."""
    if d_out is not None and architecture not in ("topk", "batchtopk", "jumprelu"):
        pytest.skip("no transcoder")
    config = SAEConfig(architecture=architecture)
    torch.manual_seed(1)
    wide = build_sae(config, 4, 5000, 7, CPU, d_out)
    torch.randn(100)
    narrow = build_sae(config, 4, 4096, 7, CPU, d_out)
    other = build_sae(config, 4, 5000, 8, CPU, d_out)
    for name in ("W_dec", "W_enc"):
        assert torch.equal(wide.get_parameter(name)[:4096], narrow.get_parameter(name))
        assert not torch.equal(wide.get_parameter(name), other.get_parameter(name))
    norm = {"gated": 0.3, "standard": 0.1, "jumprelu": 0.3}.get(architecture, 1.0)
    torch.testing.assert_close(wide.W_dec.norm(dim=1), torch.full((5000,), norm))
    if d_out is None:
        assert torch.equal(wide.W_enc, wide.W_dec)
    else:
        torch.testing.assert_close(wide.W_enc.norm(dim=1), torch.ones(5000))
        assert (wide.W_enc[:, :3] - wide.W_dec).abs().max() > 0.1
    zeros = {name: p for name, p in wide.named_parameters() if name not in ("W_dec", "W_enc")}
    assert zeros and not any(p.any() for p in zeros.values())


@architectures
@torch.no_grad()
def test_layer_norm(architecture):
    """SAELens's: unbiased deviation, 1e-5 added to it, and not to it when it is undone."""
    sae = some_sae(architecture, normalize="layer_norm")
    plain = some_sae(architecture)
    plain.load_state_dict(sae.state_dict())
    x = 5 * make_x(sae) + 7
    x[3] = 1e-4 * x[3]  # the 1e-5 shows
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True, unbiased=True)
    rows = (x - mean) / (deviation + 1e-5)
    found, (found_mean, found_deviation) = layer_norm(x)
    for one, other in ((found, rows), (found_mean, mean), (found_deviation, deviation)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    latents = sae.encode(x)
    assert_same(latents, plain.encode(rows))
    assert_same(sae.decode(latents), plain(rows))
    assert_same(sae(x), plain(rows) * deviation + mean)
    assert_same(sae(x.view(3, 11, D_IN)).view(BATCH, D_IN), plain(rows) * deviation + mean)


@kinds
def test_trains_in_bfloat16(architecture, fields, d_out):
    """Weights are bfloat16, thresholds are not: their steps would be rounded away. It learns nearly as in float32, as
    far as weights of 8 bits can follow steps of 0.01."""
    x = torch.randn(40, BATCH, D_IN, generator=torch.Generator().manual_seed(0)) + 2
    y = torch.tanh(x[..., :d_out]) if d_out else x
    fvus = []
    for dtype in (torch.float32, torch.bfloat16):
        config = SAEConfig(
            architecture=architecture,
            d_sae=D_SAE,
            dtype=str(dtype).removeprefix("torch."),  # pyright: ignore[reportArgumentType]
            dead_after_tokens=2 * BATCH,
            decoder_lr_factor=1,
            **FIELDS[architecture],
            **fields,
        )
        batches = list(zip(x, y, strict=True)) if d_out else list(x)
        optim = OptimConfig(lr=0.01, warmup_steps=0, beta2=0.99)
        trainer = fit_trainer(batches, config, optim, seed=0, num_steps=None)
        for name, parameter in trainer.sae.named_parameters():
            assert parameter.dtype == (torch.float32 if name == "threshold" else dtype)
            assert parameter.isfinite().all(), name
        assert all(b.dtype == torch.float32 and b.isfinite().all() for b in trainer.sae.buffers())
        folded = trainer.folded()
        assert {p.dtype for p in folded.parameters()} == {torch.float32}
        residual = y - folded(x)
        fvus.append((residual.square().sum() / (y - y.mean((0, 1))).square().sum()).item())
    assert fvus[0] < 0.95
    assert fvus[1] == pytest.approx(fvus[0], rel=0.05)


@kinds
def test_autocast(architecture, fields, d_out):
    """The encoder's matmul is that of bfloat16, nothing else is: loss, gradients and views are float32's to bfloat16's
    rounding of the encoder's operands and result."""
    plain = some_sae(architecture, d_out, **fields)
    sae = some_sae(architecture, d_out, autocast=True, **fields)
    sae.load_state_dict(plain.state_dict())
    x, y = make_batch(sae)
    assert sae.encoder_input(x).dtype == torch.bfloat16
    output, grads = run_step(sae, x, y, dead_latents(3))
    expected, expected_grads = run_step(plain, x, y, dead_latents(3))
    assert output.loss.dtype == output.residual.dtype == torch.float32
    assert output.loss != expected.loss
    torch.testing.assert_close(output.loss, expected.loss, rtol=2**-6, atol=0)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        # Pairs may cross a threshold or its window, of which each is a jump of the gradient.
        assert (grad - expected_grads[name]).norm() < 0.1 * expected_grads[name].norm(), name
    with torch.no_grad():
        latents, exact = sae.encode(x).float(), plain.encode(x)
        crossed = (latents > 0) != (exact > 0)
        assert crossed.float().mean() < 0.01
        atol = exact.abs().max().item() * 2**-7
        torch.testing.assert_close(latents[~crossed], exact[~crossed], rtol=0, atol=atol)


@kinds
@torch.no_grad()
def test_autocasts_views_agree(architecture, fields, d_out):
    """What was trained under autocast still is an SAE whose `forward` is `decode` of `encode`, in float32."""
    sae = some_sae(architecture, d_out, autocast=True, **fields)
    x = make_x(sae)
    recon, expected = sae(x), sae.decode(sae.encode(x))
    if sae.W_skip is not None:
        expected = expected + x @ sae.W_skip.T
    assert recon.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(recon, expected, rtol=0, atol=recon.abs().max().item() * 2**-7)


@pytest.mark.parametrize("d_out", [None, D_OUT])
@torch.no_grad()
def test_jumprelus_thresholds_start_at_the_target(d_out):
    """Where the first tokens have L0* latents, but for the one that lies on the threshold; or at what is configured."""
    sae = make_sae(SAEConfig(architecture="jumprelu", target_l0=3.0), d_out)
    sae.get_parameter("b_enc").zero_()  # as a run starts
    x = make_x(sae)
    sae.calibrate(x, StepContext(global_moments(x, len(x), None)))
    assert len(sae.get_parameter("threshold").unique()) == 1
    assert abs(int((sae.encode(x) > 0).sum()) - 3 * BATCH) <= 1
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 0.01),
        ({"target_l0": 3.0, "jumprelu_init_threshold": 0.2}, 0.2),
    ]
    for fields, value in cases:
        sae = make_sae(SAEConfig(architecture="jumprelu", **fields), d_out)
        sae.calibrate(x, StepContext(global_moments(x, len(x), None)))
        assert torch.equal(sae.get_parameter("threshold"), torch.full((D_SAE,), value))


def smallest_kept(sae: SAE, x: Tensor) -> Tensor:
    with torch.no_grad():
        pre_acts = sae.encoder_input(x) @ sae.W_enc.T + sae.get_parameter("b_enc")
        return pre_acts.flatten().topk(K * len(x)).values[-1]


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_batchtopks_threshold_is_a_running_mean(architecture):
    """It starts at the first batch's, weighs each batch by 0.99 of the next, and a batch that keeps nothing by 0."""
    sae = make_sae(SAEConfig(architecture=architecture, k=K))
    assert isinstance(sae, BatchTopKSAE)
    empty = -100 * torch.ones(D_SAE)
    b_enc = sae.b_enc.detach().clone()
    values: list[float] = []
    for step in range(6):
        x = make_x(sae, seed=step) * (1 + step)
        if step in (0, 3):
            before = {name: buffer.clone() for name, buffer in sae.named_buffers()}
            sae.b_enc.data.copy_(empty)
            output = sae.training_forward(x, x, make_context(x))
            assert int(output.num_active) == 0 and output.loss.isfinite()
            assert all(torch.equal(buffer, before[name]) for name, buffer in sae.named_buffers())
            sae.b_enc.data.copy_(b_enc)
            continue
        values.append(smallest_kept(sae, x).item())
        run_step(sae, x, x)
        weights = [0.99 ** (len(values) - 1 - i) for i in range(len(values))]
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        torch.testing.assert_close(sae.threshold, torch.tensor(mean), rtol=1e-5, atol=0)
        torch.testing.assert_close(sae.smallest, torch.tensor(values[-1]), rtol=1e-6, atol=0)
