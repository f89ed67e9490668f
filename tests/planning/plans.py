"""Plans of runs: the configuration of a plan from that of a run, and the plan itself."""

from __future__ import annotations

from bigsae.config import TrainConfig
from bigsae.planning.estimate import Estimate
from bigsae.planning.model import LMFacts, lm_facts, with_chosen_rows
from bigsae.planning.options import PlanConfig
from bigsae.planning.recommend import check_plan, recommend


def plan_of_run(config: TrainConfig, num_ranks: int) -> PlanConfig:
    """The plan of `config` on `num_ranks` ranks of one machine without GPUs."""
    return PlanConfig(
        model=config.model,
        hookpoints=config.hookpoints,
        gpus=num_ranks,
        gpus_per_node=num_ranks,
        gpu="cpu",
        tokens=config.tokens,
        batch_size_tokens=config.batch_size_tokens,
        ctx_len=config.ctx_len,
        mesh=config.mesh,
        lm=config.lm,
        buffer=config.buffer,
        sae=config.sae,
        optim=config.optim,
        eval=config.eval,
    )


def planned(config: PlanConfig) -> tuple[LMFacts, Estimate]:
    """What the model costs, and the recommended run."""
    check_plan(config)
    facts = lm_facts(config)
    return facts, recommend(with_chosen_rows(config, facts), facts)
