"""Where shards stand in their data, as checkpoints say it: read with care, and merged from those of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from bigsae.config import UserError
from bigsae.configfile import from_dict

_WHERE = "--resume: the checkpoint's place in the data"
_MOST = 2**48


def read_cursors(cls: type, state: dict[str, Any]) -> dict[int, Any]:
    """The cursors, of the dataclass `cls`, that `state` has of its shards. Raises UserError where they are none."""
    values = state.get("cursors")
    if not isinstance(values, list):
        raise UserError(f"{_WHERE} is broken: cursors must be a list")
    cursors = [from_dict(cls, value, _WHERE) for value in values]
    for cursor in cursors:
        for field in fields(cls):
            count = getattr(cursor, field.name)
            if isinstance(count, int) and not 0 <= count < _MOST:
                raise UserError(f"{_WHERE} is broken: {field.name} cannot be right")
    return {cursor.shard: cursor for cursor in cursors}


def own_cursors(cls: type, state: dict[str, Any], shards: Sequence[int]) -> list[Any]:
    """Those of `shards`. Raises UserError where one is missing."""
    cursors = read_cursors(cls, state)
    missing = [shard for shard in shards if shard not in cursors]
    if missing:
        raise UserError(f"{_WHERE} has no cursor of shards {missing[:8]}: it is not that of all ranks")
    return [cursors[shard] for shard in shards]


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state from those of all ranks, from which rows of any number of ranks go on. Raises UserError."""
    identities = [{name: value for name, value in state.items() if name != "cursors"} for state in states]
    if any(identity != identities[0] for identity in identities):
        raise UserError(f"{_WHERE} is broken: its ranks were of different runs")
    cursors = [cursor for state in states for cursor in _listed(state)]
    shards = [cursor.get("shard") if isinstance(cursor, dict) else None for cursor in cursors]
    if len(shards) != identities[0].get("num_shards") or set(shards) != set(range(len(shards))):
        raise UserError(f"{_WHERE} is broken: its ranks do not hold each shard once")
    return {**identities[0], "cursors": sorted(cursors, key=lambda cursor: cursor["shard"])}


def _listed(state: dict[str, Any]) -> list[Any]:
    cursors = state.get("cursors")
    return cursors if isinstance(cursors, list) else []
