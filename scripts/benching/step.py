"""A training step against its encoder's matmul alone and against other trainers' steps.

Everything but the peers needs torch alone (on CUDA triton with it), so that it runs where nothing else is installed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benching import peers
from benching.common import finish, paired_times, percentile, summarise
from benching.peers import Contender, Problem

MATMUL = "encoder matmul alone"
OURS = "bigsae"
_NUM_BATCHES = 4
_TOLERANCE = {False: 1e-4, True: 2e-2}
"""Relative, of the squared error; by whether matmuls run in bfloat16."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py step`."""
    parser.add_argument("--arch", choices=("topk", "batchtopk", "jumprelu"), default="topk")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32, help="latents of a token; L0 that jumprelu starts from")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step, on each rank")
    parser.add_argument("--dead-share", type=float, default=0.0, help="also a step in which so many are dead")
    parser.add_argument("--peers", nargs="*", choices=[*peers.PEERS, "none"], default=list(peers.PEERS))
    parser.add_argument("--bf16", action="store_true", help="matmuls in bfloat16 where a trainer has that")
    parser.add_argument("--grad-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--settle", type=int, default=8, help="steps from the start to the weights that are timed"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="CPU ranks with a thread each, against one of them"
    )
    parser.add_argument(
        "--latent", type=int, nargs="*", help="with --ranks: ranks to an SAE. Default: 1, and all of them"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print bigsae's step by torch's profiler as well"
    )


def make_batches(arguments: argparse.Namespace, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Activations [batch, d_in] of mean norm √d_in: sums of a few directions out of many, some of them frequent."""
    generator = torch.Generator().manual_seed(seed)
    d_in, num_directions, num_active = arguments.d_in, 8 * arguments.d_in, 24
    directions = torch.randn(num_directions, d_in, generator=torch.Generator().manual_seed(1))
    frequencies = 1 / torch.arange(10, num_directions + 10).float()
    batches = []
    for _ in range(_NUM_BATCHES):
        picks = torch.multinomial(
            frequencies.expand(arguments.batch, -1), min(num_active, num_directions), generator=generator
        )
        strengths = torch.rand(picks.shape, generator=generator) + 0.5
        x = torch.nn.functional.embedding_bag(picks, directions, per_sample_weights=strengths, mode="sum")
        x += 0.3 * num_active**0.5 * torch.randn(x.shape, generator=generator)
        batches.append((x * (d_in**0.5 / x.norm(dim=1).mean())).to(device))
    return batches


def make_trainer(arguments: argparse.Namespace, mesh: Any, first: Tensor) -> Any:
    """bigsae's trainer as a run has it, initialised from `first`, [batch, d_in] of this rank. No latent dies."""
    from bigsae.config import OptimConfig, SAEConfig
    from bigsae.training.trainer import SAETrainer

    sparsity = {"target_l0": float(arguments.k)} if arguments.arch == "jumprelu" else {"k": arguments.k}
    config = SAEConfig(
        architecture=arguments.arch,
        d_sae=arguments.d_sae,
        autocast=arguments.bf16,
        dead_after_tokens=2**40,
        **sparsity,  # pyright: ignore[reportArgumentType]
    )
    optim = OptimConfig(lr=peers.LR, warmup_steps=0, grad_dtype=arguments.grad_dtype)
    trainer = SAETrainer(config, optim, arguments.d_in, None, 0, mesh)
    trainer.initialise(first)
    return trainer


def settle(trainer: Any, num_steps: int, batches: list[Tensor]) -> None:
    """Train so many steps."""
    for _, x in zip(range(num_steps), itertools.cycle(batches), strict=False):
        trainer.train_step(x)


def contender(trainer: Any, name: str = OURS, dead: Tensor | None = None) -> Contender:
    """bigsae's step; with `dead`, bool [d_own], each step takes these latents to be dead."""

    def step(x: Tensor) -> None:
        if dead is not None:
            trainer.firing.num_tokens_since_fired[dead] = trainer.firing.dead_after_tokens
        trainer.train_step(x)

    @torch.no_grad()
    def squared_error(x: Tensor) -> float:
        x, y = trainer._units(x, None)
        residual = trainer.sae.training_forward(x, y, trainer._context(y)).residual
        return float(residual.float().square().sum() / len(x))

    return Contender(name, step, squared_error)


def run(arguments: argparse.Namespace) -> None:
    """Times of a step on one rank, or on several (ranks.py)."""
    if arguments.ranks > 1:
        from benching import ranks

        ranks.run(arguments)
        return
    from bigsae.parallel.mesh import alone

    device = torch.device(arguments.device)
    batches = make_batches(arguments, device)
    trainer = make_trainer(arguments, alone(device), batches[0])
    settle(trainer, arguments.settle, batches)
    weights = {name: t.detach().clone() for name, t in trainer.sae.state_dict().items()}
    dead = None
    if arguments.dead_share:
        dead = torch.rand(arguments.d_sae, generator=torch.Generator().manual_seed(2)) < arguments.dead_share
        dead = dead.to(device)
    problem = Problem(
        arguments.arch,
        arguments.d_in,
        arguments.d_sae,
        arguments.k,
        arguments.batch,
        weights,
        dead,
        arguments.bf16,
    )
    ours = [contender(trainer)]
    if dead is not None:
        dying = make_trainer(arguments, alone(device), batches[0])
        dying.sae.load_state_dict(weights)
        ours.append(contender(dying, f"{OURS}, {arguments.dead_share:.0%} dead", dead))
    names = [] if "none" in arguments.peers else arguments.peers
    everyone = [*ours, *peers.contenders(names, problem)]
    check(everyone, batches[0], _TOLERANCE[arguments.bf16])
    functions = {MATMUL: matmul(weights["W_enc"], batches, arguments.bf16)}
    if device.type == "cuda":
        functions["a pass over weights and moments"] = streaming_pass(weights)
    functions |= {c.name: on_batches(c.step, batches) for c in everyone}
    seconds = paired_times(functions, arguments.rounds, arguments.warmup)
    rows = summarise(seconds, MATMUL)
    against_ours(rows, seconds)
    rows[OURS]["mean_l0_at_the_end"] = l0(trainer)
    print(f"mean L0 of {OURS} at the end: {rows[OURS]['mean_l0_at_the_end']:.1f}")
    finish(arguments, rows, installed("torch", "triton", *names))
    if arguments.profile:
        profile(functions[ours[-1].name], device)


def check(everyone: list[Contender], x: Tensor, tolerance: float) -> None:
    """From the same weights all must have the same squared error on `x` [batch, d_in]."""
    check_errors({c.name: c.squared_error(x) for c in everyone}, tolerance)


def check_errors(errors: dict[str, float], tolerance: float) -> None:
    """All must be the first one, within `tolerance` of it."""
    first, expected = next(iter(errors.items()))
    for name, found in errors.items():
        if not abs(found - expected) <= tolerance * expected:
            raise SystemExit(f"{name} has a squared error of {found} where {first} has {expected}: not timed")
    print(f"squared error {expected:.4f} a token, the same within {tolerance} of all {len(errors)}")


def matmul(W_enc: Tensor, batches: list[Tensor], bf16: bool) -> Callable[[], Any]:
    """x @ W_enc.T into memory that is there already."""
    dtype = torch.bfloat16 if bf16 else W_enc.dtype
    W_enc = W_enc.to(dtype, copy=True)
    inputs = itertools.cycle([x.to(dtype) for x in batches])
    out = torch.empty(len(batches[0]), len(W_enc), dtype=dtype, device=W_enc.device)
    return lambda: torch.mm(next(inputs), W_enc.T, out=out)


def streaming_pass(weights: dict[str, Tensor]) -> Callable[[], Any]:
    """Read and write both matrices and both of Adam's moments of each once."""
    tensors = [weights[name].clone() for name in ("W_enc", "W_dec") for _ in range(3)]
    return lambda: torch._foreach_mul_(tensors, 1.0)


def against_ours(rows: dict[str, dict[str, float]], seconds: dict[str, list[float]]) -> None:
    """Add to each row how many of bigsae's steps its time is, by pairs (20, 50, 80 %), and print the medians."""
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[OURS], strict=True)]
        row.update({f"to_bigsae_p{p}": percentile(ratios, p) for p in (20, 50, 80)})
    ratios = (
        f"{name} {row['to_bigsae_p50']:.2f}" for name, row in rows.items() if name not in (MATMUL, OURS)
    )
    print(f"in steps of {OURS}:", ", ".join(ratios))


def l0(trainer: Any) -> float:
    """Mean number of active latents of a token since the start."""
    return float(trainer.window.num_active) / trainer.window.num_tokens


def installed(*names: str) -> list[str]:
    """Those of the packages whose version is known."""
    found = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def profile(function: Callable[[], Any], device: torch.device, num_calls: int = 3) -> None:
    """Print where the time of `function` goes, operation by operation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(num_calls):
            function()
    kind = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages(group_by_input_shape=True).table(sort_by=kind, row_limit=40))


def on_batches(step: Callable[[Tensor], Any], batches: list[Tensor]) -> Callable[[], Any]:
    """`step` on the next batch, and after the last one the first again."""
    inputs = itertools.cycle(batches)
    return lambda: step(next(inputs))
