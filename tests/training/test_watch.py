"""What a run makes of broken numbers, broken devices, hangs and the end of its time."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import bigsae
from bigsae.config import UserError
from bigsae.parallel.mesh import build_mesh
from bigsae.training import loop
from bigsae.training.run import Preempted
from bigsae.training.signals import StopSignal
from bigsae.training.trainer import SAETrainer
from bigsae.training.watch import Heartbeat, bit_sum, check_replicas
from tests.distributed.ranks import run_ranks
from tests.launch import metrics, write_corpus
from tests.models import tiny_llama
from tests.training.test_checkpoints import NAME, assert_as_straight, config_of


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=40)
    bigsae.train_saes(config_of(folder, folder / "straight"))
    return folder


def break_steps(monkeypatch, *steps: int) -> list[int]:
    """Have the losses of these calls of train_step (from 1) be infinite, their gradients finite. Returns the calls."""
    forward, calls = SAETrainer._mark_nonfinite, []

    def broken(self: SAETrainer, loss: torch.Tensor) -> None:
        calls.append(self.step)
        forward(self, loss * (float("inf") if len(calls) in steps else 1.0))

    monkeypatch.setattr(SAETrainer, "_mark_nonfinite", broken)
    return calls


def test_a_loss_that_is_not_finite_stops_the_run_at_the_next_log(home, tmp_path, monkeypatch):
    break_steps(monkeypatch, 8)
    config = config_of(home, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"of model\.layers\.1 was not finite in 1 .* step 8: .*--on-nonfinite skip"
    ):
        bigsae.train_saes(config)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "failed"
    # Whole, as it was before: a resume goes on from there.
    monkeypatch.undo()
    bigsae.train_saes(replace(config, resume=True))
    assert_as_straight(home, tmp_path / "run")


def test_skipped_steps_change_no_weights(home, tmp_path, monkeypatch, caplog):
    weights = []
    step = SAETrainer.train_step

    def watched(self: SAETrainer, *batch: Any) -> None:
        step(self, *batch)
        weights.append(self.sae.W_enc.detach().clone())

    monkeypatch.setattr(SAETrainer, "train_step", watched)
    break_steps(monkeypatch, 8, 14)
    bigsae.train_saes(config_of(home, tmp_path / "run", on_nonfinite="skip"))
    unchanged = [i for i in range(1, 20) if torch.equal(weights[i], weights[i - 1])]
    assert unchanged == [7, 13]
    assert [row["num_skipped_steps"] for row in metrics(tmp_path / "run")] == [0, 0, 1, 0, 1, 0, 0]
    assert caplog.text.count("they changed no weights, and the run goes on") == 2
    assert bigsae.load_sae(tmp_path / "run" / NAME).W_dec.isfinite().all()


def test_a_rollback_meets_other_data(home, tmp_path, monkeypatch, caplog):
    read, seen = bigsae.data.harvest.Harvest.read, []

    def watched(self: Any) -> Any:
        batch = read(self)
        seen.append(batch[NAME].sum().item())
        return batch

    monkeypatch.setattr(bigsae.data.harvest.Harvest, "read", watched)
    calls = break_steps(monkeypatch, 8)
    config = config_of(home, tmp_path / "run", on_nonfinite="rollback")
    bigsae.train_saes(config)
    # Found before the checkpoint of step 8 would have been written.
    assert "up to step 8: back to step 4, with the data that come next" in caplog.text
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18, 20]
    assert all(row["num_skipped_steps"] == 0 for row in rows)
    assert len(calls) == len(seen) == len(set(seen)) > 20  # nothing was met twice
    monkeypatch.undo()
    # The checkpoint of the return has the data that come next: a resume from it is the same run.
    expected = bigsae.load_sae(tmp_path / "run" / NAME).W_dec
    for step in (8, 12, 16, 20):
        (tmp_path / f"run/checkpoints/step_{step}/COMPLETE").unlink()
    bigsae.train_saes(replace(config, resume=True))
    assert torch.equal(bigsae.load_sae(tmp_path / "run" / NAME).W_dec, expected)


def test_a_run_that_is_always_broken_ends(home, tmp_path, monkeypatch):
    break_steps(monkeypatch, *range(6, 999))
    with pytest.raises(UserError, match=r"after 3 returns to step 4: lower --optim\.lr"):
        bigsae.train_saes(config_of(home, tmp_path / "run", on_nonfinite="rollback"))
    monkeypatch.undo()
    break_steps(monkeypatch, 2)
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        bigsae.train_saes(config_of(home, tmp_path / "early", on_nonfinite="rollback"))


def all_skip(home: Path, out: Path) -> list[float]:
    """Rank 1 alone has a broken loss: no rank updates."""
    step, skipped = SAETrainer.train_step, []
    mark = SAETrainer._mark_nonfinite

    def broken(self: SAETrainer, loss: torch.Tensor) -> None:
        mark(self, loss * (float("nan") if self.step == 4 and self.mesh.rank == 1 else 1.0))

    def watched(self: SAETrainer, *batch: Any) -> None:
        step(self, *batch)
        skipped.append(float(self.window.num_skipped))

    SAETrainer._mark_nonfinite, SAETrainer.train_step = broken, watched
    bigsae.train_saes(config_of(home, out, on_nonfinite="skip", log_every=100))
    return skipped


def test_all_ranks_skip_together(home, tmp_path):
    for skipped in run_ranks(2, all_skip, home, tmp_path / "run"):
        assert skipped == [0.0] * 4 + [1.0] * 16


def test_jumps_of_the_loss_are_told(home, tmp_path, monkeypatch, caplog):
    read = loop._read_metrics
    monkeypatch.setattr(loop, "_read_metrics", lambda trainer: read(trainer) | (
        {"loss": 50.0} if trainer.step == 12 else {}))  # fmt: skip
    bigsae.train_saes(config_of(home, tmp_path / "run"))
    (told,) = [r.getMessage() for r in caplog.records if "jumped" in r.getMessage()]
    assert told.startswith(f"the loss of {NAME} jumped to 50 at step 12, from about ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_bit_counts(dtype):
    values = torch.randn(37, 19, generator=torch.Generator().manual_seed(0)).to(dtype)
    size = values.element_size()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    sums = {int(bit_sum(values))}
    for place in range(0, values.numel(), 7):
        for bit in range(8 * size):
            one = -(1 << (8 * size - 1)) if bit == 8 * size - 1 else 1 << bit
            flipped = values.clone()
            flipped.view(bits).view(-1)[place] ^= one
            sums.add(int(bit_sum(flipped)))
    assert len(sums) == 1 + len(range(0, values.numel(), 7)) * 8 * size
    exchanged = values.flip(0)
    assert int(bit_sum(exchanged)) not in sums and int(bit_sum(values[:, [1, 0, *range(2, 19)]])) not in sums
    assert int(bit_sum(torch.tensor(3.0))) != int(bit_sum(torch.tensor(4.0)))


def broken_memory(home: Path, out: Path, num_latent: int, parameter: str) -> str:
    """A bit of one rank's weights flips before the second comparison."""
    step, rank = SAETrainer.train_step, build_mesh().rank

    def flipping(self: SAETrainer, *batch: Any) -> None:
        step(self, *batch)
        if self.step == 8 and rank == 1:
            self.sae.get_parameter(parameter).data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    SAETrainer.train_step = flipping
    mesh = bigsae.MeshConfig(latent=num_latent)
    try:
        bigsae.train_saes(config_of(home, out, mesh=mesh, check_replicas_every=5))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("num_latent", "parameter"), [(1, "W_enc"), (2, "b_dec")])
def test_a_flipped_bit_is_caught(home, tmp_path, num_latent, parameter):
    for message in run_ranks(2, broken_memory, home, tmp_path / "run", num_latent, parameter):
        assert f"{parameter} of {NAME} differs between the copies" in message and "after step 10" in message


def test_one_rank_has_nothing_to_compare(home):
    sae = SAETrainer(bigsae.SAEConfig(k=3, d_sae=64), bigsae.OptimConfig(), 32, 10, 0, build_mesh())
    check_replicas({"a": sae}, 5, None)


def test_a_hang_shows_where(capfd):
    heart = Heartbeat(timeout=0.3 / 60 / 0.9)
    with heart.watching():
        for _ in range(4):
            time.sleep(0.15)
            heart.beat()
        assert "test_a_hang_shows_where" not in capfd.readouterr().err
        time.sleep(0.6)
        shown = capfd.readouterr().err
    assert "Timeout" in shown and "test_a_hang_shows_where" in shown
    time.sleep(0.5)
    assert not capfd.readouterr().err  # outside nobody watches


def a_rank_that_hangs() -> None:
    time.sleep(2)


def hang(folder: Path) -> str:
    """Rank 0 hangs and rank 1 waits for it. Returns what this rank has written to its stderr."""
    shown = folder / f"{dist.get_rank()}.err"
    with shown.open("w") as file:
        os.dup2(file.fileno(), 2)
    with Heartbeat(timeout=0.5 / 60 / 0.9).watching():
        if dist.get_rank() == 0:
            a_rank_that_hangs()
        dist.barrier()
    return shown.read_text()


def test_a_hang_shows_every_rank(tmp_path):
    hanging, waiting = run_ranks(2, hang, tmp_path)
    assert "Timeout" in hanging and "a_rank_that_hangs" in hanging
    assert "Timeout" in waiting and "barrier" in waiting and "a_rank_that_hangs" not in waiting


def test_hours_that_are_up_stop_the_run_as_a_signal_does(home, tmp_path, monkeypatch):
    class Soon(StopSignal):
        """Time is up after some questions."""

        questions = 0

        @property
        def asked(self) -> bool:
            Soon.questions += 1
            return self._end is not None and Soon.questions > 12

    monkeypatch.setattr("bigsae.training.run.StopSignal", Soon)
    with pytest.raises(Preempted) as stopped:
        bigsae.train_saes(config_of(home, tmp_path / "run", max_hours=0.5))
    assert stopped.value.number is None
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["status"] == "preempted" and status["reason"] == "--max-hours 0.5"
    monkeypatch.undo()
    bigsae.train_saes(config_of(home, tmp_path / "run", resume=True))
    assert_as_straight(home, tmp_path / "run")


def test_the_clock_and_the_signals():
    assert not StopSignal().asked and not StopSignal(1.0).asked and StopSignal(0.0).asked
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with StopSignal() as stop:
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert stop.asked and stop.number == number
