"""Saving and finding what a resume needs: torch.distributed.checkpoint for tensors, JSON for numbers.

checkpoints/step_<n>/   *.distcp .metadata      weights, optimiser, statistics; each rank's buffer and generator
                        state.json rank_<r>.json  step, counters; each rank's data cursors
                        COMPLETE                the marker: without it the folder is not a checkpoint
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from bigsae.config import UserError
from bigsae.hub.files import sync_folder, write_json
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh

logger = logging.getLogger("bigsae")

_MARKER = "COMPLETE"


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

    `tensors` and `state` are the same on every rank; `rank_tensors` and `rank_state` are this rank's own.
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
    whole = [path for path in folder.glob("step_*") if (path / _MARKER).is_file()]
    return sorted(whole, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_state(checkpoint: Path, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """`state` and this rank's `rank_state` of a checkpoint. Raises UserError where other ranks wrote it."""
    state = json.loads((checkpoint / "state.json").read_text())
    if state["num_ranks"] != mesh.num_ranks:
        raise UserError(
            f"--resume: {checkpoint} was written by {state['num_ranks']} ranks, this run has {mesh.num_ranks}: "
            f"launch {state['num_ranks']} processes"
        )
    return state, json.loads((checkpoint / f"rank_{mesh.rank}.json").read_text())


def load_tensors(
    checkpoint: Path, tensors: dict[str, Tensor], rank_tensors: dict[str, Tensor], mesh: Mesh
) -> None:
    """Fill `tensors` and `rank_tensors` in place with what the checkpoint holds under their names."""
    own = {f"rank_{mesh.rank}/{name}": tensor for name, tensor in rank_tensors.items()}
    reader = dcp.FileSystemReader(os.fspath(checkpoint))
    with _single_process_unremarked(mesh):
        dcp.load(
            tensors | own, storage_reader=reader, process_group=mesh.control, no_dist=mesh.num_ranks == 1
        )


@contextmanager
def _single_process_unremarked(mesh: Mesh) -> Iterator[None]:
    """Drop torch's warning that one process saves alone, where that is what was asked for."""
    with warnings.catch_warnings():
        if mesh.num_ranks == 1:
            warnings.filterwarnings(
                "ignore", message=".*assuming the intent is to (save|load) in a single process"
            )
        yield
