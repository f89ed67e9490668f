"""What an evaluation takes from the runs that its SAEs lie in: text, held-out documents, model."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bigsae
from bigsae.caching.read import open_activations
from bigsae.evaluation import run as evaluation
from bigsae.evaluation.language import recovered
from bigsae.evaluation.run import with_defaults
from bigsae.hub.formats import save_sae
from bigsae.hub.runs import read_rows
from tests.caching.caches import HOOKPOINTS, cache_config, cached_config, make_home
from tests.evaluation.saes import residual_sae

NAME = HOOKPOINTS[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A cache made with seed 3, and a run from it with seed 8."""
    folder = make_home(tmp_path_factory.mktemp("runs"))
    bigsae.write_activations(cache_config(folder, folder / "cache"))
    data = bigsae.DataConfig()  # the cache knows which documents are held out
    bigsae.train_saes(
        cached_config(folder / "cache", folder, folder / "run", hookpoints=(NAME,), seed=8, data=data)
    )
    return folder


def test_a_run_from_a_cache_is_measured_on_what_the_cache_kept_aside(home, monkeypatch):
    measured = []
    deal = evaluation.deal
    monkeypatch.setattr(evaluation, "deal", lambda rows, *rest: measured.append(rows) or deal(rows, *rest))
    found = bigsae.evaluate_saes(
        bigsae.EvaluateConfig(
            saes=(str(home / "run"),), rows=16, ce=False, lm=bigsae.LMConfig(dtype="float32")
        )
    )
    cache = open_activations(str(home / "cache"))
    aside = torch.stack([cache.tokens(number)[0] for number in cache.heldout_rows()[:, 0].tolist()])
    assert sorted(measured[0].tolist()) == sorted(aside.tolist())
    heldout = [row["heldout_fvu"] for row in read_rows(home / "run") if "heldout_fvu" in row]
    assert found["saes"][NAME]["fvu"] == pytest.approx(heldout[-1], rel=1e-5)


def test_another_choice_of_held_out_documents_is_refused(home, tmp_path):
    data = bigsae.DataConfig(heldout_documents=3, heldout_seed=4)
    config = cached_config(home / "cache", home, tmp_path / "run", data=data)
    with pytest.raises(
        bigsae.UserError, match=r"--data\.heldout-seed is 4, but --activations .* made with 3"
    ):
        bigsae.train_saes(config)


def copy_of_run(home: Path, out: Path, **changed: object) -> Path:
    """`home`/run, of another model or of another revision of it."""
    shutil.copytree(home / "run", out)
    values = json.loads((out / "config.json").read_text())
    lm = values["lm"] | {"revision": changed.pop("revision", None)}
    (out / "config.json").write_text(json.dumps(values | changed | {"lm": lm}))
    return out / NAME


def test_models_and_revisions_are_those_of_the_runs(home, tmp_path):
    config = bigsae.EvaluateConfig(saes=("x",))
    pinned = copy_of_run(home, tmp_path / "pinned", revision="step1000")
    found = with_defaults(config, [pinned], [{"model_name": "another/model"}])
    assert (found.model, found.lm.revision) == (str(home / "lm"), "step1000")
    own = replace(config, lm=bigsae.LMConfig(revision="main"))
    assert with_defaults(own, [pinned], [{}]).lm.revision == "main"
    for other in (home / "run" / NAME, copy_of_run(home, tmp_path / "other", model="another/model")):
        with pytest.raises(bigsae.UserError, match=r"--model: the SAEs name .*lm at step1000.*: set the"):
            with_defaults(config, [pinned, other], [{}, {}])
    save_sae(residual_sae(), tmp_path / "loose")  # in no run: it says itself what it was trained on
    text = replace(config, dataset="text")
    named = {
        "model_name": "some/model",
        "model_from_pretrained_kwargs": {"revision": "v2"},
        "context_size": 16,
    }
    found = with_defaults(text, [tmp_path / "loose"], [named])
    assert (found.model, found.lm.revision, found.ctx_len) == ("some/model", "v2", 16)
    with pytest.raises(bigsae.UserError, match=r"--model: the SAEs name .*lm at step1000, some/model at v2"):
        with_defaults(text, [pinned, tmp_path / "loose"], [{}, named])
    with pytest.raises(bigsae.UserError, match="--model: the SAEs do not name it"):
        with_defaults(text, [tmp_path / "loose"], [{}])


def test_a_revision_is_kept_with_the_sae(home, tmp_path, monkeypatch):
    from bigsae.training import setup

    config = cached_config(home / "cache", home, tmp_path / "run")
    pinned = replace(config, lm=replace(config.lm, revision="step1000"))
    assert setup._metadata(pinned, True)["model_from_pretrained_kwargs"] == {"revision": "step1000"}
    assert setup._metadata(config, True)["model_from_pretrained_kwargs"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": bigsae.DataConfig(epochs=1)}, r"--data\.epochs is of training"),
        ({"data": bigsae.DataConfig(cached_order="as_made")}, r"--data\.cached-order is of training"),
        ({"wandb": bigsae.WandbConfig(artifacts=False)}, r"--wandb\.no-artifacts is of training"),
        ({"data": bigsae.DataConfig(heldout_seed=1)}, r"--data\.heldout-seed needs"),
        ({"saes": ("nowhere",)}, "--saes: nowhere is no folder"),
    ],
)
def test_what_does_nothing_is_refused(change, message):
    with pytest.raises(bigsae.UserError, match=message):
        bigsae.evaluate_saes(replace(bigsae.EvaluateConfig(saes=("x",), model="m", dataset="text"), **change))


def test_folders_without_saes_are_named(tmp_path):
    with pytest.raises(bigsae.UserError, match=r"--saes: .*: it holds no SAE: give another"):
        bigsae.evaluate_saes(bigsae.EvaluateConfig(saes=(str(tmp_path),), model="m", dataset="text"))


def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr("bigsae.parallel.launch.find_spec", lambda name: None)
    wandb = bigsae.WandbConfig(project="p")
    with pytest.raises(bigsae.UserError, match=r"--wandb\.project: .*pip install wandb"):
        bigsae.evaluate_saes(bigsae.EvaluateConfig(saes=("x",), model="m", dataset="text", wandb=wandb))


def test_the_model_is_opened_as_the_run_did(home, tmp_path):
    values = json.loads((home / "run/config.json").read_text())
    shutil.copytree(home / "run", tmp_path / "run")
    values["lm"] |= {"kwargs": '{"subfolder": "base"}', "dtype": "float32"}
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    config = bigsae.EvaluateConfig(saes=("x",))
    lm = with_defaults(config, [tmp_path / "run" / NAME], [{}]).lm
    assert (lm.kwargs, lm.dtype) == ('{"subfolder": "base"}', "float32")
    own = replace(config, lm=bigsae.LMConfig(dtype="float16"))
    assert with_defaults(own, [tmp_path / "run" / NAME], [{}]).lm.dtype == "float16"
    # Where model and text are named, the run is not asked, which may be of another version.
    (tmp_path / "run/config.json").write_text(json.dumps(values | {"of_tomorrow": 1}))
    named = replace(config, model="m", dataset="d")
    assert with_defaults(named, [tmp_path / "run" / NAME], [{}]).lm == bigsae.LMConfig()
    with pytest.raises(bigsae.UserError, match="unknown option 'of_tomorrow'"):
        with_defaults(config, [tmp_path / "run" / NAME], [{}])


def test_what_is_no_number_is_null_in_json():
    assert recovered(2.0, 1.5, 1.0) == 0.5
    assert math.isnan(recovered(1.0, 1.0, 1.0))
    found = {"saes": {"a": {"x": recovered(1.0, 1.0, 1.0), "y": [1.0, float("inf")], "z": 2}}}
    assert evaluation.plain(found) == {"saes": {"a": {"x": None, "y": [1.0, None], "z": 2}}}
