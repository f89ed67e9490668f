"""Checkpoints that are torn, of another run, or from somewhere else."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

from tests.bad_input.cases import (
    Case,
    Change,
    Harm,
    copied,
    cut,
    holding,
    train,
    with_json,
    without,
)

LAST = "checkpoints/step_10"


def resumed(message: str, *changes: Change, **more: Any) -> Case:
    """A run that goes on in a copy of its folder, to which `changes` were made, by someone who knows of checksums."""
    options: dict[str, Any] = {"resume": True, "output_dir": "{tmp}/run", "checkpoint__every": 5} | more
    return train(message, copied("run", *changes, sealed), **options)


def sealed(folder: Path) -> None:
    """Have the marker of the newest checkpoint name what is there."""
    files = [path for path in (folder / LAST).iterdir() if path.name != "COMPLETE"]
    sums = {p.name: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}
    (folder / LAST / "COMPLETE").write_text(json.dumps({"step": 10, "files": sums}))


def harmful_metadata(folder: Path) -> None:
    (folder / LAST / ".metadata").write_bytes(pickle.dumps(Harm()))


def state(**values: Any) -> Change:
    return with_json(f"{LAST}/state.json", **values)


def rank(**values: Any) -> Change:
    return with_json(f"{LAST}/rank_0.json", **values)


BROKEN = r"--resume: .*step_10 is broken \({}.*\): remove it to go on from the one before it"
CURSORS = r"--resume: the checkpoint's place in the data"
CASES: dict[str, Case] = {
    "a torn state": resumed(BROKEN.format("Expecting value: .*"), cut(f"{LAST}/state.json", 40)),
    "an empty state": resumed(BROKEN.format("Expecting value"), holding(f"{LAST}/state.json", "")),
    "no state": resumed(BROKEN.format(r"state\.json: No such file"), without(f"{LAST}/state.json")),
    "a state of a list": resumed(
        BROKEN.format(r"state\.json is no JSON object"), holding(f"{LAST}/state.json", "[]")
    ),
    "a deep state": resumed(BROKEN.format("maximum recursion"), holding(f"{LAST}/state.json", "[" * 99_999)),
    "a state without ranks": resumed(
        BROKEN.format(r"state\.json: option 'num_ranks' is missing"), state(num_ranks=...)
    ),
    "a state of many ranks": resumed(BROKEN.format(r"rank_1\.json: No such file"), state(num_ranks=2**60)),
    "a state of no ranks": resumed(
        BROKEN.format("state.json: its ranks cannot be right"), state(num_ranks=0)
    ),
    "a state of other SAEs": resumed(BROKEN.format("it is of other SAEs"), state(trainers={}, owners={})),
    "a state with words": resumed(
        BROKEN.format(r"state\.json: finished: expected bool"), state(finished="yes")
    ),
    "no numbers of a rank": resumed(
        BROKEN.format(r"rank_0\.json: No such file"), without(f"{LAST}/rank_0.json")
    ),
    "more waiting than there is": resumed(
        BROKEN.format("its files are too small"), rank(buffer={"num_unread": 2**60, "num_new": 0})
    ),
    "less than nothing waiting": resumed(
        BROKEN.format("its counts cannot be right"), rank(buffer={"num_unread": -1, "num_new": 0})
    ),
    "no place in the data": resumed(
        CURSORS + " has no cursor of shards|--seed is", rank(data={"cursors": []})
    ),
    "no tensors": resumed(BROKEN.format(".*"), without(f"{LAST}/__0_0.distcp")),
    "torn tensors": resumed(BROKEN.format(".*"), cut(f"{LAST}/__0_0.distcp", 9000)),
    "no metadata": resumed(
        BROKEN.format(r"\.metadata: No such file or directory"), without(f"{LAST}/.metadata")
    ),
    "torn metadata": resumed(
        BROKEN.format(r"\.metadata is torn: pickle data was truncated"), cut(f"{LAST}/.metadata", 300)
    ),
    "metadata with code": resumed(
        BROKEN.format(r"\.metadata calls posix\.system, which may be harmful"), harmful_metadata
    ),
    "another configuration": resumed(
        r"--resume: --sae\.d-sae is 128, the run in .* has 64: give the same", sae__d_sae=128
    ),
    "another length": resumed(
        r"--resume: --tokens is 1280, .*give the same --tokens, or another", tokens=1280
    ),
    "a torn configuration": resumed(
        r"--output-dir: the run's .*config\.json is not JSON", cut("config.json", 99)
    ),
    "a folder in use": train(
        r"--output-dir .* already holds a run: go on with --resume", copied("run"), output_dir="{tmp}/run"
    ),
    "a foreign folder": resumed(
        r"--output-dir: .*config\.json: unknown option 'architectures'",
        holding("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
    ),
}
