"""The output folder: what may be in it, what is in it while work goes on, and how it becomes whole at once.

Work goes on in `.pretokenize`, which no reader looks into; when all is there it moves out.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigsae.config import UserError, short
from bigsae.data.origin import ORIGIN_FILE
from bigsae.hub.files import sync_folder, write_json

_WORK, _OLD_WORK = ".pretokenize", ".pretokenize.old"
_MADE, _WHOLE = "made.json", "whole"


def open_folder(out: Path, made: dict[str, Any], resume: bool) -> Path | None:
    """The folder to work in, where work then begins or goes on; None where `out` is whole already.

    `made` is what decides the outcome. Raises UserError where `out` cannot be used, or was made otherwise.
    """
    work = out / _WORK
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / _OLD_WORK, ignore_errors=True)
        present = {path.name for path in out.iterdir()}
    except OSError as error:
        raise UserError(
            f"--output-dir {out}: {error.strerror}: choose a folder that can be written"
        ) from error
    is_whole = ORIGIN_FILE in present and _WORK not in present
    if (is_whole or _WORK in present) and not resume:
        what = "is whole already" if is_whole else "holds work that was interrupted"
        raise UserError(f"--output-dir {out} {what}: go on with --resume, or choose another folder")
    if is_whole:
        _check_same(out, _read(out, ORIGIN_FILE, "bigsae", "made"), made)
        return None
    if (work / _MADE).is_file():
        _check_same(out, _read(out, f"{_WORK}/{_MADE}"), made)
        return work
    if present - {_WORK}:
        raise UserError(
            f"--output-dir {out} holds {min(present - {_WORK})} and no tokens: choose an empty folder, or a new one"
        )
    return work


def begin(work: Path, made: dict[str, Any]) -> None:
    """From here on another call goes on with what this one began. Raises UserError."""
    if not (work / _MADE).is_file():
        with disk_errors(work.parent):
            write_json(work / _MADE, made)


def _read(out: Path, file: str, *names: str) -> dict[str, Any]:
    """The object in `file` of `out`, or the one in it under `names`, one within the other."""
    try:
        values = json.loads((out / file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--resume: {file} in --output-dir {out} cannot be read ({error}): choose another folder"
        ) from None
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        raise UserError(
            f"--resume: {file} in --output-dir {out} was not written by this command: choose another folder"
        )
    return values


def _check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for flag, value in now.items():
        if before.get(flag) != value:
            raise UserError(
                f"{flag} is {value}, but {short(before.get(flag))} in --output-dir {out}: --resume goes on with what "
                "it began with; choose another folder for this"
            )


def is_written(work: Path) -> bool:
    """Whether all files are written and have only to move out."""
    return (work / _WHOLE).is_file()


def set_written(work: Path) -> None:
    """From here on all files have only to move out."""
    (work / _WHOLE).touch()
    sync_folder(work)


def move_out(work: Path, files: Path) -> None:
    """Move what lies in `files` to the output folder and leave nothing of the work behind."""
    out = work.parent
    # Until state.json is there `datasets` takes the folder for none of its own.
    for path in sorted(files.iterdir(), key=lambda path: (path.name == "state.json", path.name)):
        path.rename(out / path.name)
    sync_folder(out)
    # In one step, and only then file by file: half a work folder would be taken for an interrupted one.
    work.rename(out / _OLD_WORK)
    shutil.rmtree(out / _OLD_WORK)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full disk as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"--output-dir {out}: no space left on its disk: free some, then go on with --resume"
        ) from error
