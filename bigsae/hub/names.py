"""How cards call models and datasets: those of the Hub by their names, those of this machine without their path."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE = re.compile(r".*\.(jsonl?|parquet|txt|csv|arrow)(\.(gz|zst|bz2|xz))?", re.IGNORECASE)


def is_hub_name(name: str) -> bool:
    """Whether `name` can be one of the Hub, and is no folder or file here."""
    return bool(_HUB_NAME.fullmatch(name)) and not _FILE.fullmatch(name) and not Path(name).exists()


def shown(name: str) -> str:
    """`name`, a model or dataset of the Hub or of this machine, in Markdown; of a path only its last part."""
    if not name:
        return "an unnamed source"
    if is_hub_name(name):
        return f"`{name}`"
    path = os.path.abspath(os.path.expanduser(name))
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    kind = "file" if _FILE.fullmatch(name) or os.path.isfile(path) else "folder"
    return f"`{last}` (a local {kind})"
