"""A cache on the Hub: what is uploaded, and what of it a training downloads."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError

import bigsae
from bigsae.caching import push
from bigsae.config import UserError
from bigsae.training import cached
from tests.caching.caches import HOOKPOINTS, cache_config, cached_config, make_home
from tests.launch import metrics

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Dataset repositories as folders, with the calls that are made of huggingface_hub, and its cache of links."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []

    def create_repo(self, repository: str, **options: Any) -> None:
        if "/" not in repository:
            raise HFValidationError(f"no repository: {repository}")
        self.calls.append(("create_repo", repository, options))
        (self.folder / repository).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, repo_type: str, allow_patterns: list[str], **_: Any
    ) -> None:
        assert repo_type == "dataset"
        for path in folder_path.rglob("*"):
            name = str(path.relative_to(folder_path))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                target = self.folder / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)

    def snapshot_download(
        self, repository: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]
    ) -> str:
        """Files land in blobs/, a snapshot has links to them, as in the client's own cache."""
        assert repo_type == "dataset"
        self.calls.append(("download", repository, revision))
        if not (self.folder / repository).exists():
            raise OSError(f"no such repository: {repository}")
        root = self.folder / "cache" / f"datasets--{repository.replace('/', '--')}"
        for path in (self.folder / repository).rglob("*"):
            name = str(path.relative_to(self.folder / repository))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
                blob.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, blob)
                link = root / "snapshots" / COMMIT / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(blob)
        return str(root / "snapshots" / COMMIT)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    monkeypatch.setattr(cached, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_cache_goes_to_the_hub_and_trains_from_there(hub, tmp_path):
    home = make_home(tmp_path)
    config = cache_config(home, home / "cache", push_to_hub="someone/acts", private=True)
    bigsae.write_activations(config)
    assert hub.calls == [
        ("create_repo", "someone/acts", {"repo_type": "dataset", "private": True, "exist_ok": True})
    ]
    pushed = {str(p.relative_to(hub.folder / "someone/acts")) for p in hub.folder.rglob("*") if p.is_file()}
    local = {str(path.relative_to(home / "cache")) for path in (home / "cache").rglob("*") if path.is_file()}
    assert pushed == local - {"cache.json"}
    card = (hub.folder / "someone/acts/README.md").read_text()
    assert "--activations someone/acts --hookpoints model.layers.0.mlp:input" in card
    assert card.startswith("---\ntags:\n")

    options: dict[str, Any] = {"hookpoints": HOOKPOINTS[2:], "tokens": 1280}
    bigsae.train_saes(cached_config(home / "cache", home, tmp_path / "local", **options))
    bigsae.train_saes(cached_config("someone/acts@v1", home, tmp_path / "remote", **options))
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    # The index of that revision, and then the files of that commit.
    assert [call[2] for call in hub.calls[1:]] == ["v1", COMMIT]
    links = [str(path) for path in (hub.folder / "cache").rglob("*.safetensors")]
    assert links and not any(HOOKPOINTS[1] in link for link in links)

    hub.calls.clear()
    bigsae.write_activations(replace(config, resume=True, push_to_hub="someone/again"))
    assert (hub.folder / "someone/again/index.json").exists()


def test_links_of_a_snapshot_stay_in_its_repository(hub, tmp_path):
    home = make_home(tmp_path)
    bigsae.write_activations(cache_config(home, home / "cache", push_to_hub="someone/acts", tokens=1000))
    bigsae.open_activations("someone/acts").verify()
    snapshot = next((hub.folder / "cache").rglob("index.json")).parent
    shard = next((snapshot / "tokens").glob("*"))
    shutil.copy(shard, tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached, "snapshot_download", lambda *_, **__: str(snapshot))
        with pytest.raises(UserError, match="leads out of"):
            bigsae.open_activations("someone/acts")


def test_what_the_hub_refuses_is_a_message(hub, tmp_path):
    with pytest.raises(
        UserError, match=r"--activations no/where: there is no such folder, .*no such repository"
    ):
        bigsae.open_activations("no/where")
    home = make_home(tmp_path)
    with pytest.raises(UserError, match=r"--push-to-hub nobody: no repository: .*with --resume"):
        bigsae.write_activations(cache_config(home, home / "cache", push_to_hub="nobody", tokens=500))
    assert bigsae.open_activations(home / "cache").num_rows
