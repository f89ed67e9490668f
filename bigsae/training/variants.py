"""The SAEs of a run: one for each hookpoint, or with --sweep a grid of them on each, and who trains which."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bigsae.checks import check_optim, check_sae, check_together, resolve_d_sae
from bigsae.config import OptimConfig, SAEConfig, TrainConfig, UserError, short
from bigsae.configfile import from_dict, to_dict

_EXAMPLE = "sae.k=16,32 optim.lr=1e-4,2e-4"
# What all SAEs of a run share: hookpoints and targets are the run's, and activations come with one start of the SAEs.
_MOST = 4096
_LONGEST_NAME = 200
_NOT_SWEPT = ("output_hookpoint", "init_tokens")


@dataclass(frozen=True)
class Variant:
    """One SAE of a hookpoint."""

    name: str
    """Folder below the hookpoint's; empty without a sweep."""
    sae: SAEConfig
    optim: OptimConfig
    seed: int


@dataclass(frozen=True)
class Job:
    """One SAE of the run."""

    name: str
    """Its folder in the run's, and its name in metrics and checkpoints."""
    reads: str
    predicts: str
    """Hookpoints of its inputs and of its targets."""
    variant: Variant
    owner: int | None = None
    """The rank that trains it alone; None where all ranks do together."""


def variants(config: TrainConfig) -> list[Variant]:
    """What is trained on each hookpoint of `config`: one without --sweep. Raises UserError."""
    if not config.sweep:
        return [Variant("", config.sae, config.optim, config.seed)]
    made = [_variant(config, options) for options in _points(config.sweep)]
    names = [variant.name for variant in made]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep names {name} twice: leave one out")
    return made


def _points(sweep: Sequence[str]) -> list[dict[str, Any]]:
    """The options of each point of the grid, or of each entry of a file's list."""
    if len(sweep) == 1 and "=" not in sweep[0]:
        values = _read(sweep[0])
        if isinstance(values, list):
            if len(values) > _MOST:
                raise UserError(
                    f"--sweep {sweep[0][:100]} lists {len(values)} SAEs, at most {_MOST} can be: list fewer"
                )
            return [_options(point, sweep[0]) for point in values]
        grid = _options(values, sweep[0])
        for option, choices in grid.items():
            if choices == []:
                raise UserError(f"--sweep {sweep[0]}: {option} has no values: give some, or leave it out")
    else:
        grid = dict(map(_axis, sweep))
        if len(grid) < len(sweep):
            raise UserError(
                f"--sweep {' '.join(sweep)[:100]}: each option once, with all its values behind it"
            )
    axes = [value if isinstance(value, list) else [value] for value in grid.values()]
    if (number := math.prod(map(len, axes))) > _MOST:
        raise UserError(
            f"--sweep makes {number} SAEs on each hookpoint, at most {_MOST} can be: give fewer values"
        )
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*axes)]


def with_sweep_read(config: TrainConfig) -> TrainConfig:
    """`config` with the content of a --sweep file in the place of its path: the run is what it was, if that changes."""
    if len(config.sweep) != 1 or "=" in config.sweep[0]:
        return config
    return replace(config, sweep=(json.dumps(_read(config.sweep[0])),))


def _read(path: str) -> Any:
    """The values in the file at `path`, or in `path` itself, as the config.json of a run has them."""
    try:
        values = json.loads(path if path.startswith(("[", "{")) else Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"--sweep {path[:100]} cannot be read ({error.strerror}): give a .json file, or options like {_EXAMPLE}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--sweep {path[:100]} is not JSON ({error}): give a .json file, or options like {_EXAMPLE}"
        ) from None
    return values if isinstance(values, list) and values else _options(values, path)


def _options(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        raise UserError(
            f'--sweep {path[:100]}: give an object of lists, {{"sae.k": [16, 32]}}, or a list of objects, '
            '[{"sae.k": 16}]'
        )
    return values


def _axis(text: str) -> tuple[str, list[Any]]:
    option, equals, values = text.partition("=")
    if not equals or not values or not option:
        raise UserError(f"--sweep {text[:100]}: write options with their values, like {_EXAMPLE}")
    return option, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    """`text` as the number, bool or null that it is in JSON; else as the word."""
    try:
        return json.loads(text.replace("True", "true").replace("False", "false").replace("None", "null"))
    except (ValueError, RecursionError):
        return text


def _variant(config: TrainConfig, options: Mapping[str, Any]) -> Variant:
    sae, optim, seed = to_dict(config.sae), to_dict(config.optim), config.seed
    for option, value in options.items():
        room, _, name = option.replace("-", "_").rpartition(".")
        known = {"sae": SAEConfig, "optim": OptimConfig}
        if room in known and name in {f.name for f in fields(known[room])} and name not in _NOT_SWEPT:
            (sae if room == "sae" else optim)[name] = value
        elif (room, name) == ("", "seed") and type(value) is int and 0 <= value < 2**64:
            seed = value
        else:
            raise UserError(
                f"--sweep {option[:100]}={short(value)}: sweep options of --sae and --optim, or seed, like {_EXAMPLE}"
            )
    name = "-".join(
        f"{option.rpartition('.')[2].replace('-', '_')}_{_word(v)}" for option, v in options.items()
    )
    if len(name) > _LONGEST_NAME:
        raise UserError(
            f"--sweep {name[:40]}…: too long for the name of a folder: give fewer or shorter values"
        )
    return Variant(name, from_dict(SAEConfig, sae, "--sweep"), from_dict(OptimConfig, optim, "--sweep"), seed)


def _word(value: Any) -> str:
    """`value` as part of a folder's name."""
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]", "_", text)


def check_variants(config: TrainConfig, made: Sequence[Variant]) -> None:
    """Find what is wrong with the values of one of the SAEs alone. Raises UserError."""
    for variant in made:
        try:
            check_sae(variant.sae)
            check_optim(variant.optim)
            check_together(variant.sae, variant.optim, config.tokens)
        except UserError as error:
            raise UserError(f"{error} (--sweep: {variant.name})" if variant.name else str(error)) from None
        if variant.optim.accumulation_steps != config.optim.accumulation_steps:
            raise UserError(
                "--sweep optim.accumulation_steps: it decides the number of steps, of all SAEs alike"
            )


def make_jobs(
    targets: Sequence[tuple[str, str]],
    made: Sequence[Variant],
    widths: Mapping[str, int],
    num_owners: int | None,
) -> list[Job]:
    """Every SAE of the run: each of `made` on each of `targets`, pairs of hookpoints that are read and predicted.

    `widths` is that of each hookpoint. `num_owners` deals them to so many ranks, the largest first, each to the rank
    with the least to do.
    """
    jobs = [
        Job(f"{reads}/{variant.name}" if variant.name else reads, reads, predicts, variant)
        for reads, predicts in targets
        for variant in made
    ]
    costs = [resolve_d_sae(job.variant.sae, widths[job.reads]) * widths[job.reads] for job in jobs]
    if num_owners is None:
        return jobs
    owners = _dealt(costs, [job.reads for job in jobs], num_owners)
    return [replace(job, owner=owner) for job, owner in zip(jobs, owners, strict=True)]


def _dealt(costs: Sequence[int], reads: Sequence[str], num_owners: int) -> list[int]:
    """A rank for each SAE: as even as each to the one with least to do, and of such with few owners a hookpoint.

    Each owner of SAEs that read a hookpoint gets its activations.
    """
    plain, most = _deal(costs, reads, num_owners, 0)
    grouped, most_grouped = _deal(costs, reads, num_owners, most)
    return grouped if most_grouped <= most else plain


def _deal(costs: Sequence[int], reads: Sequence[str], num_owners: int, limit: int) -> tuple[list[int], int]:
    """The largest first, each to a rank that reads its hookpoint, up to `limit` of work, else to the idlest."""
    loads, owners = [0] * num_owners, [0] * len(costs)
    readers: dict[str, list[int]] = {}
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        known = readers.setdefault(reads[i], [])
        owner = next((r for r in known if loads[r] + costs[i] <= limit), loads.index(min(loads)))
        owners[i] = owner
        loads[owner] += costs[i]
        if owner not in known:
            known.append(owner)
    return owners, max(loads)
