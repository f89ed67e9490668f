"""Killed at any moment and resumed, a run ends with the very bits of one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bigsae
from bigsae.parallel.nodes import PeerLost
from bigsae.training.checkpoint import checkpoints, step_of
from tests.launch import metrics, write_corpus
from tests.models import tiny_llama

NAME = "model.layers.1"
# Of each kind; 30 with one rank and with two.
KILLS = {"sync": 8, "time": 7}
TIMEOUT_SECONDS = 30.0
FINISHED, LOST = 0, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=40)
    return folder


def config_of(home: Path, out: Path, num_ranks: int) -> bigsae.TrainConfig:
    return bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=(NAME,),
        output_dir=str(out),
        tokens=64 * 60,
        batch_size_tokens=64,
        ctx_len=16,
        log_every=3,
        resume=True,
        timeout=TIMEOUT_SECONDS / 60,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2, shard_size=num_ranks),
        data=bigsae.DataConfig(num_shards=4),
        buffer=bigsae.BufferConfig(tokens=256, dtype="float32"),
        sae=bigsae.SAEConfig(k=3, d_sae=64, dead_after_tokens=500),
        checkpoint=bigsae.CheckpointConfig(every=4),
    )


def rank_main(rank: int, num_ranks: int, store: str, config: bigsae.TrainConfig, dies_at: int) -> None:
    """One rank of the run; kills itself at its `dies_at`-th sync of a file, a part of all writing (0: never)."""
    if num_ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        )  # fmt: skip
    torch.set_num_threads(1)
    sync, calls = os.fsync, Counter()

    def dying(file: Any) -> None:
        calls["sync"] += 1
        if calls["sync"] == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    os.fsync = dying
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    Path(f"{store}.joined_{rank}").touch()
    code = FINISHED
    try:
        bigsae.train_saes(config)
    except PeerLost as error:
        Path(f"{store}.said_{rank}").write_text(f"rank {rank}: {error}")
        code = LOST
    os._exit(code)


def launch(
    config: bigsae.TrainConfig, num_ranks: int, folder: Path, kill: Any, chance: random.Random
) -> list[int]:
    """All ranks to their end; `kill` is None, ("time", seconds, which) or ("sync", n, which). Their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bigsae.training.setup", "bigsae.training.run", "tests.distributed.test_kills"]
    )
    store = folder / f"store_{chance.random()}"
    kind, when, which = kill or ("never", 0, ())
    processes = [
        context.Process(
            target=rank_main,
            args=(rank, num_ranks, str(store), config, when if kind == "sync" and rank in which else 0),
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    if kind == "time":
        # Before the ranks have found each other their death is the launcher's affair.
        while len(list(folder.glob(f"{store.name}.joined_*"))) < num_ranks:
            time.sleep(0.01)
        time.sleep(when)
        for rank in which:
            if (pid := processes[rank].pid) and processes[rank].is_alive():
                os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 2 * TIMEOUT_SECONDS + 60
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        assert process.exitcode is not None, "a rank hangs"
    return [process.exitcode for process in processes if process.exitcode is not None]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_anywhere_and_resumed_it_is_the_same_run(home, tmp_path, num_ranks):
    chance = random.Random(num_ranks)
    launch(
        config_of(home, tmp_path / "first", num_ranks), num_ranks, tmp_path, None, chance
    )  # starts the server
    start = time.monotonic()
    config = config_of(home, tmp_path / "straight", num_ranks)
    assert launch(config, num_ranks, tmp_path, None, chance) == [0] * num_ranks
    seconds = time.monotonic() - start
    expected = bigsae.load_sae(tmp_path / "straight" / NAME)
    rows = [{k: v for k, v in row.items() if "time" not in k and "second" not in k}
            for row in metrics(tmp_path / "straight")]  # fmt: skip
    killed: Counter[str] = Counter()
    num_runs = 0
    while wanted := [kind for kind, number in KILLS.items() if killed[kind] < number]:
        num_runs += 1
        out = tmp_path / f"run_{num_runs}"
        config = config_of(home, out, num_ranks)
        codes = [1]
        while any(codes):
            kill = None
            if wanted := [kind for kind, number in KILLS.items() if killed[kind] < number]:
                whom = tuple(range(num_ranks)) if chance.random() < 0.5 else (chance.randrange(num_ranks),)
                kill = ("time", chance.uniform(0.0, 0.8 * seconds), whom)
                if chance.choice(wanted) == "sync":
                    kill = ("sync", chance.randint(1, 90), whom)
            codes = launch(config, num_ranks, tmp_path, kill, chance)
            said = " ".join(path.read_text() for path in tmp_path.glob("*.said_*"))
            for path in tmp_path.glob("*.said_*"):
                path.unlink()
            dead = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
            assert set(codes) <= {FINISHED, LOST, -signal.SIGKILL}, said
            if dead:
                assert kill is not None
                killed[kill[0]] += 1
                for rank, code in enumerate(codes):
                    if code == LOST:
                        assert f"rank {rank}: rank {dead[0]} of the run died" in said
            else:
                assert not any(codes), said
        found = bigsae.load_sae(out / NAME)
        for name, value in expected.named_parameters():
            assert torch.equal(found.get_parameter(name), value), name
        assert [{k: row[k] for k in like} for row, like in zip(metrics(out), rows, strict=True)] == rows
        # One that dies between the last checkpoint and the removal of those before it has them still.
        assert [step_of(path) for path in checkpoints(out / "checkpoints")][-2:] == [56, 60]
    print(f"{sum(killed.values())} kills ({dict(killed)}) in {num_runs} runs of {num_ranks} ranks")
