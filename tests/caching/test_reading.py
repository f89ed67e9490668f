"""Caches that cannot be right, and what does not go together with one: a UserError, and never a file outside."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import bigsae
from bigsae.config import UserError
from bigsae.data.cache_index import read_index
from tests.caching.caches import HOOKPOINTS, cache_config, cached_config, make_home

SHARD = f"activations/{HOOKPOINTS[2]}/00001-0000.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = make_home(tmp_path_factory.mktemp("reading"))
    bigsae.write_activations(cache_config(home, home / "cache", tokens=2500))
    return home


@pytest.fixture
def cache(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "cache", tmp_path / "cache"))


def rewrite(cache: Path, **changes: Any) -> None:
    index = json.loads((cache / "index.json").read_text())
    (cache / "index.json").write_text(json.dumps(index | changes))


def shard_with(cache: Path, **changes: Any) -> None:
    """The index with its second trained shard changed."""
    shards = json.loads((cache / "index.json").read_text())["shards"]
    shards[2] |= changes
    rewrite(cache, shards=shards)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/x.safetensors", "a/../../secret.safetensors",
                                  "..\\secret.safetensors", "index.json", "tokens/\0.safetensors", ""])  # fmt: skip
def test_files_outside_of_the_folder_are_refused(cache, file):
    shutil.copy(cache / "tokens" / "00001-0000.safetensors", cache.parent / "secret.safetensors")
    size = (cache / "tokens" / "00001-0000.safetensors").stat().st_size
    shard_with(cache, tokens={"file": file, "bytes": size, "sha256": ""})
    with pytest.raises(UserError, match="is no file of a cache"):
        bigsae.open_activations(cache)


@pytest.mark.parametrize("linked", [SHARD, "tokens"])
def test_links_out_of_the_folder_are_refused(cache, tmp_path, linked):
    shutil.move(cache / linked, tmp_path / "elsewhere")
    (cache / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        bigsae.open_activations(cache)


def test_files_that_are_not_those_of_the_index(cache):
    (cache / SHARD).rename(cache / "kept")
    with pytest.raises(UserError, match="is missing, the cache is not whole"):
        bigsae.open_activations(cache)
    (cache / "kept").rename(cache / SHARD)
    whole = (cache / SHARD).read_bytes()
    (cache / SHARD).write_bytes(whole[:-8])
    with pytest.raises(UserError, match="bytes, its index says"):
        bigsae.open_activations(cache)
    for broken in (b"\xff" * len(whole), b"\0" * len(whole)):
        (cache / SHARD).write_bytes(broken)
        opened = bigsae.open_activations(cache)  # only what is read is looked at
        with pytest.raises(UserError, match="cannot be read"):
            opened(opened.as_rows(list(range(opened.num_rows))))
    other = {
        "activations": load_like(cache / "activations" / HOOKPOINTS[2] / "00000-0000.safetensors")[:, :16]
    }
    save_file({name: value.contiguous() for name, value in other.items()}, cache / SHARD)
    (cache / SHARD).write_bytes((cache / SHARD).read_bytes().ljust(len(whole), b"\0")[: len(whole)])
    opened = bigsae.open_activations(cache)
    with pytest.raises(UserError, match=r"cannot be read|does not hold activations"):
        opened(opened.as_rows(list(range(opened.num_rows))))


def load_like(path: Path) -> torch.Tensor:
    return load_file(path)["activations"].clone()


@pytest.mark.parametrize("starts", [[0, 5, 3], [1, 2, 3], [0, 40, 60], [0, -(2**63), 4]])
def test_rows_that_start_where_they_cannot(cache, starts):
    path = cache / "tokens" / "00001-0000.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors["starts"][: len(starts)] = torch.tensor(starts)
    save_file(tensors, path)
    with pytest.raises(UserError, match="where its rows start cannot be right"):
        bigsae.open_activations(cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not the index of an activation cache"),
        ({"version": 2}, "has version 2, this bigsae reads 1"),
        ({"hookpoints": {"../x": 32}}, "'../x' is no name of a hookpoint"),
        ({"hookpoints": {"x": -1}}, "the width of x is -1"),
        ({"hookpoints": {"x": 32}}, "shard 0 does not hold each hookpoint"),
        ({"num_rows": 7}, "num_rows is 7, its shards hold"),
        ({"dtype": "float16"}, "'float16' is none of bfloat16, float32"),
        ({"shards": []}, "num_rows is"),
        ({"unheard": 1}, "unknown option 'unheard'"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_itself(cache, changes, message):
    rewrite(cache, **changes)
    with pytest.raises(UserError, match=message):
        bigsae.open_activations(cache)


def test_text_that_is_no_index(cache):
    for text in ("{", "[]", "null", "[" * 100_000, '{"format": "bigsae activation cache"}', "\ud800"):
        (cache / "index.json").write_text(text, errors="surrogatepass")
        with pytest.raises(UserError):
            bigsae.open_activations(cache)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


ODD = st.sampled_from(
    [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "../..", [], {}, [[]], {"a": 1}, "x" * 5000]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_to_an_index_is_refused_or_reads(home, tmp_path, data):
    """One value replaced or dropped. What is still taken reads no other files."""
    index = json.loads((home / "cache" / "index.json").read_text())
    changed = copy.deepcopy(index)
    *path, last = data.draw(st.sampled_from(places(index)))
    parent = changed
    for key in path:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(ODD)
    else:
        del parent[last]
    (tmp_path / "index.json").write_text(json.dumps(changed))
    try:
        read = read_index(tmp_path / "index.json")
    except UserError:
        return
    for shard in read.shards:
        for file in (shard.tokens, *shard.activations.values()):
            assert ".." not in file.file and not file.file.startswith("/")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": None}, "--model is needed: give it, or --activations"),
        ({"activations": None, "model": "m"}, "--dataset is needed"),
        ({"activations": None, "model": "m", "dataset": "d"}, r"--data\.cached-order does nothing without"),
        ({"activations": "nowhere"}, "--activations nowhere: there is no such folder"),
        ({"activations": "a b"}, "--activations a b: there is no such folder"),
        ({"model": "other"}, "--model is 'other', but --activations .* was made with .*: leave --model out"),
        ({"ctx_len": 64}, "--ctx-len is 64, but --activations .* was made with 32"),
        ({"lm": bigsae.LMConfig(shard_size=2)}, r"--lm\.shard-size is 2, but"),
        ({"lm": bigsae.LMConfig(dtype="float16")}, r"--lm\.dtype is 'float16', but .* was made with 'float32'"),
        ({"data": bigsae.DataConfig(heldout_documents=9)}, r"--data\.heldout-documents is 9, but .* with 3"),
        ({"data": bigsae.DataConfig(drop_special_tokens=False)}, r"--data\.drop-special-tokens is False"),
        ({"hookpoints": ("model.layers.7",)}, r"--hookpoints model\.layers\.7: there are only model\.layers\.0\.mlp:"),
        ({"hookpoints": ("blocks.1.hook_resid_post",)}, "there are only"),
        ({"sae": bigsae.SAEConfig(output_hookpoint=HOOKPOINTS[1:2])}, r"predicted from: name another"),
        ({"sae": bigsae.SAEConfig(k=200, d_sae=128)}, r"--sae\.k 200 exceeds d_sae 128"),
        ({"batch_size_tokens": 4096, "tokens": 4096, "buffer": bigsae.BufferConfig(tokens=4096)},
         "--activations .* holds less than one batch"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_cache(home, tmp_path, options, message):
    config = cached_config(home / "cache", home, tmp_path / "run", hookpoints=HOOKPOINTS[1:2])
    with pytest.raises(UserError, match=message):
        bigsae.train_saes(replace(config, **options))


def test_patterns_name_the_caches_hookpoints(home, tmp_path):
    for patterns, expected in (
        (("model.layers.*",), ["model.layers.1"]),
        (("model.layers.{0,0}.mlp:input", "model.*.1"), ["model.layers.0.mlp:input", "model.layers.1"]),
        ((), list(HOOKPOINTS)),
    ):
        out = tmp_path / str(len(patterns))
        saes = bigsae.train_saes(cached_config(home / "cache", home, out, hookpoints=patterns, tokens=256))
        assert list(saes) == expected
