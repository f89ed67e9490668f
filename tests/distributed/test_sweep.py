"""Many SAEs from one forward: each as if it were trained alone, on the ranks together or dealt to them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bigsae
from bigsae.config import UserError
from bigsae.sae.base import SAE
from bigsae.training.variants import Variant, make_jobs, variants, with_sweep_read
from tests.distributed.ranks import run_ranks
from tests.launch import metrics, write_corpus
from tests.models import tiny_llama

SWEEP = ("sae.k=2,5", "optim.lr=1e-3,3e-3")
NAMES = ["k_2-lr_0.001", "k_2-lr_0.003", "k_5-lr_0.001", "k_5-lr_0.003"]


def config(home: Path, name: str, **options: Any) -> bigsae.TrainConfig:
    made = bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.0", "model.layers.1.mlp"),
        output_dir=str(home / name),
        tokens=64 * 20,
        batch_size_tokens=64,
        ctx_len=16,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        data=bigsae.DataConfig(num_shards=8, heldout_documents=4),
        buffer=bigsae.BufferConfig(tokens=128, dtype="float32"),
        sae=bigsae.SAEConfig(d_sae=64, init_tokens=128),
        checkpoint=bigsae.CheckpointConfig(every=8, keep=0),
    )
    return replace(made, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=80)
    return folder


def states(saes: dict[str, SAE]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: sae.state_dict() for name, sae in saes.items()}


def test_a_grid_equals_each_alone(home):
    """Bit for bit, architectures and widths among them."""
    points = ("sae.architecture=topk,batchtopk", "sae.d_sae=32,64", "seed=0,7")
    together = states(bigsae.train_saes(config(home, "grid", sweep=points)))
    assert len(together) == 16
    rows = metrics(home / "grid")
    assert {(row["hookpoint"], row["variant"]) for row in rows} == {tuple(n.rsplit("/", 1)) for n in together}
    alone_as = {
        "architecture_topk-d_sae_32-seed_0": bigsae.SAEConfig(d_sae=32, init_tokens=128),
        "architecture_batchtopk-d_sae_64-seed_0": bigsae.SAEConfig("batchtopk", d_sae=64, init_tokens=128),
    }
    for name, sae in alone_as.items():
        alone = states(bigsae.train_saes(config(home, f"alone_{name}", sae=sae)))
        for hookpoint, state in alone.items():
            for key, tensor in state.items():
                assert torch.equal(tensor, together[f"{hookpoint}/{name}"][key]), (hookpoint, key)
        if sae.architecture == "topk":  # a BatchTopK SAE is stored as jumprelu
            loaded = bigsae.load_sae(home / "grid" / "model.layers.0" / name).state_dict()
            assert all(torch.equal(t, together[f"model.layers.0/{name}"][key]) for key, t in loaded.items())


def train_distributed(
    home: Path, name: str, sweep: tuple[str, ...], distribute: bool = True
) -> dict[str, Any]:
    """A run, and how often each rank's activations were sent where."""
    mesh = bigsae.MeshConfig(distribute_saes=distribute, latent=None if distribute else 1)
    sent: list[tuple[int, int]] = []
    plain = dist.gather

    def counted(tensor: torch.Tensor, gather_list: Any = None, dst: int = 0, **options: Any) -> Any:
        sent.append((dst, tensor.numel()))
        return plain(tensor, gather_list, dst=dst, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "gather", counted)
        made = states(bigsae.train_saes(config(home, name, sweep=sweep, mesh=mesh)))
    return {"saes": made, "sent": sent}


def several(home: Path) -> dict[str, Any]:
    results = {"all": train_distributed(home, "dealt", SWEEP)}
    results["one"] = train_distributed(home, "dealt_one", ("sae.k=5", "optim.lr=1e-3"))
    results["together"] = train_distributed(home, "replicated", SWEEP, distribute=False)
    return results


@pytest.fixture(scope="module")
def dealt(home) -> list[dict[str, Any]]:
    return run_ranks(2, several, home)


def test_saes_dealt_to_ranks(home, dealt):
    """As each alone, bit for bit; nearly as with a copy on every rank; and what is read goes to its owner once."""
    for result in dealt:
        saes = result["all"]["saes"]
        assert list(saes) == [f"{h}/{n}" for h in ("model.layers.0", "model.layers.1.mlp") for n in NAMES]
        for name, state in result["one"]["saes"].items():
            for key, tensor in state.items():
                assert torch.equal(tensor, saes[name][key]), (name, key)
        for name, state in result["together"]["saes"].items():
            for key, tensor in state.items():
                torch.testing.assert_close(tensor, saes[name][key], rtol=1e-4, atol=1e-5)
        # Four SAEs on each of two hookpoints: each rank owns those of one, and gets that one's activations once a step.
        steps = [size for _, size in result["all"]["sent"] if size == 32 * 32]
        assert len(steps) == 20 * 2
    rows = metrics(home / "dealt")
    assert {row["variant"] for row in rows} == set(NAMES)
    assert sum("heldout_fvu" in row for row in rows) == 8


def resume(home: Path) -> dict[str, Any]:
    """From step 8 of the dealt run."""
    made = config(home, "again", sweep=SWEEP, mesh=bigsae.MeshConfig(distribute_saes=True))
    return states(bigsae.train_saes(replace(made, resume=True)))


def test_each_owner_goes_on(home, dealt):
    """From the checkpoint in which each owner saved its SAEs, bit for bit."""
    shutil.copytree(home / "dealt", home / "again")
    for folder in (home / "again" / "checkpoints").iterdir():
        if folder.name != "step_8":
            shutil.rmtree(folder)
    straight = {name: bigsae.load_sae(home / "dealt" / name).state_dict() for name in run_names()}
    for name, state in run_ranks(2, resume, home)[0].items():
        assert all(torch.equal(t, straight[name][key]) for key, t in state.items()), name


def run_names() -> list[str]:
    return [f"{h}/{n}" for h in ("model.layers.0", "model.layers.1.mlp") for n in NAMES]


@pytest.mark.parametrize(
    ("num_reads", "num_variants", "num_owners", "most", "num_sent"),
    [(8, 8, 8, 8, 8), (2, 4, 2, 4, 2), (1, 3, 2, 2, 2), (3, 1, 2, 2, 3), (3, 3, 2, 5, 4), (2, 1, 5, 1, 2)],
)
def test_dealing_is_even_and_sends_little(num_reads, num_variants, num_owners, most, num_sent):
    """Of as many SAEs as wide as each other: the most of a rank, and to how many ranks hookpoints go in all."""
    sweep = [
        Variant(f"v{i}", bigsae.SAEConfig(d_sae=64), bigsae.OptimConfig(), 0) for i in range(num_variants)
    ]
    reads = [f"h{i}" for i in range(num_reads)]
    jobs = make_jobs([(r, r) for r in reads], sweep, dict.fromkeys(reads, 16), num_owners)
    assert max(Counter(job.owner for job in jobs).values()) == most
    assert len({(job.reads, job.owner) for job in jobs}) == num_sent


def test_a_sweep_of_a_file_is_kept_in_the_configuration(home, tmp_path):
    """So that the run stays what it is when the file changes."""
    file = tmp_path / "points.json"
    file.write_text(json.dumps([{"sae.k": 2}, {"sae.k": 5, "seed": 3}]))
    read = with_sweep_read(config(home, "kept", sweep=(str(file),)))
    file.write_text("[]")
    assert [variant.name for variant in variants(read)] == ["k_2", "k_5-seed_3"]
    assert with_sweep_read(read) == read


@pytest.mark.parametrize("content", ["[]", '{"sae.k": []}', "{}"])
def test_empty_sweeps(home, tmp_path, content):
    file = tmp_path / "points.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"--sweep .*points.json"):
        variants(config(home, "wrong", sweep=(str(file),)))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (("sae.k=",), "write options with their values"),
        (("sae.kk=3",), "sweep options of --sae and --optim"),
        (("tokens=3",), "sweep options of --sae and --optim"),
        (("sae.k=3", "sae.k=4"), "each option once"),
        (("sae.k=3,3",), "twice"),
        (("no-such.json",), "cannot be read"),
        (("sae.k=many",), "expected int"),
    ],
)
def test_wrong_sweeps(home, sweep, message):
    with pytest.raises(UserError, match=message):
        variants(config(home, "wrong", sweep=sweep))
