"""Opening a trained SAE, from a folder or from the Hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath

import torch

from bigsae.config import UserError
from bigsae.hub.formats import CONFIGS, FILES, read_sae
from bigsae.sae.base import SAE

# A path that begins with a dot is meant as one.
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def load_sae(
    source: str | Path,
    hookpoint: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> SAE:
    """The SAE in a folder, or in a repository of the Hub, on `device`. It takes activations in the LM's own scale.

    `source` is a folder, e.g. "runs/x/model.layers.6" or "runs/x" with `hookpoint` "model.layers.6"; or, where there is
    no such folder, "user/name" of the Hub with `hookpoint` (in a sweep hookpoint/variant), which may be left out where
    it holds one SAE. `revision` is a branch, tag or commit of the Hub. What was downloaded is kept in the Hub's cache.

    Reads what bigsae, SAELens, sparsify and dictionary_learning write. Raises UserError where there is none.
    """
    if hookpoint is not None:
        check_inside(hookpoint)
    if Path(source).exists() or not isinstance(source, str) or not _REPO_ID.fullmatch(source):
        if revision is not None:
            raise UserError(f"revision {revision!r} is for the Hub, and {source} is a folder: leave it out")
        return read_sae(_within(Path(source), hookpoint)).to(device)
    return read_sae(_downloaded(source, hookpoint, revision)).to(device)


def check_inside(hookpoint: str) -> None:
    """Find a name of an SAE's folder that leads out of where it is. Raises UserError."""
    parts = PurePosixPath(hookpoint).parts
    if not parts or hookpoint.startswith("/") or "\\" in hookpoint or ".." in parts:
        raise UserError(f"hookpoint {hookpoint!r} is no folder below: write it like model.layers.6")


def _within(folder: Path, hookpoint: str | None) -> Path:
    """The folder of `hookpoint` in `folder`, which a link must not lead out of it either."""
    if hookpoint is None:
        return folder
    below = folder / hookpoint
    for path in (below, *(below / name for name in FILES)):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} leads out of {folder}: it is not read")
    return below


def _downloaded(repo_id: str, hookpoint: str | None, revision: str | None) -> Path:
    # Opened when used: a folder on disk needs nothing of the Hub.
    from bigsae.hub.repository import download

    try:
        if hookpoint is not None:
            wanted = [f"{glob.escape(hookpoint)}/{name}" for name in FILES]
            snapshot = download(repo_id, wanted, revision)
            if any((snapshot / hookpoint / name).exists() for name in CONFIGS):
                return snapshot / hookpoint
        anywhere = [pattern for name in CONFIGS for pattern in (name, f"*/{name}")]
        snapshot = download(repo_id, anywhere, revision)
        names = _sae_folders(snapshot)
        if hookpoint is not None or len(names) != 1:
            found = ", ".join(names[:20]) or "no SAE"
            asked = f"has no {hookpoint}" if hookpoint is not None else "needs a hookpoint"
            raise UserError(f"{repo_id} {asked}: it holds {found}")
        (name,) = names
        within = "" if name == "." else glob.escape(name) + "/"
        # The commit that was looked at: the branch may have moved since.
        snapshot = download(repo_id, [within + file for file in FILES], snapshot.name)
        return snapshot / name
    except UserError as error:
        raise type(error)(f"{error} (and there is no folder {repo_id} here)") from None


def _sae_folders(snapshot: Path) -> list[str]:
    """The folders in `snapshot` with the configuration of an SAE, as bigsae, SAELens and the others name it."""
    folders = {path.parent for name in CONFIGS for path in snapshot.rglob(name)}
    # A run's own config.json, at the top of what it published.
    run = snapshot / "config.json"
    if run.exists() and not (snapshot / "cfg.json").exists() and len(folders) > 1:
        folders.discard(snapshot)
    return sorted(folder.relative_to(snapshot).as_posix() for folder in folders)
