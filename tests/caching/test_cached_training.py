"""Training from a cache: the same SAE as on the fly, no language model, resumed, elastic."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bigsae
from bigsae.configfile import read_config
from bigsae.training import setup
from tests.caching.caches import HOOKPOINTS, LM, cache_config, cached_config, make_home, run_config
from tests.caching.test_write import killed_after
from tests.distributed import test_elastic as elastic
from tests.distributed.ranks import run_ranks
from tests.launch import metrics


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = make_home(tmp_path_factory.mktemp("cached"))
    bigsae.write_activations(cache_config(home, home / "cache"))
    return home


@pytest.fixture(autouse=True)
def _no_language_model(monkeypatch):
    """A training from a cache that asks for one fails."""
    plain = setup.load_lm

    def load(model: str, *arguments: Any, **options: Any) -> Any:
        assert model, "the language model is loaded"
        return plain(model, *arguments, **options)

    monkeypatch.setattr(setup, "load_lm", load)


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights, logged numbers and what was measured on the rows kept aside: bit for bit."""
    assert metrics(ours) == metrics(theirs)
    assert any("heldout_fvu" in row for row in metrics(ours))
    names = [str(path.relative_to(theirs)) for path in theirs.rglob("*.safetensors")]
    assert names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_the_same_sae_as_on_the_fly(home, tmp_path, monkeypatch):
    bigsae.train_saes(run_config(home, tmp_path / "fly"))
    for room in ("load_lm", "meta_model", "download_lm"):
        monkeypatch.delattr(setup, room)
    bigsae.train_saes(cached_config(home / "cache", home, tmp_path / "cached"))
    assert_same(tmp_path / "cached", tmp_path / "fly")


def test_the_same_transcoder_in_bfloat16(home, tmp_path):
    lm = replace(LM, dtype="bfloat16")
    sae = bigsae.SAEConfig(architecture="batchtopk", k=4, d_sae=96, output_hookpoint=(HOOKPOINTS[1],))
    options: dict[str, Any] = {
        "hookpoints": (HOOKPOINTS[0],),
        "sae": sae,
        "buffer": bigsae.BufferConfig(tokens=512),
        "lm": lm,
    }
    cache = cache_config(home, tmp_path / "cache", hookpoints=HOOKPOINTS[:2], dtype="bfloat16", lm=lm)
    bigsae.write_activations(cache)
    bigsae.train_saes(run_config(home, tmp_path / "fly", **options))
    del options["lm"]
    bigsae.train_saes(cached_config(tmp_path / "cache", home, tmp_path / "cached", **options))
    assert_same(tmp_path / "cached", tmp_path / "fly")


def test_a_shuffled_run_reads_back_resumes_and_moves(home, tmp_path):
    """From its own config.json, from the middle, and from a copy of the cache: bit for bit."""
    checkpoint = bigsae.CheckpointConfig(every=10, keep=0)
    data = bigsae.DataConfig()
    straight = cached_config(home / "cache", home, tmp_path / "straight", data=data, checkpoint=checkpoint)
    bigsae.train_saes(straight)
    written = read_config(tmp_path / "straight" / "config.json")
    assert (written.model, written.ctx_len) == (str(home / "lm"), 32)
    bigsae.train_saes(replace(written, output_dir=str(tmp_path / "again")))
    assert_same(tmp_path / "again", tmp_path / "straight")
    for step in (20, 30):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step_{step}")
    shutil.copytree(home / "cache", tmp_path / "moved")
    moved = replace(
        straight, output_dir=str(tmp_path / "again"), activations=str(tmp_path / "moved"), resume=True
    )
    bigsae.train_saes(moved)
    assert_same(tmp_path / "again", tmp_path / "straight")
    other = cached_config(home / "cache", home, tmp_path / "made", checkpoint=checkpoint)
    bigsae.train_saes(other)
    assert metrics(tmp_path / "made") != metrics(tmp_path / "straight")


def test_a_run_does_not_go_on_with_another_cache(home, tmp_path):
    config = cached_config(
        home / "cache", home, tmp_path / "run", checkpoint=bigsae.CheckpointConfig(every=10, keep=0)
    )
    bigsae.train_saes(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_30")
    bigsae.write_activations(cache_config(home, tmp_path / "other", tokens=5000))
    with pytest.raises(bigsae.UserError, match=r"--activations \(its index\) is .* in the checkpoint"):
        bigsae.train_saes(replace(config, activations=str(tmp_path / "other"), resume=True))


@pytest.fixture(scope="module")
def tokens_apart(tmp_path_factory) -> Path:
    """A cache of activations that tell tokens apart, every token once."""
    folder = tmp_path_factory.mktemp("apart")
    elastic.make_home(folder)
    bigsae.write_activations(apart_cache(folder, folder / "cache"))
    return folder


def apart_cache(folder: Path, out: Path) -> bigsae.CacheConfig:
    config = elastic.config(folder, folder / "run")
    return bigsae.CacheConfig(
        model=config.model, dataset=config.dataset, hookpoints=config.hookpoints, output_dir=str(out), tokens=10**5,
        ctx_len=config.ctx_len, dtype="float32", shard_tokens=256, lm=config.lm, data=config.data,
    )  # fmt: skip


def apart(folder: Path, out: Path) -> bigsae.TrainConfig:
    config = elastic.config(folder, out)
    data = bigsae.DataConfig(num_shards=8, epochs=1)
    return replace(config, data=data, activations=str(folder / "cache"))


def train_apart(config: bigsae.TrainConfig) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic, "rest", rest)
        return elastic.train(config)


def rest(run: Any) -> list[torch.Tensor]:
    """Tokens of the rows that this rank has not read."""
    return [
        torch.empty(0, dtype=torch.int64),
        *(run.harvest.extract.tokens(int(row[0]))[0] for row in run.rows),
    ]


def on_two_ranks(home: Path, folder: Path, goes_on: bigsae.TrainConfig) -> dict[str, Any]:
    """Both ways with a sharded model; a run and a cache that one rank has begun."""
    begun = apart_cache(Path(goes_on.dataset).parent, folder / "begun")
    bigsae.write_activations(replace(begun, resume=True))
    lm = replace(LM, shard_size=2)
    bigsae.write_activations(cache_config(home, folder / "cache", lm=lm))
    bigsae.train_saes(run_config(home, folder / "fly", lm=lm))
    bigsae.train_saes(cached_config(folder / "cache", home, folder / "cached"))
    return train_apart(goes_on)


@pytest.fixture(scope="module")
def straight(tokens_apart) -> dict[str, Any]:
    """One epoch on one rank."""
    return train_apart(apart(tokens_apart, tokens_apart / "straight"))


@pytest.fixture(scope="module")
def two_ranks(home, tokens_apart, straight, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    out = elastic.cut(tokens_apart / "straight", folder / "goes_on")
    with pytest.MonkeyPatch.context() as patch:
        killed_after(apart_cache(tokens_apart, folder / "begun"), 11, patch)
    goes_on = replace(apart(tokens_apart, out), dataset=str(tokens_apart / "ids"), resume=True)
    return folder, run_ranks(2, on_two_ranks, home, folder, goes_on)


def test_every_activation_once_an_epoch(straight):
    assert Counter(straight["seen"] + straight["waiting"]) == Counter(range(elastic.VOCABULARY))
    first = straight["seen"][: 2 * elastic.BATCH]
    in_turn = sum(abs(a - b) == 1 for a, b in itertools.pairwise(first))
    assert in_turn < 10
    rows = {token // elastic.CTX_LEN for token in first}
    assert max(rows) - min(rows) > 200  # of 256: from everywhere in the cache


def test_a_run_goes_on_on_other_ranks(straight, two_ranks):
    before = straight["seen"][: elastic.CUT * elastic.BATCH]
    after = elastic.ids_of(two_ranks[1], "seen") + elastic.ids_of(two_ranks[1], "waiting")
    assert Counter(before + after) == Counter(range(elastic.VOCABULARY))


def test_the_same_sae_as_on_the_fly_on_two_ranks(two_ranks):
    assert_same(two_ranks[0] / "cached", two_ranks[0] / "fly")


def test_a_cache_goes_on_on_other_ranks(two_ranks):
    """Three shards of one rank, then of two: every token once."""
    cache = bigsae.open_activations(two_ranks[0] / "begun")
    lanes = [(shard.place, shard.lane) for shard in cache.index.shards]
    assert lanes[:7] == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
    ids = [token for number in range(cache.num_rows) for token in cache.tokens(number)[0].tolist()]
    assert sorted(ids) == list(range(elastic.VOCABULARY))
