"""Checkpoints, SAEs and caches that are torn, of another kind, or from somewhere else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.cases import (
    HOOKPOINT,
    Case,
    call,
    copied,
    cut,
    holding,
    train,
    with_json,
    without,
)

Change = Callable[[Path], object]


class Harm:
    """What a pickle may do to those who load it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harm",)


# -- checkpoints -------------------------------------------------------------------------------------------------

LAST = "checkpoints/step_10"


def resumed(message: str, *changes: Change, **more: Any) -> Case:
    """A run that goes on in a copy of its folder, to which `changes` were made."""
    return train(message, copied("run", *changes), resume=True, output_dir="{tmp}/run",
                 **{"checkpoint__every": 5} | more)  # fmt: skip


def harmful_metadata(folder: Path) -> None:
    (folder / LAST / ".metadata").write_bytes(pickle.dumps(Harm()))


def state(**values: Any) -> Change:
    return with_json(f"{LAST}/state.json", **values)


def rank(**values: Any) -> Change:
    return with_json(f"{LAST}/rank_0.json", **values)


BROKEN = r"--resume: .*step_10 is broken \({}.*\): remove it to go on from the one before it"
CURSORS = r"--resume: the checkpoint's place in the data"
CHECKPOINTS: dict[str, Case] = {
    "a torn state": resumed(BROKEN.format("Unterminated"), cut(f"{LAST}/state.json", 40)),
    "an empty state": resumed(BROKEN.format("Expecting value"), holding(f"{LAST}/state.json", "")),
    "no state": resumed(BROKEN.format(r"state\.json: No such file"), without(f"{LAST}/state.json")),
    "a state of a list": resumed(BROKEN.format(r"state\.json is no JSON object"), holding(f"{LAST}/state.json", "[]")),
    "a deep state": resumed(BROKEN.format("maximum recursion"), holding(f"{LAST}/state.json", "[" * 99_999)),
    "a state without ranks": resumed(BROKEN.format(r"state\.json: option 'num_ranks' is missing"),
                                     state(num_ranks=...)),
    "a state of many ranks": resumed(BROKEN.format(r"rank_1\.json: No such file"), state(num_ranks=2**60)),
    "a state of no ranks": resumed(BROKEN.format("state.json: its ranks cannot be right"), state(num_ranks=0)),
    "a state of other SAEs": resumed(BROKEN.format("it is of other SAEs"), state(trainers={}, owners={})),
    "a state with words": resumed(BROKEN.format(r"state\.json: finished: expected bool"), state(finished="yes")),
    "no numbers of a rank": resumed(BROKEN.format(r"rank_0\.json: No such file"), without(f"{LAST}/rank_0.json")),
    "more waiting than there is": resumed(BROKEN.format("its files are too small"),
                                          rank(buffer={"num_unread": 2**60, "num_new": 0})),
    "less than nothing waiting": resumed(BROKEN.format("its counts cannot be right"),
                                         rank(buffer={"num_unread": -1, "num_new": 0})),
    "no place in the data": resumed(CURSORS + " has no cursor of shards|--seed is", rank(data={"cursors": []})),
    "no tensors": resumed(BROKEN.format(".*"), without(f"{LAST}/__0_0.distcp")),
    "torn tensors": resumed(BROKEN.format(".*"), cut(f"{LAST}/__0_0.distcp", 9000)),
    "no metadata": resumed(BROKEN.format(r"FileNotFoundError|\.metadata"), without(f"{LAST}/.metadata")),
    "torn metadata": resumed(BROKEN.format("UnpicklingError"), cut(f"{LAST}/.metadata", 300)),
    "metadata with code": resumed(BROKEN.format(r"UnpicklingError: \.metadata calls posix\.system"), harmful_metadata),
    "another configuration": resumed(r"--resume: --sae\.d-sae is 128, the run in .* has 64: give the same",
                                     sae__d_sae=128),
    "another length": resumed(r"--resume: --tokens is 1280, .*give the same --tokens, or another", tokens=1280),
    "a torn configuration": resumed(r"--output-dir: the run's .*config\.json is not JSON", cut("config.json", 99)),
    "a folder in use": train(r"--output-dir .* already holds a run: go on with --resume", copied("run"),
                             output_dir="{tmp}/run"),
    "a foreign folder": resumed(r"--output-dir: .*config\.json: unknown option 'architectures'",
                                holding("config.json", '{"architectures": ["LlamaForCausalLM"]}')),
}  # fmt: skip

# -- SAEs --------------------------------------------------------------------------------------------------------


def measured(message: str, format: str, *changes: Change) -> Case:
    """An evaluation of a copy of an SAE's folder, to which `changes` were made."""
    prepare = copied("saes", *[lambda folder, change=change: change(folder / format) for change in changes])
    return call("evaluate", f"--saes {{tmp}}/saes/{format}", r"--saes.*" + message, prepare)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        values = {name: value.clone() for name, value in load_file(folder / file).items()}
        change(values)
        save_file(values, folder / file)

    return rewrite


def header(text: str | bytes, size: int | None = None) -> Change:
    """A file of safetensors that is nothing but a header, which may say that it is longer."""
    raw = text.encode() if isinstance(text, str) else text
    return holding(WEIGHTS, struct.pack("<Q", len(raw) if size is None else size) + raw)


def pickled(value: Any) -> Change:
    return lambda folder: torch.save(value, folder / "ae.pt")


def bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * (64 << 20))


WEIGHTS, AGAIN = "sae_weights.safetensors", "save or download it again"
NAN = tensors(WEIGHTS, lambda t: t["W_dec"][3].fill_(torch.nan))
SAES: dict[str, Case] = {
    "no such folder": call("evaluate", "--saes {home}/nowhere",
                           r"--saes: .*nowhere cannot be read as an SAE.* Give the folder of one SAE"),
    "no configuration": measured("cannot be read as an SAE", "saelens", without("cfg.json")),
    "no weights": measured(r"sae_weights\.safetensors cannot be read \(No such file.*" + AGAIN, "saelens",
                           without(WEIGHTS)),
    "cut weights": measured(r"cannot be read \(.*" + AGAIN, "saelens", cut(WEIGHTS, 5000)),
    "no bytes": measured(r"cannot be read \(.*" + AGAIN, "saelens", holding(WEIGHTS, b"")),
    "a header beyond all memory": measured(r"cannot be read \(.*header too large", "saelens", header("{}", 2**60)),
    "a shape that overflows": measured(
        r"cannot be read \(", "saelens",
        header('{"W_enc": {"dtype": "F32", "shape": [4294967296, 4294967296, 9], "data_offsets": [0, 4]}}'),
    ),
    "a deep header": measured(r"cannot be read \(", "saelens", header('{"a":' * 5000)),
    "bytes beyond the file": measured(
        r"cannot be read \(", "saelens",
        header('{"W_enc": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'),
    ),
    "other shapes": measured(r"calls for W_enc \[32, 64\], it holds \[64, 32\]", "saelens",
                             tensors(WEIGHTS, lambda t: t.update(W_enc=t["W_enc"].T.contiguous()))),
    "a tensor too few": measured(r"calls for b_dec \[32\], it holds no such tensor", "saelens",
                                 tensors(WEIGHTS, lambda t: t.pop("b_dec"))),
    "a tensor too many": measured(r"does not call for \['more'\]", "saelens",
                                  tensors(WEIGHTS, lambda t: t.update(more=torch.zeros(1)))),
    "integers": measured(r"b_dec is torch\.int64, which holds no weights", "saelens",
                         tensors(WEIGHTS, lambda t: t.update(b_dec=t["b_dec"].long()))),
    "no numbers": measured(r"W_dec holds NaN: .*take an earlier checkpoint", "saelens", NAN),
    "an unknown architecture": measured("architecture 'temporal' cannot be loaded; known is topk", "saelens",
                                        with_json("cfg.json", architecture="temporal")),
    "no width": measured("d_in None must be an integer greater than 0", "saelens", with_json("cfg.json", d_in=None)),
    "an absurd width": measured("d_sae .* is beyond all that an SAE can have", "saelens",
                                with_json("cfg.json", d_sae=10**40)),
    "k beyond the latents": measured(r"k 65 exceeds the number of latents 64", "saelens", with_json("cfg.json", k=65)),
    "a configuration of a list": measured("holds no configuration of an SAE", "saelens", holding("cfg.json", "[]")),
    "a torn configuration": measured("cfg.json is not JSON", "saelens", cut("cfg.json", 50)),
    "sparsify's groups": measured("activation 'groupmax' cannot be loaded; known is topk", "sparsify",
                                  with_json("cfg.json", activation="groupmax")),
    "sparsify's products": measured("expansion_factor .* is beyond", "sparsify",
                                    with_json("cfg.json", num_latents=0, expansion_factor=10**4000)),
    "a pickle with code": measured("other things than tensors .*may be harmful", "dictionary_learning",
                                   pickled({"b_dec": Harm()})),
    "code alone": measured("other things than tensors .*may be harmful", "dictionary_learning", pickled(Harm())),
    "a pickle of no zip": measured("cannot be read", "dictionary_learning", holding("ae.pt", pickle.dumps(Harm()))),
    "a zip bomb": measured(r"67108864 bytes are not the \d+ weights that config.json calls for", "dictionary_learning",
                           bomb),
    "a torn zip": measured(r"cannot be read \(.*" + AGAIN, "dictionary_learning", cut("ae.pt", 4000)),
    "an unknown class": measured("dict_class 'Other' cannot be loaded; known is", "dictionary_learning",
                                 with_json("config.json", trainer={"dict_class": "Other"})),
    "a start that is none": train(r"--sae\.init-from: .*nowhere cannot be read as an SAE", sae__init_from="{home}/nowhere"),
    "a start with NaN": train(r"--sae\.init-from: .*W_dec holds NaN", copied("saes", lambda f: NAN(f / "saelens")),
                              sae__init_from="{tmp}/saes/saelens"),
    "a start of another width": train(r"--sae\.init-from holds an SAE of d_sae 64, not 128: set --sae\.d-sae 64",
                                      sae__init_from="{home}/saes/saelens", sae__d_sae=128),
    "a start of another kind": train(r"--sae\.init-from holds a topk SAE: set --sae\.architecture topk",
                                     sae__init_from="{home}/saes/saelens", sae__architecture="gated", sae__k=None),
    "a broken SAE to export": call("export", "{tmp}/saes/saelens --output {tmp}/out", r"calls for b_dec",
                                   copied("saes", lambda f: tensors(WEIGHTS, lambda t: t.pop("b_dec"))(f / "saelens"))),
    "a link out of the folder": call(
        "export", "{tmp}/saes --output {tmp}/out", r"leads out of .*it is not exported",
        copied("saes", lambda f: [(f / "saelens" / WEIGHTS).unlink(),
                                  (f / "saelens" / WEIGHTS).symlink_to("/etc/hostname")]),
    ),
    "a broken SAE to report": call("report", "{tmp}/run --no-contexts", r"sae_weights\.safetensors cannot be read",
                                   copied("run", cut(f"{HOOKPOINT}/{WEIGHTS}", 99))),
}  # fmt: skip

# -- caches ------------------------------------------------------------------------------------------------------


def from_cache(message: str, *changes: Change, **more: Any) -> Case:
    """A training from a copy of the cache, to which `changes` were made."""
    left_out = dict.fromkeys(("model", "dataset", "ctx_len", "lm__dtype", "lm__micro_batch_rows"))
    return train(r"--activations.*" + message, copied("cache", *changes), activations="{tmp}/cache",
                 **left_out | {"sae__d_sae": 64} | more)  # fmt: skip


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
CACHES: dict[str, Case] = {
    "no such folder": train("--activations .*nowhere: there is no such folder", model=None, dataset=None, ctx_len=None,
                            lm__dtype=None, lm__micro_batch_rows=None, activations="{home}/nowhere"),
    "no cache": from_cache("cache holds no index.json: give the folder of a finished cache", without("index.json")),
    "a torn index": from_cache(r"index\.json is not JSON .*write the cache, or download it, again",
                               cut("index.json", 200)),
    "a deep index": from_cache(r"index\.json is not JSON", holding("index.json", '{"a":' * 99_999)),
    "another version": from_cache("has version 2, this bigsae reads 1: write the cache again", index(version=2)),
    "another format": from_cache("is not the index of an activation cache: give", index(format="x")),
    "no shards": from_cache(r"num_rows is \d+, its shards hold 0", index(shards=[])),
    "a missing shard": from_cache("is missing, the cache is not whole: write or download it again", without(TOKENS)),
    "missing activations": from_cache("is missing, the cache is not whole", without(VALUES)),
    "a cut shard": from_cache(r"has 99 bytes, its index says \d+: write or download it again", cut(VALUES, 99)),
    "a path that leads out": from_cache("is no file of a cache", outside("../../secret.safetensors")),
    "a path from the root": from_cache("is no file of a cache", outside("/etc/secret.safetensors")),
    "a link that leads out": from_cache("leads out of .*a cache has all its files in its own folder", linked_out),
    "absurd rows": from_cache("has more rows than its file", shard(num_rows=2**50)),
    "an absurd width": from_cache("has more activations at .* than its file", index(hookpoints={HOOKPOINT: 2**50})),
    "absurd counts": from_cache("num_activations is .*, its shards hold", index(num_activations=2**70)),
    "an absurd row": from_cache("has more rows than its file", index(ctx_len=2**50)),
    "a hookpoint that leads out": from_cache("is no name of a hookpoint", index(hookpoints={"../x": 32})),
    "no such hookpoint": from_cache(rf"--hookpoints model\.layers\.7: there are only {HOOKPOINT}", hookpoints="model.layers.7"),
    "another model": from_cache("was made with .*: leave --model out", model="gpt2"),
    "a file that was changed": call(
        "cache_activations", "--verify {tmp}/cache", "--verify: .* its checksum differs: write the cache again",
        copied("cache", lambda f: (f / VALUES).write_bytes((f / VALUES).read_bytes()[:-1] + b"!")),
    ),
    "nothing to verify": call("cache_activations", "--verify {home}/nowhere", "--verify.*nowhere: there is no such folder"),
}  # fmt: skip
