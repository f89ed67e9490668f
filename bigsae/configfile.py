"""Configurations as plain values, and as files: a run's config.json, and the YAML or JSON of `--config`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from bigsae.config import TrainConfig, UserError

# YAML's references make endless values of a few lines.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring = 2, 100


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], where: str, missing: Any = dataclasses.MISSING) -> Any:
    """The configuration dataclass `cls` from plain JSON values, e.g. those of a run's config.json.

    An option that is absent and has no default becomes `missing`, where that is given. Else its absence, and in any
    case an unknown name or a value of the wrong type, raises UserError, which names it under `where`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected options and their values, found {_REPR.repr(values)}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"{where}: unknown option {name!r}{_nearest(str(name), hints)}")
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
    return f": the nearest is {near[0]!r}" if near else f"; known are {', '.join(sorted(hints))}"


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}: {_REPR.repr(value)} is none of {', '.join(map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(arguments[0], item, where) for item in value)
        raise UserError(f"{where}: expected a list, found {_REPR.repr(value)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, found {_REPR.repr(value)}")
    return value


def read_config(path: str | Path) -> TrainConfig:
    """A run's configuration from its config.json. Raises UserError where it is absent or malformed."""
    return read_flags(TrainConfig, path, where=str(path))


def read_flags(
    cls: type, path: str | Path, missing: Any = dataclasses.MISSING, where: str | None = None
) -> Any:
    """The configuration dataclass `cls` with the values of a file that may hold a part of them.

    A name ending in .json is read as JSON, any other as YAML; `missing` is that of `from_dict`. Raises UserError,
    which begins with `where` (default: --config and the path), where the file cannot be read, or holds an option or a
    value that there is not.
    """
    path = Path(path)
    where = where or f"--config {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not text in UTF-8: give a .yaml or .json file") from None
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        values = json.loads(text, object_pairs_hook=_object) if kind == "JSON" else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where} is not {kind}: {' '.join(str(error).split())}") from None
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


_MERGE = "tag:yaml.org,2002:merge"
# YAML 1.1, which PyYAML reads, takes 1e-4 for a word: it wants a point and a sign, as in 1.0e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
