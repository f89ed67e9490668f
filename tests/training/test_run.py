"""Whole runs in this process: kinds of data, hookpoints, ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

import bigsae
from bigsae.config import UserError
from bigsae.training.run import Preempted
from tests.launch import metrics, write_corpus
from tests.models import english, tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=40)
    texts = {"text": [english(150, seed=i) for i in range(40)]}
    datasets.Dataset.from_dict(texts).to_parquet(folder / "corpus.parquet")
    datasets.Dataset.from_dict(texts).save_to_disk(str(folder / "saved"))
    (folder / "texts").mkdir()
    for i, text in enumerate(texts["text"]):
        (folder / "texts" / f"{i}.txt").write_text(text)
    ids = [[(7 * i + j) % 300 + 2 for j in range(40)] for i in range(60)]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(folder / "ids"))
    return folder


@pytest.fixture
def config(home, tmp_path) -> bigsae.TrainConfig:
    return bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.1",),
        output_dir=str(tmp_path / "out"),
        tokens=64 * 20,
        batch_size_tokens=64,
        ctx_len=16,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        data=bigsae.DataConfig(num_shards=4),
        buffer=bigsae.BufferConfig(tokens=256, dtype="float32"),
        sae=bigsae.SAEConfig(k=3, d_sae=64),
        optim=bigsae.OptimConfig(lr=3e-3),
    )


def status(config: bigsae.TrainConfig) -> dict:
    return json.loads((Path(config.output_dir) / "status.json").read_text())


@pytest.mark.parametrize("dataset", ["corpus.jsonl", "corpus.parquet", "saved", "texts", "ids"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_dataset_trains(home, config, dataset, streaming):
    config = replace(config, dataset=str(home / dataset), data=replace(config.data, streaming=streaming))
    bigsae.train_saes(config)
    rows = metrics(Path(config.output_dir))
    assert rows[-1]["step"] == 20
    assert rows[-1]["fvu"] < rows[0]["fvu"] < 2


def test_one_epoch_ends_the_run(home, config):
    config = replace(config, tokens=10**9, data=replace(config.data, epochs=1), log_every=50)
    sae = bigsae.train_saes(config)["model.layers.1"]
    end = status(config)
    assert end["status"] == "finished"
    assert end["reason"] == "the data ended after 1 epochs"
    assert 50 < end["step"] < 10**4
    assert metrics(Path(config.output_dir))[-1]["step"] == end["step"]
    assert torch.equal(bigsae.load_sae(Path(config.output_dir) / "model.layers.1").W_dec, sae.W_dec)


def test_data_that_ends_on_a_saved_and_measured_step_is_finished_once(config):
    """The end is found after the checkpoint of the same step was written."""
    data = replace(config.data, epochs=1, heldout_documents=2)
    config = replace(
        config,
        tokens=10**9,
        data=data,
        checkpoint=replace(config.checkpoint, every=1),
        eval=replace(config.eval, every=1),
    )
    bigsae.train_saes(config)
    before = metrics(Path(config.output_dir))
    assert len({row["step"] for row in before if "heldout_fvu" in row}) == sum(
        "heldout_fvu" in r for r in before
    )
    bigsae.train_saes(replace(config, resume=True))
    assert metrics(Path(config.output_dir)) == before
    assert status(config)["status"] == "finished"


def test_going_on_within_the_first_filling_of_the_buffer(config, monkeypatch):
    """Stopped before the first step, and past the end of an epoch: nothing is held against the data."""
    from bigsae.data.harvest import Harvest

    buffer = replace(config.buffer, tokens=20_000)
    config = replace(config, buffer=buffer, batch_size_tokens=4096, tokens=4 * 4096)
    calls = 0

    def harvest_stopped(self, step, should_stop, plain=Harvest.fill):
        def stop_late() -> bool:
            nonlocal calls
            calls += 1
            return calls == 200

        return plain(self, step, stop_late)

    with monkeypatch.context() as patch:
        patch.setattr(Harvest, "fill", harvest_stopped)
        with pytest.raises(Preempted):
            bigsae.train_saes(config)
    assert status(config)["step"] == 0
    resumed = bigsae.train_saes(replace(config, resume=True))["model.layers.1"]
    straight = bigsae.train_saes(replace(config, output_dir=config.output_dir + "-straight"))[
        "model.layers.1"
    ]
    assert torch.equal(resumed.W_dec, straight.W_dec)


def test_hookpoints_of_all_kinds_from_one_forward(config):
    names = (
        "model.layers.1.mlp",
        "blocks.0.hook_resid_post",
        "model.layers.1:input",
        "model.layers.{0,1}.self_attn",
    )
    saes = bigsae.train_saes(replace(config, hookpoints=names))
    expected = [
        "model.layers.0.self_attn",
        "model.layers.0",
        "model.layers.1:input",
        "model.layers.1.self_attn",
    ]
    assert list(saes) == [*expected, "model.layers.1.mlp"]
    # The output of layer 0 is the input of layer 1: trained side by side, their SAEs are the same one.
    for name, tensor in saes["model.layers.0"].state_dict().items():
        assert torch.equal(tensor, saes["model.layers.1:input"].state_dict()[name])


def test_many_saes_equal_each_alone(config):
    together = bigsae.train_saes(replace(config, hookpoints=("model.layers.0", "model.layers.1.mlp")))
    alone = bigsae.train_saes(
        replace(config, hookpoints=("model.layers.1.mlp",), output_dir=config.output_dir + "-alone")
    )
    for name, tensor in alone["model.layers.1.mlp"].state_dict().items():
        assert torch.equal(tensor, together["model.layers.1.mlp"].state_dict()[name])


def test_position_0_and_special_tokens_are_left_out_unless_asked_for(config, monkeypatch):
    """Counted where it matters: in what enters the buffer."""
    from bigsae.data.buffer import ActivationBuffer

    written: list[int] = []
    plain = ActivationBuffer.write

    def count(self, activations):
        written.append(len(next(iter(activations.values()))))
        plain(self, activations)

    monkeypatch.setattr(ActivationBuffer, "write", count)
    bigsae.train_saes(config)
    assert max(written) <= 2 * 15  # of each row of 16 at most 15
    assert min(written) < 2 * 15  # and fewer where a document ends
    written.clear()
    keep = replace(config.data, drop_first_position=False, drop_special_tokens=False)
    bigsae.train_saes(replace(config, data=keep, output_dir=config.output_dir + "-all"))
    assert set(written) == {2 * 16}


def test_ids_of_another_models_tokenizer(home, config, tmp_path):
    datasets.Dataset.from_dict({"input_ids": [[5000] * 40] * 20}).save_to_disk(str(tmp_path / "foreign"))
    with pytest.raises(UserError, match="token id 5000, but --model"):
        bigsae.train_saes(replace(config, dataset=str(tmp_path / "foreign")))


def test_half_precision_everywhere(config):
    half = replace(
        config, lm=replace(config.lm, dtype="bfloat16"), buffer=replace(config.buffer, dtype="bfloat16")
    )
    bigsae.train_saes(half)
    assert metrics(Path(config.output_dir))[-1]["fvu"] < 1
