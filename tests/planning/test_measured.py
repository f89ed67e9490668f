"""What a plan says of bytes, beside the tensors and files of runs: within 5 %."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

import bigsae
from bigsae.config import TrainConfig
from bigsae.kernels import encode
from bigsae.lm.loading import local_bytes
from bigsae.parallel import collectives
from bigsae.planning.model import lm_facts, with_chosen_rows
from bigsae.training import loop
from bigsae.training.checkpoint import checkpoints
from bigsae.training.saver import Saver
from bigsae.training.setup import prepare
from bigsae.training.signals import StopSignal
from tests.distributed.ranks import run_ranks
from tests.launch import write_corpus
from tests.models import tiny_llama, tiny_tokenizer
from tests.planning.plans import plan_of_run, planned

TOLERANCE = 0.05


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_llama(folder / "lm", num_layers=4)
    write_corpus(folder / "corpus.jsonl", num_documents=80)
    return folder


@pytest.fixture
def config(home, tmp_path) -> TrainConfig:
    """Two steps, after which the buffers are still nearly full."""
    return TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.1",),
        output_dir=str(tmp_path / "out"),
        tokens=64 * 2,
        batch_size_tokens=64,
        ctx_len=16,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        buffer=bigsae.BufferConfig(tokens=8192, dtype="float32"),
        sae=bigsae.SAEConfig(k=8, d_sae=4096, init_tokens=64),
    )


def nbytes(tensors: Any) -> int:
    """Bytes of tensors' storages, one that several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def watch_gradients(run: loop.Run) -> dict[Tensor, int]:
    """The bytes of each parameter's gradient, as the backward makes them."""
    seen: dict[Tensor, int] = {}

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen[parameter] = parameter.grad.nbytes

    for trainer in run.trainers.values():
        for parameter in trainer.sae.parameters():
            parameter.register_post_accumulate_grad_hook(note)
    return seen


def watch_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each part of a sum of gradients that a rank gets where ranks share the moments."""
    sizes: list[int] = []
    plain = collectives.sum_to_parts

    def note(tensor: Tensor, group: Any) -> Tensor:
        part = plain(tensor, group)
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(collectives, "sum_to_parts", note)
    return sizes


def watch_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each checkpoint copies to the host's memory: one number for tensors, one for the rank's own."""
    sizes: list[int] = []
    plain = Saver._copies

    def note(self: Saver, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = plain(self, tensors)
        sizes.append(nbytes(local_part(tensor) for tensor in copies.values()))
        return copies

    monkeypatch.setattr(Saver, "_copies", note)
    return sizes


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure(config: TrainConfig, *, without_forward: bool = False) -> dict[str, int]:
    """The bytes of a whole run on this rank, and on disk."""
    vars(encode._cpu_slabs).clear()
    with StopSignal() as stop:
        run, close = prepare(config, stop)
        extract: Any = run.harvest.extract
        if without_forward:
            widths = {name: storage.shape[1] for name, storage in run.harvest.buffer.storage.items()}
            run.harvest.extract = lambda ids: {name: torch.randn(*ids.shape, d) for name, d in widths.items()}
        gradients = watch_gradients(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encode, "_CACHED_BYTES", 0)  # less than the slab, on the CPU alone
            parts, copies = watch_parts(patch), watch_copies(patch)
            assert loop.train(run) == "finished"
        close()
    trainers = run.trainers.values()
    moments = [t for trainer in trainers for state in trainer.update.state().values() for t in state.values()]
    statistics = [
        t for tr in trainers for t in (*tr.firing.tensors().values(), *tr.window.tensors().values())
    ]
    (checkpoint,) = checkpoints(run.out / "checkpoints")
    return {
        "lm": local_bytes(extract.model),
        "buffer": nbytes(run.harvest.buffer.storage.values()),
        "weights": nbytes(p for trainer in trainers for p in trainer.sae.parameters()),
        "moments": nbytes(moments),
        "statistics": nbytes(statistics),
        "gradients": max(sum(gradients[p] for p in trainer.sae.parameters()) for trainer in trainers)
        + max(parts, default=0),
        "slab": encode._cpu_slabs.bytes.nbytes,
        "checkpoint_copy": sum(copies[-2:]),
        "checkpoint": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
    }


def predicted(config: TrainConfig, num_ranks: int) -> dict[str, int]:
    _, plan = planned(plan_of_run(config, num_ranks))
    saes = plan.bytes.saes
    return {
        "lm": plan.bytes.lm,
        "buffer": plan.bytes.buffer,
        "weights": sum(s.weights for s in saes),
        "moments": sum(s.moments for s in saes),
        "statistics": sum(s.statistics for s in saes),
        "gradients": max(s.gradients for s in saes),
        "slab": max(s.slab for s in saes),
        "checkpoint_copy": plan.bytes.checkpoint_copy,
        "checkpoint": plan.checkpoint,
    }


def assert_close(predicted: dict[str, int], measured: dict[str, int]) -> None:
    for name, value in measured.items():
        assert predicted[name] == pytest.approx(value, rel=TOLERANCE), name


def jumprelu(config: TrainConfig) -> TrainConfig:
    return replace(
        config, sae=bigsae.SAEConfig(architecture="jumprelu", target_l0=8, d_sae=4096, init_tokens=64)
    )


def two_hookpoints(config: TrainConfig) -> TrainConfig:
    return replace(config, hookpoints=("model.layers.0", "model.layers.2.mlp"))


def half_precision(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        lm=replace(config.lm, dtype="bfloat16"),
        buffer=replace(config.buffer, dtype="bfloat16"),
        optim=bigsae.OptimConfig(grad_dtype="bfloat16", moments_dtype="bfloat16"),
    )


def small_moments(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        optim=bigsae.OptimConfig(moments_dtype="int8"),
        sae=replace(config.sae, slab_mb=1, d_sae=8192),
        batch_size_tokens=256,
        tokens=2 * 256,
        buffer=bigsae.BufferConfig(tokens=32_768),
    )


def transcoder(config: TrainConfig) -> TrainConfig:
    sae = replace(config.sae, output_hookpoint=("model.layers.1.mlp",), skip=True)
    return replace(config, hookpoints=("model.layers.1.mlp:input",), sae=sae)


def bfloat16_weights(config: TrainConfig) -> TrainConfig:
    return replace(config, sae=replace(config.sae, dtype="bfloat16"), optim=bigsae.OptimConfig(beta2=0.99))


def whole_model(config: TrainConfig) -> TrainConfig:
    """Two of four layers would do for the hookpoint."""
    return replace(
        config, eval=bigsae.EvalConfig(ce=True, rows=2), data=bigsae.DataConfig(heldout_documents=2)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c,
        jumprelu,
        two_hookpoints,
        half_precision,
        small_moments,
        transcoder,
        bfloat16_weights,
        whole_model,
    ],
    ids=[
        "topk",
        "jumprelu",
        "two hookpoints",
        "bfloat16",
        "int8 moments",
        "transcoder",
        "bfloat16 weights",
        "eval.ce",
    ],
)
def test_one_rank(config, change):
    config = change(config)
    assert_close(predicted(config, 1), measure(config))


@pytest.mark.parametrize(
    "mesh",
    [
        bigsae.MeshConfig(latent=1),
        bigsae.MeshConfig(latent=2),
        bigsae.MeshConfig(latent=1, shard_optimizer=True),
        bigsae.MeshConfig(),
    ],
    ids=["data 2", "latent 2", "data 2, moments shared", "as chosen"],
)
def test_two_ranks_with_a_sharded_model(config, mesh):
    """Also that the plan takes the mesh that the run takes where neither is told."""
    config = replace(two_hookpoints(config), lm=replace(config.lm, shard_size=2), mesh=mesh)
    expected = predicted(config, 2)
    for result in run_ranks(2, measure, config):
        assert_close(expected, result)


def rows_of_runs(configs: list[TrainConfig]) -> list[tuple[int | None, int, int]]:
    """Of each run what its configuration says, the rows of a forward, and the buffer's room for them."""
    found = []
    for config in configs:
        with StopSignal() as stop:
            run, close = prepare(config, stop)
            close()
        rows = run.harvest.micro_batch_rows
        found.append((run.config.lm.micro_batch_rows, rows, run.harvest.buffer.headroom))
    return found


def test_the_chosen_rows_are_the_plan_s_on_any_mesh(config):
    config = replace(two_hookpoints(config), lm=bigsae.LMConfig(dtype="float32"))
    meshes = [
        replace(config, output_dir=f"{config.output_dir}_{latent}", mesh=bigsae.MeshConfig(latent=latent),
                lm=replace(config.lm, shard_size=latent))
        for latent in (1, 2)
    ]  # fmt: skip
    plan = plan_of_run(config, 1)
    assert with_chosen_rows(plan, lm_facts(plan)).lm.micro_batch_rows == 128
    expected = (128, 128, 2048)
    assert rows_of_runs([config]) == [expected]
    assert run_ranks(2, rows_of_runs, meshes) == [[expected, expected]] * 2


def test_the_quickstart(home, tmp_path):
    """SmolLM2-135M's shapes and the quickstart's flags, on one rank, for one step on random activations."""
    shapes = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16).save_pretrained(tmp_path / "smol")
    tiny_tokenizer(tmp_path / "smol")
    config = TrainConfig(
        model=str(tmp_path / "smol"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.6",),
        output_dir=str(tmp_path / "out"),
        tokens=1024,
        batch_size_tokens=1024,
        lm=bigsae.LMConfig(dtype="float32"),
        buffer=bigsae.BufferConfig(tokens=16_384, dtype="float32"),
        sae=bigsae.SAEConfig(dead_after_tokens=100_000),
        optim=bigsae.OptimConfig(lr=2e-3, warmup_steps=20),
    )
    result = measure(config, without_forward=True)
    assert_close(predicted(config, 1), result)
    assert result["lm"] > 150e6  # 7 layers and the embedding, not nothing
