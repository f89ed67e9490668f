"""Runs that go on on other ranks or another mesh: nothing of the data is lost or repeated, the state is the same."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import bigsae
from bigsae.training.run import run_training
from bigsae.training.state import Run
from bigsae.training.trainer import SAETrainer
from tests.distributed.ranks import run_ranks
from tests.distributed.states import assert_close, assert_read_back, state, waiting
from tests.launch import metrics

VOCABULARY, CTX_LEN, BATCH, CUT = 4096, 16, 96, 15
HOOKPOINT = "model.embed_tokens"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("elastic"))


def make_home(folder: Path) -> Path:
    """A model whose embeddings tell tokens apart, and a dataset that holds every token once."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "lm")
    ids = torch.arange(VOCABULARY).view(-1, CTX_LEN).tolist()
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(folder / "ids"))
    return folder


def config(home: Path, out: Path, **mesh: Any) -> bigsae.TrainConfig:
    return bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "ids"),
        hookpoints=(HOOKPOINT,),
        output_dir=str(out),
        tokens=10**6,
        batch_size_tokens=BATCH,
        ctx_len=CTX_LEN,
        log_every=4,
        seed=1,
        mesh=bigsae.MeshConfig(**mesh),
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        data=bigsae.DataConfig(num_shards=8, epochs=1, drop_first_position=False, drop_special_tokens=False),
        buffer=bigsae.BufferConfig(tokens=256, dtype="float32"),
        sae=bigsae.SAEConfig(k=4, d_sae=96, dead_after_tokens=500, init_tokens=128),
        optim=bigsae.OptimConfig(lr=1e-3, accumulation_steps=2),
        checkpoint=bigsae.CheckpointConfig(every=CUT, keep=0),
    )


def train(config: bigsae.TrainConfig) -> dict[str, Any]:
    """What a run trained on, what waits at its end, and how it began: token ids, and the state it read."""
    seen: list[Tensor] = []
    began: dict[str, Any] = {}
    plain = SAETrainer.train_step

    def recorded(self: SAETrainer, x: Tensor, y: Tensor | None = None) -> None:
        if not began:
            began.update(state=state(self), waiting=waiting(self))
        if self.mesh.latent_rank == 0:
            seen.append(x.clone())
        plain(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAETrainer, "train_step", recorded)
        run = run_training(config)
    embeddings = AutoModelForCausalLM.from_pretrained(config.model).get_input_embeddings().weight.detach()
    token_of = {row.numpy().tobytes(): i for i, row in enumerate(embeddings)}

    def ids(rows: list[Tensor]) -> list[int]:
        return [token_of[x.numpy().tobytes()] for part in rows for x in part]

    return {
        "seen": ids(seen),
        "waiting": ids([run.harvest.buffer.tensors()[HOOKPOINT]]) + torch.cat([*rest(run)]).tolist(),
        "began": began,
        "mesh": (run.mesh.num_data, run.mesh.num_latent),
    }


def rest(run: Run) -> list[Tensor]:
    """The rows that this rank has not harvested."""
    return [torch.empty(0, dtype=torch.int64), *run.rows]


MESHES = {"1 x 2": (2, 2), "1 x 1": (1, 1), "2 x 2": (4, 2), "1 x 3": (3, 3)}


def cut(run: Path, copy: Path) -> Path:
    """`run` as it was at its checkpoint of step CUT, which lies within an accumulated update."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if folder.name != f"step_{CUT}":
            shutil.rmtree(folder)
    return copy


@pytest.fixture(scope="module")
def straight(home) -> list[dict[str, Any]]:
    """The run without interruption, on 2 x 1."""
    return run_ranks(2, train, config(home, home / "straight", latent=1))


def ids_of(results: list[dict[str, Any]], what: str) -> list[int]:
    return [token for result in results for token in result[what]]


def test_the_straight_run_takes_every_token_once(straight):
    assert Counter(ids_of(straight, "seen") + ids_of(straight, "waiting")) == Counter(range(VOCABULARY))


def resumed_state(config: bigsae.TrainConfig) -> dict[str, Any]:
    return train(replace(config, resume=True))


@pytest.fixture(scope="module")
def as_written(home, straight, tmp_path_factory) -> dict[str, Any]:
    """The state in the checkpoint, as the ranks that wrote it read it back."""
    out = cut(home / "straight", tmp_path_factory.mktemp("same") / "run")
    results = run_ranks(2, resumed_state, config(home, out, latent=1))
    # Data and state are these ranks' own: to the end it is the very run that was not interrupted.
    assert metrics(out) == metrics(home / "straight")
    assert [r["seen"] for r in results] == [r["seen"][CUT * BATCH // 2 :] for r in straight]
    return results[0]["began"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_goes_on_on_another_mesh(home, straight, as_written, tmp_path, mesh):
    num_ranks, num_latent = MESHES[mesh]
    before = [result["seen"][: CUT * BATCH // 2] for result in straight]
    out = cut(home / "straight", tmp_path / "run")
    results = run_ranks(num_ranks, resumed_state, config(home, out, latent=num_latent))
    assert {result["mesh"] for result in results} == {(num_ranks // num_latent, num_latent)}
    tokens = (
        [token for part in before for token in part] + ids_of(results, "seen") + ids_of(results, "waiting")
    )
    assert Counter(tokens) == Counter(range(VOCABULARY))
    for result in results:
        assert_read_back(result["began"]["state"], as_written["state"])
        assert_close(result["began"]["waiting"], as_written["waiting"])
    if num_ranks == 2:
        ours, theirs = metrics(out), metrics(home / "straight")
        for mine, straights in zip(ours, theirs, strict=True):
            assert mine.pop("hookpoint") == straights.pop("hookpoint")
            assert mine == pytest.approx(straights, rel=1e-5)
