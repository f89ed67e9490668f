"""From trained SAEs to a repository on the Hub, or a folder like one: a folder for each SAE, and a model card.

README.md                       the model card
<hookpoint>/…                   each SAE, in a sweep <hookpoint>/<variant>/
config.json  metrics.jsonl      of the run, where there is one
curves.svg                      its learning curves
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bigsae.config import HubConfig, TrainConfig, UserError, WandbConfig
from bigsae.configfile import to_dict
from bigsae.hub.card import Entry, entry, model_card
from bigsae.hub.curves import learning_curves
from bigsae.hub.files import write_atomic, write_json
from bigsae.hub.formats import FILES, SPARSITY, Format, default_format, read_sae, save_sae
from bigsae.hub.load import check_inside
from bigsae.hub.options import ExportConfig
from bigsae.hub.repository import commit_folder, open_repository
from bigsae.hub.runs import find_saes, read_rows, run_config
from bigsae.hub.secrets import without_secrets
from bigsae.hub.weights import read_safetensors
from bigsae.lm.kwargs import without_hub_kwargs
from bigsae.progress import Progress
from bigsae.sae.base import SAE

_CARD, _CURVES = "README.md", "curves.svg"


def export_run(config: ExportConfig) -> str:
    """Publish the SAEs in the folder `config.run` on the Hub, in one commit; and, or, write them to `config.output`.

    Returns the commit's address, or the folder. Raises UserError where there is nothing to export, a format cannot
    hold an SAE, or the Hub refuses; HubDown (one too) where it cannot be reached.
    """
    run = Path(config.run)
    if not run.is_dir():
        raise UserError(f"{run} is no folder: give that of a run")
    names = find_saes(run)
    if not names:
        raise UserError(f"{run} holds no SAE yet: finish its training (--resume), or give another folder")
    trained = run_config(run) if names != ["."] else None
    saes = ((name if name != "." else run.resolve().name, *_read(run, name)) for name in names)
    return _publish(saes, len(names), config, trained, read_rows(run) if trained else [])


def push_saes(
    saes: Mapping[str, SAE],
    repo_id: str,
    *,
    format: Format | None = None,
    private: bool = False,
    license: str = "unknown",
    base_model: str | None = None,
    dataset: str | None = None,
    message: str | None = None,
) -> str:
    """Publish `saes`, by the folders that they get, in the repository `repo_id` ("user/name"), in one commit.

    Options as of ExportConfig. Returns the commit's address. Raises UserError, and HubDown where the Hub is away.
    """
    for name in saes:
        check_inside(name)
    config = ExportConfig(
        "", repo_id, None, format, private, license, base_model, dataset, message or f"{len(saes)} SAEs"
    )
    return _publish(((name, sae, None) for name, sae in saes.items()), len(saes), config, None, [])


def _publish(
    saes: Iterable[tuple[str, SAE, Tensor | None]],
    num_saes: int,
    config: ExportConfig,
    trained: TrainConfig | None,
    rows: list[dict[str, Any]],
) -> str:
    """`trained` and `rows` (of metrics.jsonl) are of the run that the SAEs come from."""
    repo_id = config.push_to_hub
    if not num_saes:
        raise UserError("there is no SAE to export")
    if repo_id is None and config.output is None:
        raise UserError("nothing to do: set --push-to-hub user/name, or --output folder")
    if repo_id is not None:
        open_repository(repo_id, config.private, "--push-to-hub")
    with _folder(config.output, config.run) as folder:
        entries = []
        with Progress("exporting", num_saes, "SAEs") as progress:
            for name, sae, sparsity in saes:
                entries.append(_write(folder, name, sae, sparsity, config))
                progress.advance()
        if trained is not None:
            write_json(folder / "config.json", without_secrets(to_dict(_for_others(trained))))
        if rows:
            lines = "".join(json.dumps(without_secrets(row)) + "\n" for row in rows)
            write_atomic(folder / "metrics.jsonl", lambda path: path.write_text(lines))
        curves = learning_curves([e.name for e in entries], rows)
        if curves is not None:
            write_atomic(folder / _CURVES, lambda path: path.write_text(without_secrets(curves)))
        origin = entries[0].metadata
        card = model_card(
            repo_id or Path(str(config.output)).name,
            repo_id is not None,
            entries,
            trained,
            rows,
            str(config.base_model or (trained.model if trained else origin.get("model_name")) or ""),
            str(config.dataset or (trained.dataset if trained else origin.get("dataset_path")) or ""),
            config.license,
            _CURVES if curves is not None else None,
        )
        write_atomic(folder / _CARD, lambda path: path.write_text(without_secrets(card)))
        if repo_id is None:
            return str(folder)
        message = config.message or f"{num_saes} SAEs of {Path(config.run).resolve().name}"
        return commit_folder(folder, repo_id, message, "--push-to-hub")


def _for_others(config: TrainConfig) -> TrainConfig:
    """The run's configuration without where its author logs and publishes, and how this machine reaches the Hub."""
    return replace(
        config,
        output_dir=Path(config.output_dir).name,
        resume=False,
        log_with=(),
        wandb=WandbConfig(),
        hub=HubConfig(),
        lm=without_hub_kwargs(config.lm),
    )


@contextmanager
def _folder(output: str | Path | None, run: str | Path) -> Iterator[Path]:
    if output is None:
        # Beside the SAEs where that can be: they may be more than the system's temporary folder has room for.
        beside = run if run and os.access(run, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix=".bigsae-export-", dir=beside) as folder:
            yield Path(folder)
        return
    folder = Path(output)
    if run and folder.resolve().is_relative_to(Path(run).resolve()):
        raise UserError(f"--output {output} lies in {run}, whose SAEs are exported: give a folder beside it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {output} is there and not empty: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except UserError:
        shutil.rmtree(folder)  # it was new, or empty
        raise


def _write(folder: Path, name: str, sae: SAE, sparsity: Tensor | None, config: ExportConfig) -> Entry:
    """Write one SAE to its folder below `folder`. `sparsity` [d_sae] is log10 of how often latents fire."""
    origin = {"model_name": config.base_model, "dataset_path": config.dataset}
    sae = copy.copy(sae)  # the caller's keeps its metadata
    sae.metadata = without_secrets(sae.metadata | {key: value for key, value in origin.items() if value})
    format = config.format or default_format(sae)
    frequencies = None if sparsity is None else (10 ** sparsity.double() - 1e-10).clamp(min=0)
    try:
        save_sae(sae, folder / name, frequencies, format)
    except UserError as error:
        raise UserError(f"{name} cannot be exported as {format}: {error}") from None
    except OSError as error:
        raise UserError(
            f"{name} cannot be written to {folder} ({error.strerror}): make room there"
        ) from error
    return entry(name, sae, format)


def _read(run: Path, name: str) -> tuple[SAE, Tensor | None]:
    """The SAE, and log10 of how often its latents fire [d_sae] where that is known."""
    folder = run / name
    for file in FILES:
        if not (folder / file).resolve().is_relative_to(run.resolve()):
            raise UserError(f"{folder / file} leads out of {run}: it is not exported")
    sae = read_sae(folder)
    if not (folder / SPARSITY).exists():
        return sae, None
    sparsity = read_safetensors(folder / SPARSITY).get("sparsity")
    return sae, sparsity if sparsity is not None and sparsity.shape == (sae.d_sae,) else None
