"""Trackers beside metrics.jsonl, read back from the files that they wrote offline; and no trace of them without."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bigsae
from bigsae.config import TrainConfig, UserError, WandbConfig
from bigsae.training import publish
from tests.launch import environment, flags, metrics, write_corpus
from tests.models import tiny_llama
from tests.training.tracked import tensorboard_events, wandb_records

NAME = "model.layers.0"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trackers")
    tiny_llama(folder / "lm", num_layers=1)
    write_corpus(folder / "corpus.jsonl", num_documents=12)
    return folder


@pytest.fixture
def config(home, tmp_path, monkeypatch) -> TrainConfig:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=(NAME,),
        output_dir=str(tmp_path / "run"),
        tokens=640,
        batch_size_tokens=64,
        ctx_len=16,
        log_every=2,
        lm=bigsae.LMConfig(dtype="float32"),
        data=bigsae.DataConfig(num_shards=2),
        buffer=bigsae.BufferConfig(tokens=256),
        sae=bigsae.SAEConfig(k=2, d_sae=64),
        checkpoint=bigsae.CheckpointConfig(every=4),
    )


class Interrupted(Exception):
    pass


def interrupt(config: TrainConfig, step: int) -> None:
    """Train, and fail after `step`."""
    plain = publish.publish

    def failing(run: Any) -> None:
        plain(run)
        if run.step == step:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigsae.training.loop.publish", failing)
        with pytest.raises(Interrupted):
            bigsae.train_saes(config)


def records(config: TrainConfig) -> list[list[Any]]:
    """Those of each run of wandb's, oldest first. Its service may write for a moment after a run was finished."""
    deadline = time.monotonic() + 60
    while True:
        paths = Path(config.output_dir).glob("wandb/offline-run-*/run-*.wandb")
        found = [list(wandb_records(path)) for path in sorted(paths, key=lambda path: path.parent.name)]
        if all(some and some[-1].WhichOneof("record_type") == "exit" for some in found):
            return found
        assert time.monotonic() < deadline, "a run of wandb's has no end"
        time.sleep(0.1)


def history(some: list[Any]) -> dict[int, dict[str, Any]]:
    """What was logged, by step."""
    rows: dict[int, dict[str, Any]] = {}
    for record in some:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.setdefault(record.history.step.num, {}).update(items)
    return rows


def artifacts(some: list[Any]) -> Iterator[Any]:
    for record in some:
        if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
            yield record.request.log_artifact.artifact
        elif record.WhichOneof("record_type") == "artifact":
            yield record.artifact


def configuration(some: list[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in some:
        for part in (record.config, record.run.config):
            values |= {item.key: json.loads(item.value_json) for item in part.update if item.key}
    return values


def test_wandb_has_configuration_curves_system_metrics_and_saes(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.1")
    secret = json.dumps({"proxies": {"https": "http://me:never-to-be-seen@proxy:3128"}})
    config = replace(
        config, wandb=WandbConfig(project="saes", name="a-name"), lm=replace(config.lm, kwargs=secret)
    )
    sae = bigsae.train_saes(config)[NAME]
    (some,) = records(config)
    (started,) = [r.run for r in some if r.WhichOneof("record_type") == "run" and r.run.project][:1]
    assert (started.project, started.display_name) == ("saes", "a-name")
    values = configuration(some)
    assert values["sae"]["d_sae"] == 64
    assert json.loads(values["lm"]["kwargs"]) == {}
    assert "never-to-be-seen" not in str(some)
    rows = history(some)
    assert [row["fvu"] for row in metrics(tmp_path / "run")] == [
        rows[step][f"{NAME}/fvu"] for step in range(2, 11, 2)
    ]
    stats = {item.key for r in some if r.WhichOneof("record_type") == "stats" for item in r.stats.item}
    assert any("cpu" in key for key in stats) and any("memory" in key for key in stats), stats
    logged = list(artifacts(some))
    assert [[a for a in artifact.aliases if a != "latest"] for artifact in logged] == [
        ["step_4"], ["step_8"], ["step_10"]
    ]  # fmt: skip
    assert {artifact.name for artifact in logged} == {f"saes-{started.run_id}"}
    folders = []
    for artifact in logged:
        folder = tmp_path / next(alias for alias in artifact.aliases if alias != "latest")
        for entry in artifact.manifest.contents:
            (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / entry.path).write_bytes(Path(entry.local_path).read_bytes())
        folders.append(folder)
    kept = [bigsae.load_sae(folder, NAME) for folder in folders]
    assert [s.metadata["training_tokens"] for s in kept] == [256, 512, 640]
    assert torch.equal(kept[-1].W_dec, sae.W_dec) and not torch.equal(kept[0].W_dec, sae.W_dec)
    assert not (tmp_path / "run" / ".saes").exists()


def test_wandb_goes_on_in_the_same_run_and_without_artifacts_if_told_so(config):
    config = replace(config, log_with=("wandb",), wandb=WandbConfig(artifacts=False))
    interrupt(config, 7)
    bigsae.train_saes(replace(config, resume=True))
    first, second = records(config)
    ids = {r.run.run_id for some in (first, second) for r in some if r.WhichOneof("record_type") == "run"}
    assert len(ids) == 1
    assert json.loads((Path(config.output_dir) / "trackers.json").read_text())["id"] in ids
    assert next(r.run.project for r in first if r.WhichOneof("record_type") == "run") == "bigsae"
    steps = [
        [step for step, row in history(some).items() if f"{NAME}/fvu" in row] for some in (first, second)
    ]
    assert steps == [[2, 4, 6], [6, 8, 10]]
    assert not list(artifacts(first)) and not list(artifacts(second))


def test_a_run_begun_anew_is_another_one(config):
    config = replace(config, log_with=("wandb",), wandb=WandbConfig(artifacts=False))
    interrupt(config, 3)
    bigsae.train_saes(replace(config, resume=True))
    ids = [{r.run.run_id for r in some if r.WhichOneof("record_type") == "run"} for some in records(config)]
    assert len(ids) == 2 and not ids[0] & ids[1]


def events(config: TrainConfig) -> list[Any]:
    """Of the metrics, oldest file first."""
    paths = sorted(
        (Path(config.output_dir) / "tensorboard" / "bigsae").glob("events.*"), key=lambda p: p.stat().st_ctime
    )
    return [event for path in paths for event in tensorboard_events(path)]


def test_tensorboard_and_wandb_side_by_side(config, tmp_path):
    pytest.importorskip("tensorboardX")
    config = replace(config, log_with=("tensorboard", "wandb"), wandb=WandbConfig(artifacts=False))
    interrupt(config, 7)
    bigsae.train_saes(replace(config, resume=True))
    found = events(config)
    shown: dict[int, float] = {}
    starts: list[int] = []
    for event in found:
        # As TensorBoard reads them: a start at a step hides what was logged from it on.
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            starts.append(event.step)
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == f"{NAME}/fvu":
                shown[event.step] = value.simple_value
    rows = {row["step"]: row["fvu"] for row in metrics(tmp_path / "run")}
    assert list(shown) == [2, 4, 6, 8, 10] == list(rows)
    assert shown == pytest.approx(rows) and starts == [5]
    # Names differ by more than the second of the start.
    names = {
        path.name.partition(".resumed-")[2] for path in (tmp_path / "run" / "tensorboard").rglob("events.*")
    }
    assert names == {"", "4"}
    (hparams,) = (tmp_path / "run" / "tensorboard").rglob("hparams.yml")
    assert "sae.d_sae: 64" in hparams.read_text()
    assert {step for some in records(config) for step in history(some)} >= {2, 4, 6, 8, 10}


def test_trackio(config, tmp_path):
    # pip install trackio: of use beside this alone, and it brings eleven packages.
    pytest.importorskip("trackio")
    config = replace(config, log_with=("trackio",))
    interrupt(config, 7)
    bigsae.train_saes(replace(config, resume=True))
    with sqlite3.connect(tmp_path / "trackio" / "bigsae.db") as database:
        found = database.execute("select run_name, step, metrics from metrics").fetchall()
        (stored,) = {row[0] for row in database.execute("select config from configs").fetchall()}
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["id"]
    assert {name for name, _, _ in found} == {f"run-{identity}"}
    logged = {step: json.loads(values)[f"{NAME}/fvu"] for _, step, values in found}
    assert logged == {row["step"]: row["fvu"] for row in metrics(tmp_path / "run")}
    assert json.loads(stored)["sae"]["d_sae"] == 64


def test_a_tracker_that_is_not_installed_is_an_error(config, monkeypatch):
    monkeypatch.setattr("bigsae.parallel.launch.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log-with tensorboard: .*pip install tensorboardX"):
        bigsae.train_saes(replace(config, log_with=("tensorboard",)))


def test_without_a_tracker_none_is_imported(config):
    arguments = {
        "model": config.model, "dataset": config.dataset, "hookpoints": NAME, "tokens": 640, "batch_size_tokens": 64,
        "ctx_len": 16, "sae__k": 2, "sae__d_sae": 64, "data__num_shards": 2, "lm__dtype": "float32",
        "buffer__tokens": 256, "output_dir": config.output_dir,
    }  # fmt: skip
    code = f"import sys; sys.argv[1:] = {flags(**arguments)!r}\nfrom bigsae.train import main; main()\n"
    code += "assert not {'wandb', 'tensorboardX', 'tensorboard', 'trackio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    assert not (Path(config.output_dir) / "trackers.json").exists()
