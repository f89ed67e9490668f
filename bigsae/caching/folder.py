"""The folder of a cache in the making: whether a command may use it, and whether the disk has room."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bigsae.caching.options import CacheConfig
from bigsae.config import UserError, lm_kwargs, short
from bigsae.lm.kwargs import without_hub_kwargs

logger = logging.getLogger("bigsae")

MADE = "cache.json"
"""What the cache is made with; a resume is compared with it."""
# What a finished or resumed cache may be asked for anew: nothing here changes what is written.
_MAY_CHANGE = ("output_dir", "resume", "timeout", "push_to_hub", "private")
_MAY_CHANGE_LM = ("shard_size", "replicate_size", "kwargs")
# Left to others on the disk.
_FREE_BYTES = 1 << 28


def identity(config: CacheConfig) -> dict[str, Any]:
    """What a resumed run may not change."""
    values = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    values["lm"] = {name: value for name, value in values["lm"].items() if name not in _MAY_CHANGE_LM}
    values["lm"]["kwargs"] = lm_kwargs(without_hub_kwargs(config.lm))
    return json.loads(json.dumps(values))


def check_folder(config: CacheConfig, folder: Path) -> None:
    """Refuse a folder that holds something this command does not continue. Raises UserError."""
    if (folder / MADE).exists():
        check_same(config, folder)
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"--output-dir {folder} holds other files: give a new folder")


def check_same(config: CacheConfig, folder: Path) -> None:
    if not config.resume:
        raise UserError(
            f"--output-dir {folder} already holds a cache: go on with --resume, or give another folder"
        )
    before = _read_made(folder)
    for name, value in identity(config).items():
        if before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"--resume: {flag} is {value!r}, the cache in {folder} has {short(before.get(name))}: give the "
                "same, or another --output-dir"
            )


def with_saved_rows(config: CacheConfig, folder: Path) -> CacheConfig:
    """`config` with the rows of a forward that the cache in `folder` has, where it is resumed and says none."""
    if not config.resume or config.lm.micro_batch_rows is not None or not (folder / MADE).exists():
        return config
    lm = _read_made(folder).get("lm")
    rows = lm.get("micro_batch_rows") if isinstance(lm, dict) else None
    # Anything else is found by check_same.
    return replace(config, lm=replace(config.lm, micro_batch_rows=rows)) if type(rows) is int else config


def _read_made(folder: Path) -> dict[str, Any]:
    """What the cache in `folder`, which is resumed, is made with. Raises UserError."""
    try:
        made = json.loads((folder / MADE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--resume: {folder / MADE} cannot be read ({error}): give another --output-dir"
        ) from None
    if not isinstance(made, dict):
        raise UserError(f"--resume: {folder / MADE} is not what was written: give another --output-dir")
    return made


def check_disk(config: CacheConfig, num_hookpoints: int, needed: int, shard: int) -> None:
    """Tell the bytes that are `needed` on disk, and of a `shard` in memory; refuse what cannot fit.

    Raises UserError.
    """
    room = Path(config.output_dir).absolute()
    while not room.exists():
        room = room.parent
    free = shutil.disk_usage(room).free
    logger.info(
        "%d hookpoints in %s: at most %s on disk (%s are free), %s of memory on each rank",
        num_hookpoints, config.dtype, _gib(needed), _gib(free), _gib(shard),
    )  # fmt: skip
    if needed + _FREE_BYTES > free:
        raise UserError(
            f"--output-dir {config.output_dir}: --tokens {config.tokens} at {num_hookpoints} hookpoints need "
            f"{_gib(needed)}, but {_gib(free)} are free: lower --tokens, name fewer --hookpoints, or take another disk"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
