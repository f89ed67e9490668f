"""From options to results: the function behind `bigsae.evaluate`."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from bigsae.config import LMConfig, UserError, WandbConfig
from bigsae.configfile import to_dict
from bigsae.data.text import Text, open_text
from bigsae.evaluation.language import Batch
from bigsae.evaluation.measure import measure
from bigsae.evaluation.options import EvaluateConfig, check_options
from bigsae.evaluation.targets import check_widths, find_folders, model_of, read_saes, read_targets, run_of
from bigsae.hub.files import write_json
from bigsae.hub.secrets import without_secrets
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import locate
from bigsae.lm.kwargs import without_hub_kwargs
from bigsae.lm.loading import (
    download_lm,
    load_lm,
    meta_model,
    process_groups,
    resolve_layout,
)
from bigsae.lm.micro_batch import activation_elements, with_rows
from bigsae.parallel.launch import join_launch
from bigsae.parallel.mesh import Mesh, build_mesh
from bigsae.parallel.nodes import first_on_node, limit_waits, lost_peers_named

logger = logging.getLogger("bigsae")

_CTX_LEN = 256


def evaluate_saes(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the SAEs of `config` on its language model; every rank of the launch calls this.

    Returns on every rank what docs/evaluate.md describes, plain JSON values, which also go to `config.output`. Raises
    UserError for what the user can mend.
    """
    with lost_peers_named(config.timeout):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    check_options(config)
    accelerator = join_launch(config.timeout, ("wandb",) if config.wandb.project else ())
    mesh = build_mesh()
    limit_waits((mesh.world, mesh.control), config.timeout)
    if not mesh.is_main:
        datasets.disable_progress_bars()
        disable_progress_bar()
    folders = find_folders(config.saes)
    with first_on_node(mesh):
        saes = read_saes(folders)
    config = with_defaults(config, folders, [sae.metadata for sae in saes])
    assert config.model is not None and config.ctx_len is not None
    layout = resolve_layout(config.lm, mesh.num_ranks, mesh.num_local_ranks)
    with first_on_node(mesh):
        meta, _ = meta_model(config.model, config.lm)
    targets = read_targets(config, folders, saes, meta)
    sites = locate(meta, list({h.name: h for t in targets for h in (t.reads, t.predicts)}.values()))
    check_widths(targets, sites)
    with first_on_node(mesh):
        rows, keep = _rows(config, meta)
    with first_on_node(mesh):
        download_lm(config.model, config.lm, meta)
    model = load_lm(config.model, config.lm, meta, layout, mesh.device, sites, all_layers=config.ce)
    limit_waits(process_groups(model), config.timeout)
    for target in targets:
        target.sae.to(mesh.device)
    # At most an eighth of them, so that the ranks of a node share them.
    useful, elements = config.rows // 8 * config.ctx_len, activation_elements(meta, sites)
    config = replace(config, lm=with_rows(config.lm, config.ctx_len, elements, useful, mesh.device.type))
    logger.info(
        "%d SAEs on %d rows of %d tokens, %d a forward, %d ranks on %s, language model %s",
        len(targets), len(rows), config.ctx_len, config.lm.chosen_rows, mesh.num_ranks, mesh.device.type, layout,
    )  # fmt: skip
    batches = deal(rows, keep, config.lm.chosen_rows, mesh)
    measured = measure(Extractor(model, sites), batches, targets, config, mesh)
    results = _about(config, len(rows), int(keep.sum())) | measured
    if mesh.is_main and config.output is not None:
        write_json(Path(config.output), plain(results))
    _track(accelerator, config, results)
    return results


def with_defaults(
    config: EvaluateConfig, folders: Sequence[Path], metadata: Sequence[dict[str, Any]]
) -> EvaluateConfig:
    """`config` with what the SAEs and their run say in place of None. Raises UserError where neither says."""
    asked = config.dataset is None or config.model is None
    runs = [run_of(folder) if asked else None for folder in folders]
    if config.dataset is None:
        run = runs[0]
        if run is None:
            raise UserError(f"--dataset: {folders[0]} lies in no run of bigsae: name the text to measure on")
        ctx_len = config.ctx_len or run.ctx_len
        config = replace(config, dataset=run.dataset, data=run.data, seed=run.seed, ctx_len=ctx_len)
    if config.model is None:
        models = {model_of(run, said) for run, said in zip(runs, metadata, strict=True)} - {None}
        if len(models) != 1:
            names = ", ".join(sorted(" at ".join(filter(None, one)) for one in models if one))
            found = f"the SAEs name {names}" if names else "the SAEs do not name it"
            raise UserError(f"--model: {found}: set the language model to measure on")
        ((model, revision),) = filter(None, models)
        lm = replace(config.lm, revision=config.lm.revision or revision)
        if runs[0] is not None:
            theirs = {name: getattr(runs[0].lm, name) for name in ("dtype", "autocast", "kwargs")}
            lm = replace(lm, **{k: v for k, v in theirs.items() if getattr(lm, k) == getattr(LMConfig, k)})
        config = replace(config, model=model, lm=lm)
    if config.ctx_len is None:
        said = metadata[0].get("context_size")
        config = replace(config, ctx_len=said if isinstance(said, int) and said > 1 else _CTX_LEN)
    return config


def _rows(config: EvaluateConfig, meta: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids [n, ctx_len] and which of them count, the same on every rank."""
    assert config.model is not None and config.dataset is not None and config.ctx_len is not None
    data = replace(config.data, epochs=1)
    text = open_text(config.dataset, data, config.model, config.lm, meta.config, config.ctx_len)
    rows = some_rows(text, config.seed, config.rows)
    keep = text.kept(rows)
    if not keep.any():
        raise UserError(
            f"--dataset {config.dataset} holds special tokens alone: keep them with --data.no-drop-special-tokens"
        )
    return rows, keep


def some_rows(text: Text, seed: int, max_rows: int) -> Tensor:
    """[n, ctx_len] int64, n <= max_rows: of the documents held out where some are, else of all in a seeded order."""
    if text.data.heldout_documents:
        return text.heldout(seed, max_rows, 1, "--rows")
    with closing(text.rows(seed)) as rows:
        return torch.stack(list(itertools.islice(rows, max_rows)))


def deal(rows: Tensor, keep: Tensor, micro_batch_rows: int, mesh: Mesh) -> list[Batch]:
    """This rank's batches of at most `micro_batch_rows` rows: as many on every rank, which a sharded model needs.

    A rank for which no rows are left has a row of which nothing counts.
    """
    at_once = micro_batch_rows * mesh.num_ranks
    batches = []
    for first in range(0, len(rows), at_once):
        start = first + mesh.rank * micro_batch_rows
        ids, kept = rows[start : start + micro_batch_rows], keep[start : start + micro_batch_rows]
        if not len(ids):
            ids, kept = torch.zeros_like(rows[:1]), torch.zeros_like(keep[:1])
        batches.append(Batch(ids, kept))
    return batches


def _about(config: EvaluateConfig, num_rows: int, num_tokens: int) -> dict[str, Any]:
    left_out = [
        name
        for name, dropped in (
            ("first position", config.data.drop_first_position),
            ("special tokens", config.data.drop_special_tokens),
        )
        if dropped
    ]
    return {
        "model": config.model,
        "dataset": config.dataset,
        "heldout_documents": config.data.heldout_documents,
        "rows": num_rows,
        "ctx_len": config.ctx_len,
        "tokens": num_tokens,
        "left_out": left_out,
        "ablated": "everywhere" if config.ablate_everywhere else "where spliced",
    }


def plain(value: Any) -> Any:
    """`value` with None in place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _histogram(found: dict[str, Any]) -> tuple[list[str], list[list[float]]]:
    """The firing-density histogram as a table: its columns, and a row for each bar."""
    edges = found["log10_edges"]
    rows = [list(row) for row in zip(edges[:-1], edges[1:], found["num_latents"], strict=True)]
    return ["log10 density from", "to", "latents"], rows


def _track(accelerator: Accelerator, config: EvaluateConfig, results: dict[str, Any]) -> None:
    """The numbers to Weights & Biases, where a project is given."""
    wandb: WandbConfig = config.wandb
    if wandb.project is None:
        return
    folder = Path(config.output).parent if config.output is not None else Path()
    measured = {key: value for key, value in results.items() if key not in ("saes", "joint")}
    accelerator.init_trackers(
        wandb.project,
        config=without_secrets(to_dict(replace(config, lm=without_hub_kwargs(config.lm)))) | measured,
        init_kwargs={"wandb": {"name": wandb.name, "entity": wandb.entity, "dir": str(folder)}},
    )
    for tracker in accelerator.trackers:
        for name, values in results["saes"].items():
            columns, rows = _histogram(values["density_histogram"])
            tracker.log_table(f"{name}/density_histogram", columns, rows, step=0)
    parts = results["saes"] | ({"joint": results["joint"]} if results.get("joint") else {})
    numbers = {
        f"{name}/{key}": value
        for name, values in parts.items()
        for key, value in values.items()
        if isinstance(value, (int, float))
    }
    accelerator.log(numbers, step=0)
    for tracker in accelerator.trackers:  # not end_training(): a script may go on in the same process group
        tracker.finish()
