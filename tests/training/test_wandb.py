"""Metrics in Weights & Biases, and no trace of it without --wandb.project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ONE_RANK, environment, flags, metrics, run, write_corpus
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("wandb")
    tiny_llama(folder / "lm", num_layers=1)
    write_corpus(folder / "corpus.jsonl", num_documents=12)
    options = {
        "model": folder / "lm", "dataset": folder / "corpus.jsonl", "hookpoints": "model.layers.0", "tokens": 640,
        "batch_size_tokens": 64, "ctx_len": 16, "sae__k": 2, "sae__d_sae": 64, "data__num_shards": 2,
        "lm__dtype": "float32", "buffer__tokens": 256, "log_every": 2,
    }  # fmt: skip
    return flags(**options)


def test_an_offline_run_holds_the_metrics(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    code, output = run(
        ONE_RANK, [*arguments, *flags(output_dir=out, wandb__project="saes", wandb__name="a-name")]
    )
    assert code == 0, output
    (written,) = out.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"a-name" in content
    assert b"expansion_factor" in content
    assert b"model.layers.0/fvu" in content
    assert len(metrics(out)) == 5
    for row in metrics(out):
        assert json.dumps(row["fvu"]).encode() in content


def test_without_a_project_wandb_is_not_imported(arguments, tmp_path):
    command = [*arguments, *flags(output_dir=tmp_path / "run")]
    code = f"import sys; sys.argv[1:] = {command!r}\nfrom bigsae.train import main; main()\n"
    code += "assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
