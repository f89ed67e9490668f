"""Whole reports of small runs, as the command and from Python."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bigsae
from bigsae import report
from bigsae.commands import run_command
from bigsae.config import UserError
from bigsae.reporting import latents
from tests.reporting.conftest import EVIL_TOKEN, WIDTH


def content(page: Path) -> dict[str, Any]:
    """What the page shows."""
    embedded = re.search(
        r'<script type="application/json" id="content">(.*?)</script>', page.read_text(), re.S
    )
    assert embedded
    return json.loads(embedded[1])


def make(tmp_path: Path, *runs: Path, **options: Any) -> dict[str, Any]:
    config = bigsae.ReportConfig(
        runs=tuple(map(str, runs)), output=str(tmp_path / "r.html"), **{"num_rows": 8} | options
    )
    return content(bigsae.write_report(config))


def test_a_sweep_on_two_hookpoints(home, tmp_path):
    page = make(tmp_path, home / "grid", num_latents=5, num_contexts=2, context_tokens=8)
    names = [f"{hookpoint}/k_{k}" for hookpoint in ("model.layers.0", "model.layers.1.mlp") for k in (2, 4)]
    assert [sae["label"] for sae in page["saes"]] == names
    rows = [json.loads(line) for line in (home / "grid/metrics.jsonl").read_text().splitlines()]
    for sae, name in zip(page["saes"], names, strict=True):
        own = [r for r in rows if f"{r['hookpoint']}/{r['variant']}" == name]
        heldout = [row["heldout_fvu"] for row in own if "heldout_fvu" in row]
        assert sae["curves"]["heldout_fvu"]["y"] == pytest.approx(heldout, rel=1e-4)
        assert sae["curves"]["fvu"]["y"] == pytest.approx(
            [row["fvu"] for row in own if "fvu" in row], rel=1e-4
        )
        assert sae["last"]["heldout_fvu"] == heldout[-1]
        assert sae["d_sae"] == WIDTH
        assert len(sae["latents"]) == 5
    assert [sae["k"] for sae in page["saes"]] == [2, 4, 2, 4]
    assert page["runs"][0]["status"] == "finished"


def test_activations_are_those_of_the_plain_model(home, tmp_path):
    """Every shaded token of every latent, against transformers' own forward."""
    page = make(
        tmp_path, home / "plain", latents=tuple(range(WIDTH)), num_contexts=99, context_tokens=32, num_rows=4
    )
    (sae,) = page["saes"]
    model = AutoModelForCausalLM.from_pretrained(home / "lm", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "lm")
    texts = latents.Texts(tokenizer, [])
    ids_of = {texts.text(i): i for i in range(len(tokenizer))}
    trained = bigsae.load_sae(home / "plain/model.layers.1")
    num_seen = 0
    for latent in sae["latents"]:
        for context in latent["top"]:
            ids = torch.tensor([[ids_of[page["texts"][place]] for place in context["t"]]])
            with torch.no_grad():
                x = model(ids, output_hidden_states=True).hidden_states[2]
                acts = trained.encode(x)[0, :, latent["i"]]
            acts[torch.isin(ids[0], torch.tensor(tokenizer.all_special_ids))] = 0
            acts[0] = 0
            assert context["a"] == pytest.approx(acts.tolist(), rel=6e-3, abs=1e-5)
            assert context["p"] == int(acts.argmax())
            num_seen += 1
        assert latent["fires"] == sum(a > 0 for c in latent["top"] for a in c["a"])
        peaks = [context["a"][context["p"]] for context in latent["top"]]
        assert peaks == sorted(peaks, reverse=True)
        assert latent["max"] == max(peaks, default=0)
        assert sum(latent["hist"]) == latent["fires"]
    assert num_seen > 20
    assert any(
        EVIL_TOKEN in page["texts"][place] for c in sae["latents"] for x in c["top"] for place in x["t"]
    )


def test_two_runs_are_told_apart_and_share_a_pass(home, tmp_path, monkeypatch):
    loaded = []
    load_lm = latents.load_lm
    monkeypatch.setattr(latents, "load_lm", lambda *args: loaded.append(args) or load_lm(*args))
    shutil.copytree(home / "plain", tmp_path / "again")
    page = make(tmp_path, home / "plain", tmp_path / "again", num_latents=2)
    assert [sae["label"] for sae in page["saes"]] == ["plain", "again"]
    assert page["saes"][0]["latents"] == page["saes"][1]["latents"]
    assert len(loaded) == 1


def test_without_contexts_no_model_is_needed(home, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "load_lm", None)
    shutil.copytree(home / "plain", tmp_path / "moved")
    config = json.loads((home / "plain/config.json").read_text()) | {"model": "gone", "dataset": "gone"}
    (tmp_path / "moved/config.json").write_text(json.dumps(config))
    page = make(tmp_path, tmp_path / "moved", contexts=False)
    assert "top" not in page["saes"][0]["latents"][0]
    assert "gone" in page["runs"][0]["memory"]["unknown"]
    with pytest.raises(UserError, match=r"gone.*--no-contexts"):
        make(tmp_path, tmp_path / "moved")


def test_moved_model_and_dataset_are_named(home, tmp_path):
    shutil.copytree(home / "plain", tmp_path / "moved")
    config = json.loads((home / "plain/config.json").read_text()) | {"model": "gone", "dataset": "gone"}
    (tmp_path / "moved/config.json").write_text(json.dumps(config))
    page = make(
        tmp_path,
        tmp_path / "moved",
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        num_latents=3,
    )
    assert page["saes"][0]["latents"] == make(tmp_path, home / "plain", num_latents=3)["saes"][0]["latents"]


def test_a_run_that_goes_on(home, tmp_path):
    """Its last row may be half written, and its SAEs are not there yet."""
    running = tmp_path / "running"
    running.mkdir()
    shutil.copy(home / "plain/config.json", running)
    (running / "status.json").write_text('{"status": "running", "reason": "", "step": 4, "tokens": 256}')
    lines = (home / "plain/metrics.jsonl").read_text().splitlines()
    (running / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])
    page = make(tmp_path, running)
    (sae,) = page["saes"]
    assert len(sae["curves"]["fvu"]["x"]) == 2
    assert "latents" not in sae
    assert page["runs"][0]["status"] == "running"
    (running / "metrics.jsonl").unlink()
    assert make(tmp_path, running)["saes"] == []
    (running / "metrics.jsonl").write_text(lines[0][:40] + "\n" + lines[1] + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        make(tmp_path, running)


def test_foreign_code_runs_only_by_this_commands_flag(home, tmp_path, monkeypatch, caplog):
    """A run's folder may come from anyone."""
    seen = []
    meta_model = latents.meta_model
    monkeypatch.setattr(latents, "meta_model", lambda *args: seen.append(args[1]) or meta_model(*args))
    shutil.copytree(home / "plain", tmp_path / "foreign")
    config = json.loads((home / "plain/config.json").read_text())
    kwargs = {"attn_implementation": "eager", "experts_implementation": "someone/kernels"}
    config["lm"] |= {"trust_remote_code": True, "kwargs": json.dumps(kwargs)}
    (tmp_path / "foreign/config.json").write_text(json.dumps(config))
    make(tmp_path, tmp_path / "foreign", num_latents=1)
    assert "someone/kernels of --lm.kwargs is code from the Hub: left out" in caplog.text
    with pytest.raises(UserError, match="kernels"):  # asked for, and not to be had here
        make(tmp_path, tmp_path / "foreign", num_latents=1, trust_remote_code=True)
    assert [lm.trust_remote_code for lm in seen] == [False, True]
    assert [json.loads(lm.kwargs) for lm in seen] == [{"attn_implementation": "eager"}, kwargs]
    assert "attn_implementation" not in (tmp_path / "r.html").read_text()


def changed_run(run: Path, **changes: Any) -> Path:
    """`run` with other options in its config.json."""
    config = json.loads((run / "config.json").read_text())
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_names_options_and_reasons_stay_text(home, tmp_path):
    evil, name = "</script><script>harm()</script><img src=x onerror=harm()>", "<script>harm()"
    run = Path(shutil.copytree(home / "plain", tmp_path / name))
    (run / "model.layers.1").rename(run / name)
    config = json.loads((run / "config.json").read_text()) | {"model": evil, "dataset": evil}
    config["data"]["name"] = config["sae"]["init_from"] = evil
    (run / "config.json").write_text(json.dumps(config))
    (run / "status.json").write_text(json.dumps({"status": evil, "reason": evil, "step": 1, "tokens": 64}))
    rows = (run / "metrics.jsonl").read_text().replace('"model.layers.1"', json.dumps(name))
    (run / "metrics.jsonl").write_text(rows)
    page = make(tmp_path, run, home / "plain", contexts=False)
    shown, options = page["runs"][0], dict(page["runs"][0]["options"])
    assert page["saes"][0]["name"] == shown["label"] == name
    assert {shown[key] for key in ("status", "reason", "model", "dataset")} == {evil}
    assert options["data.name"] == options["sae.init_from"] == evil
    text = (tmp_path / "r.html").read_text()
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text


def test_a_hookpoint_that_leads_out_is_refused(home, tmp_path):
    run = Path(shutil.copytree(home / "plain", tmp_path / "run"))
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) | {"hookpoint": "../../elsewhere"}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="is no folder below"):
        make(tmp_path, run, contexts=False)


def test_memory_is_the_planners(home, tmp_path):
    memory = make(tmp_path, home / "plain", contexts=False)["runs"][0]["memory"]
    parts = dict(memory["parts"])
    assert memory["ranks"] == 1 and memory["known"]
    assert parts["buffer"] == (256 + 4 * 32) * 32 * 4
    kept = AutoModelForCausalLM.from_pretrained(home / "lm", num_hidden_layers=2)
    weights = 4 * sum(parameter.numel() for parameter in kept.parameters())
    assert parts["language model"] == pytest.approx(weights, rel=0.01)
    assert parts["SAE weights"] == 4 * (2 * WIDTH * 32 + WIDTH + 32)
    shutil.copytree(home / "plain", tmp_path / "other")
    whole = changed_run(tmp_path / "other", data={"heldout_documents": 2}, eval={"ce": True})
    measured = dict(make(tmp_path, whole, contexts=False)["runs"][0]["memory"]["parts"])
    model = AutoModelForCausalLM.from_pretrained(home / "lm")
    whole_weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert measured["language model"] == pytest.approx(whole_weights, rel=0.01)
    changed_run(tmp_path / "other", data={}, eval={}, activations="a/cache")
    cached = dict(make(tmp_path, tmp_path / "other", contexts=False)["runs"][0]["memory"]["parts"])
    assert "language model" not in cached and cached["buffer"] == parts["buffer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "report nowhere: no config.json of a run there"),
        (
            ["RUN", "--latents", str(WIDTH)],
            f"--latents {WIDTH}: .*plain/model.layers.1 has latents 0 to {WIDTH - 1}",
        ),
        (["RUN", "RUN/."], "named twice"),
        (["RUN", "--num-rows", "0"], "--num-rows 0: give 1 or more"),
        (["RUN", "--device", "cuda:7"], "--device cuda:7 cannot be used"),
    ],
)
def test_mistakes_are_named(home, tmp_path, monkeypatch, capsys, arguments, message):
    arguments = [argument.replace("RUN", str(home / "plain")) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["report", *arguments, "--output", str(tmp_path / "r.html")])
    with pytest.raises(SystemExit) as ended:
        run_command(report.main)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "r.html").exists()


def test_the_command_writes_into_the_runs_folder(home, tmp_path, monkeypatch, capsys):
    shutil.copytree(home / "plain", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "run"), "--num-rows", "4", "--no-contexts"])
    report.main()
    assert capsys.readouterr().out == f"{tmp_path / 'run/report.html'}\n"
    assert content(tmp_path / "run/report.html")["saes"][0]["name"] == "model.layers.1"
