"""Training from an activation cache (--activations): what stands in place of dataset and language model."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bigsae.config import DataConfig, LMConfig, TrainConfig, UserError, named
from bigsae.configfile import from_dict
from bigsae.data.activation_cache import ActivationCache
from bigsae.data.cache_index import INDEX, Index, read_index
from bigsae.data.cached_rows import CachedRows
from bigsae.data.harvest import Harvest
from bigsae.hub.repository import download
from bigsae.lm.hookpoints import match_names
from bigsae.parallel.mesh import Mesh
from bigsae.training.supply import build_harvest

logger = logging.getLogger("bigsae")

# What of --lm and --data decided the activations: the cache's own hold, and others are refused.
_LM = ("revision", "dtype", "autocast", "micro_batch_rows")
_DATA = (
    "split", "name", "revision", "text_column", "streaming", "heldout_documents", "heldout_seed",
    "drop_first_position", "drop_special_tokens",
)  # fmt: skip
# What a run from a cache sets for itself.
_OWN = ("epochs", "num_shards", "cached_order")
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class FoundCache:
    """A cache whose index was read; of one on the Hub nothing else is here yet."""

    name: str
    """As the user gave it."""
    folder: Path
    index: Index
    repository: str | None = None
    commit: str | None = None


@named("--activations")
def find_cache(name: str) -> FoundCache:
    """The cache of `--activations name`, a folder or on the Hub (its index is downloaded). Raises UserError."""
    if (folder := Path(name).expanduser()).is_dir():
        if not (folder / INDEX).exists():
            raise UserError(
                f"--activations {name} holds no {INDEX}: give the folder of a finished cache (bigsae.cache_activations "
                "--resume finishes one that was stopped)"
            )
        return FoundCache(name, folder, read_index(folder / INDEX))
    parsed = _HUB_ID.fullmatch(name)
    if parsed is None:
        raise UserError(f"--activations {name}: there is no such folder")
    repository, revision = parsed.groups()
    folder = _download(name, repository, revision, [INDEX])
    # The commit, so that files and index belong together even if the repository changes meanwhile.
    return FoundCache(name, folder, read_index(folder / INDEX), repository, folder.name)


@named("--activations")
def open_cache(found: FoundCache, hookpoints: Sequence[str]) -> ActivationCache:
    """The cache with the files of `hookpoints`; from the Hub these are downloaded now. Raises UserError."""
    if found.repository is None:
        return ActivationCache(found.folder, found.index, hookpoints)
    wanted = [file.file for shard in found.index.shards
              for file in (shard.tokens, *(shard.activations[name] for name in hookpoints))]  # fmt: skip
    folder = _download(found.name, found.repository, found.commit, [_literal(file) for file in wanted])
    # In the Hub's cache files are links to blobs/, beside snapshots/<commit>/.
    return ActivationCache(folder, found.index, hookpoints, root=folder.parent.parent)


def _literal(file: str) -> str:
    """`file` as an fnmatch pattern of itself alone."""
    return re.sub(r"([*?[])", r"[\1]", file)


def _download(name: str, repository: str, revision: str | None, files: list[str]) -> Path:
    try:
        return download(repository, files, revision, "dataset")
    except UserError as error:
        raise type(error)(
            f"--activations {name}: there is no such folder, and it cannot be read from the Hub: {error}"
        ) from None


def with_origin(config: TrainConfig, found: FoundCache) -> TrainConfig:
    """`config` with what the cache decides: model, dataset, rows and how they were made.

    Raises UserError where `config` asks for something else.
    """
    index = found.index
    data = index.data
    if data.get("heldout_documents") and data.get("heldout_seed") is None:
        data = data | {"heldout_seed": index.seed}
    origin = {"model": index.model, "dataset": index.dataset, "ctx_len": index.ctx_len}
    values = {
        name: _agreed(found, f"--{name.replace('_', '-')}", getattr(config, name), default, origin[name])
        for name, default in (("model", ""), ("dataset", ""), ("ctx_len", TrainConfig.ctx_len))
    }
    return replace(
        config,
        **values,
        hookpoints=config.hookpoints or tuple(index.hookpoints),
        lm=_options(config.lm, LMConfig, _made(LMConfig, index.lm, _LM, found), "--lm", found),
        data=_options(config.data, DataConfig, _made(DataConfig, data, _DATA, found), "--data", found),
    )


def _made(cls: type, values: dict[str, Any], names: Sequence[str], found: FoundCache) -> Any:
    """The options `names` with which the cache was made, others as by default."""
    known = {name: value for name, value in values.items() if name in names}
    return from_dict(cls, known, f"--activations {found.name}: {INDEX}")


def _options(ours: Any, cls: type, made: Any, flag: str, found: FoundCache) -> Any:
    values = {}
    for f in fields(cls):
        own, theirs = getattr(ours, f.name), getattr(made, f.name)
        if f.name in _OWN or (
            f.name == "micro_batch_rows" and own != f.default
        ):  # rows that are read at a time
            values[f.name] = own
        else:
            name = f"{flag}.{f.name.replace('_', '-')}"
            values[f.name] = _agreed(found, name, own, f.default, theirs)
    return replace(ours, **values)


def _agreed(found: FoundCache, flag: str, own: Any, default: Any, made: Any) -> Any:
    """What the cache was made with; a value of the user's own must be the same."""
    if own not in (default, made):
        raise UserError(
            f"{flag} is {own!r}, but --activations {found.name} was made with {made!r}: leave {flag} out"
        )
    return made


def cached_targets(config: TrainConfig, index: Index) -> list[tuple[str, str]]:
    """What each SAE reads and what it predicts, in the order of the forward. Raises UserError."""
    names = list(index.hookpoints)
    reads = match_names(config.hookpoints, names)
    if not config.sae.output_hookpoint:
        return [(name, name) for name in sorted(reads, key=names.index)]
    predicted = match_names(config.sae.output_hookpoint, names, flag="--sae.output-hookpoint")
    if len(reads) != len(predicted):
        raise UserError(
            f"--hookpoints names {len(reads)} activations and --sae.output-hookpoint {len(predicted)}: they pair up "
            "one to one"
        )
    pairs = list(zip(reads, predicted, strict=True))
    for ours, theirs in pairs:
        if ours == theirs:
            raise UserError(
                f"--sae.output-hookpoint {theirs} is what it is predicted from: name another, or none"
            )
    return sorted(pairs, key=lambda pair: names.index(pair[0]))


def cached_harvest(
    config: TrainConfig, cache: ActivationCache, label: str, mesh: Mesh
) -> tuple[Harvest, CachedRows, Tensor]:
    """What a run takes its activations from, its rows, and those that are never trained on. Raises UserError."""
    rows = CachedRows(cache, config.data, config.seed, mesh.rank, mesh.num_ranks, label)
    heldout = cache.heldout_rows()
    usable = min(len(heldout), config.eval.rows) // mesh.num_ranks * mesh.num_ranks
    if len(heldout) and not usable:
        if config.eval.rows < mesh.num_ranks:
            raise UserError(
                f"--eval.rows {config.eval.rows} is less than one for each of {mesh.num_ranks} ranks: raise it"
            )
        logger.warning(
            "--activations %s keeps %d rows aside, less than one for each of %d ranks: nothing is measured on them",
            label, len(heldout), mesh.num_ranks,
        )  # fmt: skip
    widths = {name: cache.index.hookpoints[name] for name in cache.hookpoints}
    harvest = build_harvest(config, widths, rows, cache, cache.kept_of, mesh)
    return harvest, rows, heldout[:usable]
