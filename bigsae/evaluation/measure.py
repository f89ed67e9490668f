"""All measurements of an evaluation: one pass for the reconstructions, one through the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigsae.evaluation.language import (
    CLEAN,
    Batch,
    Intervention,
    Scores,
    Splice,
    ablations,
    reconstructions,
    recovered,
    score,
)
from bigsae.evaluation.options import EvaluateConfig
from bigsae.evaluation.reconstruction import ReconstructionSums
from bigsae.evaluation.targets import Target
from bigsae.lm.activations import Extractor
from bigsae.parallel.mesh import Mesh
from bigsae.progress import Progress

_JOINT = "joint"


def measure(
    extractor: Extractor,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    config: EvaluateConfig,
    mesh: Mesh,
) -> dict[str, Any]:
    """Metrics of each target under "saes", by name, and of all spliced at once under "joint"; the same on every rank.

    "joint" is None for a single target, for several that replace the same activation, and without `config.ce`.
    """
    joint = len(targets) > 1 and len({t.predicts.name for t in targets}) == len(targets)
    num_sites = len({t.predicts.name for t in targets})
    num_forwards = 1 + (1 + len(targets) + 2 * num_sites + 3 * joint if config.ce else 0)
    with Progress("measuring", num_forwards * len(batches), "forwards", shown=mesh.is_main) as progress:
        sums = _reconstruct(extractor, batches, targets, mesh, progress)
        scores: dict[str, Scores] = {}
        if config.ce:
            means = {t.predicts.name: sums[t.name].mean() for t in targets}
            interventions = _interventions(targets, means, joint, config.ablate_everywhere)
            scores = score(extractor, batches, interventions, mesh.world, progress.advance)
    saes = {}
    for target in targets:
        metrics = _about(target) | sums[target.name].read(config.dense_above)
        if config.ce:
            metrics |= _of_model(scores, f"sae {target.name}", target.predicts.name)
        saes[target.name] = metrics
    return {"saes": saes, "joint": _of_model(scores, "sae", _JOINT) if joint and config.ce else None}


def _reconstruct(
    extractor: Extractor, batches: Sequence[Batch], targets: Sequence[Target], mesh: Mesh, progress: Progress
) -> dict[str, ReconstructionSums]:
    sums = {target.name: ReconstructionSums(target.sae) for target in targets}
    for batch in batches:
        chosen = batch.keep.flatten().nonzero().squeeze(1)
        kept = {
            name: values.flatten(0, 1)[chosen.to(values.device)]
            for name, values in extractor(batch.ids).items()
        }
        for target in targets:
            sums[target.name].add(kept[target.reads.name], kept[target.predicts.name])
        progress.advance()
    for one in sums.values():
        one.reduce_(mesh.world)
    return sums


def _interventions(
    targets: Sequence[Target], means: dict[str, Tensor], joint: bool, everywhere: bool
) -> dict[str, Intervention]:
    splices = {t.name: Splice(t.reads.name, t.predicts.name, t.sae) for t in targets}
    zeros = {name: torch.zeros_like(mean) for name, mean in means.items()}
    named = {f"sae {name}": reconstructions([splice]) for name, splice in splices.items()}
    for kind, values in (("zero", zeros), ("mean", means)):
        for name, value in values.items():
            named[f"{kind} {name}"] = ablations({name: value}, everywhere=everywhere)
        if joint:
            named[f"{kind} {_JOINT}"] = ablations(values, everywhere=everywhere)
    if joint:
        named["sae"] = reconstructions(list(splices.values()))
    return named


def _of_model(scores: dict[str, Scores], spliced: str, ablated: str) -> dict[str, float]:
    clean, sae = scores[CLEAN], scores[spliced]
    zero, mean = scores[f"zero {ablated}"], scores[f"mean {ablated}"]
    return {
        "ce_clean": clean.ce,
        "ce_spliced": sae.ce,
        "ce_zero": zero.ce,
        "ce_mean": mean.ce,
        "loss_recovered": recovered(zero.ce, sae.ce, clean.ce),
        "loss_recovered_mean": recovered(mean.ce, sae.ce, clean.ce),
        "kl_spliced": sae.kl,
        "kl_zero": zero.kl,
        "kl_mean": mean.kl,
        "kl_recovered": recovered(zero.kl, sae.kl, clean.kl),
    }


def _about(target: Target) -> dict[str, Any]:
    sae = target.sae
    return {
        "folder": target.folder,
        "architecture": sae.architecture,
        "hookpoint": target.reads.name,
        "output_hookpoint": target.predicts.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
    }
