"""Folders of runs as they lie on disk, finished or not, bigsae's or others': which SAEs and metrics they hold."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from bigsae.config import TrainConfig, UserError
from bigsae.configfile import read_config
from bigsae.hub import dictionary_learning

# In the folder of a run, and no SAEs; beside what begins with a dot, such as copies that are being pushed.
_NOT_SAES = ("checkpoints", "wandb", "tensorboard")
# Together they tell a run's config.json from those that sparsify, dictionary_learning and transformers write.
_OURS = {"model", "dataset", "output_dir", "buffer", "sae"}

# No count or mean of a run is larger, infinite or NaN.
_MOST = 1e300


def is_sae(folder: Path) -> bool:
    """Whether `folder` is that of one SAE, in any format that bigsae reads."""
    return (folder / "cfg.json").exists() or (folder / dictionary_learning.WEIGHTS).exists()


def find_saes(folder: Path) -> list[str]:
    """The folders of SAEs below `folder`, in the order of their layers; ["."] where it is an SAE's own."""
    if is_sae(folder):
        return ["."]
    found = []
    for path, folders, _files in os.walk(folder):  # which follows no links
        here = Path(path)
        folders[:] = [f for f in folders if not f.startswith(".") and (here != folder or f not in _NOT_SAES)]
        if here != folder and is_sae(here):
            found.append(here.relative_to(folder).as_posix())
    return sorted(found, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def run_config(folder: Path) -> TrainConfig | None:
    """The configuration of the run in `folder`, or that was exported to it; None where its config.json is not bigsae's.

    Raises UserError where it is bigsae's and cannot be read by this version.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"the run's {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the run's {path} is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict) or not values.keys() >= _OURS:
        return None
    return read_config(path)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in `run`, whose last line may be torn. [] where there is none. Raises UserError."""
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON") from None
            continue
        if not _is_row(row):
            raise UserError(f"{path}: line {number} is no row of metrics: leave it out")
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether it is as training writes it: counts, names, and numbers that are some."""
    if not isinstance(row, dict) or not isinstance(row.get("hookpoint"), str):
        return False
    if not isinstance(row.get("variant", ""), str):
        return False
    values = [value for name, value in row.items() if name not in ("hookpoint", "variant")]
    if not all(type(value) in (int, float) and -_MOST < value < _MOST for value in values):
        return False
    return all(type(row.get(name)) is int and row[name] >= 0 for name in ("step", "tokens"))
