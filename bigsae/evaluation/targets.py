"""Which SAEs are measured, and where each of them belongs in the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bigsae.config import TrainConfig, UserError, named
from bigsae.evaluation.options import EvaluateConfig
from bigsae.hub.formats import read_sae
from bigsae.hub.runs import find_saes, run_config
from bigsae.lm.hookpoints import Hookpoint, Site, resolve_hookpoints
from bigsae.sae.base import SAE


@dataclass(frozen=True)
class Target:
    """An SAE, or a transcoder, and its place."""

    name: str
    """What it is called in the results: its folder's name, or as much of the path as tells it from the others."""
    folder: str
    sae: SAE
    reads: Hookpoint
    predicts: Hookpoint


def find_folders(saes: Sequence[str]) -> list[Path]:
    """The folders of single SAEs, those within runs one by one. Raises UserError for a folder without any."""
    folders: list[Path] = []
    for given in saes:
        path = Path(given)
        if not path.is_dir():
            raise UserError(f"--saes: {given} is no folder: give that of a run or of an SAE")
        found = find_saes(path)
        if not found:
            what = "this run has written no SAE yet" if run_config(path) else "it holds no SAE"
            raise UserError(f"--saes: {given}: {what}: give another folder")
        folders += [path / name for name in found]
    if duplicates := {str(folder) for folder in folders if folders.count(folder) > 1}:
        raise UserError(f"--saes names {sorted(duplicates)[0]} twice: leave one of them out")
    return folders


def run_of(folder: Path) -> TrainConfig | None:
    """The configuration of the run that an SAE's folder lies in, or that it is; None where there is none."""
    for place in (folder, *folder.resolve().parents[:2]):
        if config := run_config(place):
            return config
    return None


def model_of(run: TrainConfig | None, metadata: dict[str, Any]) -> tuple[str, str | None] | None:
    """The language model, and its revision on the Hub, by an SAE's `run`, else by what it says itself."""
    if run is not None:
        return run.model, run.lm.revision
    name, kwargs = metadata.get("model_name"), metadata.get("model_from_pretrained_kwargs")
    if not isinstance(name, str):
        return None
    revision = kwargs.get("revision") if isinstance(kwargs, dict) else None
    return name, revision if isinstance(revision, str) else None


def read_targets(
    config: EvaluateConfig, folders: Sequence[Path], saes: Sequence[SAE], meta: PreTrainedModel
) -> list[Target]:
    """`saes`, read from `folders`, with their places in the model. Raises UserError where one cannot be told."""
    for flag, names in (
        ("--hookpoints", config.hookpoints),
        ("--output-hookpoints", config.output_hookpoints),
    ):
        if names and len(names) != len(folders):
            raise UserError(
                f"{flag} names {len(names)} hookpoints for {len(folders)} SAEs: give one for each"
            )
    targets = []
    for i, (name, folder, sae) in enumerate(zip(_short_names(folders), folders, saes, strict=True)):
        given = config.hookpoints[i] if config.hookpoints else None
        reads = find_hookpoint(sae, meta, given, str(folder), folder.name)
        predicts = reads
        if sae.is_transcoder:
            given = config.output_hookpoints[i] if config.output_hookpoints else None
            predicts = find_output_hookpoint(sae, meta, given, str(folder))
        elif config.output_hookpoints and config.output_hookpoints[i] != reads.name:
            raise UserError(
                f"--output-hookpoints {config.output_hookpoints[i]}: {folder} is no transcoder: give what it reads, "
                f"{reads.name}"
            )
        targets.append(Target(name, str(folder), sae, reads, predicts))
    return targets


def read_saes(folders: Sequence[Path]) -> list[SAE]:
    """The SAEs in `folders`, on the CPU."""
    with named("--saes"):
        return [read_sae(folder) for folder in folders]


def find_hookpoint(
    sae: SAE,
    model: PreTrainedModel,
    given: str | None,
    label: str,
    fallback: str | None = None,
    flag: str = "--hookpoints",
) -> Hookpoint:
    """The hookpoint that `sae` reads: the one `given`, or the one it names, or `fallback` where that is a module."""
    name = given or sae.metadata.get("hook_name")
    if name is None and fallback is not None and _module(fallback, model) is not None:
        name = fallback  # sparsify's folders are named after the module
    if not isinstance(name, str):
        raise UserError(f"{flag}: {label} does not say which activation it reads: name it")
    return _resolve(name, model, flag)


def find_output_hookpoint(
    sae: SAE, model: PreTrainedModel, given: str | None, label: str, flag: str = "--output-hookpoints"
) -> Hookpoint:
    """The hookpoint that the transcoder `sae` predicts: the one `given`, or the one it names."""
    name = given or sae.metadata.get("hook_name_out")
    if not isinstance(name, str):
        raise UserError(f"{flag}: {label} does not say which activation it predicts: name it")
    return _resolve(name, model, flag)


def _resolve(name: str, model: PreTrainedModel, flag: str) -> Hookpoint:
    found = resolve_hookpoints((_module(name, model) or name,), model, flag)
    if len(found) != 1:
        raise UserError(f"{flag} {name} names {len(found)} activations: give one for each SAE")
    return found[0]


def _module(name: str, model: PreTrainedModel) -> str | None:
    """`name` as a module of `model`; sparsify's begin below the part without the head."""
    modules = {path for path, _ in model.named_modules()}
    for full in (name, f"{model.base_model_prefix}.{name}"):
        if full.removesuffix(":input") in modules:
            return full
    return None


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Each folder by as few of its last parts as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def check_widths(targets: Sequence[Target], sites: Sequence[Site]) -> None:
    """Find SAEs that do not fit the activations of their hookpoints. Raises UserError."""
    widths = {site.name: site.d_in for site in sites}
    order = list(widths)
    for target in targets:
        for hookpoint, width, flag in (
            (target.reads, target.sae.d_in, "--hookpoints"),
            (target.predicts, target.sae.d_out, "--output-hookpoints"),
        ):
            if widths[hookpoint.name] != width:
                raise UserError(
                    f"{flag} {hookpoint.name} is {widths[hookpoint.name]} wide, {target.folder} {width}: "
                    "name the activation that it was trained on, or its own --model"
                )
        if order.index(target.predicts.name) < order.index(target.reads.name):
            raise UserError(
                f"--output-hookpoints {target.predicts.name} is computed before {target.reads.name}, from which "
                f"{target.folder} would predict it"
            )
