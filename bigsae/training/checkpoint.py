"""Saving and finding what a resume needs: torch.distributed.checkpoint for tensors, JSON for numbers.

checkpoints/step_<n>/   *.distcp .metadata      weights, optimiser, statistics; each rank's buffer and generator
                        state.json rank_<r>.json  step, counters; each rank's data cursors
                        COMPLETE                the marker: without it the folder is not a checkpoint
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from bigsae.hub.files import sync_folder, write_json
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.training.saved import Saved, load, read_saved

logger = logging.getLogger("bigsae")

_MARKER = "COMPLETE"
_NAME = re.compile(r"step_[0-9]{1,18}")


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    rank_tensors: dict[str, Tensor],
    state: dict[str, Any],
    rank_state: dict[str, Any],
    keep: int,
    mesh: Mesh,
) -> Path:
    """Write checkpoint `folder`/step_<n>, on all ranks together, and drop the oldest beyond `keep` (0: none).

    `tensors` are held together: the same on every rank under one name, or DTensors; or one rank's alone under a name
    that no other has. `state` is the same on every rank; `rank_tensors` and `rank_state` are this rank's own.
    """
    final, temporary = folder / f"step_{step}", folder / f".step_{step}.tmp"
    if mesh.is_main:
        for leftover in (
            *folder.glob(".step_*.tmp"),
            *folder.glob(".step_*.old"),
        ):  # of a run that was killed
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    collectives.barrier(mesh.control)
    own = {f"rank_{mesh.rank}/{name}": tensor for name, tensor in rank_tensors.items()}
    writer = dcp.FileSystemWriter(temporary, sync_files=True)
    with _single_process_unremarked(mesh):
        dcp.save(
            tensors | own, storage_writer=writer, process_group=mesh.control, no_dist=mesh.num_ranks == 1
        )
    write_json(temporary / f"rank_{mesh.rank}.json", rank_state)
    collectives.barrier(mesh.control)
    if mesh.is_main:
        write_json(temporary / "state.json", state | {"step": step, "num_ranks": mesh.num_ranks})
        write_json(temporary / _MARKER, {"step": step})
        if final.exists():  # without its marker, or the same step before the run was known to be finished
            final.rename(folder / f".step_{step}.old")
        temporary.rename(final)
        sync_folder(folder)
        shutil.rmtree(folder / f".step_{step}.old", ignore_errors=True)
        for old in checkpoints(folder)[:-keep] if keep else []:
            shutil.rmtree(old)
    collectives.barrier(mesh.control)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    named = (path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))
    whole = [path for path in named if (path / _MARKER).is_file()]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_state(checkpoint: Path) -> Saved:
    """The numbers of `checkpoint`, of all ranks. Raises UserError where they cannot be right."""
    return read_saved(checkpoint)


def load_tensors(
    saved: Saved, tensors: dict[str, Tensor], rank_tensors: dict[str, Tensor], mesh: Mesh
) -> None:
    """Fill `tensors`, and this rank's own `rank_tensors`, in place with what the checkpoint holds under their names.

    DTensors get their part of the rows, on whatever mesh they were written. All ranks call this. Raises UserError where
    the checkpoint does not hold them.
    """
    own = {f"rank_{mesh.rank}/{name}": tensor for name, tensor in rank_tensors.items()}
    with _single_process_unremarked(mesh):
        load(tensors | own, saved, mesh.control, alone=mesh.num_ranks == 1)


def read_tensors(saved: Saved, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, on this rank alone, under their whole names. Raises UserError as `load_tensors`."""
    with _single_process_unremarked(None):
        load(tensors, saved, None, alone=True)


@contextmanager
def _single_process_unremarked(mesh: Mesh | None) -> Iterator[None]:
    """Drop torch's warning that one process saves or loads alone, where that is what was asked for."""
    with warnings.catch_warnings():
        if mesh is None or mesh.num_ranks == 1:
            warnings.filterwarnings(
                "ignore", message=".*assuming the intent is to (save|load) in a single process"
            )
        yield
