"""How many ranks hold one SAE between them, chosen from the widths, the ranks of a node and the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bigsae.parallel.memory import SAEShape, all_bytes, sae_bytes
from bigsae.parallel.traffic import StepShape, sent_bytes, step_payloads


@dataclass(frozen=True)
class Choice:
    """A mesh and why it is this one."""

    num_latent: int
    """Ranks that hold one SAE between them."""
    reason: str
    """A sentence with the numbers that decided."""


def choose_latent(
    saes: Sequence[SAEShape],
    num_ranks: int,
    num_local_ranks: int,
    batch_tokens: int,
    memory_bytes: int | None,
    *,
    shard_optimizer: bool = False,
    accumulates: bool = False,
    first_tokens: int = 0,
    act_bytes: int = 4,
    other_width: int = 0,
) -> Choice:
    """How many ranks should hold one SAE between them.

    Of the numbers that divide the ranks of a node, so that latents stay on its links, and every d_sae: the one that
    sends least, AuxK included, among those that fit into `memory_bytes`, what a rank has for its SAEs (None: not known,
    all fit); the smaller of equals. Where none fits, the smallest beyond a node that does. Where nothing does, the
    largest, and the reason says so. The other arguments are those of `sae_bytes`; `accumulates` that of `all_bytes`;
    `other_width`: of the hookpoints whose batches wait while one SAE steps.
    """

    def needs(num_latent: int) -> int:
        mesh = num_latent, num_ranks // num_latent, batch_tokens, shard_optimizer, first_tokens, act_bytes
        waiting = batch_tokens * num_latent // num_ranks * other_width * act_bytes
        return all_bytes([sae_bytes(shape, *mesh) for shape in saes], accumulates=accumulates) + waiting

    def sends(num_latent: int) -> float:
        steps = [step_shape(s, num_ranks, num_latent, batch_tokens, shard_optimizer, act_bytes) for s in saes]
        return sum(_sent(step) for step in steps)

    def fits(num_latent: int) -> bool:
        return memory_bytes is None or needs(num_latent) <= memory_bytes

    if num_ranks == 1:
        return Choice(1, "latent 1: there is one rank")
    possible = possible_latent(saes, num_ranks, shard_optimizer)
    within = [n for n in possible if num_local_ranks % n == 0]
    fitting = [n for n in within if fits(n)]
    if fitting:
        best = min(fitting, key=lambda n: (sends(n), n))
        # What would send less, but does not fit, is told of first.
        missed = [n for n in within if n not in fitting and sends(n) < sends(best)]
        reason = _by_traffic(best, missed or within, sends, any(shape.k_aux for shape in saes))
        if missed:
            assert memory_bytes is not None
            reason += f", but {_too_much(min(missed, key=sends), needs, memory_bytes)}"
        return Choice(best, reason)
    assert memory_bytes is not None
    beyond = next((n for n in possible if n > num_local_ranks and fits(n)), None)
    if beyond is not None:
        reason = f"latent {beyond}, over several nodes: {_too_much(within[-1], needs, memory_bytes)}"
        return Choice(beyond, reason)
    return Choice(possible[-1], f"nothing fits: {_too_much(possible[-1], needs, memory_bytes)}")


def possible_latent(saes: Sequence[SAEShape], num_ranks: int, shard_optimizer: bool) -> list[int]:
    """The numbers of ranks that can hold one of each of `saes` between them, ascending; 1 is always among them."""
    return [
        n
        for n in range(1, num_ranks + 1)
        if num_ranks % n == 0
        and (n == 1 or all(s.d_sae % (num_ranks if shard_optimizer else n) == 0 for s in saes))
    ]


def step_shape(
    sae: SAEShape,
    num_ranks: int,
    num_latent: int,
    batch_tokens: int,
    shard_optimizer: bool,
    act_bytes: int,
    *,
    with_auxk: bool = True,
) -> StepShape:
    """What decides a step's traffic; `with_auxk`: of one in which latents are dead, where the SAE has AuxK."""
    return StepShape(
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        # Latents that are selected over a batch, or by their own thresholds, are not gathered.
        k=int(sae.k) if sae.selects == "token" else 0,
        batch_tokens=batch_tokens,
        num_data=num_ranks // num_latent,
        num_latent=num_latent,
        d_out=sae.d_out if sae.transcoder else None,
        k_aux=sae.k_aux if sae.k_aux and with_auxk else None,
        grad_bytes=sae.grad_bytes,
        act_bytes=act_bytes,
        shard_optimizer=shard_optimizer,
        centred=sae.centred,
        num_vectors=sae.num_vectors,
        num_sums=sae.num_sums,
        weight_bytes=sae.weight_bytes,
        encoder_bytes=sae.encoder_bytes,
        skip=sae.skip,
    )


def _sent(step: StepShape) -> float:
    sizes = {"data": step.num_data, "latent": step.num_latent}
    return sum(sent_bytes(payload, sizes[payload.group]) for payload in step_payloads(step))


def _by_traffic(best: int, beside: Sequence[int], sends: Callable[[int], float], auxk: bool) -> str:
    """Why `best`: beside latent 1 where that is another one, else beside the one that sends least."""
    others = [n for n in beside if n != best]
    if not others:
        return f"latent {best}: no other number divides the ranks of a node and d_sae"
    other = 1 if 1 in others else min(others, key=sends)
    return (
        f"latent {best} moves {_amount(sends(best))} a step and rank{', AuxK included' * auxk}, latent {other} would "
        f"move {_amount(sends(other))}"
    )


def _too_much(num_latent: int, needs: Callable[[int], int], memory_bytes: int) -> str:
    return (
        f"latent {num_latent} would need {needs(num_latent) / 2**30:,.1f} GiB a rank, and "
        f"{max(memory_bytes, 0) / 2**30:,.1f} GiB are left for SAEs"
    )


def _amount(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
