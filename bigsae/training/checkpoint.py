"""Saving and finding what a resume needs: torch.distributed.checkpoint for tensors, JSON for numbers.

checkpoints/step_<n>/   *.distcp .metadata      weights, optimiser, statistics; each rank's buffer and generator
                        state.json rank_<r>.json  step, counters; each rank's data cursors
                        COMPLETE                the marker, with the checksums of all other files: without it the
                                                folder is not a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from bigsae.config import UserError
from bigsae.hub.files import sync_folder, write_json
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.training.saved import Saved, load, read_saved

logger = logging.getLogger("bigsae")

_MARKER = "COMPLETE"
_NAME = re.compile(r"step_[0-9]{1,18}")


class NotSaved(Exception):
    """A checkpoint could not be written on some rank; raised on all of them. Those before it are whole."""


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
    that no other has. `state` is the same on every rank; `rank_tensors` and `rank_state` are this rank's own. Raises
    NotSaved, on all ranks, where one of them cannot write.
    """
    final, temporary = folder / f"step_{step}", folder / f".step_{step}.tmp"
    with _failing_together(mesh):
        if mesh.is_main:
            _drop_leftovers(folder)
            temporary.mkdir(parents=True)
    own = {f"rank_{mesh.rank}/{name}": tensor for name, tensor in rank_tensors.items()}
    writer = dcp.FileSystemWriter(temporary, sync_files=True)
    files: dict[str, tuple[int, str]] = {}
    with _failing_together(mesh):
        with _single_process_unremarked(mesh):
            dcp.save(
                tensors | own, storage_writer=writer, process_group=mesh.control, no_dist=mesh.num_ranks == 1
            )
        write_json(temporary / f"rank_{mesh.rank}.json", rank_state)
        if mesh.is_main:
            write_json(temporary / "state.json", state | {"step": step, "num_ranks": mesh.num_ranks})
    with _failing_together(mesh):
        files = _checksums(sorted(temporary.iterdir())[mesh.rank :: mesh.num_ranks])
    whole = {name: sums for part in collectives.objects(files, mesh.control) for name, sums in part.items()}
    with _failing_together(mesh):
        if mesh.is_main:
            write_json(temporary / _MARKER, {"step": step, "files": whole})
            if final.exists():  # without its marker, or the same step before the run was known to be finished
                final.rename(folder / f".step_{step}.old")
            temporary.rename(final)
            sync_folder(folder)
            shutil.rmtree(folder / f".step_{step}.old", ignore_errors=True)
            for old in checkpoints(folder)[:-keep] if keep else []:
                shutil.rmtree(old)
    return final


def take_up_leftovers(folder: Path) -> None:
    """Give checkpoints in `folder` their names that were whole when a run was killed within giving them.

    One rank calls this, before others look for checkpoints, where a run is to go on.
    """
    for pattern in (".step_*.tmp", ".step_*.old"):  # the newer first
        for leftover in folder.glob(pattern):
            final = folder / leftover.stem.removeprefix(".")
            if (leftover / _MARKER).is_file() and _NAME.fullmatch(final.name) and not final.exists():
                leftover.rename(final)
                sync_folder(folder)
                logger.warning("a run was killed while it named %s: that is whole, and is taken up", final)


def _drop_leftovers(folder: Path) -> None:
    """What a killed run, or a full disk, has left of checkpoints that were never whole."""
    for leftover in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")):
        shutil.rmtree(leftover)


@contextmanager
def _failing_together(mesh: Mesh) -> Iterator[None]:
    """A block after which all ranks go on, or all raise NotSaved since one of them could not write. They meet here."""
    reason = ""
    try:
        yield
    except OSError as error:
        reason = str(error)
    except CheckpointException as error:  # known to all ranks
        first = next(iter(error.failures.values()))[0]
        if not isinstance(first, (OSError, RuntimeError)):  # serialisation to a full disk is a RuntimeError
            raise
        reason = " ".join(str(first).split())
    if reason := collectives.first_text(reason, mesh.control):
        raise NotSaved(reason)


def _checksums(files: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file, by its name."""
    sums = {}
    for path in files:
        with path.open("rb") as file:
            sums[path.name] = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return sums


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that were written to their end, oldest first."""
    named = (path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))
    whole = [path for path in named if (path / _MARKER).is_file()]
    return sorted(whole, key=step_of)


def newest_whole(folder: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint in `folder` whose files are as they were written; None where there is none at all.

    One that is not is put aside as damaged_step_<n>, which is said. Raises UserError where all are. All ranks call
    this, and see the same folder.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        damage = collectives.first_text(_damage(path, mesh), mesh.control)
        if not damage:
            if mesh.is_main:
                _put_aside(damaged)
            collectives.barrier(mesh.control)
            return path
        damaged[path] = damage
    if damaged:
        path, damage = next(iter(damaged.items()))
        raise UserError(
            f"--resume: all checkpoints in {folder} are damaged ({path.name}: {damage}): give another --output-dir to "
            "start afresh"
        )
    return None


def _put_aside(damaged: dict[Path, str]) -> None:
    """Rename checkpoints, so that none is taken for the newest again, or kept in place of a whole one."""
    for path, damage in damaged.items():
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("%s is damaged (%s): it is now %s, and the one before it is taken", path, damage,
                       aside.name)  # fmt: skip


def _damage(checkpoint: Path, mesh: Mesh) -> str:
    """What is wrong with this rank's share of the files of `checkpoint`; empty where nothing is."""
    try:
        files = json.loads((checkpoint / _MARKER).read_bytes())["files"]
        written = {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {_MARKER} cannot be read"
    for name in sorted(written)[mesh.rank :: mesh.num_ranks]:
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != written[name][0]:
                return f"{name} has {size} bytes of {written[name][0]}"
            if _checksums([path])[name] != written[name]:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


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
