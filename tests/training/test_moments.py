"""Moments below float32 and gradients in bfloat16: rounding, Adam's semantics, and what does not decide the bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigsae.checks import check_optim
from bigsae.config import OptimConfig, SAEConfig, UserError
from bigsae.kernels.pairs import RaggedPairs
from bigsae.kernels.sparse_grad import LatentMajor
from bigsae.training import moments
from bigsae.training.fit import fit_trainer
from bigsae.training.moments import read_moment, round_moment
from bigsae.training.optim import adam_step, build_adam, empty_state, gradient_norm, set_grad_dtype

LOW = ("bfloat16", "int8")
ONE = torch.tensor(1.0)


def noise_of(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**16, shape, generator=generator, dtype=torch.int32)


def values(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Of magnitudes from 1e-4 to 1 within each block, as of dimensions that differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * 10 ** (
        -4 * torch.rand(rows, cols, generator=generator)
    )


def gradients(step: int, shape: tuple[int, int] = (48, 320)) -> dict[str, Tensor]:
    return {"W_enc": values(*shape, seed=step), "W_dec": values(*shape, seed=100 + step)} | {
        "b_enc": values(1, shape[0], seed=200 + step)[0]
    }


def parameters(first: int = 0, stop: int = 48) -> dict[str, nn.Parameter]:
    """Rows first..stop of the same weights."""
    whole = {name: 0.1 * g for name, g in gradients(-1).items()}
    return {name: nn.Parameter(w[first:stop].clone()) for name, w in whole.items()}


def train(
    weights: dict[str, nn.Parameter], optim: OptimConfig, steps: range, rows: slice = slice(None), adam=None
):
    """Steps on the same gradients, of which `weights` are `rows`."""
    set_grad_dtype(weights, optim)
    adam = adam or build_adam(weights, optim, seed=1, first_row=rows.start or 0)
    for step in steps:
        for name, gradient in gradients(step).items():
            dtype = torch.float32 if name == "b_enc" else getattr(torch, optim.grad_dtype)
            weights[name].grad = gradient[rows].to(dtype)
        adam_step(adam, 0.01, ONE, grad_clip=1.0)
    return adam


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_rounding_is_to_a_neighbour_and_right_in_the_mean(dtype, name):
    """Over many draws; of the second moment in int8 it is the root, down to where the code 0 would be next."""
    wide = values(4, 300) if name == "exp_avg" else values(4, 300).square()

    def rounded(noise: Tensor) -> Tensor:
        read = read_moment(round_moment(wide, name, dtype, noise), name).double()
        return read.sqrt() if (dtype, name) == ("int8", "exp_avg_sq") else read

    draws = torch.stack([rounded(noise_of(i, (4, 300))) for i in range(4000)])
    ends = torch.stack([rounded(torch.full((4, 300), noise, dtype=torch.int32)) for noise in (0, 0xFFFF)])
    up = ends.abs().argmax(0, keepdim=True)
    low, high = ends.gather(0, 1 - up)[0], ends.gather(0, up)[0]
    wide = wide.double()
    if (dtype, name) == ("int8", "exp_avg_sq"):
        wide = wide.sqrt()
        least = torch.cat([b.amax(1, keepdim=True).expand_as(b) for b in wide.split(256, 1)], 1) / 255**2
        below = wide < least
        assert 1 < below.sum() < 300
        torch.testing.assert_close(draws[0][below], least[below], rtol=1e-5, atol=0)
        wide = torch.where(below, draws[0], wide)
    assert (low.abs() <= wide.abs() * (1 + 1e-5)).all() and (wide.abs() <= high.abs() * (1 + 1e-5)).all()
    assert ((draws == low) | (draws == high)).all() and (low != high).float().mean() > 0.9
    deviation = 0.5 * (high - low).abs() / 4000**0.5
    assert ((draws.mean(0) - wide).abs() <= 5 * deviation + 1e-5 * wide.abs()).all()


@pytest.mark.parametrize("dtype", LOW)
def test_a_second_moment_falls(dtype):
    """By 0.999 a step, 2,000 times, where the nearest value would always be the same; all of it but a few per cent."""
    wide = torch.full((64, 256), 1e-4)
    for step in range(2000):
        wide = read_moment(
            round_moment(0.999 * wide, "exp_avg_sq", dtype, noise_of(step, (64, 256))), "exp_avg_sq"
        )
    assert wide.mean().item() == pytest.approx(1e-4 * 0.999**2000, rel=0.05)


def test_int8_errors_are_small_beside_each_value():
    """A thousandth of the largest of its block keeps its size, where 127 equal steps made it 0 or 8 times that."""
    wide = torch.full((1, 256), 1e-3)
    wide[0, 0] = 1.0
    for name in ("exp_avg", "exp_avg_sq"):
        moment = wide if name == "exp_avg" else wide.square()
        read = read_moment(round_moment(moment, name, "int8", noise_of(0, (1, 256))), name)
        root = read if name == "exp_avg" else read.sqrt()
        assert ((root - wide).abs() <= (0.57 if name == "exp_avg" else 0.27) * wide).all()


@pytest.mark.parametrize("dtype", LOW)
def test_zeros_stay_zeros(dtype):
    for name in ("exp_avg", "exp_avg_sq"):
        kept = round_moment(torch.zeros(2, 300), name, dtype, noise_of(0, (2, 300)))
        assert read_moment(kept, name).abs().max() == 0


@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", LOW)
def test_the_first_step_is_adams(dtype, grad_dtype):
    """It comes before any rounding; later ones stay close, and the bias' moments are in float32 throughout."""
    optim = OptimConfig(moments_dtype=dtype, grad_dtype=grad_dtype)
    ours, plain = parameters(), parameters()
    adam = train(ours, optim, range(1))
    rounded = {name: g.to(getattr(torch, grad_dtype)).float() for name, g in gradients(0).items()}
    reference = build_adam(plain, OptimConfig())
    for name, gradient in rounded.items():
        plain[name].grad = gradient if name != "b_enc" else gradients(0)[name]
    adam_step(reference, 0.01, ONE, grad_clip=1.0)
    for name in ours:
        assert torch.equal(ours[name], plain[name]), name
    assert adam.state[ours["b_enc"]]["exp_avg_sq"].dtype == torch.float32
    start = parameters()
    train(ours, optim, range(1, 20), adam=adam)
    train(plain, OptimConfig(), range(1, 20), adam=reference)
    for name in ours:
        moved = (plain[name] - start[name]).norm()
        assert (ours[name] - plain[name]).norm() < 0.05 * moved, name


def test_bfloat16_gradients_alone_are_the_fused_step_on_their_values():
    ours, plain = parameters(), parameters()
    adam = train(ours, OptimConfig(grad_dtype="bfloat16"), range(4))
    reference = build_adam(plain, OptimConfig())
    for step in range(4):
        for name, gradient in gradients(step).items():
            plain[name].grad = gradient if name == "b_enc" else gradient.bfloat16().float()
        adam_step(reference, 0.01, ONE, grad_clip=1.0)
    for name in ours:
        assert torch.equal(ours[name], plain[name])
        for key, value in reference.state[plain[name]].items():
            assert torch.equal(adam.state[ours[name]][key], value), (name, key)


@pytest.mark.parametrize("dtype", LOW)
def test_chunks_and_slices_of_rows_decide_no_bit(dtype, monkeypatch):
    """One chunk or many, all rows on one rank or parts of them on several: the same weights and states.

    Where rows fill whole vectors of the CPU: torch's fused Adam rounds what is left over in another way.
    """
    optim = OptimConfig(moments_dtype=dtype)
    whole = parameters()
    states = train(whole, optim, range(5)).state
    monkeypatch.setattr(moments, "_ON_CPU", 7 * 320)
    for rows in (slice(0, 48), slice(0, 16), slice(16, 48)):
        part = parameters(rows.start, rows.stop)
        own = train(part, optim, range(5), rows).state
        for name, parameter in part.items():
            assert torch.equal(parameter, whole[name][rows]), name
            for key, value in own[parameter].items():
                expected = states[whole[name]][key]
                assert torch.equal(value, expected if key == "step" else expected[rows]), (name, key)


@pytest.mark.parametrize("dtype", LOW)
def test_a_resume_has_the_same_bits(dtype):
    """From the tensors of the state alone, put into those that `empty_state` makes."""
    optim = OptimConfig(moments_dtype=dtype)
    straight = parameters()
    states = train(straight, optim, range(6)).state
    first = parameters()
    adam = train(first, optim, range(3))
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    resumed = build_adam(second, optim, seed=1)
    for name, parameter in second.items():
        resumed.state[parameter] = empty_state(resumed, parameter)
        assert resumed.state[parameter].keys() == adam.state[first[name]].keys()
        for key, value in resumed.state[parameter].items():
            assert value.dim() == 0 or len(value) == len(parameter)
            value.copy_(adam.state[first[name]][key])
    train(second, optim, range(3, 6), adam=resumed)
    for name in straight:
        assert torch.equal(second[name], straight[name])
        for key, value in states[straight[name]].items():
            assert torch.equal(resumed.state[second[name]][key], value)


@pytest.mark.parametrize("dtype", LOW)
def test_seed_and_step_decide_the_bits(dtype):
    def state(seed: int, steps: int) -> Tensor:
        weights = parameters()
        adam = build_adam(weights, OptimConfig(moments_dtype=dtype, beta1=0.0), seed=seed)
        for _ in range(steps):  # with beta1 0 the first moment is the gradient, rounded
            for name, gradient in gradients(0).items():
                weights[name].grad = gradient
            adam_step(adam, 0.01, ONE, grad_clip=1.0)
        return adam.state[weights["W_enc"]]["exp_avg"]

    assert torch.equal(state(1, 1), state(1, 1))
    assert not torch.equal(state(1, 1), state(2, 1))
    assert not torch.equal(state(1, 1), state(1, 2))


@pytest.mark.parametrize("dtype", LOW)
def test_a_norm_that_is_no_number_changes_nothing(dtype, monkeypatch):
    """Also not by rounding again what is rounded: most likely where all random bits are 0."""
    optim = OptimConfig(moments_dtype=dtype, grad_dtype="bfloat16")
    weights = parameters()
    adam = train(weights, optim, range(3))
    before = {name: p.detach().clone() for name, p in weights.items()}
    states = {n: {k: v.clone() for k, v in adam.state[p].items()} for n, p in weights.items()}
    for parameter in weights.values():
        assert parameter.grad is not None
        parameter.grad.fill_(torch.nan)
    norm = gradient_norm([p.grad for p in weights.values() if p.grad is not None])
    monkeypatch.setattr(
        moments.ChunkedAdam, "_random_bits", lambda self, p, step, start, rows: rows.to(torch.int32) * 0
    )
    assert adam_step(adam, 0.01, norm, grad_clip=1.0) == 1
    for name, parameter in weights.items():
        assert torch.equal(parameter, before[name])
        assert all(torch.equal(adam.state[parameter][k], v) for k, v in states[name].items())


@pytest.mark.parametrize("dtype", LOW)
def test_clip_and_learning_rates_of_their_own(dtype):
    """A gradient twice too long counts half; W_dec moves at its factor of the rate."""
    optim = OptimConfig(moments_dtype=dtype, eps=1.0)
    moved = {}
    for norm, factor in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0)):
        weights = parameters()
        adam = build_adam(weights, optim, {"W_dec": factor})
        for name, gradient in gradients(0).items():
            weights[name].grad = 1e-3 * gradient
        adam_step(adam, 0.01, torch.tensor(norm), grad_clip=1.0)
        moved[norm, factor] = {
            n: (p - q).detach() for (n, p), q in zip(weights.items(), parameters().values(), strict=True)
        }
    for name in ("W_enc", "W_dec"):
        torch.testing.assert_close(moved[2.0, 1.0][name] * 2, moved[1.0, 1.0][name], rtol=0.02, atol=3e-8)
    torch.testing.assert_close(moved[1.0, 3.0]["W_enc"], moved[1.0, 1.0]["W_enc"])
    torch.testing.assert_close(moved[1.0, 3.0]["W_dec"], 3 * moved[1.0, 1.0]["W_dec"], rtol=0.02, atol=3e-8)


def test_gradients_norm_in_bfloat16():
    gradient = values(300, 500).bfloat16()
    norm = gradient_norm([gradient])
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), gradient.double().norm(), rtol=1e-5, atol=0)


def test_bfloat16_rows_are_those_of_float32_rounded_once(monkeypatch):
    """Whatever the chunks in which they are made; of topk's pairs and of ragged ones."""
    monkeypatch.setattr("bigsae.kernels.sparse_grad._WIDE_ELEMENTS", 7 * 12)
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(40, generator=generator)[:3] for _ in range(64)])
    dense = torch.randn(64, 12, generator=generator)
    crow = torch.arange(0, 64 * 3 + 1, 3)
    for pattern, shape in (
        (LatentMajor(indices, 40), (64, 3)),
        (RaggedPairs(indices.flatten(), crow, 40).latent_major, (192,)),
    ):
        coefficients = torch.randn(shape, generator=generator)
        wide = pattern.rows(coefficients, dense)
        assert torch.equal(pattern.rows(coefficients, dense, dtype=torch.bfloat16), wide.bfloat16())


ARCHITECTURES = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4},
    "jumprelu": {"target_l0": 4.0},
    "jumprelu dense": {"jumprelu_init_threshold": 0.0},
    "gated": {"l1_coefficient": 1.0},
    "standard": {"l1_coefficient": 1.0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_arrive_in_bfloat16_and_near_those_of_float32(name, monkeypatch):
    """On the sparse and the dense path, with dead latents too; biases keep float32."""
    batches = [torch.randn(128, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    config = SAEConfig(
        architecture=name.split()[0],  # pyright: ignore[reportArgumentType]
        d_sae=80,
        init_tokens=128,
        dead_after_tokens=100,
        normalize_decoder=False,
        **ARCHITECTURES[name],
    )
    found: dict[str, list[dict[str, Tensor]]] = {}
    for dtype in ("float32", "bfloat16"):
        seen = found[dtype] = []

        def look(gradients: list[Tensor], seen=seen) -> Tensor:
            seen.append({f"{i} {tuple(g.shape)}": g.clone() for i, g in enumerate(gradients)})
            return gradient_norm(gradients)

        monkeypatch.setattr("bigsae.training.update.gradient_norm", look)
        # Nothing moves, so that both runs see the same weights.
        fit_trainer(batches, config, OptimConfig(lr=1e-12, grad_dtype=dtype), seed=0, num_steps=None)
    assert len(found["float32"]) >= 3
    for wide, narrow in zip(found["float32"], found["bfloat16"], strict=True):
        for key, gradient in wide.items():
            matrix = gradient.dim() == 2
            assert narrow[key].dtype == (torch.bfloat16 if matrix else torch.float32), key
            error = (narrow[key].float() - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < (2**-7 if matrix else 1e-5), (key, error)


@pytest.mark.parametrize("dtype", ["float32", *LOW])
@pytest.mark.parametrize("grad_dtype", ["float32", "bfloat16"])
def test_training_is_as_good(dtype, grad_dtype):
    """The FVU of a small SAE within 5 % of that in float32."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(48, 16, generator=generator)
    batches = [
        (torch.rand(256, 48, generator=generator) < 0.06).float() @ features + 1e-6 for _ in range(200)
    ]

    def fvu(optim: OptimConfig) -> float:
        config = SAEConfig(k=4, d_sae=64, init_tokens=256)
        trainer = fit_trainer(batches, config, optim, seed=0, num_steps=200)
        error, _ = trainer.evaluate(batches[0])
        return (error / (batches[0] - batches[0].mean(0)).square().sum()).item()

    low = OptimConfig(lr=3e-3, moments_dtype=dtype, grad_dtype=grad_dtype)  # pyright: ignore[reportArgumentType]
    assert fvu(low) == pytest.approx(fvu(OptimConfig(lr=3e-3)), rel=0.05)


def test_bfloat16_gradients_are_not_gathered_over_batches():
    with pytest.raises(UserError, match=r"--optim\.accumulation-steps 4"):
        check_optim(OptimConfig(grad_dtype="bfloat16", accumulation_steps=4))
