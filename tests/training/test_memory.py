"""Peak memory of a step, as the allocator sees it: what docs/memory.md says of it."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile

from bigsae.config import OptimConfig, SAEConfig
from bigsae.kernels import encode, topk_pairs
from bigsae.sae.losses import global_moments
from bigsae.training.fit import fit_trainer
from bigsae.training.optim import gradient_norm, project_rows_

MIB = 2**20
D_IN, K = 256, 32


def peak_of(action: Callable[[], object]) -> int:
    """Most bytes that exist at a time during `action` beyond those that existed before it.

    Of all allocations, also those inside of an operator. A dispatch mode would count tensors alone, and have autograd
    add gradients out of place.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    kineto = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def living_bytes() -> int:
    """Of the storages of all tensors that exist now, each counted once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names, which isinstance opens
        # Those that other tests have torch.compile trace with stay in its caches, and have no storage.
        tensors = [t for t in gc.get_objects() if isinstance(t, Tensor) and not isinstance(t, FakeTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_count_is_right_where_the_answer_is_known():
    """Freed tensors are not counted on, views not twice, and what exists inside of one operator is."""
    x = torch.randn(256, 1024)  # 1 MiB

    def two_at_a_time() -> None:
        for _ in range(5):
            y = x + 1
            z = y.view(-1) * 2
            del y, z

    assert peak_of(two_at_a_time) == pytest.approx(2 * MIB, rel=0.01)
    assert peak_of(lambda: x.add_(1)) < 1000
    assert peak_of(lambda: torch.linalg.vecdot(x, x)) == pytest.approx(MIB, rel=0.01)
    before = living_bytes()
    views = [torch.zeros(256, 1024)[i:] for i in range(1)]
    views.append(views[0].view(-1))
    assert living_bytes() - before == MIB


@dataclass
class Step:
    """Bytes of a step: at its peak, and what the bound is made of."""

    peak: int
    weights: int
    moments: int
    gradients: int
    slab: int
    batch: int
    pairs: int
    num_dead: int
    """When the step begins."""

    @property
    def named(self) -> int:
        """Weights, moments, gradients, slab, and the batch as it comes and as targets."""
        return self.weights + self.moments + self.gradients + self.slab + 2 * self.batch


def step(
    batch: int,
    d_sae: int,
    sae: dict,
    optim: OptimConfig,
    monkeypatch: pytest.MonkeyPatch,
    slab_mb: int = 16,
) -> Step:
    """Measure the fourth step of a training."""
    monkeypatch.setattr(encode, "_cpu_slabs", threading.local())
    monkeypatch.setattr(encode, "_CACHED_BYTES", 0)  # less than the slab, on the CPU alone
    config = SAEConfig(d_sae=d_sae, init_tokens=1024, slab_mb=slab_mb, **sae)
    batches = [torch.randn(batch, D_IN, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    x = batches.pop()
    before = living_bytes() - bytes_of(x, *batches)
    trainer = fit_trainer(batches, config, optim, seed=0, num_steps=100)
    batches.clear()
    held = living_bytes() - before
    num_dead = int(trainer.firing.dead_mask().sum())
    peak = held + peak_of(lambda: trainer.train_step(x))
    parameters = dict(trainer.sae.named_parameters())
    states = [t for state in trainer.update.adam.state.values() for t in state.values()]
    slab = encode._cpu_slabs.bytes.numel()
    assert slab <= slab_mb * MIB
    return Step(
        peak,
        weights=bytes_of(*parameters.values()),
        moments=bytes_of(*states),
        gradients=sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in parameters.values()),
        slab=slab,
        batch=bytes_of(x),
        pairs=batch * K,
        num_dead=num_dead,
    )


ARCHITECTURES = {
    "topk": {"k": K},
    "batchtopk": {"architecture": "batchtopk", "k": K},
    "matryoshka": {"architecture": "matryoshka", "k": K},
    "jumprelu": {"architecture": "jumprelu", "target_l0": float(K)},
}
OPTIMS = {
    "float32": OptimConfig(),
    "bfloat16 moments": OptimConfig(moments_dtype="bfloat16"),
    "int8 moments": OptimConfig(moments_dtype="int8"),
    "bfloat16 gradients": OptimConfig(grad_dtype="bfloat16"),
    "both": OptimConfig(grad_dtype="bfloat16", moments_dtype="int8"),
}


@pytest.mark.parametrize(
    ("name", "batch", "d_sae", "slab_mb"),
    [
        *((name, batch, 16_384, 16) for name in ("topk", "batchtopk", "jumprelu") for batch in (512, 2048)),
        *((name, 2048, 32_768, 16) for name in ("topk", "batchtopk", "jumprelu")),
        ("topk", 4096, 16_384, 256),
        ("matryoshka", 1024, 16_384, 16),
    ],
)
def test_a_step_needs_a_tenth_more_than_what_it_names(name, batch, d_sae, slab_mb, monkeypatch):
    """From 16,384 latents on, for batches of up to an eighth of these, however large the slab."""
    measured = step(batch, d_sae, ARCHITECTURES[name], OPTIMS["float32"], monkeypatch, slab_mb)
    assert measured.peak <= 1.10 * measured.named
    assert measured.peak >= 0.95 * measured.named


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_dead_latents_need_no_second_gradient(name, monkeypatch):
    """More than a third of them are dead. Before, each use of a matrix had a whole gradient of its own."""
    sae = ARCHITECTURES[name] | {"dead_after_tokens": 256}
    measured = step(512, 16_384, sae, OPTIMS["float32"], monkeypatch)
    assert measured.num_dead > 16_384 / 3
    assert measured.peak <= 1.10 * measured.named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_candidates_of_several_ranks_take_what_the_slab_is_divided_by(num_ranks, dtype):
    values = torch.randn(512, 32).sort(1, descending=True).values.to(dtype)
    of_all = torch.cat([values] * num_ranks)
    peak = peak_of(lambda: topk_pairs._places(values, 32, 0, lambda _: of_all.clone()))
    assert peak <= 1.01 * topk_pairs._CANDIDATE_BYTES * of_all.numel()


def test_accumulated_gradients_are_one_of_each(monkeypatch):
    measured = step(512, 16_384, ARCHITECTURES["topk"], OptimConfig(accumulation_steps=2), monkeypatch)
    assert measured.peak <= 1.10 * measured.named


@pytest.mark.parametrize("optim", [name for name in OPTIMS if name != "float32"])
@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_smaller_moments_and_gradients_make_a_smaller_peak(name, optim, monkeypatch):
    """By their whole bytes: nothing of a matrix is in float32 beside them."""
    measured = step(512, 16_384, ARCHITECTURES[name], OPTIMS[optim], monkeypatch)
    assert measured.peak <= 1.10 * measured.named
    wide = step(512, 16_384, ARCHITECTURES[name], OPTIMS["float32"], monkeypatch)
    saved = wide.moments + wide.gradients - measured.moments - measured.gradients
    assert wide.peak - measured.peak == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize("batch", [1024, 4096])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_what_a_batch_adds_where_it_is_most_of_a_step(name, batch, monkeypatch):
    """Few latents: the page's formula, of the batch and its pairs, in place of a tenth."""
    measured = step(batch, 2048, ARCHITECTURES[name], OPTIMS["float32"], monkeypatch)
    beyond = measured.peak - measured.named
    least, most = (n * measured.batch + 52 * measured.pairs + 64 * 2048 for n in (2, 3))
    assert 0.9 * least <= beyond <= 1.05 * most


def test_half_a_slab_is_that_much_less(monkeypatch):
    """--sae.slab-mb is what it says."""
    peaks = [step(2048, 16_384, ARCHITECTURES["topk"], OPTIMS["float32"], monkeypatch, mb) for mb in (64, 32)]
    assert [p.slab for p in peaks] == [64 * MIB, 32 * MIB]
    assert peaks[0].peak - peaks[1].peak == pytest.approx(32 * MIB, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_norm_and_moments_need_little(dtype):
    """Beside 32 MiB in float32: no copy of the matrix or of the batch."""
    matrix = torch.randn(16_384, 512)
    gradient = torch.randn(16_384, 512).to(dtype)
    assert peak_of(lambda: project_rows_(gradient, matrix)) < 2 * MIB
    assert peak_of(lambda: gradient_norm([gradient])) < 2 * MIB
    assert peak_of(lambda: global_moments(matrix, len(matrix), None)) < 4 * MIB
