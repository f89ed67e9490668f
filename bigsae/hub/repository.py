"""Asking the Hub: a repository, one commit of a folder's files, a download. The token is the environment's alone."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from bigsae.config import UserError
from bigsae.hub.formats import FILES

logger = logging.getLogger("bigsae")

OF_THE_RUN = ("config.json", "metrics.jsonl", "curves.svg")
"""At the top of a repository, of the run whose SAEs were pushed last."""

_REPO_ID = re.compile(r"[^/\\\s]+/[^/\\\s]+")
_FORBIDDEN = (401, 403)
_TOO_MANY_REQUESTS = 429


class HubDown(UserError):
    """The Hub, or the way to it, does not work now: the same may succeed later."""


def check_repo_id(repo_id: str, flag: str) -> None:
    """Find a `repo_id` that can be none. Raises UserError."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{flag} {repo_id}: {error}") from None
    if not _REPO_ID.fullmatch(repo_id):
        raise UserError(f"{flag} {repo_id}: write it as user/name")


def open_repository(
    repo_id: str, private: bool, flag: str, repo_type: Literal["model", "dataset"] = "model"
) -> None:
    """Make the repository `repo_id` where there is none. Raises UserError where it cannot be written to.

    One that is there keeps its visibility: a UserError where `private` is asked for and it is not.
    """
    check_repo_id(repo_id, flag)
    with hub_errors(f"{flag} {repo_id}"):
        if get_token() is None:
            raise UserError(f"{flag} {repo_id} needs an access token: set HF_TOKEN, or run `hf auth login`")
        api = HfApi()
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        # Which takes one that is there for made, also where others alone may write to it.
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UserError(
                f"{flag} {repo_id} exists and is public: make it private in its settings, name another, or leave out "
                "private"
            )


def commit_folder(folder: Path, repo_id: str, message: str, flag: str) -> str:
    """Put the files of `folder` into `repo_id` in one commit; its address. Raises UserError, HubDown.

    What an SAE's folder there holds in another format, and what is told of an earlier run, goes with the same commit.
    Files are uploaded first: whoever
    reads sees all of it or nothing, and what was uploaded before an interruption is not uploaded again.
    """
    paths = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    folders = {name.rpartition("/")[0] for name in paths if Path(name).name in FILES and "/" in name}
    with hub_errors(f"{flag} {repo_id}"):
        api = HfApi()
        stale = [
            name
            for name in api.list_repo_files(repo_id)
            if name not in paths
            and (name in OF_THE_RUN or (name.rpartition("/")[0] in folders and Path(name).name in FILES))
        ]
        operations = [
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
            *(CommitOperationAdd(name, path) for name, path in paths.items()),
        ]
        return api.create_commit(repo_id, operations, commit_message=message).commit_url


def download(
    repo_id: str,
    patterns: Sequence[str],
    revision: str | None,
    repo_type: Literal["model", "dataset"] = "model",
) -> Path:
    """The snapshot of `repo_id` in the cache, with its files that match one of `patterns`; `*` also takes slashes.

    Where the Hub is out of reach it is what the cache holds of the newest one known. Raises UserError, HubDown.
    """
    with hub_errors(repo_id):
        return Path(
            snapshot_download(repo_id, repo_type=repo_type, revision=revision, allow_patterns=list(patterns))
        )


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """What goes wrong between here and the Hub as a UserError that begins with `what`; HubDown where it may pass."""
    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{what} is no name of the Hub: {' '.join(str(error).split())}") from None
    except (HTTPError, EntryNotFoundError, ConnectionError, TimeoutError, RuntimeError) as error:
        raise _for_users(what, error) from None
    except json.JSONDecodeError:  # from huggingface_hub's reading of an error's page
        raise HubDown(
            f"{what}: the Hub does not work now (its answer is not JSON): try again later"
        ) from None
    except ValueError as error:  # how huggingface_hub tells of a card whose values the Hub does not know
        if not isinstance(error.__cause__, HfHubHTTPError):
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None


def _for_users(what: str, error: Exception) -> UserError:
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{what}: HF_HUB_OFFLINE is set: unset it to reach the Hub")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{what}: the Hub has no such revision")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"{what}: the Hub has no such repository, or none that you may see ({_status(error)}): check the name, and "
            "HF_TOKEN"
        )
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code in _FORBIDDEN:
            return UserError(
                f"{what}: the Hub refuses ({_status(error)}): HF_TOKEN must be of a token that may write"
            )
        if code >= 500 or code == _TOO_MANY_REQUESTS:
            return HubDown(f"{what}: the Hub does not work now ({_status(error)}): try again later")
        return UserError(f"{what}: the Hub refuses ({_status(error)})")
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return HubDown(f"{what}: the Hub cannot be reached ({type(error).__name__}): try again later")
    if isinstance(
        error, RuntimeError
    ):  # how huggingface_hub tells of an upload that failed after its retries
        why = type(error.__cause__ or error).__name__
        return HubDown(f"{what}: the upload was cut off ({why}), try again: it goes on from there")
    # Not in the cache, where it was looked for because of another error.
    cause = error.__cause__
    if isinstance(cause, (HfHubHTTPError, OfflineModeIsEnabled)):
        return _for_users(what, cause)
    return HubDown(f"{what}: the Hub cannot be reached, and the cache does not hold this: try again later")


def _status(error: HfHubHTTPError) -> str:
    message = " ".join((error.server_message or "").split())[:200]
    return f"HTTP {error.response.status_code}{', ' + message if message else ''}"
