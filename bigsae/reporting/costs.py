"""What a run took of each rank's memory, by the planner's formulas."""

from __future__ import annotations

from typing import Any

import torch

from bigsae.checks import resolve_d_sae, resolve_sae
from bigsae.config import TrainConfig, UserError
from bigsae.parallel.memory import sae_shape
from bigsae.planning.estimate import bytes_of
from bigsae.planning.model import lm_facts, with_chosen_rows
from bigsae.planning.options import PlanConfig
from bigsae.planning.stages import Mesh
from bigsae.reporting.runs import RunFolder
from bigsae.training.variants import variants


def memory(run: RunFolder, config: TrainConfig) -> dict[str, Any]:
    """{"parts": [[what, bytes], …], "ranks": how many} for the rank of `run` that holds most, or {"unknown": why}.

    `config` is the run's, with the place where its language model is now.
    Of the language model its configuration alone is read. Without a checkpoint nothing tells how many ranks there
    were: then all is on one.
    """
    ranks = run.num_ranks or 1
    plan = PlanConfig(
        model=config.model,
        hookpoints=config.hookpoints,
        gpus=ranks,
        gpus_per_node=ranks,
        gpu="h100" if torch.cuda.is_available() else "cpu",
        batch_size_tokens=config.batch_size_tokens,
        ctx_len=config.ctx_len,
        mesh=config.mesh,
        lm=config.lm,
        buffer=config.buffer,
        sae=config.sae,
        optim=config.optim,
        eval=config.eval,
    )
    try:
        facts = lm_facts(plan)
    except UserError as error:
        return {"unknown": str(error)}
    plan = with_chosen_rows(plan, facts)
    shapes = []
    for variant in variants(config):
        sae = resolve_sae(variant.sae, transcoder=bool(config.sae.output_hookpoint))
        for reads, predicts in facts.targets:
            d_in = facts.widths[reads]
            d_out = facts.widths[predicts] if config.sae.output_hookpoint else None
            shapes.append(sae_shape(sae, variant.optim, d_in, resolve_d_sae(sae, d_in), d_out))
    mesh = Mesh(
        ranks,
        ranks,
        min(config.lm.shard_size or 1, ranks),
        run.num_latent,
        config.mesh.distribute_saes and ranks > 1,
    )
    used = bytes_of(plan, facts, shapes, mesh)
    forward = [("language model", used.lm), ("a forward: gathered layers, activations", used.lm_step)]
    parts = [
        *([] if config.activations else forward),  # a cache stands in its place
        ("buffer", used.buffer),
        ("SAE weights", sum(s.weights for s in used.saes)),
        ("SAE moments", sum(s.moments for s in used.saes)),
        ("SAE statistics", sum(s.statistics for s in used.saes)),
        ("a step: gradients, slab, activations", used.sae_step),
    ]
    return {"parts": parts, "ranks": ranks, "known": run.num_ranks is not None}
