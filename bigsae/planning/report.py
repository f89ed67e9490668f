"""A plan as numbers and as text."""

from __future__ import annotations

from typing import Any

from bigsae.planning.estimate import Estimate, gpu_of, shapes_of
from bigsae.planning.gpus import LINK_EFFICIENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, USABLE_MEMORY
from bigsae.planning.model import LMFacts
from bigsae.planning.options import PlanConfig
from bigsae.planning.stages import Stage

_GIB = 2**30


def as_numbers(config: PlanConfig, facts: LMFacts, plan: Estimate, remedies: list[str]) -> dict[str, Any]:
    """The plan as plain values: bytes, operations, seconds; those of `text` and of --json."""
    gpu, mesh = gpu_of(config), plan.mesh
    step = plan.step_seconds(gpu)
    per_second = config.batch_size_tokens / step
    numbers = {
        "model": config.model,
        "layers_loaded": facts.num_layers,
        "saes": [[s.d_in, s.d_sae, s.d_out] for s in shapes_of(config, facts)],
        "gpus": config.gpus,
        "gpus_per_node": config.gpus_per_node,
        "gpu": config.gpu,
        "mesh": {
            "shard_size": mesh.shard_size,
            "replicate_size": mesh.num_ranks // mesh.shard_size,
            "data": mesh.num_data,
            "latent": mesh.num_latent,
            "reason": plan.reason,
        },
        "micro_batch_rows": config.lm.chosen_rows,
        "bytes_per_rank": _bytes(plan),
        "memory": plan.memory,
        "checkpoint_bytes": plan.checkpoint,
        "checkpoint_copy_bytes": plan.bytes.checkpoint_copy,
        "stages": [_stage(stage, config, plan) for stage in plan.stages],
        "seconds_per_step": step,
        "tokens_per_second": per_second,
        "hours": config.tokens / per_second / 3600,
        "binds": "memory" if not plan.fits else plan.binding(gpu),
        "fits": plan.fits,
        "remedies": remedies,
    }
    if plan.auxk_stages:
        slower = config.batch_size_tokens / plan.step_seconds(gpu, with_auxk=True)
        numbers["tokens_per_second_with_dead_latents"] = slower
    return numbers


def _bytes(plan: Estimate) -> dict[str, int]:
    used = plan.bytes
    most = max(used.saes, key=lambda s: s.step)
    return {
        "language model, its shard": used.lm,
        "layers gathered for the forward": used.lm_unsharded,
        "activations of the forward": used.lm_activations,
        "buffer (host memory)" if used.buffer_on_host else "buffer": used.buffer,
        "SAE weights": sum(s.weights for s in used.saes),
        "SAE moments": sum(s.moments for s in used.saes),
        "SAE statistics": sum(s.statistics for s in used.saes),
        "SAE gradients": sum(s.gradients for s in used.saes) if used.accumulates else most.gradients,
        "SAE working copy": most.working_copy,
        "SAE slab": most.slab,
        "activations of the step": most.activations,
        "most at a time": used.peak,
    }


def _stage(stage: Stage, config: PlanConfig, plan: Estimate) -> dict[str, Any]:
    gpu = gpu_of(config)
    per_token = plan.mesh.num_ranks / config.batch_size_tokens
    return {
        "name": stage.name,
        "flops_per_token": stage.flops * per_token,
        "bytes_per_token": (stage.moved + stage.gathered) * per_token,
        "nvlink_bytes_per_step": stage.nvlink,
        "network_bytes_per_step": stage.network,
        "seconds_per_step": stage.seconds(gpu),
        "bound_by": stage.bound(gpu),
    }


def as_text(config: PlanConfig, numbers: dict[str, Any]) -> str:
    """The plan to read."""
    return "\n".join(
        [
            *_head(config, numbers),
            "",
            *_memory_table(numbers),
            "",
            *_stage_table(numbers),
            "",
            *_end(config, numbers),
        ]
    )


def _head(config: PlanConfig, numbers: dict[str, Any]) -> list[str]:
    mesh = numbers["mesh"]
    widths = sorted({f"{d_in:,} x {d_sae:,}" for d_in, d_sae, _ in numbers["saes"]})
    flags = f"--lm.shard-size {mesh['shard_size']} --mesh.latent {mesh['latent']}"
    held = (
        "one rank each" if config.mesh.distribute_saes else f"data {mesh['data']} x latent {mesh['latent']}"
    )
    return [
        f"{numbers['model']}: {_count(numbers['layers_loaded'], 'layer')}; "
        f"{_count(len(numbers['saes']), 'SAE')} of {', '.join(widths)}",
        f"{config.gpus} x {config.gpu}, {config.local_gpus} a node: language model {mesh['replicate_size']} copies of "
        f"{mesh['shard_size']} ranks, SAEs {held}",
        f"recommended: {'--mesh.distribute-saes ' * config.mesh.distribute_saes}{flags}",
        f"because {mesh['reason']}",
        f"a forward: {_count(numbers['micro_batch_rows'], 'row')} of {config.ctx_len:,} tokens on each rank",
    ]


def _memory_table(numbers: dict[str, Any]) -> list[str]:
    lines = [f"{'bytes per rank':<34}{'GiB':>10}"]
    lines += [f"  {name:<32}{amount / _GIB:>10,.3f}" for name, amount in numbers["bytes_per_rank"].items()]
    if numbers["memory"] is not None:
        lines.append(f"  {'there is':<32}{numbers['memory'] / _GIB:>10,.3f}")
    beside = {
        "a checkpoint on disk, at most": numbers["checkpoint_bytes"],
        "its copy (host memory), at most": numbers["checkpoint_copy_bytes"],
    }
    return [*lines, *(f"  {name:<32}{amount / _GIB:>10,.3f}" for name, amount in beside.items())]


def _stage_table(numbers: dict[str, Any]) -> list[str]:
    columns = f"{'a token':<18}{'FLOPs':>10}{'bytes':>10}  | {'a step and rank: NVLink':>23}{'network':>10}{'ms':>10}"
    lines = [f"{columns}  bound by"]
    for stage in numbers["stages"]:
        lines.append(
            f"  {stage['name']:<16}{_short(stage['flops_per_token']):>10}{_short(stage['bytes_per_token']):>10}  | "
            f"{_short(stage['nvlink_bytes_per_step']):>23}{_short(stage['network_bytes_per_step']):>10}"
            f"{1e3 * stage['seconds_per_step']:>10,.2f}  {stage['bound_by']}"
        )
    return lines


def _end(config: PlanConfig, numbers: dict[str, Any]) -> list[str]:
    speed = f"{numbers['tokens_per_second']:,.0f} tokens/s, {numbers['hours']:,.1f} hours for {config.tokens:,} tokens"
    lines = [f"speed: {speed}"]
    if "tokens_per_second_with_dead_latents" in numbers:
        slower = numbers["tokens_per_second_with_dead_latents"]
        lines.append(f"while latents are dead (AuxK), at least {slower:,.0f} tokens/s")
    lines.append(
        f"assumed: {MATMUL_EFFICIENCY:.0%} of the peak in matmuls, {MEMORY_EFFICIENCY:.0%} of the memory's and "
        f"{LINK_EFFICIENCY:.0%} of the links' bandwidth, {USABLE_MEMORY:.0%} of the memory; nothing was measured"
    )
    peak = numbers["bytes_per_rank"]["most at a time"] / _GIB
    there = "" if numbers["memory"] is None else f" of {numbers['memory'] / _GIB:,.1f}"
    if numbers["fits"]:
        unknown = " (the memory is not known: --memory-gib)" if numbers["memory"] is None else ""
        return [*lines, f"verdict: fits, {peak:,.1f}{there} GiB a rank{unknown}; {numbers['binds']} binds"]
    lines.append(f"verdict: does not fit, {peak:,.1f}{there} GiB a rank; memory binds")
    fixes = numbers["remedies"] or ["nothing that was tried: take a smaller --sae.d-sae"]
    return [*lines, "it would fit with one of:", *(f"  {fix}" for fix in fixes)]


def _short(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
