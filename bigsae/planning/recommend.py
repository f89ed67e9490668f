"""The mesh for a run, and what would make one fit that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from bigsae.checks import check, check_divides, check_latent
from bigsae.config import UserError
from bigsae.lm.layout import resolve_layout
from bigsae.parallel.choose import Choice, choose_latent
from bigsae.parallel.memory import DTYPE_BYTES
from bigsae.planning.estimate import Estimate, bytes_of, estimate, first_tokens, gpu_of, memory_of, shapes_of
from bigsae.planning.model import LMFacts
from bigsae.planning.options import PlanConfig
from bigsae.planning.stages import Mesh

# How many times as many GPUs are tried before a run is given up.
_MORE_GPUS = (2, 4, 8, 16, 32, 64)


def check_plan(config: PlanConfig) -> None:
    """Find what is wrong with the values alone. Raises UserError."""
    for flag, value in (
        ("--gpus", config.gpus),
        ("--gpus-per-node", config.gpus_per_node),
        ("--memory-gib", config.memory_gib),
        ("--variants", config.variants),
    ):
        if value is not None and not value > 0:
            raise UserError(f"{flag} {value} must be greater than 0")
    if config.gpus % config.local_gpus:
        raise UserError(
            f"--gpus {config.gpus} makes no whole nodes of --gpus-per-node {config.gpus_per_node}: set it to a multiple"
        )
    check(config.as_run(), config.gpus)
    check_latent(config.mesh.latent, config.gpus)


def recommend(config: PlanConfig, facts: LMFacts) -> Estimate:
    """The run of `config` on the fastest mesh on which it fits; where it fits on none, on the one that needs least.

    What `config` says of the mesh stands. Raises UserError where it does not go together.
    """
    gpu = gpu_of(config)
    found = [_with_shards(config, facts, shard_size) for shard_size in _shard_sizes(config)]
    fitting = [e for e in found if e.fits]
    if fitting:
        return min(fitting, key=lambda e: (e.step_seconds(gpu), e.mesh.shard_size))
    return min(found, key=lambda e: e.bytes.peak)


def _shard_sizes(config: PlanConfig) -> list[int]:
    """How many ranks may hold one copy of the language model: a part of a node, or whole nodes."""
    lm, local = config.lm, config.local_gpus
    if lm.shard_size is not None or lm.replicate_size is not None:
        return [resolve_layout(lm, config.gpus, local, env={}).shard_size]
    sizes = range(1, config.gpus + 1)
    return [s for s in sizes if config.gpus % s == 0 and (local % s == 0 or s % local == 0)]


def _with_shards(config: PlanConfig, facts: LMFacts, shard_size: int) -> Estimate:
    mesh = Mesh(config.gpus, config.local_gpus, shard_size, 1, config.mesh.distribute_saes)
    saes = shapes_of(config, facts)
    memory = memory_of(config)
    if config.mesh.distribute_saes:
        return estimate(config, facts, mesh, "each SAE is held by one rank")
    if config.mesh.latent is not None:
        for shape in saes:
            check_divides(shape.d_sae, config.mesh.latent)
        return _on(config, facts, mesh, Choice(config.mesh.latent, f"latent {config.mesh.latent}: as given"))
    used = bytes_of(config, facts, saes, mesh)
    taken = used.lm + (0 if used.buffer_on_host else used.buffer)
    found: Estimate | None = None
    # A forward's memory is free again in a step. Only where the forward needs more than the step does it count here.
    for taken_in_step in (taken, taken + used.lm_step):
        choice = choose_latent(
            saes,
            config.gpus,
            config.local_gpus,
            config.batch_size_tokens,
            None if memory is None else memory - taken_in_step,
            shard_optimizer=config.mesh.shard_optimizer,
            accumulates=config.optim.accumulation_steps > 1,
            first_tokens=first_tokens(config),
            act_bytes=DTYPE_BYTES[config.buffer.dtype],
        )
        found = _on(config, facts, mesh, choice)
        if found.fits:
            break
    assert found is not None
    return found


def _on(config: PlanConfig, facts: LMFacts, mesh: Mesh, choice: Choice) -> Estimate:
    mesh = replace(mesh, num_latent=choice.num_latent)
    if config.mesh.shard_optimizer and mesh.num_data > 1:
        for shape in shapes_of(config, facts):
            if shape.d_sae % config.gpus:
                raise UserError(
                    f"--mesh.shard-optimizer: d_sae {shape.d_sae} cannot be cut into {config.gpus} equal parts: set "
                    f"--sae.d-sae to a multiple of {config.gpus}"
                )
    return estimate(config, facts, mesh, choice.reason)


def remedies(config: PlanConfig, facts: LMFacts) -> list[str]:
    """What would make a run fit that does not: each by itself, or where no flag does several together; or more GPUs."""
    options = list(_options(config))
    found = [
        f"{flag} {value}".strip() for flag, value, change in options if _would_fit(change(config), facts)
    ]
    if not found:
        found = _together(config, facts, options)
    for factor in _MORE_GPUS:
        if _would_fit(replace(config, gpus=config.gpus * factor), facts):
            return [*found, f"--gpus {config.gpus * factor}"]
    return found


def _together(config: PlanConfig, facts: LMFacts, options: Sequence[_Option]) -> list[str]:
    """As many of the options, in their order, as are enough; none where all are not."""
    flags: dict[str, str] = {}
    for flag, value, change in options:
        config, flags[flag] = change(config), value
        if _would_fit(config, facts):
            return [" ".join(f"{flag} {value}".strip() for flag, value in flags.items())]
    return []


def _would_fit(config: PlanConfig, facts: LMFacts) -> bool:
    try:
        check_plan(config)
        return recommend(config, facts).fits
    except UserError:  # a change that makes no valid run is no remedy
        return False


_Option = tuple[str, str, Callable[[PlanConfig], PlanConfig]]


def _options(config: PlanConfig) -> Iterator[_Option]:
    """Flags that save memory, their values and the functions that set them, from the one that costs least."""
    mesh, optim, rank_batch = config.mesh, config.optim, config.batch_size_tokens // config.gpus
    if mesh.latent is not None:
        yield "no --mesh.latent", "", lambda c: replace(c, mesh=replace(c.mesh, latent=None))
    if config.lm.shard_size is not None or config.lm.replicate_size is not None:
        free = replace(config.lm, shard_size=None, replicate_size=None)
        yield (
            "no --lm.shard-size",
            "",
            lambda c: replace(c, lm=replace(free, micro_batch_rows=c.lm.micro_batch_rows)),
        )
    if not mesh.shard_optimizer and not mesh.distribute_saes:
        yield "--mesh.shard-optimizer", "", lambda c: replace(c, mesh=replace(c.mesh, shard_optimizer=True))
    if (tokens := max(config.buffer.tokens // 4, rank_batch)) < config.buffer.tokens:
        yield "--buffer.tokens", str(tokens), lambda c: replace(c, buffer=replace(c.buffer, tokens=tokens))
    if config.buffer.device != "cpu" and config.gpu != "cpu":
        yield "--buffer.device", "cpu", lambda c: replace(c, buffer=replace(c.buffer, device="cpu"))
    if config.lm.chosen_rows > 1:
        yield "--lm.micro-batch-rows", "1", lambda c: replace(c, lm=replace(c.lm, micro_batch_rows=1))
    if optim.grad_dtype == "float32" and config.sae.dtype == "float32":
        grads = "bfloat16"
        yield "--optim.grad-dtype", grads, lambda c: replace(c, optim=replace(c.optim, grad_dtype=grads))
    if optim.moments_dtype == "float32" and config.sae.dtype == "float32":
        half = "bfloat16"
        yield "--optim.moments-dtype", half, lambda c: replace(c, optim=replace(c.optim, moments_dtype=half))
    if optim.moments_dtype != "int8":
        yield (
            "--optim.moments-dtype",
            "int8",
            lambda c: replace(c, optim=replace(c.optim, moments_dtype="int8")),
        )
