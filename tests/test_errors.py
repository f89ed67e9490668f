"""What a user can get wrong on the command line: a short message with the flag and the fix, exit status 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigsae.commands import run_command
from bigsae.train import main
from tests.launch import flags, write_corpus
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=12)
    (folder / "short.jsonl").write_text('{"text": "too short"}\n')
    datasets.Dataset.from_dict({"label": [1, 2, 3]}).save_to_disk(str(folder / "labels"))
    return folder


def arguments(home: Path, out: Path, **more: Any) -> list[str]:
    base: dict[str, Any] = {
        "model": home / "lm", "dataset": home / "corpus.jsonl", "output_dir": out, "hookpoints": "model.layers.1",
        "tokens": 640, "batch_size_tokens": 64, "ctx_len": 16, "sae__k": 2, "sae__d_sae": 64, "data__num_shards": 2,
        "lm__dtype": "float32", "lm__micro_batch_rows": 2, "buffer__tokens": 128, "buffer__dtype": "float32",
    }  # fmt: skip
    return flags(**{name: value for name, value in (base | more).items() if value is not None})


def call(monkeypatch, command_line: list[str]) -> int:
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bigsae.train", *command_line])
    try:
        run_command(main)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def refused(monkeypatch, capsys, command_line: list[str]) -> str:
    """The message with which the command refuses."""
    capsys.readouterr()
    assert call(monkeypatch, command_line) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_unknown_flags_keep_tyros_box(home, tmp_path, monkeypatch, capsys):
    assert "--sae.kk" in refused(monkeypatch, capsys, [*arguments(home, tmp_path), "--sae.kk", "5"])


def test_vocabulary_beyond_the_models(home, tmp_path, monkeypatch, capsys):
    """A tokenizer with ids that the embedding does not have."""
    model = tmp_path / "lm"
    tiny_llama(model, num_layers=2)
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    message = refused(monkeypatch, capsys, arguments(home, tmp_path / "out", model=model))
    assert "300" in message
    assert "--model" in message


def test_activations_that_are_no_numbers(home, tmp_path, monkeypatch, capsys):
    model = tmp_path / "lm"
    tiny_llama(model, num_layers=2)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    points = {"hookpoints": ("model.layers.0", "model.layers.1")}
    message = refused(monkeypatch, capsys, arguments(home, tmp_path / "out", model=model, **points))
    assert "non-finite activations at model.layers.1 before step 0" in message
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "model.layers.1" in status["reason"]


def test_an_output_folder_that_holds_a_run(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert call(monkeypatch, arguments(home, out)) == 0
    assert "already holds a run: go on with --resume" in refused(monkeypatch, capsys, arguments(home, out))
    message = refused(monkeypatch, capsys, arguments(home, out, resume=True, sae__d_sae=128))
    assert "--sae.d-sae is 128" in message
    assert "has 64" in message
    message = refused(monkeypatch, capsys, arguments(home, out, resume=True, tokens=1280))
    assert "--tokens is 1280" in message
    assert call(monkeypatch, arguments(home, out, resume=True, log_every=3)) == 0


def test_a_run_that_failed_before_its_first_checkpoint_can_be_mended(home, tmp_path, monkeypatch, capsys):
    out, wrong = tmp_path / "out", {"batch_size_tokens": 8192, "tokens": 8192, "buffer__tokens": 8192}
    refused(monkeypatch, capsys, arguments(home, out, **wrong))
    assert json.loads((out / "status.json").read_text())["status"] == "failed"
    assert "already holds a run" in refused(monkeypatch, capsys, arguments(home, out))
    assert call(monkeypatch, arguments(home, out, resume=True)) == 0
    assert json.loads((out / "config.json").read_text())["batch_size_tokens"] == 64


def test_resume_where_there_is_nothing_starts_afresh_and_says_so(home, tmp_path, monkeypatch, caplog):
    assert call(monkeypatch, arguments(home, tmp_path / "run", resume=True)) == 0
    assert "starting afresh" in caplog.text


def test_config_reads_back_and_flags_override(home, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, arguments(home, tmp_path / "one", seed=5)) == 0
    again = ["--config", str(tmp_path / "one" / "config.json"), "--output-dir", str(tmp_path / "two")]
    assert call(monkeypatch, again) == 0
    weights = "model.layers.1/sae_weights.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert call(monkeypatch, [*again[:3], str(tmp_path / "three"), "--seed", "6"]) == 0
    assert (tmp_path / "one" / weights).read_bytes() != (tmp_path / "three" / weights).read_bytes()
    broken = tmp_path / "broken.json"
    broken.write_text('{"sae": {"kk": 3}}')
    assert "unknown option 'kk'" in refused(monkeypatch, capsys, ["--config", str(broken)])
