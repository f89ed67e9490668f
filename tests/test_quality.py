"""scripts/quality.py on problems of a second: both trainers, the judge, what is kept of a run, the table."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_lens")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import quality
import quality_saelens
import quality_table

import bigsae
from bigsae.config import SAEConfig
from bigsae.training.fit import fit
from tests.models import english, tiny_llama

TASK = quality.Task("tiny", 16, 32, 8, 64, 3e-3, 3, 4, {"gated": (1.0, 3.0), "standard": (1.0,)})


@pytest.fixture(scope="module")
def problem():
    return quality.synthetic_problem(TASK, 0, num_heldout=500)


def test_both_trainers_get_the_same_batches(problem, monkeypatch):
    """Also those that SAELens takes for the scale first: they are the beginning of the same stream."""
    seen: dict[str, list[torch.Tensor]] = {"theirs": [], "ours": []}
    provider = quality_saelens._Batches(lambda: problem.batches(TASK.batch_size), 3)
    seen["theirs"] = [next(provider) for _ in range(3 + TASK.num_steps)]
    monkeypatch.setattr(
        "bigsae.training.trainer.SAETrainer.train_step", lambda self, x, y: seen["ours"].append(x)
    )
    runs = quality.plan([TASK], {"tiny": [0]})
    monkeypatch.setattr("bigsae.sae.base.SAE.save", lambda self, folder: None)
    quality.train_bigsae(runs[0], problem, Path())
    assert torch.equal(torch.stack(seen["theirs"][3:]), torch.stack(seen["ours"]))
    assert torch.equal(torch.stack(seen["theirs"][:3]), torch.stack(seen["ours"][:3]))
    assert torch.equal(torch.cat(seen["ours"]), problem.train[problem.order])


def test_rates_of_both_trainers_are_the_same_but_for_the_last_steps(problem, monkeypatch):
    rates: dict[str, list[float]] = {"bigsae": [], "sae-lens": []}
    from sae_lens.training.sae_trainer import SAETrainer

    from bigsae.training import trainer

    theirs, ours = SAETrainer.step, trainer.SAETrainer.train_step

    def note_theirs(self, batch):
        rates["sae-lens"].append(self.optimizer.param_groups[0]["lr"])
        return theirs(self, batch)

    def note_ours(self, x, y=None):
        rates["bigsae"].append(self.lr())
        ours(self, x, y)

    monkeypatch.setattr(SAETrainer, "step", note_theirs)
    monkeypatch.setattr(trainer.SAETrainer, "train_step", note_ours)
    task = replace(TASK, num_steps=40)
    longer = quality.synthetic_problem(task, 0, num_heldout=10)
    for run in quality.plan([task], {"tiny": [0]})[:2]:
        quality.perform(run, longer)
    assert rates["bigsae"] == pytest.approx(rates["sae-lens"], rel=1e-6)
    assert max(rates["bigsae"]) == task.lr and rates["bigsae"][0] == task.lr / 2


def test_every_architecture_of_both_trainers_is_trained_judged_and_not_repeated(
    problem, tmp_path, monkeypatch
):
    path = tmp_path / "quality.jsonl"
    runs = quality.plan([TASK], {"tiny": [0]})
    assert len(runs) == 2 * (6 + 1)  # gated has two coefficients
    quality.perform_all(runs[:3], lambda run: problem, path)
    quality.perform_all(runs, lambda run: problem, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [json.dumps(line["run"]) for line in lines] == [run.identity for run in runs]
    for line in lines:
        scores = line["scores"]
        assert all(math.isfinite(value) for value in scores.values()) and 0 < scores["mmcs"] <= 1
        assert ("fvu_at_target" in scores) == (line["run"][1] in ("batchtopk", "matryoshka"))
    monkeypatch.setattr(quality, "perform", lambda run, problem: pytest.fail("trained again"))
    quality.perform_all(runs, lambda run: problem, path)

    made = quality_table.table(lines, "the command")
    assert "the command" in made and made.count("| bigsae |") == made.count("| sae-lens |") == 6
    with pytest.MonkeyPatch.context() as other_default:
        other_default.setitem(quality_defaults(), "pre_act_coefficient", (("jumprelu",), 7.0))
        changed = [run.identity not in quality.read_lines(path) for run in runs]
    assert changed == [run.architecture == "jumprelu" and run.trainer == "bigsae" for run in runs]


def quality_defaults():
    from bigsae import checks

    return checks._FIELDS


def test_judge(problem, tmp_path):
    """Against bigsae's own reading of the export, and a dictionary that is known."""
    sae = fit(problem.train.split(64), SAEConfig(architecture="batchtopk", d_sae=32, k=3))
    sae.save(str(tmp_path))
    scores = quality_saelens.judge(tmp_path, problem.heldout, problem.features)
    recon, num_active = bigsae.load_sae(tmp_path).reconstruct(problem.heldout)
    variance = (problem.heldout - problem.heldout.mean(0)).square().sum()
    assert scores["fvu"] == pytest.approx(
        float((problem.heldout - recon).square().sum() / variance), rel=1e-5
    )
    assert scores["l0"] == int(num_active) / 500
    assert scores["dead"] == 1 - float((sae.encode(problem.heldout) > 0).any(0).float().mean())

    quality_saelens.move_threshold(tmp_path, problem.heldout, 2.5)
    assert quality_saelens.judge(tmp_path, problem.heldout, None)["l0"] == 2.5

    sae.W_dec[:] = 2 * problem.features.roll(5, 0)
    sae.save(str(tmp_path))
    known = quality_saelens.judge(tmp_path, problem.heldout, problem.features)
    assert known["mmcs"] == pytest.approx(1, abs=1e-6) and known["mcc"] == pytest.approx(1, abs=1e-6)


def test_interpolation_and_what_counts_as_worse():
    points = [(64.0, 0.1), (16.0, 0.4), (256.0, 0.05)]
    assert quality_table.interpolate(points, 32) == (pytest.approx(0.2), True)  # FVU ~ 1 / L0 there
    assert quality_table.interpolate(points, 128) == (pytest.approx(0.1 / math.sqrt(2)), True)
    assert quality_table.interpolate(points, 8) == (pytest.approx(0.8), False)
    assert quality_table.interpolate(points, 1024) == (pytest.approx(0.025), False)

    def lines(fvu, l0=3.0, mmcs=0.9, architecture="topk"):
        run = [quality.asdict(TASK), architecture, None, 0, {}]
        other = {"machine": {"cpu": "c", "num_threads": 1}, "versions": {}, "commit": "x", "seconds": 1.0}
        mine = {"scores": {"l0": l0, "fvu": fvu, "dead": 0.0, "mmcs": mmcs}}
        base = {"scores": {"l0": 3.0, "fvu": 0.2, "dead": 0.0, "mmcs": 0.9}}
        return [
            {**other, **scores, "run": [*run[:2], trainer, *run[3:]]}
            for trainer, scores in (("bigsae", mine), ("sae-lens", base))
        ]

    assert "Nowhere" in quality_table.table(lines(0.203), "")
    assert "FVU is 1.050 times" in quality_table.table(lines(0.21), "")
    assert "MMCS is 0.8000" in quality_table.table(lines(0.2, mmcs=0.8), "")
    assert "L0 is 3.5 where 3 was" in quality_table.table(lines(0.2, l0=3.5, architecture="jumprelu"), "")
    elsewhere = quality_table.table(lines(0.21, l0=3.5), "")
    assert "(1.050)" in elsewhere and "FVU is" not in elsewhere


def test_harvest_of_a_model(tmp_path):
    """The same tokens at each hookpoint, no document both trained on and held out, positions 0 left out."""
    model = tiny_llama(tmp_path / "lm")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(english(700, seed=i))
    tasks = [
        replace(task, batch_size=100)
        for task in quality.real_tasks(["model.layers.1", "model.layers.1.mlp"], 100, 32)
    ]
    problems = quality.real_problems(str(model), str(text), tasks)
    again = quality.real_problems(str(model), str(text), tasks)
    for name, problem in problems.items():
        assert problem.train.shape == (10_000, 32) and len(problem.heldout) % (quality.CTX_LEN - 1) == 0
        assert torch.equal(problem.train, again[name].train)
        assert sorted(problem.order.tolist()) == list(range(10_000))
        nearest = torch.cdist(problem.heldout.float(), problem.train.float()).amin(1)
        assert (
            nearest == 0
        ).float().mean() < 0.02  # those at the beginnings of rows, after the same few tokens
    with pytest.raises(SystemExit, match="lower --steps"):
        quality.real_problems(str(model), str(text), [replace(tasks[0], num_steps=1000)])
