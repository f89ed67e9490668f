"""The whole command on two ranks with a sharded LM, and what interrupts it.

What a launcher has no part in is trained by ranks that are forked: their start takes no seconds.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bigsae.commands import parse_train_config
from bigsae.training.run import run_training
from tests.distributed.ranks import run_ranks
from tests.launch import ONE_RANK, TWO_RANKS, checkpoint_tensors, flags, metrics, run, start, write_corpus
from tests.models import tiny_llama

HOOKPOINTS = ("model.layers.2.mlp", "model.layers.1")
NUM_STEPS, EVERY = 150, 50


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny_llama(folder / "lm")
    write_corpus(folder / "corpus.jsonl")
    return folder


def options(home: Path, out: Path, **more: Any) -> list[str]:
    base = {
        "model": home / "lm", "dataset": home / "corpus.jsonl", "output_dir": out, "hookpoints": HOOKPOINTS,
        "tokens": NUM_STEPS * 128, "batch_size_tokens": 128, "ctx_len": 32, "log_every": 7,
        "seed": 3, "optim__lr": 3e-3,
        "sae__k": 4, "sae__d_sae": 256, "sae__dead_after_tokens": 1000, "sae__init_tokens": 512,
        "lm__dtype": "float32", "lm__micro_batch_rows": 4, "buffer__tokens": 512, "buffer__dtype": "float32",
        "data__heldout_documents": 3, "data__num_shards": 8, "eval__every": EVERY, "eval__rows": 16,
        "checkpoint__every": EVERY, "checkpoint__keep": 0,
    }  # fmt: skip
    return flags(**(base | more))


def succeed(command: tuple[str, ...], arguments: list[str]) -> str:
    code, output = run(command, arguments)
    assert code == 0, output
    return output


def training_here(arguments: list[str]) -> str:
    """What a training by the command's arguments says, in this process."""
    said = logging.StreamHandler(io.StringIO())
    logger, threads = logging.getLogger("bigsae"), torch.get_num_threads()
    level = logger.level
    logger.addHandler(said)
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)  # as `environment()` has it: another number sums in another order
    try:
        run_training(parse_train_config(arguments))
    finally:
        logger.removeHandler(said)
        logger.setLevel(level)
        torch.set_num_threads(threads)
    return said.stream.getvalue()


@pytest.fixture(scope="module")
def sharded(home) -> Path:
    """The straight run: two ranks, the LM sharded over them."""
    output = succeed(TWO_RANKS, options(home, home / "sharded", lm__shard_size=2))
    assert "2 ranks on cpu, language model fsdp (flags), kernels torch" in output
    return home / "sharded"


def assert_same_run(ours: Path, theirs: Path, scratch: Path) -> None:
    """Weights, optimiser, statistics, buffers, cursors, generators and logged numbers, bit for bit."""
    assert metrics(ours) == metrics(theirs)
    final = f"checkpoints/step_{NUM_STEPS}"
    tensors = [checkpoint_tensors(run / final, scratch / f"{i}.pt") for i, run in enumerate((ours, theirs))]
    assert tensors[0].keys() == tensors[1].keys()
    assert any("rank_" in name and "buffer" in name for name in tensors[0])
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    for path in sorted((ours / final).glob("*.json")):
        assert path.read_text() == (theirs / final / path.name).read_text()
    for hookpoint in HOOKPOINTS:
        for file in ("sae_weights.safetensors", "sparsity.safetensors", "cfg.json"):
            assert (ours / hookpoint / file).read_bytes() == (theirs / hookpoint / file).read_bytes()


def test_a_finished_run(sharded):
    rows = metrics(sharded)
    trained = [row for row in rows if "fvu" in row]
    assert {row["hookpoint"] for row in rows} == set(HOOKPOINTS)
    assert [row["step"] for row in trained if row["hookpoint"] == HOOKPOINTS[1]] == [
        *range(7, NUM_STEPS, 7),
        NUM_STEPS,
    ]
    for name in HOOKPOINTS:
        own = [row for row in trained if row["hookpoint"] == name]
        assert own[-1]["fvu"] < 0.6 * own[0]["fvu"]
        assert any(row["dead_fraction"] > 0 and row["auxk_loss"] > 0 for row in own)
        assert 0 < own[-1]["l0"] <= 4
        heldout = [row for row in rows if row["hookpoint"] == name and "heldout_fvu" in row]
        assert [row["step"] for row in heldout] == [EVERY, 2 * EVERY, NUM_STEPS]
        assert heldout[-1]["heldout_fvu"] == pytest.approx(own[-1]["fvu"], rel=0.5)
    status = json.loads((sharded / "status.json").read_text())
    left_out = {"skipped_documents": 0, "dropped_tokens": 0}
    expected = {
        "status": "finished",
        "reason": "all tokens trained",
        "step": NUM_STEPS,
        "tokens": NUM_STEPS * 128,
    }
    assert status == expected | left_out
    assert sorted(p.name for p in (sharded / "checkpoints").iterdir()) == ["step_100", "step_150", "step_50"]


def test_replicated_lm_gives_the_same_numbers(home, sharded):
    run_ranks(2, training_here, options(home, home / "replicated"))
    ours, theirs = metrics(sharded), metrics(home / "replicated")
    assert len(ours) == len(theirs)
    for row, other in zip(ours, theirs, strict=True):
        assert row.pop("hookpoint") == other.pop("hookpoint")
        assert row == pytest.approx(other, rel=1e-5)


def test_resume_is_bit_for_bit(home, sharded, tmp_path):
    """Interrupted after 50 of 150 steps: as if the machine had gone down within the next checkpoint."""
    resumed = tmp_path / "resumed"
    shutil.copytree(sharded, resumed)
    for gone in (*HOOKPOINTS, "checkpoints/step_150"):
        shutil.rmtree(resumed / gone)
    (resumed / "checkpoints/step_100/COMPLETE").unlink()
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # torn
    said = run_ranks(2, training_here, options(home, resumed, lm__shard_size=2, resume=True))
    assert "step_50 at step 50" in said[0]
    assert_same_run(sharded, resumed, tmp_path)


def wait_for_rows(folder: Path, num_rows: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < num_rows:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_resume_goes_on(home, sharded, tmp_path, monkeypatch, number):
    # As scripts/slurm/train.sbatch has it: the launcher would die of SIGUSR1.
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    out = tmp_path / "stopped"
    arguments = options(home, out, lm__shard_size=2)
    process = start(TWO_RANKS, arguments)
    wait_for_rows(out, 6, process)
    # As a cluster does it: the launcher and its workers are told, and the launcher tells the workers again.
    workers = psutil.Process(process.pid).children(recursive=True)
    for worker in workers:
        worker.send_signal(number)
    time.sleep(0.03)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    status = json.loads((out / "status.json").read_text())
    assert status["status"] == "preempted", output
    assert 0 < status["step"] < NUM_STEPS
    assert (out / f"checkpoints/step_{status['step']}/COMPLETE").exists()
    succeed(TWO_RANKS, [*arguments, "--resume"])
    assert_same_run(sharded, out, tmp_path)


TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
    "--rdzv_endpoint", "127.0.0.1:0",
)  # fmt: skip
ELASTIC = {
    "accelerate": (*TWO_RANKS[:3], "--max_restarts", "1", *TWO_RANKS[3:]),
    "torchrun": (*TORCHRUN, "--max_restarts", "1", "-m", "bigsae.train"),
}


def rank_of_pid(pid: int, rank: int) -> psutil.Process:
    """The process of a rank below its launcher; what it starts itself has its environment too, but came later."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile
            if child.environ().get("RANK") == str(rank):
                found.append((child.create_time(), child.pid, child))
    return min(found)[2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ELASTIC)
def test_a_launcher_that_restarts_goes_on_by_itself(home, sharded, tmp_path, launcher):
    """One rank is killed; the launcher starts both again, with the same command line, which says --resume."""
    out = tmp_path / "restarted"
    process = start(ELASTIC[launcher], options(home, out, lm__shard_size=2, resume=True))
    deadline = time.monotonic() + 120
    while not (out / "checkpoints/step_50/COMPLETE").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank_of_pid(process.pid, 1).kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "holds no whole checkpoint, starting afresh" in output  # the first time
    assert "step_50 at step 50" in output or "step_100 at step 100" in output
    assert_same_run(sharded, out, tmp_path)


def test_sigint_on_one_process(home, tmp_path):
    training_here(options(home, tmp_path / "straight"))
    out = tmp_path / "stopped"
    arguments = options(home, out)
    process = start(ONE_RANK, arguments)
    wait_for_rows(out, 6, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert json.loads((out / "status.json").read_text())["status"] == "preempted"
    training_here([*arguments, "--resume"])
    assert_same_run(tmp_path / "straight", out, tmp_path)


def test_a_finished_run_resumes_to_nothing(home, sharded):
    files = ("metrics.jsonl", f"{HOOKPOINTS[0]}/sae_weights.safetensors")
    before = [(sharded / file).read_bytes() for file in files]
    said = run_ranks(2, training_here, options(home, sharded, lm__shard_size=2, resume=True))
    assert "is finished" in said[0]
    assert [(sharded / file).read_bytes() for file in files] == before
    assert json.loads((sharded / "status.json").read_text())["status"] == "finished"
