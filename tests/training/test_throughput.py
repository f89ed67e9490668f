"""Operations of SAE steps are torch's count, and metrics.jsonl says what part of a device's peak a run reaches."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bigsae
from bigsae.checks import resolve_sae
from bigsae.config import OptimConfig, SAEConfig, UserError
from bigsae.parallel.flops import centre_flops, decode_flops, encode_flops, step_flops
from bigsae.parallel.memory import sae_shape
from bigsae.parallel.mesh import build_mesh
from bigsae.parallel.peaks import PEAKS, peak_of
from bigsae.training.throughput import sae_flops
from bigsae.training.trainer import SAETrainer
from tests.launch import write_corpus
from tests.models import tiny_llama
from tests.sae import dense
from tests.sae.saes import BATCH, D_IN, D_OUT, D_SAE, make_batch, make_sae

EVERY = BATCH * D_SAE
"""Pairs (token, latent)."""


@pytest.mark.parametrize(
    ("architecture", "fields", "d_out"),
    [
        ("topk", {"k": D_SAE}, None),
        ("topk", {"k": D_SAE, "apply_b_dec_to_input": False}, None),
        ("topk", {"k": D_SAE, "skip": True}, D_OUT),
        ("batchtopk", {"k": D_SAE}, None),
        ("jumprelu", {"l0_coefficient": 1.0}, None),
        ("gated", {}, None),
        ("standard", {}, None),
    ],
)
def test_on_all_pairs_a_step_s_flops_are_those_of_dense_autograd(
    architecture: Any, fields: dict[str, Any], d_out: int | None
):
    config = SAEConfig(architecture=architecture, d_sae=D_SAE, **fields)
    resolved = resolve_sae(config, transcoder=d_out is not None)
    sae = make_sae(resolved, d_out)
    weights = {name: parameter.detach().requires_grad_() for name, parameter in sae.named_parameters()}
    x, y = make_batch(sae)
    with FlopCounterMode(display=False) as counter:
        dense.expected(dense.Step(resolved, weights, x, y)).loss.backward()
    shape = sae_shape(resolved, OptimConfig(), D_IN, D_SAE, d_out)
    # b_dec's gradient through the encoder is made of that of its bias, not of one for each token.
    of_tokens = encode_flops(shape, BATCH, D_SAE) if shape.centred else 0
    expected = counter.get_total_flops() - of_tokens + centre_flops(shape, D_SAE)
    assert step_flops(shape, BATCH, D_SAE, EVERY) == expected


def linear_flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Of oneDNN's x @ weight.T, which torch's counter does not know."""
    return 2 * math.prod(x) * weight[0]


COUNTED = {torch.ops.mkldnn._linear_pointwise: linear_flops}


def trainer_and_flops(
    num_dead_after: int, num_steps: int, **fields: Any
) -> tuple[SAETrainer, list[tuple[int, float]]]:
    """A trainer after some steps; of each what torch counted, and what is counted here."""
    config = SAEConfig(d_sae=D_SAE, dead_after_tokens=num_dead_after, **fields)
    trainer = SAETrainer(config, OptimConfig(lr=1e-3), D_IN, num_steps, 0, build_mesh())
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    trainer.initialise(x)
    counted = []
    for _ in range(num_steps):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            trainer.train_step(x)
        metrics = trainer.read_metrics()
        counted.append((counter.get_total_flops(), sae_flops(trainer, BATCH, metrics)))
    return trainer, counted


def test_a_dense_step_is_counted_as_torch_counts_it():
    """JumpReLU without a target begins with steps on all pairs."""
    _, counted = trainer_and_flops(10**9, 2, architecture="jumprelu")
    shape = sae_shape(resolve_sae(SAEConfig(architecture="jumprelu")), OptimConfig(), D_IN, D_SAE)
    assert [torch_s for torch_s, _ in counted] == [step_flops(shape, BATCH, D_SAE, EVERY)] * 2
    assert all(ours == torch_s for torch_s, ours in counted)


def test_a_sparse_step_has_one_matmul_also_for_dead_latents():
    """Torch counts matmuls alone: what is gathered for the selected pairs is counted beside it."""
    k = 3
    trainer, counted = trainer_and_flops(2 * BATCH, 6, k=k)
    shape = sae_shape(resolve_sae(SAEConfig(k=k)), OptimConfig(), D_IN, D_SAE)
    dense = encode_flops(shape, BATCH, D_SAE) + centre_flops(shape, D_SAE)
    plain = step_flops(shape, BATCH, D_SAE, BATCH * k)
    num_dead = round(trainer.firing.dead_fraction() * D_SAE)
    assert 0 < num_dead < D_IN // 2  # all of them are selected
    assert counted[0] == (dense, plain)
    assert counted[-1] == (dense, pytest.approx(plain + 4 * decode_flops(shape, BATCH * num_dead)))
    # Of each selected pair a row of W_dec, its value's gradient and both weights': four products.
    assert plain == dense + 4 * decode_flops(shape, BATCH * k)


def test_a_run_logs_what_it_reaches(tmp_path):
    tiny_llama(tmp_path / "lm", num_layers=2)
    write_corpus(tmp_path / "corpus.jsonl")
    config = bigsae.TrainConfig(
        model=str(tmp_path / "lm"),
        dataset=str(tmp_path / "corpus.jsonl"),
        hookpoints=("model.layers.1",),
        output_dir=str(tmp_path / "out"),
        tokens=64 * 20,
        batch_size_tokens=64,
        ctx_len=16,
        lm=bigsae.LMConfig(dtype="float32"),
        buffer=bigsae.BufferConfig(tokens=512),
        sae=SAEConfig(k=3, d_sae=64),
        log_every=2,
        peak_tflops=(0.5, 0.25),
    )
    bigsae.train_saes(config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    shape = sae_shape(resolve_sae(config.sae), config.optim, 32, 64)
    for row in rows:
        seconds = 2 * 64 / row["tokens_per_second"]
        flops = row["sae_tflops"] * 1e12 * row["sae_time_share"] * seconds
        assert flops == pytest.approx(2 * step_flops(shape, 64, 64, 64 * 3), rel=1e-6)
        assert row["sae_mfu"] == pytest.approx(row["sae_tflops"] / 0.25)
        assert ("lm_mfu" in row) == ("lm_tflops" in row)
    harvested = [row for row in rows if "lm_mfu" in row]
    assert 1 < len(harvested) < len(rows)  # a filling of the buffer is several logs' worth
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # of two layers
    of_a_token = 2 * weights + 2 * 16 * 2 * 32
    for row in harvested:
        seconds = 2 * 64 / row["tokens_per_second"]
        flops = row["lm_tflops"] * 1e12 * row["lm_time_share"] * seconds
        num_rows = flops / of_a_token / 16
        assert num_rows == pytest.approx(round(num_rows), rel=1e-6)  # whole micro-batches
        assert round(num_rows) % 8 == 0
        assert row["lm_mfu"] == pytest.approx(row["lm_tflops"] / 0.5)


def test_peaks_are_known_by_the_names_of_devices():
    assert peak_of("NVIDIA H100 80GB HBM3") == PEAKS["h100"]
    assert peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_of("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert peak_of("NVIDIA H200") == PEAKS["h200"]
    assert peak_of("NVIDIA A100-SXM4-80GB") == peak_of("NVIDIA A100 80GB PCIe") == PEAKS["a100"]
    assert peak_of("NVIDIA B200") == PEAKS["b200"]
    for other in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "Tesla T4"):
        assert peak_of(other) is None, other


@pytest.mark.parametrize("peaks", [(0.0,), (1.0, -1.0), (1.0, 1.0, 1.0)])
def test_peaks_that_are_none(tmp_path, peaks):
    config = bigsae.TrainConfig(
        model="m", dataset="d", hookpoints=("h",), output_dir=str(tmp_path), tokens=10**6, peak_tflops=peaks
    )
    with pytest.raises(UserError, match="--peak-tflops"):
        bigsae.train_saes(config)
