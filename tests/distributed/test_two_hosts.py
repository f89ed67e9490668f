"""The whole command on two hosts that only a cable joins, as `scripts/two_hosts.sh` starts it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.hosts import Host, Launch, launch, two_hosts, why_not
from tests.launch import checkpoint_tensors, flags, metrics, run, write_corpus
from tests.models import tiny_llama

HOOKPOINT = "model.layers.1"
NUM_STEPS = 240
TIMEOUT_SECONDS = 20

reason = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(reason is not None, reason=str(reason))]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    tiny_llama(folder / "lm", num_layers=3)
    write_corpus(folder / "corpus.jsonl")
    return folder


def options(home: Path, out: Path, **more: Any) -> list[str]:
    base = {
        "model": home / "lm", "dataset": home / "corpus.jsonl", "output_dir": out, "hookpoints": HOOKPOINT,
        "tokens": NUM_STEPS * 128, "batch_size_tokens": 128, "ctx_len": 32, "log_every": 20, "seed": 3,
        "optim__lr": 1e-3, "sae__k": 4, "sae__d_sae": 256, "sae__dead_after_tokens": 1000, "sae__init_tokens": 512,
        "lm__dtype": "float32", "lm__micro_batch_rows": 4, "buffer__tokens": 512, "buffer__dtype": "float32",
        "data__num_shards": 8, "checkpoint__every": 40, "checkpoint__keep": 0,
        # What is chosen follows from the ranks of a node, and another mesh rounds otherwise.
        "mesh__latent": 1,
    }  # fmt: skip
    return flags(**(base | more))


def on_one_host(num_ranks: int, arguments: list[str]) -> None:
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_ranks),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "bigsae.train",
    ]  # fmt: skip
    code, output = run(tuple(launcher), arguments)
    assert code == 0, output


def succeed(started: Launch) -> str:
    """What the first host printed, once both have succeeded."""
    for rank in (0, 1):
        code, output = started.wait(rank)
        assert code == 0, output
    return started.logs[0].read_text()


def assert_same_run(ours: Path, theirs: Path, scratch: Path) -> None:
    """Exported weights, all that is in the last checkpoint, and the numbers logged, bit for bit."""
    files = [load_file(out / HOOKPOINT / "sae_weights.safetensors") for out in (ours, theirs)]
    final = f"checkpoints/step_{NUM_STEPS}"
    tensors = [checkpoint_tensors(out / final, scratch / f"{i}.pt") for i, out in enumerate((ours, theirs))]
    for ones, others in (files, tensors):
        assert ones.keys() == others.keys() and ones
        for name, tensor in ones.items():
            assert torch.equal(tensor, others[name]), name
    assert metrics(ours) == metrics(theirs)


def test_two_ranks_on_each_host_train_as_four_on_one(hosts, home, tmp_path):
    """The layout is that of accelerate_configs/hsdp_2nodes.yaml: sharded within a host, replicated on the other."""
    output = succeed(launch(hosts, 2, options(home, tmp_path / "two"), tmp_path))
    assert "4 ranks on cpu, language model hsdp 2 x 2 ranks (accelerate FSDP HYBRID_SHARD)" in output
    on_one_host(4, options(home, tmp_path / "one", lm__shard_size=2))
    assert_same_run(tmp_path / "two", tmp_path / "one", tmp_path)


@pytest.fixture(scope="module")
def straight(home) -> Path:
    """Two ranks of one host, uninterrupted."""
    on_one_host(2, options(home, home / "straight"))
    return home / "straight"


def ends_without(
    victim: Host, hosts: tuple[Host, Host], arguments: list[str], out: Path, silently: bool
) -> None:
    """Kill the victim between two checkpoints; the other host has to end by itself, in time, and say why."""
    started = launch(hosts, 1, arguments, out.parent / "killed")
    started.wait_for(out / "checkpoints" / "step_40" / "COMPLETE")
    if silently:
        victim.plug("down")
    victim.kill()
    killed = time.monotonic()
    survivor = 1 - victim.rank
    code, output = started.wait(survivor, timeout=TIMEOUT_SECONDS + 60)
    seconds = time.monotonic() - killed
    assert code != 0
    errors = [line for line in output.splitlines() if line.startswith(f"error on rank {survivor}: ")]
    assert len(errors) == 1, output
    assert "of the run died, or did not answer within --timeout" in errors[0]
    assert "--resume" in errors[0]
    assert f"[rank{survivor}]: Traceback" not in output
    # The rest is the launcher's way out.
    assert seconds < TIMEOUT_SECONDS + 25
    if silently:
        assert "Timed out" in errors[0]
        assert seconds > TIMEOUT_SECONDS - 5
        victim.plug("up")


@pytest.mark.parametrize(
    ("victim", "silently"),
    [
        pytest.param(1, True, id="second-silently"),
        pytest.param(0, False, id="first"),
        pytest.param(0, True, id="first-silently"),
    ],
)
def test_a_host_that_dies_ends_the_other_and_both_go_on(hosts, home, straight, tmp_path, victim, silently):
    """Silently: its cable is cut first, so that no connection is closed and only the time-out tells."""
    out = tmp_path / "run"
    arguments = options(home, out, timeout=TIMEOUT_SECONDS / 60)
    ends_without(hosts[victim], hosts, arguments, out, silently)
    status = json.loads((out / "status.json").read_text())
    # Rank 0 writes it: where that died nobody did.
    assert status["status"] == ("failed" if victim else "running")
    assert not (out / "checkpoints" / f"step_{NUM_STEPS}").exists()
    output = succeed(launch(hosts, 1, [*arguments, "--resume"], tmp_path / "resumed"))
    assert "2 ranks on cpu, language model replicate (accelerate FSDP HYBRID_SHARD)" in output
    assert f"resumed {out}/checkpoints/step_" in output
    assert_same_run(out, straight, tmp_path)
