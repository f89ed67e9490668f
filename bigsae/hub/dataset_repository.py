"""Repositories of data: opened before the work whose outcome goes there, and filled when it is done."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from bigsae.config import UserError
from bigsae.hub.repository import hub_errors, open_repository

FLAG = "--push-to-hub"
_NO_DATA = re.compile(r"\.gitattributes|\.gitignore|(README|LICENSE)(\.\w+)?")


def open_dataset_repository(repo_id: str, private: bool, ours: Mapping[str, Path] | None = None) -> None:
    """Make the dataset repository `repo_id` where there is none, and see that what is begun can go there.

    `ours` are files that may be there, by their names there: those of an upload that broke off. Raises UserError where
    it holds other data, which an upload would mix with ours, or cannot be written to; HubDown.
    """
    open_repository(repo_id, private, FLAG, "dataset")
    with hub_errors(f"{FLAG} {repo_id}"):
        there = list(HfApi().list_repo_tree(repo_id, recursive=True, repo_type="dataset"))
    for file in there:
        if not isinstance(file, RepoFile) or _NO_DATA.fullmatch(file.path):
            continue
        if not _same(file, (ours or {}).get(file.path)):
            raise UserError(
                f"{FLAG} {repo_id} holds other data ({file.path}): name an empty repository, or a new one"
            )


def _same(file: RepoFile, path: Path | None) -> bool:
    """Whether `path` holds what `file` on the Hub does: of large ones the size is compared, of JSON the content.

    What is in the others follows from it: it names their checksums, or all that decided them.
    """
    if path is None or path.stat().st_size != file.size:
        return False
    if path.suffix != ".json":
        return True
    content = path.read_bytes()
    if file.lfs is not None:
        return hashlib.sha256(content).hexdigest() == file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


def push_dataset(
    folder: Path, repo_id: str, private: bool, data: Sequence[str], about: Sequence[str], message: str
) -> str:
    """Upload what matches `data` and then `about`, patterns of paths in `folder`, to `repo_id`; its address.

    What is there already is not sent again, so that the same call goes on with an upload that broke off. Raises
    UserError as `open_dataset_repository` does.
    """
    ours = {
        path.relative_to(folder).as_posix(): path
        for pattern in (*data, *about)
        for path in folder.glob(pattern)
    }
    try:
        open_dataset_repository(repo_id, private, ours)
        with hub_errors(f"{FLAG} {repo_id}"):
            api = HfApi()
            # A large folder takes several commits. What names the files comes after them, so that no one who reads
            # meanwhile takes a part for the whole.
            for patterns in (data, about):
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    repo_type="dataset",
                    allow_patterns=list(patterns),
                    commit_message=message,
                )
            return f"{api.endpoint}/datasets/{repo_id}"
    except UserError as error:
        hint = f"({folder} is whole: the same command with --resume uploads it)"
        raise type(error)(f"{error} {hint}") from None
