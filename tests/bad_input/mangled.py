"""Mangles files and has them read, under a limit of memory: `python -m tests.bad_input.mangled folder`.

Prints, for what was mangled, how often it was read all the same and how often refused. Anything but a UserError ends
it with a traceback.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bigsae
from bigsae.config import TrainConfig, UserError
from bigsae.configfile import from_dict, read_config, read_flags
from bigsae.hub.formats import read_sae
from bigsae.training import checkpoint
from tests.bad_input.caches import TOKENS, VALUES
from tests.bad_input.checkpoints import LAST, sealed
from tests.bad_input.saes import WEIGHTS

# More than a whole test run has any use for beyond what it had before, and less than the numbers below ask for.
ROOM_BYTES = 1 << 30
_LONGEST = 600
ODD = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**40, 2**63, 2**64, 10**40, 1.5, 1e308, float("inf"), float("nan"), "",
    "x" * 5000, "../..", "\0", "\ud800", [], {}, [[]], {"a": {"b": 1}}, [1] * 50,
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within `value`."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def odd_json(text: str, chance: random.Random) -> str:
    """JSON with one or two values replaced, dropped, doubled or deeply nested; or cut, or with other characters."""
    values = json.loads(text)
    kind = chance.randrange(10)
    if kind == 0:
        return text[: chance.randrange(len(text))]
    if kind == 1:
        at = chance.randrange(len(text))
        return text[:at] + chance.choice('{}[]",:0-eN\\\0é') + text[at + 1 :]
    if kind == 2:
        return chance.choice(
            ["[" * 99_999, '{"a":' * 99_999, "9" * 5000, "null", "[]", "NaN", "", "\ufeff{}"]
        )
    if kind == 3:
        name = chance.choice(list(values))
        return "{" + f"{json.dumps(name)}: {json.dumps(chance.choice(ODD))}, " + text.lstrip()[1:]
    for _ in range(chance.randint(1, 2)):
        if not (found := list(places(values))):
            break
        *path, last = chance.choice(found)
        parent = values
        for key in path:
            parent = parent[key]
        if kind == 4:
            del parent[last]
        elif kind == 5 and isinstance(parent, dict):
            parent[chance.choice(["", "x" * 300, "../x", "model"])] = parent.pop(last)
        else:
            parent[last] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(values)


def odd_safetensors(whole: bytes, chance: random.Random) -> bytes:
    """A file of safetensors whose header, length or bytes were changed."""
    (size,) = struct.unpack("<Q", whole[:8])
    head, body = whole[8 : 8 + size], whole[8 + size :]
    kind = chance.randrange(5)
    if kind == 0:
        return whole[: chance.randrange(len(whole))]
    if kind == 1:
        return (
            struct.pack("<Q", chance.choice([0, 1, 2**31, 2**60, 2**64 - 1, size + 1, size - 1])) + whole[8:]
        )
    if kind == 2:
        return odd_bytes(whole, chance, size + 8)
    text = odd_json(head.decode(), chance)
    if kind == 3:
        values = json.loads(head)
        name = chance.choice(list(values))
        dtype = chance.choice(
            ["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "C64", "U16", "F32"]
        )
        values[name] |= {
            "dtype": dtype,
            "shape": chance.choice([[2**40, 2**40], [0, 2**60], [], [1] * 99, [64, 32], [16]]),
        }
        text = json.dumps(values)
    head = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(head)) + head + body


def odd_bytes(whole: bytes, chance: random.Random, most: int | None = None) -> bytes:
    """`whole` with up to four bytes changed, among its first `most`, or cut."""
    if chance.random() < 0.2:
        return whole[: chance.randrange(len(whole))]
    changed = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(min(len(whole), most or len(whole)))] = chance.randrange(256)
    return bytes(changed)


def _json(path: Path, chance: random.Random) -> None:
    path.write_bytes(odd_json(path.read_text(), chance).encode(errors="surrogatepass"))


def _safetensors(path: Path, chance: random.Random) -> None:
    path.write_bytes(odd_safetensors(path.read_bytes(), chance))


def _sized(path: Path, chance: random.Random) -> None:
    """As `_safetensors`, of the same length: what a reader that compares lengths believes first."""
    whole = path.read_bytes()
    path.write_bytes(odd_safetensors(whole, chance)[: len(whole)].ljust(len(whole), b"\0"))


def _bytes(path: Path, chance: random.Random) -> None:
    path.write_bytes(odd_bytes(path.read_bytes(), chance))


def _open_cache(folder: Path) -> None:
    cache = bigsae.open_activations(str(folder))
    cache(cache.as_rows([0, cache.num_rows - 1]))
    cache.heldout_rows()


def _resume(folder: Path) -> None:
    """Go on from the checkpoint in `folder`, of a run that has ended: reads all of it, and does nothing."""
    sealed(folder)
    config = json.loads((folder / "config.json").read_text())
    bigsae.train_saes(from_dict(TrainConfig, config | {"output_dir": str(folder), "resume": True}, "resume"))


Mangle = Callable[[Path, random.Random], None]
Load = Callable[[Path], Any]


SAELENS, SPARSIFY, DICTIONARY, RUN, CACHE = (
    "saes/saelens", "saes/sparsify", "saes/dictionary_learning", "run", "cache",
)  # fmt: skip
# What is mangled, by name: a folder, its file, how, what reads it, and how many times.
LOADERS: dict[str, tuple[str, str, Mangle, Load, int]] = {
    "cfg.json of SAELens": (SAELENS, "cfg.json", _json, read_sae, 800),
    "cfg.json of sparsify": (SPARSIFY, "cfg.json", _json, read_sae, 600),
    "config.json of dictionary_learning": (DICTIONARY, "config.json", _json, read_sae, 600),
    "safetensors of SAELens": (SAELENS, WEIGHTS, _safetensors, read_sae, 800),
    "safetensors of sparsify": (SPARSIFY, "sae.safetensors", _safetensors, read_sae, 600),
    "ae.pt": (DICTIONARY, "ae.pt", _bytes, read_sae, 600),
    "config.json of a run": (RUN, "config.json", _json, lambda f: read_config(f / "config.json"), 600),
    "--config": (RUN, "config.json", _json, lambda f: read_flags(TrainConfig, f / "config.json"), 300),
    "index of a cache": (CACHE, "index.json", _json, _open_cache, 600),
    "tokens of a cache": (CACHE, TOKENS, _sized, _open_cache, 300),
    "activations of a cache": (CACHE, VALUES, _sized, _open_cache, 300),
    "state of a checkpoint": (RUN, f"{LAST}/state.json", _json, lambda f: checkpoint.read_state(f / LAST), 400),
    "a rank's state": (RUN, f"{LAST}/rank_0.json", _json, lambda f: checkpoint.read_state(f / LAST), 400),
    "state, resumed": (RUN, f"{LAST}/state.json", _json, _resume, 8),
    "a rank's state, resumed": (RUN, f"{LAST}/rank_0.json", _json, _resume, 8),
    "metadata, resumed": (RUN, f"{LAST}/.metadata", _bytes, _resume, 8),
    "tensors, resumed": (RUN, f"{LAST}/__0_0.distcp", _bytes, _resume, 8),
}  # fmt: skip


def mangled(home: Path, name: str) -> dict[str, int]:
    """How often what is called `name`, mangled, was read and refused."""
    kind, file, mangle, load, times = LOADERS[name]
    counts = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(home / kind, Path(scratch) / "it"))
        whole = (folder / file).read_bytes()
        load(folder)
        for i in range(times):
            (folder / file).write_bytes(whole)
            mangle(folder / file, random.Random(f"{name} {i}"))
            try:
                load(folder)
                counts["read"] += 1
            except UserError as error:
                counts["refused"] += 1
                if "\n" in str(error) or len(str(error)) > _LONGEST:
                    raise ValueError("a message of one short line was asked for") from error
    return counts


def main() -> None:
    home = Path(sys.argv[1])
    for kind, _, _, load, _ in LOADERS.values():  # what is loaded at the first call counts for nothing
        if load is not _resume:
            load(home / kind)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({name: mangled(home, name) for name in LOADERS}))


if __name__ == "__main__":
    main()
