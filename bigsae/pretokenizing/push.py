"""A whole folder of tokens to the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from bigsae.config import UserError


def check_repository(repository: str, private: bool) -> None:
    """Make the repository where it is new: what forbids an upload is known before hours of work.

    Raises UserError where that fails.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push-to-hub {repository}: give it as user/name")
    with _hub_errors(repository):
        HfApi().create_repo(repository, repo_type="dataset", private=private, exist_ok=True)


def push(folder: Path, repository: str) -> str:
    """Upload `folder`; its address. An upload that breaks off goes on where it was, when it is asked for again.

    Raises UserError where that fails, or where the repository holds other data, which readers would mix with these.
    """
    ours = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    with _hub_errors(repository):
        api = HfApi()
        there = api.list_repo_files(repository, repo_type="dataset")
        others = sorted(name for name in there if name.endswith((".parquet", ".jsonl")) and name not in ours)
        if others:
            raise UserError(
                f"--push-to-hub {repository} holds other data ({others[0]}), which readers would mix with these rows: "
                "choose a new repository"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="dataset",
            commit_message="Token rows",
            ignore_patterns=[".*"],
        )
    return f"{api.endpoint}/datasets/{repository}"


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--push-to-hub {repository}: {reason}: mend that, then go on with --resume"
        ) from error
