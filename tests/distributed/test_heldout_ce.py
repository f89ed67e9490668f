"""Cross-entropy while training is what `bigsae.evaluate` finds of the SAEs that come out, on every mesh."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import bigsae
from tests.distributed.ranks import run_ranks
from tests.launch import write_corpus
from tests.models import tiny_llama

MESHES = {
    "data": bigsae.MeshConfig(latent=1),
    "latent": bigsae.MeshConfig(latent=2),
    "owners": bigsae.MeshConfig(distribute_saes=True),
}


def make_config(home: Path, name: str) -> bigsae.TrainConfig:
    return bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.1", "model.layers.0.mlp:input"),
        output_dir=str(home / name),
        tokens=64 * 20,
        batch_size_tokens=64,
        ctx_len=16,
        mesh=MESHES.get(name, bigsae.MeshConfig()),
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        data=bigsae.DataConfig(heldout_documents=3),
        buffer=bigsae.BufferConfig(tokens=128, dtype="float32"),
        sae=bigsae.SAEConfig(k=3, d_sae=64),
        eval=bigsae.EvalConfig(every=10, rows=6, ce=True),
    )


def train_all(home: Path) -> None:
    for name in MESHES:
        config = make_config(home, name)
        bigsae.train_saes(replace(config, lm=replace(config.lm, shard_size=1 + (name == "latent"))))


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "heldout_fvu" in row]


def check(folder: Path) -> None:
    results = bigsae.evaluate_saes(
        bigsae.EvaluateConfig(saes=(str(folder),), rows=6, lm=bigsae.LMConfig(dtype="float32"))
    )
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [10, 10, 20, 20]
    for row in rows[-2:]:
        found = results["saes"][row["hookpoint"]]
        assert results["tokens"] == row["heldout_tokens"]
        for name in ("fvu", "l0", "ce_clean", "ce_spliced", "ce_zero", "loss_recovered"):
            assert row[f"heldout_{name}"] == pytest.approx(found[name], rel=1e-4), name
        assert row["heldout_kl"] == pytest.approx(found["kl_spliced"], rel=1e-3)
        assert len({found["ce_clean"], found["ce_spliced"], found["ce_zero"]}) == 3
    assert rows[0]["heldout_ce_clean"] == rows[-1]["heldout_ce_clean"]
    assert rows[0]["heldout_ce_spliced"] != rows[-2]["heldout_ce_spliced"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ce")
    tiny_llama(folder / "lm", num_layers=3)
    write_corpus(folder / "corpus.jsonl", num_documents=20)
    return folder


def test_on_two_ranks(home):
    run_ranks(2, train_all, home)
    for name in MESHES:
        check(home / name)


def test_a_transcoder_on_one_rank(home):
    config = make_config(home, "transcoder")
    sae = replace(config.sae, output_hookpoint=("model.layers.1.mlp", "model.layers.0.mlp"))
    hookpoints = ("model.layers.1.mlp:input", "model.layers.0.mlp:input")
    bigsae.train_saes(replace(config, sae=sae, hookpoints=hookpoints))
    check(home / "transcoder")


def test_without_heldout_documents_it_is_refused(home):
    config = make_config(home, "refused")
    with pytest.raises(bigsae.UserError, match=r"--eval\.ce need documents"):
        bigsae.train_saes(replace(config, data=bigsae.DataConfig(), eval=bigsae.EvalConfig(ce=True)))


def test_a_transcoder_backwards_is_refused(home):
    config = make_config(home, "refused")
    sae = replace(config.sae, output_hookpoint=("model.layers.0",))
    with pytest.raises(
        bigsae.UserError, match=r"--eval\.ce: model\.layers\.0 is computed before model\.layers\.1"
    ):
        bigsae.train_saes(replace(config, sae=sae, hookpoints=("model.layers.1",)))
