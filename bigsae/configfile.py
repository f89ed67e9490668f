"""Configurations as plain values, and as files: a run's config.json, and the YAML or JSON of `--config`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from bigsae.config import TrainConfig, UserError, short


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str, missing: Any = dataclasses.MISSING) -> Any:
    """The configuration dataclass `cls` from plain JSON values, e.g. those of a run's config.json.

    An option that is absent and has no default becomes `missing`, where that is given. Else its absence, and in any
    case an unknown name or a value of the wrong type, raises UserError, which names it under `where`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected options and their values, found {short(values)}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            # In YAML a name may be anything.
            near = _nearest(name[:100] if isinstance(name, str) else "", hints)
            raise UserError(f"{where}: unknown option {short(name)}{near}")
    built = {}
    for f in dataclasses.fields(cls):
        inner = f"{where}: {f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            built[f.name] = from_dict(hints[f.name], values.get(f.name, {}), inner, missing)
        elif f.name in values:
            built[f.name] = _typed(hints[f.name], values[f.name], inner)
        elif _required(f):
            if missing is dataclasses.MISSING:
                raise UserError(f"{where}: option {f.name!r} is missing")
            built[f.name] = missing
    return cls(**built)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of `to_dict` by their whole names, e.g. "sae.k"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _nearest(name: str, hints: dict[str, Any]) -> str:
    """What was probably meant by an option that there is not: one of the same level, or of a group of it."""
    groups = {
        group: typing.get_type_hints(hint) for group, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    name = name.replace("-", "_")
    elsewhere = [group for group, inner in groups.items() if name in inner]
    if elsewhere:
        return f": {name!r} belongs under {elsewhere[0]!r}"
    group, _, rest = name.partition(".")
    if rest in groups.get(group, {}):
        return f": write {rest!r} under {group!r}"
    near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
    if near:
        return f": the nearest is {near[0]!r}"
    return f": known are {textwrap.shorten(', '.join(sorted(hints)), _KNOWN, placeholder=' …')}"


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}: {short(value)} is none of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(arguments[0], item, where) for item in value)
        raise UserError(f"{where}: expected a list, found {short(value)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where}: {short(value)} is larger than any float") from None
    hint = origin or hint
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {short(value)}")
    return value


def read_config(path: str | Path) -> TrainConfig:
    """A run's configuration from its config.json. Raises UserError where it is absent or malformed."""
    return _read(TrainConfig, path, f"the run's {path}", dataclasses.MISSING)


def read_flags(cls: type, path: str | Path, missing: Any = dataclasses.MISSING) -> Any:
    """The configuration dataclass `cls` with the values of the file of --config, which may hold a part of them.

    A name ending in .json is read as JSON, any other as YAML; `missing` is that of `from_dict`. Raises UserError where
    the file cannot be read, or holds an option or a value that there is not.
    """
    return _read(cls, path, f"--config {path}", missing)


def _read(cls: type, path: str | Path, where: str, missing: Any) -> Any:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}: give a .yaml or .json file") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not text in UTF-8: give a .yaml or .json file") from None
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        values = json.loads(text, object_pairs_hook=_object) if kind == "JSON" else yaml.load(text, _Loader)
    except (*_UNREADABLE, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:_REASON]
        raise UserError(f"{where} is not {kind}: {reason or type(error).__name__}: mend it there") from None
    return from_dict(cls, {} if values is None else values, where, missing)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} stands in it twice")
        values[name] = value
    return values


class _Loader(yaml.SafeLoader):
    """Safe YAML, with numbers as in YAML 1.2 and JSON, and no option twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} stands in it twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


# ValueError is that of json; with the others PyYAML fails on values like `!!int ""` and `!!timestamp x`.
_UNREADABLE = (ValueError, LookupError, AttributeError, TypeError)
_REASON = 250
_KNOWN = 200
_MERGE = "tag:yaml.org,2002:merge"
# YAML 1.1, which PyYAML reads, takes 1e-4 for a word: it wants a point and a sign, as in 1.0e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
