"""Caches and rows of tokens on a Hub: what is uploaded and read back, what is refused before the work, and bad days."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

import bigsae
from bigsae.config import DataConfig, UserError
from bigsae.data.origin import read_origin
from bigsae.data.tokens import TokenRows, open_dataset
from bigsae.hub.repository import HubDown
from bigsae.pretokenizing.run import pretokenize_dataset
from bigsae.training import cached
from tests.caching.caches import HOOKPOINTS, cache_config, cached_config
from tests.distributed.ranks import run_ranks
from tests.hub.environment import use_hub
from tests.hub.hub_server import TOKEN, Hub
from tests.launch import metrics, write_corpus
from tests.models import tiny_llama
from tests.pretokenizing.corpus import configured, written

NAME = "someone/data"
Make = Callable[..., object]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "home"
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl")
    return folder


def make_cache(home: Path, out: Path, **options: Any) -> object:
    return bigsae.write_activations(
        cache_config(home, out, **({"tokens": 1500, "push_to_hub": NAME} | options))
    )


def make_rows(home: Path, out: Path, **options: Any) -> object:
    values: dict[str, Any] = {"push_to_hub": NAME} | options
    return pretokenize_dataset(configured(home, out, **values))


BOTH = pytest.mark.parametrize("make", [make_cache, make_rows])


def files_of(hub: Hub, name: str = NAME) -> dict[str, bytes]:
    return hub.repositories[f"datasets/{name}"].files


def local_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_cache_goes_to_the_hub_and_trains_from_there(hub: Hub, home, tmp_path):
    cache = tmp_path / "cache"
    make_cache(home, cache, tokens=6000, private=True)
    repository = hub.repositories[f"datasets/{NAME}"]
    local = local_files(cache)
    del local["cache.json"]
    assert repository.private and repository.files == local | {".gitattributes": b""}
    # Whoever reads meanwhile finds no index of files that are not there yet.
    without = {name for name in local if "safetensors" in name}
    assert [set(files) - {".gitattributes"} for _, _, files in repository.commits] == [
        set(),
        without,
        set(local),
    ]
    card = repository.files["README.md"].decode()
    assert f"--activations {NAME} --hookpoints model.layers.0.mlp:input" in card
    assert "# Activations of `lm` (a local folder)" in card and "of `corpus.jsonl` (a local file)," in card
    assert card.startswith("---\ntags:\n") and str(home.parent) not in card and "private" not in card

    hub.requests.clear()
    sha = repository.commits[-1][0]
    options: dict[str, Any] = {"hookpoints": HOOKPOINTS[2:], "tokens": 1280}
    bigsae.train_saes(cached_config(cache, home, tmp_path / "local", **options))
    assert not hub.requests
    bigsae.train_saes(cached_config(f"{NAME}@{sha}", home, tmp_path / "remote", **options))
    assert metrics(tmp_path / "remote") == metrics(tmp_path / "local")
    downloaded = [path for _, path in hub.requests if "safetensors" in path]
    assert downloaded and not any(HOOKPOINTS[1] in path for path in downloaded)
    assert all(f"/resolve/{sha}/" in path for path in downloaded)


def test_links_of_a_snapshot_stay_in_its_repository(hub: Hub, home, tmp_path, monkeypatch):
    make_cache(home, tmp_path / "cache")
    bigsae.open_activations(NAME).verify()
    snapshot = next(Path(constants.HF_HUB_CACHE).rglob("index.json")).parent
    shard = next((snapshot / "tokens").glob("*"))
    shutil.copy(shard, tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    monkeypatch.setattr(cached, "download", lambda *_: snapshot)
    with pytest.raises(UserError, match="leads out of"):
        bigsae.open_activations(NAME)


def test_a_cache_that_is_nowhere_is_a_message(hub: Hub):
    with pytest.raises(UserError, match=r"--activations no/where: there is no such folder, .*404"):
        bigsae.open_activations("no/where")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_go_to_the_hub_and_are_read_from_there(hub: Hub, home, tmp_path, streaming):
    out = tmp_path / "out"
    make_rows(home, out)
    assert files_of(hub) == local_files(out) | {".gitattributes": b""}
    card = files_of(hub)["README.md"].decode()
    assert "`corpus.jsonl` (a local file)" in card and "`lm` (a local folder)" in card
    assert "path: data/train-*" in card and str(home.parent) not in card
    data = DataConfig(num_shards=4, epochs=1, streaming=streaming)
    rows = TokenRows(open_dataset(NAME, data), None, 16, data, 0, 0, 1)
    assert sorted(row.tolist() for row in rows) == sorted(written(out))
    assert (read_origin(NAME, data) or {})["context_size"] == 16


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"push_to_hub": "name"}, "--push-to-hub name: write it as user/name"),
    "no id either": ({"push_to_hub": "a/b/c"}, "--push-to-hub a/b/c"),
    "public": ({"push_to_hub": "someone/public", "private": True}, "someone/public exists and is public"),
    "other data": (
        {"push_to_hub": "someone/full"},
        r"someone/full holds other data \(data/x.csv\): name an empty repository",
    ),
    "of others": ({"push_to_hub": "someone/public"}, r"the Hub refuses \(HTTP 403"),
    "nobody's token": ({}, "needs an access token: set HF_TOKEN"),
    "away": ({}, r"--push-to-hub someone/data: the Hub does not work now \(HTTP 503"),
    "offline": ({}, "HF_HUB_OFFLINE is set: unset it"),
}


@BOTH
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_refused_before_the_work(
    case, make: Make, hub: Hub, home, tmp_path, monkeypatch
):
    for name in ("someone/public", "someone/full"):
        HfApi().create_repo(name, repo_type="dataset")
    hub.repositories["datasets/someone/full"].commit("theirs", {"README.md": b"", "data/x.csv": b"1"})
    hub.refuses_writes, hub.down = case == "of others", case == "away"
    if case == "nobody's token":
        monkeypatch.delenv("HF_TOKEN")
    if case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("bigsae.caching.write.load_lm", None)
    monkeypatch.setattr("bigsae.pretokenizing.run._write", None)
    options, message = REFUSED[case]
    before = [len(repository.commits) for repository in hub.repositories.values()]
    with pytest.raises(UserError, match=message):
        make(home, tmp_path / "out", **options)
    assert [len(repository.commits) for repository in hub.repositories.values()] == before
    assert not local_files(tmp_path / "out")


@BOTH
def test_what_is_wrong_here_is_found_before_the_hub_is_asked(make: Make, hub: Hub, home, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    wrong = {"dataset": str(tmp_path / "absent.jsonl")}
    for out, options in ((tmp_path / "full", {}), (tmp_path / "out", wrong)):
        with pytest.raises(UserError, match=r"--output-dir .* holds|--dataset .*absent"):
            make(home, out, **options)
    assert not hub.requests and not hub.repositories


@BOTH
def test_an_upload_that_broke_off_is_finished_by_running_again(
    make: Make, hub: Hub, home, tmp_path, monkeypatch
):
    """First no commit arrives, then that of the data alone; what had arrived is not sent again."""
    out, again = tmp_path / "out", r" \(.*out is whole: the same command with --resume uploads it\)$"
    hub.drop_commits = 1
    with pytest.raises(HubDown, match="--push-to-hub someone/data: the Hub cannot be reached.*" + again):
        make(home, out)
    assert set(files_of(hub)) == {".gitattributes"}
    uploads = hub.count("PUT", "/lfs/")
    upload = HfApi.upload_folder

    def cut_off(self: HfApi, **options: Any) -> object:
        hub.down = hub.count("POST", "/commit/main") > 1
        return upload(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", cut_off)
        with pytest.raises(HubDown, match="the Hub does not work now.*" + again):
            make(home, out, resume=True)
    data = [name for name in files_of(hub) if name.endswith((".safetensors", ".parquet"))]
    assert len(data) > 2 and set(files_of(hub)) == {".gitattributes", *data}
    hub.down = False
    make(home, out, resume=True)
    assert hub.count("PUT", "/lfs/") == uploads
    expected = local_files(out) | {".gitattributes": b""}
    expected.pop("cache.json", None)
    assert files_of(hub) == expected
    commits = len(hub.repositories[f"datasets/{NAME}"].commits)
    make(home, out, resume=True)
    assert len(hub.repositories[f"datasets/{NAME}"].commits) == commits


@BOTH
def test_finished_data_are_not_mixed_with_others_of_the_same_names(make: Make, hub: Hub, home, tmp_path):
    make(home, tmp_path / "first")
    make(home, tmp_path / "second", seed=7, push_to_hub=None)
    before = files_of(hub)
    assert len(before.keys() & local_files(tmp_path / "second").keys()) > 3
    with pytest.raises(UserError, match=r"someone/data holds other data .*name an empty repository"):
        make(home, tmp_path / "second", seed=7, resume=True)
    assert files_of(hub) == before
    make(home, tmp_path / "second", seed=7, resume=True, push_to_hub="someone/other")
    assert files_of(hub, "someone/other").keys() == before.keys()


@BOTH
def test_what_names_the_others_must_be_the_same_to_the_letter(make: Make, hub: Hub, home, tmp_path):
    """Of the other files the size is compared; this one tells of what is in them."""
    make(home, tmp_path / "out")
    files = dict(files_of(hub))
    (about,) = (name for name in files if name.endswith(".json"))
    files[about] = files[about].replace(b"0", b"1")
    hub.repositories[f"datasets/{NAME}"].commit("another", files)
    with pytest.raises(UserError, match=rf"someone/data holds other data \({about}\)"):
        make(home, tmp_path / "out", resume=True)
    assert files_of(hub) == files


def two_ranks(home: Path, folder: Path, endpoint: str) -> str:
    """What refuses a repository, and then one that takes the cache."""
    config = cache_config(home, folder / "out", tokens=1500, push_to_hub="someone/public", private=True)
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, endpoint, folder / "hf")
        try:
            bigsae.write_activations(config)
        except UserError as error:
            bigsae.write_activations(replace(config, push_to_hub=NAME))
            return str(error)
    return ""


def test_of_many_ranks_one_asks_the_hub_and_all_know(rank_server, hub: Hub, home, tmp_path, caplog):
    HfApi().create_repo("someone/public", repo_type="dataset")
    hub.requests.clear()
    with caplog.at_level(logging.WARNING):
        first, second = run_ranks(2, two_ranks, home, tmp_path, hub.endpoint)
    assert first == second and "--push-to-hub someone/public exists and is public" in first
    assert TOKEN not in first
    # Of the refused one once; of the other before the work and before the upload.
    assert hub.count("POST", "/api/repos/create") == 3
    assert {name for name in files_of(hub) if name.endswith("-0001.safetensors")}
    bigsae.open_activations(NAME).verify()
