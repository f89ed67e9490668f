"""From folders of runs to the page: the function behind `bigsae.report`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bigsae.config import TrainConfig, UserError, lm_kwargs
from bigsae.configfile import flat, to_dict
from bigsae.hub.files import write_atomic
from bigsae.hub.formats import read_sae
from bigsae.reporting.costs import memory
from bigsae.reporting.curves import curves, last_values, time_spent
from bigsae.reporting.latents import Shown, describe_contexts, describe_weights
from bigsae.reporting.options import ReportConfig, check_report
from bigsae.reporting.page import page
from bigsae.reporting.runs import RunFolder, SAEFolder, read_runs
from bigsae.reporting.weights import Distributions, choose_latents, distributions, histograms

logger = logging.getLogger("bigsae")

# Options that say nothing of what was trained, or may hold a secret (an access token among the LM's arguments).
_NOT_SHOWN = ("output_dir", "resume", "timeout", "lm.kwargs", "wandb.project", "wandb.name", "wandb.entity")


def write_report(options: ReportConfig) -> Path:
    """Write the report that `options` describe and return its file.

    Where --no-contexts is not given, loads the language model as far as the last hookpoint, whole on one device. Raises
    UserError for folders that hold no run, latents that an SAE does not have, a model or dataset that is not there.
    """
    check_report(options)
    runs = read_runs(options.runs)
    output = Path(options.output) if options.output else runs[0].folder / "report.html"
    shown: dict[tuple[str, str], Shown] = {}
    found: dict[tuple[str, str], Distributions] = {}
    for run in runs:
        config = _opened_as(run.config, options)
        for sae in run.saes:
            if sae.is_written:
                key = (run.label, sae.name)
                logger.info("reading %s", sae.folder)
                shown[key], found[key] = _read_latents(sae, config, options)
    texts: list[str] = []
    if options.contexts and any(one.latents for one in shown.values()):
        texts = _contexts(list(shown.values()), options)
    pictures = dict(zip(found, histograms(list(found.values())), strict=True))
    saes = [
        _about_sae(run, number, sae, shown.get((run.label, sae.name)), pictures.get((run.label, sae.name)))
        for number, run in enumerate(runs)
        for sae in run.saes
    ]
    content = {
        "version": version("bigsae"),
        "runs": [_about_run(run, _opened_as(run.config, options)) for run in runs],
        "saes": _labelled(saes, several_runs=len(runs) > 1),
        "texts": texts,
        "contexts": options.contexts,
    }
    write_atomic(output, lambda path: path.write_text(page(content), encoding="utf-8"))
    logger.info("wrote %s (%.1f MB)", output, output.stat().st_size / 1e6)
    return output


def _opened_as(config: TrainConfig, options: ReportConfig) -> TrainConfig:
    """The run's `config`, for one process and one pass, with the model and dataset that `options` name.

    Code of a model's repository, or of a kernel's, runs only where this command, not the run's folder, allows it.
    """
    kwargs = lm_kwargs(config.lm)
    if not options.trust_remote_code:
        named = [
            name for name, value in kwargs.items() if name.endswith("_implementation") and "/" in str(value)
        ]
        for name in named:
            logger.warning("%s %s of --lm.kwargs is code from the Hub: left out (--trust-remote-code runs it)",
                           name, kwargs.pop(name))  # fmt: skip
    lm = replace(
        config.lm,
        shard_size=None,
        replicate_size=None,
        compile=False,
        kwargs=json.dumps(kwargs),
        revision=None if options.model else config.lm.revision,
        trust_remote_code=options.trust_remote_code,
    )
    data = replace(config.data, epochs=1)
    if options.dataset:
        data = replace(data, name=None, revision=None)
    return replace(
        config,
        model=options.model or config.model,
        dataset=options.dataset or config.dataset,
        lm=lm,
        data=data,
    )


def _read_latents(sae: SAEFolder, config: TrainConfig, options: ReportConfig) -> tuple[Shown, Distributions]:
    loaded = read_sae(sae.folder)
    found = distributions(loaded, sae.folder, options.seed)
    latents = choose_latents(
        options.latents, options.num_latents, loaded.d_sae, found.log_density, options.seed, str(sae.folder)
    )
    shown = Shown(sae.name, sae.hookpoint, config, loaded, latents)
    describe_weights(shown, found)
    return shown, found


def _contexts(shown: Sequence[Shown], options: ReportConfig) -> list[str]:
    try:
        return describe_contexts(shown, options)
    except UserError as error:
        raise UserError(f"{error} (--no-contexts leaves the language model out)") from error


def _about_run(run: RunFolder, opened: TrainConfig) -> dict[str, Any]:
    config = run.config
    return {
        "label": run.label,
        "status": run.status.get("status", "unknown"),
        "reason": run.status.get("reason", ""),
        "model": config.model,
        "dataset": config.dataset,
        "tokens": max((row["tokens"] for sae in run.saes for row in sae.rows), default=0),
        "planned": config.num_steps * config.batch_size_tokens,
        "time": time_spent(run.saes[0]) if run.saes else None,
        "memory": memory(run, replace(opened, lm=replace(opened.lm, shard_size=config.lm.shard_size))),
        "options": [[name, value] for name, value in _options(config)],
    }


def _options(config: TrainConfig) -> list[tuple[str, str]]:
    """Options that have a value and are shown, with their whole names."""
    return [
        (name, " ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in flat(to_dict(config)).items()
        if value is not None and value != [] and name not in _NOT_SHOWN
    ]


def _about_sae(
    run: RunFolder, number: int, sae: SAEFolder, shown: Shown | None, pictures: dict[str, Any] | None
) -> dict[str, Any]:
    about: dict[str, Any] = {
        "run": number,
        "run_label": run.label,
        "name": sae.name,
        "curves": curves(sae.rows),
        "last": last_values(sae.rows),
    }
    if shown is None:
        return about
    loaded = shown.sae
    about |= {
        "d_in": loaded.d_in,
        "d_sae": loaded.d_sae,
        "d_out": loaded.d_out if loaded.is_transcoder else None,
        "kind": loaded.architecture + (" transcoder" if loaded.is_transcoder else ""),
        "k": getattr(loaded, "k", None),
        "pictures": pictures,
        "about": shown.about,
        "latents": [shown.values[latent] for latent in shown.latents],
    }
    return about


def _labelled(saes: list[dict[str, Any]], *, several_runs: bool) -> list[dict[str, Any]]:
    """Each with the label that tells it from the others: its run, its name, or both."""
    names = {sae["name"] for sae in saes}
    for sae in saes:
        parts = [sae.pop("run_label")] if several_runs else []
        if not several_runs or len(names) > 1:
            parts.append(sae["name"])
        sae["label"] = " · ".join(parts)
    return saes
