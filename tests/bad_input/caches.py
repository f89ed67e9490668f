"""Caches of activations that are torn, contradict themselves, or lead elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.bad_input.cases import (
    HOOKPOINT,
    Case,
    Change,
    call,
    copied,
    cut,
    holding,
    train,
    with_json,
    without,
)


def from_cache(message: str, *changes: Change, **more: Any) -> Case:
    """A training from a copy of the cache, to which `changes` were made."""
    options: dict[str, Any] = dict.fromkeys(
        ("model", "dataset", "ctx_len", "lm__dtype", "lm__micro_batch_rows")
    )
    message = message if message.startswith("--") else "--activations.*" + message
    options |= {"activations": "{tmp}/cache"} | more
    return train(message, copied("cache", *changes), **options)


def shard(**values: Any) -> Change:
    """`values` in the index's entry of a shard that is trained on."""

    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        index["shards"][-1] |= values
        (folder / "index.json").write_text(json.dumps(index))

    return change


def index(**values: Any) -> Change:
    return with_json("index.json", **values)


def linked_out(folder: Path) -> None:
    shutil.move(folder / "tokens", folder.parent / "elsewhere")
    (folder / "tokens").symlink_to(folder.parent / "elsewhere")


def outside(file: str) -> Change:
    return shard(tokens={"file": file, "bytes": 1 << 20, "sha256": ""})


TOKENS, VALUES = "tokens/00000-0000.safetensors", f"activations/{HOOKPOINT}/00000-0000.safetensors"
CASES: dict[str, Case] = {
    "no such folder": train(
        "--activations .*nowhere: there is no such folder",
        model=None,
        dataset=None,
        ctx_len=None,
        lm__dtype=None,
        lm__micro_batch_rows=None,
        activations="{home}/nowhere",
    ),
    "no cache": from_cache(
        "cache holds no index.json: give the folder of a finished cache", without("index.json")
    ),
    "a torn index": from_cache(
        r"index\.json is not JSON .*write the cache, or download it, again", cut("index.json", 200)
    ),
    "a deep index": from_cache(r"index\.json is not JSON", holding("index.json", '{"a":' * 99_999)),
    "another version": from_cache(
        "has version 2, this bigsae reads 1: write the cache again", index(version=2)
    ),
    "another format": from_cache("is not the index of an activation cache: give", index(format="x")),
    "no shards": from_cache(r"num_rows is \d+, its shards hold 0", index(shards=[])),
    "a missing shard": from_cache(
        "is missing, the cache is not whole: write or download it again", without(TOKENS)
    ),
    "missing activations": from_cache("is missing, the cache is not whole", without(VALUES)),
    "a cut shard": from_cache(
        r"has 99 bytes, its index says \d+: write or download it again", cut(VALUES, 99)
    ),
    "a path that leads out": from_cache("is no file of a cache", outside("../../secret.safetensors")),
    "a path from the root": from_cache("is no file of a cache", outside("/etc/secret.safetensors")),
    "a link that leads out": from_cache(
        "leads out of .*a cache has all its files in its own folder", linked_out
    ),
    "absurd rows": from_cache("has more rows than its file", shard(num_rows=2**50)),
    "an absurd width": from_cache(
        "has more activations at .* than its file", index(hookpoints={HOOKPOINT: 2**50})
    ),
    "absurd counts": from_cache("num_activations is .*, its shards hold", index(num_activations=2**70)),
    "an absurd row": from_cache("has more rows than its file", index(ctx_len=2**50)),
    "a hookpoint that leads out": from_cache("is no name of a hookpoint", index(hookpoints={"../x": 32})),
    "no such hookpoint": from_cache(
        rf"--hookpoints model\.layers\.7: there are only {HOOKPOINT}", hookpoints="model.layers.7"
    ),
    "another model": from_cache("was made with .*: leave --model out", model="gpt2"),
    "a file that was changed": call(
        "cache_activations",
        "--verify {tmp}/cache",
        "--verify: .* its checksum differs: write the cache again",
        copied("cache", lambda f: (f / VALUES).write_bytes((f / VALUES).read_bytes()[:-1] + b"!")),
    ),
    "nothing to verify": call(
        "cache_activations", "--verify {home}/nowhere", "--verify: .*nowhere: there is no such folder"
    ),
}
