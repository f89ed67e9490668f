"""Training that pushes to a Hub: at its steps and at its end, and on the Hub's bad days."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

import bigsae
from bigsae.commands import run_command
from bigsae.config import HubConfig, TrainConfig, UserError
from bigsae.export import main
from bigsae.training.pusher import Pusher
from bigsae.training.signals import StopSignal
from tests.distributed.ranks import run_ranks
from tests.hub.environment import use_hub
from tests.hub.hub_server import TOKEN, Hub
from tests.launch import write_corpus
from tests.models import tiny_llama

STEPS, NAME = 12, "model.layers.0"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pushes")
    tiny_llama(folder / "lm", num_layers=1)
    write_corpus(folder / "corpus.jsonl", num_documents=12)
    return folder


def config_of(home: Path, out: Path, **hub: Any) -> TrainConfig:
    return TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=(NAME,),
        output_dir=str(out),
        tokens=64 * STEPS,
        batch_size_tokens=64,
        ctx_len=16,
        log_every=3,
        lm=bigsae.LMConfig(dtype="float32"),
        data=bigsae.DataConfig(num_shards=2),
        buffer=bigsae.BufferConfig(tokens=256),
        sae=bigsae.SAEConfig(k=2, d_sae=64),
        hub=HubConfig(repo_id="user/name", **hub),
    )


@pytest.fixture
def config(home, tmp_path) -> TrainConfig:
    return config_of(home, tmp_path / "run", push_every=10, license="mit")


@pytest.fixture
def slow_steps(monkeypatch) -> None:
    """Training is slower than a push: each is over before the next step."""
    start = Pusher.start

    def started(self: Pusher, folder: Path, step: int) -> None:
        start(self, folder, step)
        assert self._process is not None
        self._process.wait()

    monkeypatch.setattr(Pusher, "start", started)


class Here:
    """A push's process, over at once, that is this one: what others take seconds to begin with is loaded."""

    def __init__(self, command: list[str], stdout: BinaryIO, **options: Any):
        self.returncode = 0
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            patch.setattr(sys, "argv", command[2:])
            try:
                run_command(main)
            except SystemExit as done:
                self.returncode = int(done.code or 0)
        stdout.write(said.getvalue().encode())

    def poll(self) -> int:
        return self.returncode

    def wait(self) -> int:
        return self.returncode


def messages(hub: Hub) -> list[str]:
    return [message for _, message, _ in hub.repositories["user/name"].commits]


def test_pushes_as_it_goes_on_and_at_the_end(hub: Hub, config, slow_steps, caplog):
    caplog.set_level(logging.INFO, "bigsae")
    saes = bigsae.train_saes(config)
    assert messages(hub) == ["initial commit", "step 10", "step 12"]
    commits = hub.repositories["user/name"].commits
    for sha, message, files in commits[1:]:
        sae, step = bigsae.load_sae("user/name", NAME, revision=sha), int(message.removeprefix("step "))
        assert sae.metadata["training_tokens"] == 64 * step
        assert torch.equal(sae.W_dec, saes[NAME].W_dec) == (step == STEPS)
        rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
        assert rows[-1]["step"] == step // 3 * 3
        card = files["README.md"].decode()
        assert "license: mit" in card and f"| {64 * rows[-1]['step']:,} |" in card
        assert not any(TOKEN.encode() in content for content in files.values())
    out = Path(config.output_dir)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert "pushed the SAEs of step 12" in caplog.text
    assert not any(TOKEN.encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_hub_that_is_away_stops_nothing(hub: Hub, config, caplog, monkeypatch):
    monkeypatch.setattr("bigsae.training.pusher.subprocess.Popen", Here)
    hub.down = True
    start = Pusher.start

    def started(self: Pusher, folder: Path, step: int) -> None:
        hub.down = step == 5
        start(self, folder, step)

    monkeypatch.setattr(Pusher, "start", started)
    saes = bigsae.train_saes(replace(config, hub=replace(config.hub, push_every=5)))
    assert messages(hub) == ["initial commit", "step 10", "step 12"]
    assert "training begins, and the SAEs are pushed when it is back" in caplog.text
    assert (
        "the SAEs of step 5 did not get to the Hub" in caplog.text and "HTTP 503, maintenance" in caplog.text
    )
    assert torch.equal(bigsae.load_sae("user/name", NAME).W_dec, saes[NAME].W_dec)
    status = json.loads((Path(config.output_dir) / "status.json").read_text())
    assert status["status"] == "finished"


def test_a_last_push_that_fails_says_how_to_make_up_for_it(hub: Hub, config, caplog, monkeypatch):
    monkeypatch.setattr("bigsae.training.pusher.subprocess.Popen", Here)
    config = replace(config, hub=replace(config.hub, push_every=0, private=True))
    start = Pusher.start

    def started(self: Pusher, folder: Path, step: int) -> None:
        hub.down = True
        start(self, folder, step)

    monkeypatch.setattr(Pusher, "start", started)
    bigsae.train_saes(config)
    assert json.loads((Path(config.output_dir) / "status.json").read_text())["status"] == "finished"
    advice = f"python -m bigsae.export {config.output_dir} --push-to-hub user/name --license mit"
    assert advice in caplog.text and caplog.text.rstrip().endswith("--private")


def test_resuming_pushes_what_is_due_after_it(hub: Hub, config, monkeypatch):
    pushed: list[tuple[str, int]] = []
    monkeypatch.setattr(Pusher, "start", lambda self, folder, step: pushed.append((folder.name, step)))
    monkeypatch.setattr(
        Pusher, "push_last", lambda self, folder, step, stop: pushed.append((folder.name, step))
    )
    hub_config = replace(config.hub, push_every=5)
    config = replace(config, hub=hub_config, checkpoint=bigsae.CheckpointConfig(every=4))

    steps = iter(range(1, STEPS))

    def interrupted(self: Pusher) -> bool:
        if next(steps) == 7:
            raise InterruptedError
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pusher, "busy", interrupted)
        with pytest.raises(InterruptedError):
            bigsae.train_saes(config)
    assert pushed == [(".pushed", 5)]
    assert not (Path(config.output_dir) / ".pushed").exists()  # closed
    bigsae.train_saes(replace(config, resume=True))
    assert pushed == [(".pushed", 5), (".pushed", 5), (".pushed", 10), ("run", 12)]


def test_what_is_due_while_a_push_goes_on_is_left_out(hub: Hub, config, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "bigsae")
    pushed: list[int] = []
    monkeypatch.setattr(Pusher, "start", lambda self, folder, step: pushed.append(step))
    monkeypatch.setattr(Pusher, "push_last", lambda self, folder, step, stop: pushed.append(step))
    monkeypatch.setattr(Pusher, "busy", lambda self: pushed == [3])
    bigsae.train_saes(replace(config, hub=replace(config.hub, push_every=3)))
    assert pushed == [3, 12]
    for step in (6, 9):
        assert f"the last push goes on: the SAEs of step {step} are left out" in caplog.text


def two_ranks(home: Path, folder: Path, endpoint: str) -> None:
    """One SAE on two ranks, each with a part of its latents."""
    config = config_of(home, folder / "run", push_every=4)
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, endpoint, folder / "hf")
        bigsae.train_saes(replace(config, mesh=bigsae.MeshConfig(latent=2), tokens=64 * 6))


def test_an_sae_on_two_ranks_is_pushed_whole(rank_server, hub: Hub, home, tmp_path):
    run_ranks(2, two_ranks, home, tmp_path, hub.endpoint)
    assert messages(hub)[-1] == "step 6"
    ours, theirs = bigsae.load_sae(tmp_path / "run", NAME), bigsae.load_sae("user/name", NAME)
    assert ours.d_sae == 64 and torch.equal(ours.W_enc, theirs.W_enc)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo_id": "name"}, "--hub.repo-id name: write it as user/name"),
        ({"repo_id": None}, r"--hub\.push-every, .* need a --hub\.repo-id"),
        ({"push_every": -1}, r"--hub\.push-every -1"),
        ({"private": True}, "--hub.repo-id user/name exists and is public"),
        ("token", "--hub.repo-id user/name needs an access token: set HF_TOKEN"),
        ("refused", "--hub.repo-id user/name: the Hub refuses .HTTP 403"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    change, message, hub: Hub, config, monkeypatch
):
    monkeypatch.setattr("bigsae.training.setup.load_lm", None)
    if change == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif change == "refused":
        hub.refuses_writes = True
    else:
        bigsae.push_saes({"a": _any_sae()}, "user/name")
        config = replace(config, hub=replace(config.hub, **change))
    with pytest.raises(UserError, match=message):
        bigsae.train_saes(config)


def _any_sae() -> Any:
    from tests.hub.saes import random_sae

    return random_sae("standard")


@pytest.fixture
def pusher(tmp_path, monkeypatch) -> Pusher:
    """Of which a push is what its step says, in Python."""
    programs = {
        "step 1": "import time; time.sleep(60)",
        "step 2": "print('https://hub/commit/1')",
        "step 3": "import sys; print('error: no luck', file=sys.stderr); sys.exit(2)",
        "step 4": "import os; assert 'RANK' not in os.environ; print(os.environ['CUDA_VISIBLE_DEVICES'] == '')",
        "step 5": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
    }
    monkeypatch.setattr(Pusher, "_command", lambda self, folder, text: [sys.executable, "-c", programs[text]])
    return Pusher(HubConfig("user/name"), tmp_path)


def over(pusher: Pusher) -> None:
    while pusher.busy():
        time.sleep(0.05)


def test_a_push_goes_on_beside_the_trainer(pusher, tmp_path, caplog):
    caplog.set_level(logging.INFO, "bigsae")
    start = time.monotonic()
    pusher.start(tmp_path, 1)
    assert pusher.busy() and time.monotonic() - start < 5
    pusher.push_last(tmp_path, 2, StopSignal())
    assert time.monotonic() - start < 30
    assert "pushed the SAEs of step 2: https://hub/commit/1" in caplog.text and "step 1" not in caplog.text
    pusher.start(tmp_path, 3)
    over(pusher)
    assert "the SAEs of step 3 did not get to the Hub (no luck); the next push tries again" in caplog.text


def test_a_push_is_no_rank(pusher, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "bigsae")
    monkeypatch.setenv("RANK", "0")
    pusher.start(tmp_path, 4)
    over(pusher)
    assert "pushed the SAEs of step 4: True" in caplog.text


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_is_told_to_stop_waits_for_no_push(pusher, tmp_path, monkeypatch, caplog, step):
    monkeypatch.setattr("bigsae.training.pusher._SECONDS_TO_END", 1.0)
    stop = StopSignal()
    stop.number = 15
    start = time.monotonic()
    pusher.push_last(tmp_path, step, stop)
    assert time.monotonic() - start < 20
    assert (
        "told to stop before the SAEs were on the Hub; push them by: python -m bigsae.export" in caplog.text
    )
    pusher.start(tmp_path, 1)
    process = pusher._process
    assert process is not None
    pusher.stop()
    assert process.poll() is not None and not Path(f"/proc/{process.pid}").exists()
