"""Checkpoints that are damaged, cannot be written, or are written while training goes on."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bigsae
from bigsae.config import UserError
from bigsae.configfile import read_config
from bigsae.parallel.mesh import alone
from bigsae.training import checkpoint
from bigsae.training.checkpoint import NotSaved, checkpoints, newest_whole
from bigsae.training.metrics import MetricsFile
from bigsae.training.saved import Saved
from tests.distributed.ranks import run_ranks
from tests.launch import metrics, write_corpus
from tests.models import tiny_llama

NAME = "model.layers.1"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, text, and a run of 20 steps that has all its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=40)
    bigsae.train_saes(config_of(folder, folder / "straight"))
    return folder


def config_of(home: Path, out: Path, **options: Any) -> bigsae.TrainConfig:
    base: dict[str, Any] = {
        "model": str(home / "lm"), "dataset": str(home / "corpus.jsonl"), "hookpoints": (NAME,),
        "output_dir": str(out), "tokens": 64 * 20, "batch_size_tokens": 64, "ctx_len": 16, "log_every": 3,
        "lm": bigsae.LMConfig(dtype="float32", micro_batch_rows=2), "data": bigsae.DataConfig(num_shards=4),
        "buffer": bigsae.BufferConfig(tokens=256, dtype="float32"), "sae": bigsae.SAEConfig(k=3, d_sae=64),
        "optim": bigsae.OptimConfig(lr=3e-3), "checkpoint": bigsae.CheckpointConfig(every=4, keep=0),
    }  # fmt: skip
    return bigsae.TrainConfig(**(base | options))


def cut(home: Path, out: Path, last: int) -> bigsae.TrainConfig:
    """The straight run as it was when the checkpoint of step `last` was the newest, to be resumed."""
    shutil.copytree(home / "straight", out)
    for path in checkpoints(out / "checkpoints"):
        if checkpoint.step_of(path) > last:
            shutil.rmtree(path)
    return config_of(home, out, resume=True)


def assert_as_straight(home: Path, out: Path) -> None:
    ours, theirs = bigsae.load_sae(out / NAME), bigsae.load_sae(home / "straight" / NAME)
    for name, value in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), value)
    assert metrics(out) == metrics(home / "straight")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def data_file(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[0]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda f: flip_a_bit(data_file(f)),
    "a torn file": lambda f: data_file(f).write_bytes(data_file(f).read_bytes()[:-1]),
    "a lost file": lambda f: data_file(f).unlink(),
    "a torn state": lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:-9]),
    "another rank's cursors": lambda f: flip_a_bit(f / "rank_0.json"),
    "a marker without sums": lambda f: (f / "COMPLETE").write_text('{"step": 12}'),
    "a torn marker": lambda f: (f / "COMPLETE").write_text('{"step": 1'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_taken(home, tmp_path, caplog, damage):
    config = cut(home, tmp_path / "run", last=12)
    newest = tmp_path / "run/checkpoints/step_12"
    DAMAGE[damage](newest)
    bigsae.train_saes(config)
    assert "step_12 is damaged" in caplog.text and "the one before it is taken" in caplog.text
    assert (newest.parent / "damaged_step_12").is_dir()
    assert_as_straight(home, tmp_path / "run")


@pytest.mark.parametrize(
    "leftovers", [(".step_12.old",), (".step_12.tmp",), (".step_12.old", ".step_12.tmp")]
)
def test_one_that_a_kill_left_between_its_names_is_taken_up(home, tmp_path, caplog, leftovers):
    """The old one of that step had been put aside, or the new one was whole and had no name yet."""
    config = cut(home, tmp_path / "run", last=12)
    folder = tmp_path / "run/checkpoints"
    for leftover in leftovers:
        shutil.copytree(folder / "step_12", folder / leftover)
    if len(leftovers) == 2:
        flip_a_bit(data_file(folder / ".step_12.old"))  # the newer one is taken
    shutil.rmtree(folder / "step_12")
    shutil.copytree(folder / "step_8", folder / ".step_16.tmp")
    (folder / ".step_16.tmp/COMPLETE").unlink()  # torn: this one is none
    bigsae.train_saes(config)
    assert caplog.text.count("that is whole, and is taken up") == 1
    assert f"resumed {folder / 'step_12'} at step 12" in caplog.text
    assert_as_straight(home, tmp_path / "run")
    assert not list(folder.glob(".*"))


def test_a_resume_takes_the_rows_of_a_forward_that_the_run_had(home, tmp_path):
    """Not those that would be chosen, 8; others that are asked for are refused."""
    config = cut(home, tmp_path / "run", last=12)
    with pytest.raises(UserError, match=r"--lm\.micro-batch-rows is 4, the run in .* has 2"):
        bigsae.train_saes(replace(config, lm=replace(config.lm, micro_batch_rows=4)))
    bigsae.train_saes(replace(config, lm=replace(config.lm, micro_batch_rows=None)))
    assert_as_straight(home, tmp_path / "run")
    assert read_config(tmp_path / "run/config.json").lm.micro_batch_rows == 2


def test_the_chosen_rows_are_kept_and_told(home, tmp_path, caplog):
    caplog.set_level("INFO")
    config = config_of(home, tmp_path / "run", tokens=64, lm=bigsae.LMConfig(dtype="float32"))
    bigsae.train_saes(config)
    assert (
        read_config(tmp_path / "run/config.json").lm.micro_batch_rows == 8
    )  # half of the buffer, 128 tokens
    assert caplog.text.count("8 rows of 16 tokens at a time") == 1


def compressed(path: Path, folder: Path) -> None:
    """A checkpoint whose tensors are so in its files that they are far larger in memory."""
    tensors = {"x": torch.zeros(1 << 20)}
    checkpoint.save(folder, 1, tensors, {}, {}, {}, 0, alone(torch.device("cpu")))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (place,) = metadata.storage_data.values()
    whole = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as old,
        zipfile.ZipFile(path / "small", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    small = (path / "small").read_bytes()
    assert len(small) < len(whole) / 100
    (path / place.relative_path).write_bytes(small)
    place.offset, place.length = 0, len(small)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_tensors_that_are_more_in_memory_than_on_disk_are_not_read(tmp_path):
    compressed(tmp_path / "step_1", tmp_path)
    saved = Saved(tmp_path / "step_1", 1, {}, [], 0)
    with pytest.raises(UserError, match="holds tensors that are compressed, which no checkpoint does"):
        checkpoint.read_tensors(saved, {"x": torch.empty(1 << 20)})


def test_where_all_are_damaged_nothing_is_begun_anew(home, tmp_path):
    config = cut(home, tmp_path / "run", last=8)
    for path in checkpoints(tmp_path / "run/checkpoints"):
        data_file(path).unlink()
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        bigsae.train_saes(config)


def damaged_on_ranks(folder: Path) -> list[str]:
    from bigsae.parallel.mesh import build_mesh

    found = newest_whole(folder, build_mesh())
    assert found is not None
    return [found.name, *sorted(path.name for path in folder.iterdir())]


def test_every_file_is_looked_at_by_one_of_the_ranks(home, tmp_path):
    for name in sorted(path.name for path in (home / "straight/checkpoints/step_8").iterdir()):
        if name == "COMPLETE":
            continue
        shutil.copytree(home / "straight/checkpoints", tmp_path / name)
        for step in (12, 16, 20):
            shutil.rmtree(tmp_path / name / f"step_{step}")
        flip_a_bit(tmp_path / name / "step_8" / name)
        assert newest_whole(tmp_path / name, alone(torch.device("cpu"))) == tmp_path / name / "step_4"
    shutil.copytree(home / "straight/checkpoints", tmp_path / "ranks")
    flip_a_bit(tmp_path / "ranks/step_20" / sorted(json.loads(
        (tmp_path / "ranks/step_20/COMPLETE").read_text())["files"])[1])  # fmt: skip
    for found in run_ranks(2, damaged_on_ranks, tmp_path / "ranks"):
        assert found[0] == "step_16" and found[1] == "damaged_step_20" and "step_20" not in found


@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_leaves_older_ones_whole_and_the_run_goes_on(home, tmp_path, monkeypatch, caplog, beside):
    """The second and third of the checkpoints find no room, as dcp meets it: a RuntimeError of its serialiser."""
    write = checkpoint.dcp.save
    calls = []

    def full(tensors: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 3):
            path = Path(options["storage_writer"].path)
            (path / "__0_0.distcp").write_bytes(b"half of it")
            raise checkpoint.CheckpointException("write", {0: (RuntimeError("no room"), None)})
        return write(tensors, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    saving = bigsae.CheckpointConfig(every=4, keep=0, beside_training=beside)
    bigsae.train_saes(config_of(home, tmp_path / "run", checkpoint=saving))
    assert caplog.text.count("a checkpoint could not be written (no room): the run goes on") == 2
    steps = [checkpoint.step_of(path) for path in checkpoints(tmp_path / "run/checkpoints")]
    assert steps == [4, 16, 20]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    assert_as_straight(home, tmp_path / "run")


def test_an_end_that_cannot_be_saved_is_an_error(home, tmp_path, monkeypatch):
    write = checkpoint.write_json

    def full(path: Path, value: Any) -> None:
        if path.parent.name == ".step_20.tmp":
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match=r"last checkpoint could not be written.*No space left.*from step 16"):
        bigsae.train_saes(config_of(home, tmp_path / "run"))
    monkeypatch.undo()
    bigsae.train_saes(config_of(home, tmp_path / "run", resume=True))
    assert_as_straight(home, tmp_path / "run")


def test_training_goes_on_while_a_checkpoint_is_written(home, tmp_path, monkeypatch):
    """The disk of the first checkpoint waits until step 7 is done; what is written is still that of step 4."""
    write, stepped = checkpoint.dcp.save, threading.Event()
    step = bigsae.training.trainer.SAETrainer.train_step

    def slow(*args: Any, **options: Any) -> Any:
        assert threading.current_thread().name == "bigsae-checkpoint"
        assert stepped.wait(60)
        return write(*args, **options)

    def train_step(self: Any, *batch: Any) -> None:
        step(self, *batch)
        if self.step == 7:
            stepped.set()

    monkeypatch.setattr(checkpoint.dcp, "save", slow)
    monkeypatch.setattr(bigsae.training.trainer.SAETrainer, "train_step", train_step)
    bigsae.train_saes(config_of(home, tmp_path / "run"))
    monkeypatch.undo()
    assert_as_straight(home, tmp_path / "run")
    for path in checkpoints(tmp_path / "run/checkpoints")[1:]:
        shutil.rmtree(path)
    bigsae.train_saes(config_of(home, tmp_path / "run", resume=True))
    assert_as_straight(home, tmp_path / "run")


def unwritable(folder: Path) -> str:
    """Rank 1 cannot write its part: all ranks learn of it, and none hangs."""
    from bigsae.parallel.mesh import build_mesh

    mesh = build_mesh()
    if mesh.rank == 1:
        checkpoint.write_json = refuse
    try:
        checkpoint.save(folder, 3, {}, {"own": torch.ones(2)}, {}, {}, 0, mesh)
    except NotSaved as error:
        return str(error)
    return ""


def refuse(path: Path, value: Any) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_one_ranks_full_disk_fails_all(tmp_path):
    first, second = run_ranks(2, unwritable, tmp_path)
    assert first == second and "No space left on device" in first
    assert not checkpoints(tmp_path)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"needs to mount a file system of its own: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_rows_wait_for_room(small_disk, caplog):
    path = small_disk / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    (small_disk / "filler").write_bytes(b"x" * (60 * 1024 - 10))
    rows = [{"step": step, "text": "y" * 3000} for step in range(2, 6)]
    for row in rows:
        file.write(row)
    written = [json.loads(line) for line in path.read_text().splitlines()]  # none is torn
    assert written[0] == {"step": 1} and len(written) < 5
    assert caplog.text.count("No space left on device): the run goes on, its rows wait") == 1
    (small_disk / "filler").unlink()
    file.write({"step": 6})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, *rows, {"step": 6}]
