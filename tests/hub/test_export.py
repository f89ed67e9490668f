"""Publishing SAEs on a Hub, as a whole or not at all, and what is then there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors.torch import load

import bigsae
from bigsae.config import OptimConfig, SAEConfig, TrainConfig, UserError
from bigsae.configfile import from_dict, read_config, to_dict
from bigsae.hub.export import export_run
from bigsae.hub.formats import save_sae
from bigsae.hub.options import ExportConfig
from bigsae.hub.repository import HubDown
from tests.hub.hub_server import TOKEN, Hub
from tests.hub.saes import D_IN, D_SAE, K, activations, assert_computes, random_sae
from tests.launch import ROOT, environment

NAMES = ("model.layers.2", "model.layers.10/k_5")
LEAKED = "hf_aTokenThatWasLeakedOnce"


def make_run(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A run's folder, as training leaves it: two hookpoints, of which one has a variant."""
    config = TrainConfig(
        model="some/model",
        dataset="some/text",
        hookpoints=("model.layers.2", "model.layers.10"),
        output_dir=str(folder),
        tokens=4000,
        sae=SAEConfig(k=K, d_sae=D_SAE),
        optim=OptimConfig(lr=1e-3),
    )
    rows = []
    for i, name in enumerate(names):
        sae = random_sae("topk", k=K)
        sae.metadata |= {
            "hook_name": name.split("/")[0],
            "training_tokens": 4000,
            "note": f"{LEAKED} and {TOKEN}",
        }
        save_sae(sae, folder / name, torch.linspace(0, 0.5, D_SAE))
        hookpoint, _, variant = name.partition("/")
        for step in range(1, 41):
            row = {
                "step": step,
                "tokens": 100 * step,
                "hookpoint": hookpoint,
                "fvu": (i + 1) / step,
                "l0": 5.0,
            }
            rows.append(row | ({"variant": variant} if variant else {}))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "status.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "to'
    )
    (folder / "checkpoints" / "step_1").mkdir(parents=True)
    (folder / "checkpoints" / "step_1" / "cfg.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def push(run: Path, **options: Any) -> str:
    return export_run(ExportConfig(str(run), "user/name", **options))


def test_the_repository_holds_the_run_and_opens_everywhere(hub: Hub, run):
    sae_lens = pytest.importorskip("sae_lens")
    address = push(run, license="mit")
    repository = hub.repositories["user/name"]
    assert address.endswith(repository.commits[-1][0]) and len(repository.commits) == 2
    expected = {f"{name}/{file}" for name in NAMES for file in ("cfg.json", "sae_weights.safetensors")}
    expected |= {f"{name}/sparsity.safetensors" for name in NAMES}
    expected |= {".gitattributes", "README.md", "config.json", "curves.svg", "metrics.jsonl"}
    assert set(repository.files) == expected
    for name in NAMES:
        local = bigsae.load_sae(run / name)
        assert_computes(bigsae.load_sae("user/name", name), local, activations())
        theirs, config, sparsity = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity("user/name", name)
        assert_computes(theirs, local, activations())
        assert config["metadata"]["hook_name"] == name.split("/")[0]
        torch.testing.assert_close(10**sparsity, torch.linspace(0, 0.5, D_SAE))
    snapshot = Path(snapshot_download("user/name"))
    assert_computes(
        sae_lens.SAE.load_from_disk(snapshot / NAMES[0]), bigsae.load_sae(run / NAMES[0]), activations()
    )


def test_the_card_says_what_there_is(hub: Hub, run):
    push(run, license="mit")
    files = hub.repositories["user/name"].files
    _, head, text = files["README.md"].decode().split("---\n", 2)
    values = yaml.safe_load(head)
    assert values["library_name"] == "saelens" and values["license"] == "mit"
    assert values["base_model"] == "some/model" and values["datasets"] == ["some/text"]
    assert {"sparse-autoencoder", "saelens", "bigsae"} <= set(values["tags"])
    for name in NAMES:
        assert f"| `{name}` | topk SAE, k {K} | {D_IN} x {D_SAE} | `{name.split('/')[0]}` | 4,000 |" in text
    assert "| `model.layers.2` | 0.025 | 5 |" in text and "| `model.layers.10/k_5` | 0.05 | 5 |" in text
    curve = text.split("<summary>model.layers.10/k_5</summary>")[1].split("</details>")[0]
    rows = [line.split(" | ") for line in curve.strip().splitlines()[2:]]
    assert len(rows) == 12 and rows[0][:2] == ["| 100", "2"] and rows[-1][:2] == ["| 4,000", "0.05"]
    assert "](curves.svg)" in text and files["curves.svg"].count(b"<polyline") == 2 * len(NAMES)
    assert "`--optim.lr` | 0.001" in text
    published = from_dict(TrainConfig, json.loads(files["config.json"]), "pushed")
    assert replace(read_config(run / "config.json"), output_dir="run") == published
    assert len(files["metrics.jsonl"].splitlines()) == 80


def test_the_code_on_the_card_runs(hub: Hub, run):
    pytest.importorskip("sae_lens")
    push(run)
    blocks = re.findall(
        r"```python\n(.*?)```", hub.repositories["user/name"].files["README.md"].decode(), re.DOTALL
    )
    assert len(blocks) == 2
    x, outputs = activations(), []
    for block in blocks:
        room = {"x": x}
        exec(block, room)
        outputs.append(room["sae"](x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-3)


def test_no_token_is_published_or_said(hub: Hub, run, capfd, caplog, monkeypatch):
    """Neither in the card nor in a configuration: not the one in use, nor one that got into the run."""
    config = json.loads((run / "config.json").read_text())
    password = "never-to-be-seen"
    proxies = {"https": f"http://me:{password}@proxy:3128"}
    config["lm"]["kwargs"] = json.dumps({"token": TOKEN, "proxies": proxies})
    config["sweep"] = [LEAKED]
    config["data"]["name"] = key = "0123456789abcdef0123"
    monkeypatch.setenv("WANDB_API_KEY", key)
    (run / "config.json").write_text(json.dumps(config))
    push(run)
    hub.refuses_writes = True
    with pytest.raises(UserError) as refused:
        push(run)
    said = str(refused.value) + caplog.text + "".join(capfd.readouterr())
    files = hub.repositories["user/name"].files
    for secret in (TOKEN, LEAKED, key, password):
        assert secret not in said
        for name, content in files.items():
            assert secret.encode() not in content, name
    assert b"[removed] and [removed]" in files["model.layers.2/cfg.json"]
    assert b"proxy:3128" not in files["config.json"]


def test_a_folder_instead_of_the_hub(run, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    out = tmp_path / "out"
    assert export_run(ExportConfig(str(run), output=str(out))) == str(out)
    for name in NAMES:
        assert_computes(sae_lens.SAE.load_from_disk(out / name), bigsae.load_sae(out, name), activations())
    assert "load_from_disk" in (out / "README.md").read_text()
    with pytest.raises(UserError, match=r"--output .*out is there and not empty"):
        export_run(ExportConfig(str(run), output=str(out)))
    with pytest.raises(UserError, match=r"set --push-to-hub user/name, or --output"):
        export_run(ExportConfig(str(run)))


@pytest.mark.parametrize("format", ["sparsify", "dictionary_learning"])
def test_another_format_takes_the_place_of_the_first(hub: Hub, run, format):
    push(run)
    push(run, format=format)
    files, weights = (
        hub.repositories["user/name"].files,
        {"sparsify": "sae.safetensors", "dictionary_learning": "ae.pt"},
    )
    config = "cfg.json" if format == "sparsify" else "config.json"
    in_folder = {name.rpartition("/")[2] for name in files if name.startswith(NAMES[0])}
    assert in_folder == {config, weights[format]} | ({"sparsity.safetensors"})
    for name in NAMES:
        assert_computes(bigsae.load_sae("user/name", name), bigsae.load_sae(run / name), activations())
    assert "library_name: saelens" not in files["README.md"].decode()
    assert "sae_lens" not in files["README.md"].decode()


def test_one_saes_folder_and_what_other_libraries_wrote(hub: Hub, run, tmp_path):
    """Any folder that is read can be exported; it then has its own name."""
    save_sae(random_sae("gated"), tmp_path / "theirs" / "ae", format="dictionary_learning")
    push(tmp_path / "theirs" / "ae", base_model="other/model")
    files = hub.repositories["user/name"].files
    assert {name for name in files if "/" in name} == {"ae/cfg.json", "ae/sae_weights.safetensors"}
    assert json.loads(files["ae/cfg.json"])["metadata"]["model_name"] == "other/model"
    assert_computes(bigsae.load_sae("user/name"), random_sae("gated"), activations())


def test_a_card_tells_no_paths(hub: Hub, run, tmp_path):
    """Of what lies on this machine the last part, and whether it is a file."""
    (tmp_path / "private" / "lm").mkdir(parents=True)
    (tmp_path / "private" / "corpus.jsonl").touch()
    config = json.loads((run / "config.json").read_text())
    config |= {
        "model": str(tmp_path / "private" / "lm"),
        "dataset": str(tmp_path / "private" / "corpus.jsonl"),
    }
    (run / "config.json").write_text(json.dumps(config))
    push(run)
    card = hub.repositories["user/name"].files["README.md"].decode()
    assert "activations of `lm` (a local folder), trained on `corpus.jsonl` (a local file)" in card
    assert "private" not in card and "base_model" not in card and "datasets" not in card


def test_a_config_json_of_others_is_no_runs(hub: Hub, tmp_path):
    """sparsify keeps its own beside its SAEs."""
    save_sae(random_sae("topk", k=K), tmp_path / "theirs" / "layers.3", format="sparsify")
    (tmp_path / "theirs" / "config.json").write_text('{"sae": {}, "loss_fn": "fvu"}')
    (tmp_path / "theirs" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    push(tmp_path / "theirs")
    files = hub.repositories["user/name"].files
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "layers.3/cfg.json",
        "layers.3/sae_weights.safetensors",
    }


def test_a_broken_sparsity_file_is_named(run, tmp_path):
    (run / NAMES[0] / "sparsity.safetensors").write_bytes(b"cut of")
    with pytest.raises(UserError, match=r"model\.layers\.2/sparsity\.safetensors cannot be read"):
        export_run(ExportConfig(str(run), output=str(tmp_path / "out")))


def test_from_python(hub: Hub):
    saes = {"model.layers.6": random_sae("topk", k=K), "late/one": random_sae("jumprelu")}
    bigsae.push_saes(saes, "user/name", private=True, license="mit")
    assert hub.repositories["user/name"].private
    for name, sae in saes.items():
        assert_computes(bigsae.load_sae("user/name", name), sae, activations())
        assert "training_tokens" not in sae.metadata
    for name in ("../up", "/abs", "a/../../b", ""):
        with pytest.raises(UserError, match="no folder below"):
            bigsae.push_saes({name: saes["late/one"]}, "user/name")
    with pytest.raises(UserError, match="no SAE"):
        bigsae.push_saes({}, "user/name")


def test_the_command(hub: Hub, run):
    command = [sys.executable, "-m", "bigsae.export", str(run), "--push-to-hub", "user/name", "--private"]
    env = environment() | {"HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["user/name"]
    assert done.stdout.strip().endswith(repository.commits[-1][0])
    assert repository.private and "model.layers.2/cfg.json" in repository.files


def test_a_cut_off_upload_is_taken_up_again(hub: Hub, run):
    """The connection ends in the middle of a file: the same call goes on, and one commit has it all."""
    hub.drops = 2
    push(run)
    assert hub.drops == 0
    assert len(hub.repositories["user/name"].commits) == 2
    assert_computes(bigsae.load_sae("user/name", NAMES[0]), bigsae.load_sae(run / NAMES[0]), activations())


def test_an_upload_that_fails_leaves_nothing_to_see_and_is_not_begun_anew(hub: Hub, run):
    """Nothing is visible before the commit, and what had arrived is not sent again."""
    push(run)
    before = dict(hub.repositories["user/name"].files)
    for name in NAMES:  # other weights
        sae = bigsae.load_sae(run / name)
        with torch.no_grad():
            sae.W_dec.mul_(2 if name == NAMES[0] else 3)
        save_sae(sae, run / name)
    hub.drop_commits = 1
    with pytest.raises(HubDown, match=r"--push-to-hub user/name: .*cannot be reached"):
        push(run)
    assert hub.repositories["user/name"].files == before
    assert_computes(bigsae.load_sae("user/name", NAMES[0]), random_sae("topk", k=K), activations())
    uploads = hub.count("PUT", "/lfs/")
    push(run)
    assert hub.count("PUT", "/lfs/") == uploads  # the files were there, only the commit was not
    assert load(hub.repositories["user/name"].files[f"{NAMES[0]}/sae_weights.safetensors"])["W_dec"].equal(
        bigsae.load_sae(run / NAMES[0]).W_dec
    )
    hub.drops = 10**6
    with torch.no_grad():
        sae = bigsae.load_sae(run / NAMES[0])
        sae.W_dec.mul_(5)
    save_sae(sae, run / NAMES[0])
    before = dict(hub.repositories["user/name"].files)
    with pytest.raises(HubDown, match=r"cut off .*try again"):
        push(run)
    assert hub.repositories["user/name"].files == before
    hub.down, hub.drops = True, 0
    with pytest.raises(HubDown, match=r"does not work now \(HTTP 503"):
        push(run)
    assert hub.repositories["user/name"].files == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"push_to_hub": "name"}, "write it as user/name"),
        ({"push_to_hub": "a/b/c"}, "--push-to-hub a/b/c"),
        ({"push_to_hub": "user/na me"}, "--push-to-hub user/na me"),
        ({"private": True}, "exists and is public"),
        ({"license": "no-such"}, "Invalid metadata in README.md. - license"),
        ({"push_to_hub": "others/name"}, "--push-to-hub others/name: the Hub refuses (HTTP 403"),
        ({"format": "dictionary_learning", "run": "transcoder"}, "no transcoders"),
        ({"format": "saelens", "run": "transcoder"}, 'save it with format="sparsify"'),
        ({"run": "nowhere"}, "nowhere is no folder"),
        ({"run": "empty"}, "holds no SAE yet"),
        ({"run": "linked"}, "leads out of"),
    ],
)
def test_refusals(change, message, hub: Hub, run, tmp_path):
    bigsae.push_saes({"a": random_sae("standard")}, "user/name")
    hub.repositories["others/name"] = hub.repositories["user/name"]
    hub.refuses_writes = change.get("push_to_hub") == "others/name"
    save_sae(random_sae("topk", k=K, d_out=D_IN), tmp_path / "transcoder" / "a")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "linked" / "a").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "linked" / "a" / "cfg.json").symlink_to(tmp_path / "secret")
    options = {"run": str(run), "push_to_hub": "user/name"} | change
    if "run" in change:
        options["run"] = str(tmp_path / change["run"])
    before = len(hub.repositories["user/name"].commits)
    with pytest.raises(UserError, match=re.escape(message)):
        export_run(ExportConfig(**options))
    assert len(hub.repositories["user/name"].commits) == before


def test_without_a_token_nothing_is_asked(hub: Hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="needs an access token: set HF_TOKEN"):
        push(run)
    assert not hub.requests


def test_a_published_configuration_is_for_others(hub: Hub, run):
    """It says neither where its author logs and publishes, nor how this machine reaches the Hub."""
    config = json.loads((run / "config.json").read_text())
    kwargs = {"proxies": {"https": "me:secret@proxy:1"}, "subfolder": "base"}
    config |= {
        "hub": config["hub"] | {"repo_id": "user/name", "push_every": 5},
        "log_with": ["wandb"],
        "resume": True,
    }
    config["lm"]["kwargs"] = json.dumps(kwargs)
    (run / "config.json").write_text(json.dumps(config))
    push(run)
    published = json.loads(hub.repositories["user/name"].files["config.json"])
    assert (published["hub"]["repo_id"], published["log_with"], published["resume"]) == (None, [], False)
    assert json.loads(published["lm"]["kwargs"]) == {"subfolder": "base"}
    assert published["output_dir"] == Path(config["output_dir"]).name
    assert published["sae"] == config["sae"]


def test_what_is_told_of_an_earlier_run_goes(hub: Hub, run):
    push(run)
    bigsae.push_saes({"layers.9": random_sae("topk", k=K)}, "user/name")
    files = hub.repositories["user/name"].files
    assert not {"config.json", "metrics.jsonl", "curves.svg"} & set(files)
    assert "layers.9/cfg.json" in files and f"{NAMES[0]}/cfg.json" in files


def test_an_export_does_not_go_among_what_it_exports(run):
    with pytest.raises(UserError, match=r"--output .* lies in .*: give a folder beside it"):
        export_run(ExportConfig(str(run), output=str(run / "sparsify")))


def test_a_card_does_not_call_others_work_its_own(tmp_path):
    sae = random_sae("topk", k=K)
    sae.metadata = {}
    save_sae(sae, tmp_path / "theirs" / "layers.3", format="sparsify")
    export_run(ExportConfig(str(tmp_path / "theirs"), output=str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Sparse autoencoders. Written by bigsae." in card and "trained" not in card.split("|")[0]
    assert "``" not in card.replace("```", "") and str(tmp_path) not in card
