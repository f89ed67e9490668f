"""Runs as they lie on disk, finished or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigsae.config import TrainConfig, UserError
from bigsae.hub.curves import name_of
from bigsae.hub.load import check_inside
from bigsae.hub.runs import find_saes, is_sae, read_rows, run_config
from bigsae.training.checkpoint import checkpoints, read_state


@dataclass(frozen=True)
class SAEFolder:
    """One SAE of a run."""

    name: str
    """Its folder in the run's: the hookpoint, in a sweep hookpoint/variant."""
    hookpoint: str
    """What it reads."""
    folder: Path
    rows: tuple[dict[str, Any], ...]
    """Its rows of metrics.jsonl."""

    @property
    def is_written(self) -> bool:
        """Whether its weights are there; training writes them at its end."""
        return is_sae(self.folder)


@dataclass(frozen=True)
class RunFolder:
    """What is known of a run."""

    label: str
    """Unlike that of every other run of the report."""
    folder: Path
    config: TrainConfig
    status: dict[str, Any]
    """status.json: status, reason, step, tokens; empty where there is none."""
    saes: tuple[SAEFolder, ...]
    num_ranks: int | None
    """Ranks that wrote the newest checkpoint; None without one."""
    num_latent: int
    """Ranks that hold one SAE between them."""


def read_runs(folders: Sequence[str]) -> list[RunFolder]:
    """The runs in `folders`, in that order. Raises UserError for a folder that holds none."""
    paths = [Path(folder) for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if [p.resolve() for p in paths].count(path.resolve()) > 1:
            raise UserError(f"report {folder}: named twice, leave one out")
    configs = [run_config(path) for path in paths]
    for folder, config in zip(folders, configs, strict=True):
        if config is None:
            raise UserError(
                f"report {folder}: no config.json of a run there: name a folder that training wrote"
            )
    labelled = zip(paths, configs, _labels(paths), strict=True)
    return [_read_run(path, config, label) for path, config, label in labelled if config]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError("distinct paths have distinct ends")


def _read_run(path: Path, config: TrainConfig, label: str) -> RunFolder:
    rows = read_rows(path)
    names = dict.fromkeys(name_of(row) for row in rows)
    names |= dict.fromkeys(find_saes(path))
    for name in names:
        check_inside(name)  # metrics.jsonl may come from anyone
    whole = checkpoints(path / "checkpoints")
    saved = read_state(whole[-1]) if whole else None
    return RunFolder(
        label=label,
        folder=path,
        config=config,
        status=_read_status(path / "status.json"),
        saes=tuple(_sae(path, name, rows, bool(config.sweep)) for name in names),
        num_ranks=saved.num_ranks if saved else None,
        num_latent=saved.state["num_latent"] if saved else config.mesh.latent or 1,
    )


def _sae(path: Path, name: str, rows: Sequence[dict[str, Any]], is_sweep: bool) -> SAEFolder:
    hookpoint, _, variant = name.rpartition("/") if is_sweep else (name, "", "")
    own = [row for row in rows if row["hookpoint"] == hookpoint and row.get("variant", "") == variant]
    return SAEFolder(name, hookpoint, path / name, tuple(own))


def _read_status(path: Path) -> dict[str, Any]:
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(status, dict):
        raise UserError(f"{path} is no JSON object")
    return status
