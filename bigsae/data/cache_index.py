"""The index of an activation cache: what it holds, in which files, and where it came from.

    index.json                                     this
    tokens/<place>-<lane>.safetensors              input_ids [rows, ctx_len], kept [rows, ctx_len], starts [rows + 1]
    activations/<hookpoint>/<place>-<lane>.safetensors    activations [n, d_in]: those kept, row after row

A lane holds what one rank harvested, in places 0, 1, … one after the other; place -1, called "heldout" in the names of
files, is kept aside. Row i of a shard has activations starts[i] to starts[i + 1], in the order of their positions.

What an index says is checked before it is believed: it may come from the Hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from bigsae.config import UserError, short
from bigsae.configfile import from_dict

FORMAT = "bigsae activation cache"
VERSION = 1
INDEX = "index.json"
# An id in int32, and whether it is kept; bytes of an element of each dtype.
_TOKEN_BYTES = 5
_BYTES = {"bfloat16": 2, "float32": 4}
HELDOUT = -1
"""Place of the rows that are kept aside."""


@dataclass(frozen=True)
class CacheFile:
    """One file of a cache."""

    file: str
    """Its path below the cache's folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """What one rank wrote at a time: token rows, and their activations at each hookpoint."""

    lane: int
    place: int
    num_rows: int
    num_activations: int
    """Of each hookpoint."""
    tokens: CacheFile
    activations: dict
    """The CacheFile of each hookpoint."""


@dataclass(frozen=True)
class Index:
    """All that is known of a cache without opening its shards."""

    bigsae_version: str
    model: str
    model_commit: str | None
    """Commit on the Hub that was read, where it came from there."""
    dataset: str
    ctx_len: int
    seed: int
    prepend_bos: bool
    lm: dict
    """Options of --lm with which the activations were made."""
    data: dict
    """Options of --data that decided the rows and what of them is kept."""
    dtype: Literal["bfloat16", "float32"]
    hookpoints: dict
    """d_in of each by its name, in the order of the forward."""
    num_rows: int
    num_activations: int
    """Of each hookpoint, without those kept aside."""
    num_heldout_rows: int
    num_heldout_activations: int
    shards: tuple[Shard, ...]
    token_order: str = "lane, place, row, position"

    def fingerprint(self) -> str:
        """What another cache does not share."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()


def to_json(index: Index) -> dict[str, Any]:
    """`index` as what index.json holds."""
    return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(index)))}


def stem(place: int, lane: int) -> str:
    """The name, without its suffix, of a shard's files."""
    return f"heldout-{lane:04d}" if place == HELDOUT else f"{place:05d}-{lane:04d}"


def with_shards(index: Index, shards: Sequence[Shard]) -> Index:
    """`index` of just these `shards`."""
    trained = [shard for shard in shards if shard.place != HELDOUT]
    heldout = [shard for shard in shards if shard.place == HELDOUT]
    return replace(
        index,
        shards=tuple(sorted(shards, key=lambda shard: (shard.place, shard.lane))),
        num_rows=sum(shard.num_rows for shard in trained),
        num_activations=sum(shard.num_activations for shard in trained),
        num_heldout_rows=sum(shard.num_rows for shard in heldout),
        num_heldout_activations=sum(shard.num_activations for shard in heldout),
    )


def read_index(path: Path) -> Index:
    """The index in `path`. Raises UserError where there is none, or one that cannot be right."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the folder of a finished cache"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): write the cache, or download it, again") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise UserError(
            f"{path} is not the index of an activation cache: give a folder that bigsae.cache_activations made"
        )
    if (version := values.pop("version", None)) != VERSION:
        raise UserError(
            f"{path} has version {short(version)}, this bigsae reads {VERSION}: write the cache again"
        )
    shards = values.pop("shards", None)
    if not isinstance(shards, list):
        raise UserError(f"{path}: shards must be a list")
    hookpoints = _hookpoints(values.pop("hookpoints", None), path)
    whole = {"hookpoints": {}, "shards": []} | values
    index = replace(from_dict(Index, whole, str(path)), hookpoints=hookpoints)
    parsed = [parse_shard(shard, f"{path}: shard {i}") for i, shard in enumerate(shards)]
    _check(index, parsed, path)
    return replace(index, shards=tuple(parsed))


def _hookpoints(values: Any, path: Path) -> dict[str, int]:
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: hookpoints must be an object of widths")
    for name, width in values.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UserError(f"{path}: the width of {name[:100]} is {short(width)}")
        if not name or "/" in name or "\0" in name or name in (".", ".."):  # it becomes a folder of the run
            raise UserError(f"{path}: {short(name)} is no name of a hookpoint")
    return values


def parse_shard(values: Any, where: str) -> Shard:
    """A shard from its plain JSON values. Raises UserError, which names `where` they stand."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, found {type(values).__name__}")
    files = values.get("activations")
    if not isinstance(files, dict):
        raise UserError(f"{where}: activations must be an object of files")
    parsed = {name: from_dict(CacheFile, file, f"{where}: {name}") for name, file in files.items()}
    shard = replace(from_dict(Shard, values | {"activations": {}}, where), activations=parsed)
    if min(shard.lane, shard.num_activations) < 0 or shard.num_rows < 1 or shard.place < HELDOUT:
        raise UserError(f"{where}: its counts cannot be right")
    for file in (shard.tokens, *parsed.values()):
        path = PurePosixPath(file.file)
        outside = path.is_absolute() or ".." in path.parts or "\\" in file.file or "\0" in file.file
        if outside or path.suffix != ".safetensors" or file.bytes < 0:
            raise UserError(f"{where}: {short(file.file)} is no file of a cache")
    return shard


def _check(index: Index, shards: Sequence[Shard], path: Path) -> None:
    """Whether the parts of an index agree with each other."""
    if index.ctx_len < 1 or index.seed < 0:
        raise UserError(f"{path}: ctx_len {short(index.ctx_len)} or seed {short(index.seed)} cannot be right")
    for i, shard in enumerate(shards):
        # The size on disk is compared with what stands here before anything is read: so no number claims more.
        if shard.num_rows * index.ctx_len * _TOKEN_BYTES > shard.tokens.bytes:
            raise UserError(
                f"{path}: shard {i} has more rows than its file of {shard.tokens.bytes} bytes holds"
            )
        if shard.activations.keys() != index.hookpoints.keys():
            raise UserError(f"{path}: shard {i} does not hold each hookpoint")
        if shard.num_activations > shard.num_rows * index.ctx_len:
            raise UserError(f"{path}: shard {i} holds more activations than its rows have positions")
        for name, file in shard.activations.items():
            if shard.num_activations * index.hookpoints[name] * _BYTES[index.dtype] > file.bytes:
                raise UserError(f"{path}: shard {i} has more activations at {name[:100]} than its file holds")
    if len({(shard.lane, shard.place) for shard in shards}) < len(shards):
        raise UserError(f"{path} names a shard twice")
    counted = with_shards(index, shards)
    for name in ("num_rows", "num_activations", "num_heldout_rows", "num_heldout_activations"):
        if getattr(index, name) != getattr(counted, name):
            raise UserError(
                f"{path}: {name} is {short(getattr(index, name))}, its shards hold {getattr(counted, name)}"
            )
    if not index.num_activations:
        raise UserError(f"{path}: the cache holds nothing to train on")
