"""What a checkpoint's files say, checked before it is believed: they may be torn, of another run, or from elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from bigsae.config import UserError, short
from bigsae.configfile import from_dict

_REASON = 150
# Counts beyond it overflow the tensors that they become.
_MOST = 2**62


@dataclass(frozen=True)
class Saved:
    """A checkpoint's numbers."""

    folder: Path
    num_ranks: int
    """Ranks that wrote it."""
    state: dict[str, Any]
    """The same on every rank."""
    ranks: list[dict[str, Any]]
    """Each rank's own."""
    num_bytes: int
    """Of its files of tensors."""


@dataclass(frozen=True)
class _State:
    trainers: dict
    finished: bool
    initialised: bool
    num_unlogged: int
    num_latent: int
    owners: dict
    step: int
    num_ranks: int


@dataclass(frozen=True)
class _Firing:
    num_window_tokens: int
    num_last_window_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class _Counters:
    step: int
    scale: float
    out_scale: float
    density: float
    initialised: bool
    firing: _Firing
    window: tuple[int, ...]


@dataclass(frozen=True)
class _Buffer:
    num_unread: int
    num_new: int


@dataclass(frozen=True)
class _RankState:
    buffer: _Buffer
    refilling: bool
    data: dict


def read_saved(checkpoint: Path) -> Saved:
    """The numbers of `checkpoint`, of all ranks. Raises UserError where they cannot be right."""
    with _broken(checkpoint):
        state = _read(checkpoint / "state.json")
        parsed = from_dict(_State, state, "state.json")
        for name, counters in parsed.trainers.items():
            counts = from_dict(_Counters, counters, f"state.json: {name}")
            if len(counts.window) != 3:
                raise UserError(f"state.json: {name}: window must hold 3 counts")
            _check_counts(counts.step, *counts.window, *vars(counts.firing).values(), parsed.num_unlogged)
        if parsed.num_ranks < 1 or parsed.num_latent < 1 or parsed.num_ranks % parsed.num_latent:
            raise UserError("state.json: its ranks cannot be right")
        if parsed.owners.keys() != parsed.trainers.keys() or not all(
            owner is None or (type(owner) is int and 0 <= owner < parsed.num_ranks)
            for owner in parsed.owners.values()
        ):
            raise UserError("state.json: the owners of its SAEs cannot be right")
        ranks = []
        for rank in range(parsed.num_ranks):  # the first file that is not there ends it
            ranks.append(_read(checkpoint / f"rank_{rank}.json"))
            own = from_dict(_RankState, ranks[rank], f"rank_{rank}.json")
            _check_counts(own.buffer.num_unread, own.buffer.num_new)
        num_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    return Saved(checkpoint, parsed.num_ranks, state, ranks, num_bytes)


def _check_counts(*counts: int) -> None:
    if not all(0 <= count < _MOST for count in counts):
        raise UserError("its counts cannot be right")


def check_waiting(saved: Saved, bytes_each: int) -> None:
    """Find more activations, of `bytes_each`, than the files have room for: they are to be read into memory."""
    waiting = sum(count for rank in saved.ranks for count in rank["buffer"].values())
    if waiting * bytes_each > saved.num_bytes:
        raise _error(saved.folder, f"its files are too small for {waiting} activations that wait")


def check_saes(saved: Saved, names: list[str]) -> None:
    """Find a checkpoint of other SAEs than those called `names`."""
    if saved.state["trainers"].keys() != set(names):
        raise _error(saved.folder, "it is of other SAEs")


def _read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_bytes())
    if not isinstance(values, dict):
        raise UserError(f"{path.name} is no JSON object")
    return values


@contextmanager
def _broken(checkpoint: Path) -> Iterator[None]:
    """What is found wrong within it as a UserError that names `checkpoint` and says what to do."""
    try:
        yield
    except OSError as error:
        raise _error(checkpoint, f"{Path(error.filename or '').name}: {error.strerror}") from None
    except (UserError, ValueError, RecursionError) as error:
        raise _error(checkpoint, str(error)) from None
    except CheckpointException as error:  # what went wrong on one rank or another, wrapped
        cause = next(iter(error.failures.values()))[0]
        text = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
        raise _error(checkpoint, text) from None


def _error(checkpoint: Path, reason: str) -> UserError:
    reason = " ".join(reason.split())[:_REASON]
    return UserError(
        f"--resume: {checkpoint} is broken ({reason}): remove it to go on from the one before it, or give another "
        "--output-dir"
    )


def load(tensors: dict[str, torch.Tensor], saved: Saved, group: Any, *, alone: bool) -> None:
    """Fill `tensors` in place under their names. Of a `group` of ranks all call this, unless `alone`."""
    with _broken(saved.folder):
        _check_metadata(saved.folder)
        reader = dcp.FileSystemReader(os.fspath(saved.folder))
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=alone)


def _check_metadata(folder: Path) -> None:
    """Find a .metadata of other things than tensors in files of `folder`: torch unpickles whatever stands there."""
    with (folder / ".metadata").open("rb") as file:
        try:
            places = [
                (info.relative_path, int(info.offset), int(info.length))
                for info in _Unpickler(file).load().storage_data.values()
            ]
        except _TORN as error:
            raise UserError(f".metadata is torn: {error}") from None
    for name, _, _ in places:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f".metadata names {short(name)}, which is no file of a checkpoint")
    for name, offset, length in places:
        _check_size(folder / name, offset, length)


def _check_size(path: Path, offset: int, length: int) -> None:
    """Find a tensor that would be more in memory than it is on disk: torch writes none of them compressed."""
    with path.open("rb") as file:
        if offset < 0 or length < 0 or offset + length > path.stat().st_size:
            raise UserError(f"{path.name} is shorter than .metadata says")
        try:
            with zipfile.ZipFile(cast(IO[bytes], _Part(file, offset, length))) as archive:
                entries = archive.infolist()  # which stands at the end: nothing else is read
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path.name} is torn: {error}") from None
    if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > length:
        raise UserError(f"{path.name} holds tensors that are compressed, which no checkpoint does")


class _Part(io.RawIOBase):
    """`length` bytes of a file, from `offset` on, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("before the beginning")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        size = min(len(buffer), max(0, self._length - self._at))
        read = self._file.read(size)
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)


# How unpickling fails on bytes that are no pickle, or are one of something else.
_TORN = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
)
# All that the metadata of tensors is made of. Values of other kinds torch would unpickle without asking.
_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _METADATA.get(module_name, ()):
            raise UserError(f".metadata calls {module_name}.{global_name}, which may be harmful")
        return super().find_class(module_name, global_name)
