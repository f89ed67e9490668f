"""The quickstart's model: written by the command on two ranks that share it, killed, gone on with, trained from."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

import bigsae
from tests.launch import ONE_RANK, ROOT, TWO_RANKS, flags, metrics, run, start

WRITE = (*TWO_RANKS[:-1], "bigsae.cache_activations")
HOOKPOINT = "model.layers.6"


@pytest.mark.slow
def test_killed_caches_of_a_real_model_train_the_same_sae(quickstart_run, tmp_path):
    home = ROOT / ".quickstart"
    model = {"model": home / "SmolLM2-135M", "dataset": home / "sotu", "lm__dtype": "float32"}
    options = {
        "hookpoints": HOOKPOINT, "tokens": 4096, "output_dir": tmp_path / "fly", "batch_size_tokens": 1024,
        "log_every": 1, "sae__dead_after_tokens": 100_000, "optim__lr": 2e-3, "optim__warmup_steps": 2,
        "buffer__tokens": 1024, "buffer__dtype": "float32",
    }  # fmt: skip
    writing = flags(
        **model, hookpoints=(HOOKPOINT, "model.layers.3.mlp:input"), tokens=8192, shard_tokens=2048,
        output_dir=tmp_path / "cache", dtype="float32", lm__shard_size=2, data__heldout_documents=8, heldout_rows=8,
    )  # fmt: skip
    process = start(WRITE, writing)
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "cache").glob("progress/00000-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    kill_with_children(process.pid)
    process.wait()
    first = next((tmp_path / "cache" / "activations" / HOOKPOINT).glob("00000-*"))
    before = first.stat().st_mtime_ns
    code, output = run(WRITE, [*writing, "--resume"])
    assert code == 0 and "resumed" in output, output
    assert first.stat().st_mtime_ns == before
    bigsae.open_activations(tmp_path / "cache").verify()

    train = (*TWO_RANKS[:-1], "bigsae.train")
    # The small buffer would have 2 rows in a forward, where the cache had 8.
    fly = flags(
        **model, **options, lm__shard_size=2, lm__micro_batch_rows=8, data__heldout_documents=8, eval__rows=8
    )
    code, output = run(train, fly)
    assert code == 0, output
    cached = options | {"output_dir": tmp_path / "cached", "activations": tmp_path / "cache"}
    code, output = run(train, flags(**cached, data__cached_order="as_made", eval__rows=8))
    assert code == 0 and "Loading weights" not in output, output
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "fly")
    name = f"{HOOKPOINT}/sae_weights.safetensors"
    assert (tmp_path / "cached" / name).read_bytes() == (tmp_path / "fly" / name).read_bytes()
    shuffled = cached | {"output_dir": tmp_path / "shuffled"}
    code, output = run(ONE_RANK, flags(**shuffled))
    assert code == 0, output
    measured = [[row["heldout_fvu"] for row in metrics(tmp_path / name) if "heldout_fvu" in row][-1]
                for name in ("shuffled", "fly")]  # fmt: skip
    assert measured[0] == pytest.approx(measured[1], rel=0.2)


def kill_with_children(pid: int) -> None:
    """As when the machine goes down."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
