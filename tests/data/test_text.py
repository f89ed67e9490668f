"""A dataset and a model that do not belong together are found alike by every command that reads text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

import bigsae
from bigsae import report
from bigsae.commands import run_command
from bigsae.data.cache_index import read_index
from tests.caching.caches import HOOKPOINTS, cache_config, make_home, run_config

NAME = HOOKPOINTS[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The model's own text, a run on it, and rows of ready-made ids that begin with BOS."""
    folder = make_home(tmp_path_factory.mktemp("text"))
    bigsae.train_saes(run_config(folder, folder / "run", hookpoints=(NAME,)))
    bos = AutoTokenizer.from_pretrained(folder / "lm").bos_token_id
    rows = [[bos, *(3 + (i + j) % 40 for j in range(31))] for i in range(400)]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder / "rows"))
    return folder


def says(home: Path, **origin: object) -> str:
    """The rows, with a sae_lens.json that says how they were made."""
    (home / "rows" / "sae_lens.json").write_text(json.dumps({"context_size": 32} | origin))
    return str(home / "rows")


def report_on(home: Path, dataset: str, tmp_path: Path, monkeypatch) -> None:
    arguments = [str(home / "run"), "--dataset", dataset, "--output", str(tmp_path / "r.html")]
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()


COMMANDS: dict[str, Callable] = {
    "train": lambda home, dataset, out, _: bigsae.train_saes(run_config(home, out / "run", dataset=dataset)),
    "cache": lambda home, dataset, out, _: bigsae.write_activations(
        cache_config(home, out / "cache", dataset=dataset)
    ),
    "evaluate": lambda home, dataset, out, _: bigsae.evaluate_saes(
        bigsae.EvaluateConfig(saes=(str(home / "run" / NAME),), dataset=dataset, ctx_len=32)
    ),
    "report": report_on,
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (
            {"tokenizer_name": "another", "bigsae": {"tokenizer_sha256": "0"}},
            "whose vocabulary is not that of",
        ),
        ({"context_size": 16}, "hold 16 tokens: lower --ctx-len to 16"),
    ],
)
def test_rows_made_for_another_run_are_refused(home, tmp_path, monkeypatch, command, origin, message):
    with pytest.raises(bigsae.UserError, match=message):
        COMMANDS[command](home, says(home, **origin), tmp_path, monkeypatch)
    assert not (tmp_path / "cache" / "index.json").exists() and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("begin", ["bos", None])
def test_a_cache_knows_whether_ready_made_rows_begin_with_bos(home, tmp_path, begin):
    dataset = says(home, begin_batch_token=begin)
    bigsae.write_activations(cache_config(home, tmp_path / "cache", dataset=dataset, tokens=500))
    assert read_index(tmp_path / "cache" / "index.json").prepend_bos == (begin == "bos")


def test_the_other_commands_take_config_files(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.yaml").write_text(f"num_latents: 3\ncontexts: false\noutput: {tmp_path}/r.html\n")
    monkeypatch.setattr(sys, "argv", ["report", str(home / "run"), "--config", str(tmp_path / "report.yaml")])
    report.main()
    assert (tmp_path / "r.html").exists()
    (tmp_path / "report.yaml").write_text("num_latent: 3\n")
    with pytest.raises(SystemExit) as ended:
        run_command(report.main)
    assert ended.value.code == 2
    assert "unknown option 'num_latent': the nearest is 'num_latents'" in capsys.readouterr().err
