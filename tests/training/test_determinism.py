"""The same command gives the same bits, and the losses that it gave when they were stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bigsae
from tests.launch import metrics
from tests.training import loss_curves

STORED = json.loads(loss_curves.STORED.read_text())
# What differs between two runs: where they lie, how long they took, and the pickle in which torch lists a checkpoint's
# tensors, with its hash. The tensors are compared.
NOT_COMPARED = {"config.json", "metrics.jsonl", ".metadata", "COMPLETE"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    loss_curves.write_inputs(folder)
    return folder


def trained(home: Path, out: Path, architecture: str) -> tuple[list[dict], dict[str, bytes]]:
    """Rows of metrics.jsonl but for times, and the bytes of every other file that is compared."""
    bigsae.train_saes(loss_curves.configuration(architecture, home, out))
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    compared = {name: path.read_bytes() for name, path in files.items() if path.name not in NOT_COMPARED}
    return metrics(out), compared


@pytest.mark.parametrize("architecture", list(STORED))
def test_two_runs_are_equal_and_follow_the_stored_losses(home, tmp_path, architecture):
    rows, files = trained(home, tmp_path / "one", architecture)
    checkpoint = f"checkpoints/step_{loss_curves.NUM_STEPS}/__0_0.distcp"
    assert {
        "model.layers.1/sae_weights.safetensors",
        "model.layers.1/sparsity.safetensors",
        checkpoint,
    } < set(files)
    assert rows[0]["loss"] > 1.3 * rows[loss_curves.NUM_STEPS - 1]["loss"]  # something was learnt
    rows_again, files_again = trained(home, tmp_path / "two", architecture)
    assert rows_again == rows
    assert files_again.keys() == files.keys()
    for name, content in files.items():
        assert files_again[name] == content, name

    curve, stored = loss_curves.losses(tmp_path / "one"), STORED[architecture]
    assert len(curve) == len(stored) == loss_curves.NUM_STEPS
    assert curve == pytest.approx(stored, rel=1e-5), (
        "a change of results: if it is meant, python -m tests.training.loss_curves stores the new ones"
    )
