"""load_sae: from a folder and from a Hub, which SAE, which revision, and that it stays where it was told to look."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import bigsae
from bigsae.config import UserError
from bigsae.hub.formats import save_sae
from bigsae.hub.repository import HubDown
from tests.hub.hub_server import Hub, Repository
from tests.hub.saes import K, activations, assert_computes, random_sae


@pytest.fixture
def folder(tmp_path) -> Path:
    save_sae(random_sae("topk", k=K), tmp_path / "run" / "model.layers.6")
    save_sae(random_sae("gated"), tmp_path / "run" / "model.layers.6:input" / "k_5")
    return tmp_path / "run"


def put(hub: Hub, folder: Path, repo_id: str = "user/name") -> str:
    """The files of `folder` as a commit; its id."""
    repository = hub.repositories.setdefault(repo_id, Repository())
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    return repository.commit("a commit", files)


def test_from_a_folder_and_from_the_hub(hub: Hub, folder):
    put(hub, folder)
    for source in (folder, str(folder), "user/name"):
        assert_computes(bigsae.load_sae(source, "model.layers.6"), random_sae("topk", k=K), activations())
        assert bigsae.load_sae(source, "model.layers.6:input/k_5").architecture == "gated"
    assert_computes(bigsae.load_sae(folder / "model.layers.6"), random_sae("topk", k=K), activations())


def test_only_what_is_asked_for_is_downloaded_and_once(hub: Hub, folder):
    put(hub, folder)
    bigsae.load_sae("user/name", "model.layers.6")
    got = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert {Path(path).parent.name for path in got} == {"model.layers.6"}
    bigsae.load_sae("user/name", "model.layers.6")
    assert [path for method, path in hub.requests if method == "GET" and "/resolve/" in path] == got


def test_the_cache_serves_when_the_hub_does_not(hub: Hub, folder):
    put(hub, folder)
    bigsae.load_sae("user/name", "model.layers.6")
    hub.down = True
    assert_computes(bigsae.load_sae("user/name", "model.layers.6"), random_sae("topk", k=K), activations())
    with pytest.raises(HubDown, match=r"user/name: the Hub does not work now \(HTTP 503, maintenance\)"):
        bigsae.load_sae("user/name", "model.layers.6:input/k_5")


def test_revisions(hub: Hub, folder):
    first = put(hub, folder)
    save_sae(random_sae("jumprelu"), folder / "model.layers.6")
    put(hub, folder)
    assert bigsae.load_sae("user/name", "model.layers.6").architecture == "jumprelu"
    assert bigsae.load_sae("user/name", "model.layers.6", revision=first).architecture == "topk"
    with pytest.raises(UserError, match="no such revision"):
        bigsae.load_sae("user/name", "model.layers.6", revision="v9")
    with pytest.raises(UserError, match="revision 'v9' is for the Hub"):
        bigsae.load_sae(folder, "model.layers.6", revision="v9")


def test_without_a_hookpoint_where_there_is_one_sae(hub: Hub, folder):
    put(hub, folder / "model.layers.6", "user/top")
    (folder / "config.json").write_text("{}")  # the run's
    put(hub, folder)
    with pytest.raises(
        UserError, match=r"needs a hookpoint: it holds model\.layers\.6, model\.layers\.6:input/k_5"
    ):
        bigsae.load_sae("user/name")
    put(hub, folder / "model.layers.6:input", "user/one")
    assert bigsae.load_sae("user/one").architecture == "gated"
    assert bigsae.load_sae("user/top").architecture == "topk"


@pytest.mark.parametrize(
    ("source", "hookpoint", "message"),
    [
        ("user/nothing", "model.layers.6", r"no such repository, .* \(and there is no folder user/nothing here\)"),
        ("user/name", "model.layers.7", r"has no model\.layers\.7: it holds model\.layers\.6, model\.lay"),
        ("nowhere", None, "nowhere cannot be read as an SAE"),
        ("a/b/c", "model.layers.6", "cannot be read as an SAE"),
        *(
            (source, hookpoint, "is no folder below")
            for source in ("user/name", ".")
            for hookpoint in ("../model.layers.6", "a/../../b", "/etc", "", "a\\..\\b", "..")
        ),
    ],
)  # fmt: skip
def test_what_is_not_there_or_leads_elsewhere(source, hookpoint, message, hub: Hub, folder):
    put(hub, folder)
    with pytest.raises(UserError, match=message):
        bigsae.load_sae(source, hookpoint)


def test_a_link_does_not_lead_out(folder, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "linked").symlink_to(folder / "model.layers.6")
    (tmp_path / "inside" / "own").mkdir()
    (tmp_path / "inside" / "own" / "cfg.json").symlink_to(folder / "model.layers.6" / "cfg.json")
    for name in ("linked", "own"):
        with pytest.raises(UserError, match="leads out of"):
            bigsae.load_sae(tmp_path / "inside", name)
    (folder / "same").symlink_to(folder / "model.layers.6")
    assert bigsae.load_sae(folder, "same").architecture == "topk"
    assert torch.is_tensor(bigsae.load_sae(tmp_path / "inside" / "linked").W_enc)  # named outright


def test_a_private_repository_takes_the_environments_token(hub: Hub, folder, monkeypatch):
    put(hub, folder)
    hub.repositories["user/name"].private = True
    assert bigsae.load_sae("user/name", "model.layers.6").architecture == "topk"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no such repository, or none that you may see"):
        bigsae.load_sae("user/name", "model.layers.6:input/k_5")


def test_offline_the_cache_is_all_there_is(hub: Hub, folder, monkeypatch):
    put(hub, folder)
    bigsae.load_sae("user/name", "model.layers.6")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert bigsae.load_sae("user/name", "model.layers.6").architecture == "topk"
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        bigsae.load_sae("user/other", "model.layers.6")
    assert not hub.requests
