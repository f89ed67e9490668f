"""Training steps of several CPU ranks, a thread each, against the same step on one of them.

Each rank brings as many tokens as the one rank has. So a global batch is as many times larger; ranks that share an SAE
exchange their tokens first, and each then has all of these and a part of the latents. Beside each time stands that of
the cost model of bigsae.plan for the rates of a rank that are measured in the same run (growth.py), of one rank while
the others wait, and of all while all work, and for the rate of an all_reduce of a weight.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benching import growth, step
from benching.common import finish, paired_times, percentile, summarise

ALONE = "one rank"


def run(arguments: argparse.Namespace) -> None:
    """Print and write times and tokens a second of each mesh."""
    if torch.device(arguments.device).type != "cpu":
        raise SystemExit("bench.py step: --ranks starts ranks on the CPU: give --device cpu")
    latents = arguments.latent or [1, arguments.ranks]
    if any(arguments.ranks % latent for latent in latents):
        raise SystemExit(f"bench.py step: --latent must divide --ranks {arguments.ranks}")
    arguments.latent = latents
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank_main, (arguments, folder), arguments.ranks, start_method="spawn")
        seconds, models = torch.load(Path(folder) / "seconds.pt", weights_only=True)
    rows = summarise(seconds, ALONE)
    for name, row in rows.items():
        factor = 1 if name == ALONE else arguments.ranks
        ratios = [factor * a / b for a, b in zip(seconds[ALONE], seconds[name], strict=True)]
        row.update({f"tokens_ratio_p{p}": percentile(ratios, p) for p in (20, 50, 80)})
        row["tokens_per_second"] = factor * arguments.batch / percentile(seconds[name], 50)
        row |= models[name] | {"model_ratio_p50": row["ms_p50"] / models[name]["model_ms"]}
        print(
            f"{name}: {row['tokens_per_second']:.0f} tokens/s, {row['tokens_ratio_p50']:.2f} x one rank; "
            f"{row['ms_p50']:.0f} ms, model {row['model_ms']:.0f}"
        )
    finish(arguments, rows, ["torch"])


def _rank_main(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    num_ranks = arguments.ranks
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(LOCAL_WORLD_SIZE=str(num_ranks), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    functions, errors = _functions(rank, arguments)
    step.check_errors(errors, 1e-4)
    seconds = paired_times(functions, arguments.rounds, arguments.warmup)
    models = _models(arguments)
    if rank == 0:
        torch.save((seconds, models), f"{folder}/seconds.pt")
    dist.barrier()
    dist.destroy_process_group()


def _models(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What the cost model says of each mesh, with the rates it takes."""
    from bigsae.parallel.traffic import Payload, sent_bytes
    from bigsae.planning.stages import Mesh

    device, num_ranks = torch.device(arguments.device), arguments.ranks
    solo = growth.calibrate(device) if dist.get_rank() == 0 else {}
    dist.barrier()
    rates = growth.calibrate(device)
    weight = torch.zeros(arguments.d_sae, arguments.d_in)
    sent = sent_bytes(Payload("a weight", "all_reduce", "data", weight.nbytes), num_ranks)
    rates["link"] = sent / percentile(growth.times(lambda: dist.all_reduce(weight), device), 50)
    if not solo:
        return {}
    shape = (arguments.d_in, arguments.d_sae, arguments.k)
    models = {ALONE: growth.model(growth.Point("ranks", *shape, arguments.batch), arguments.arch, solo)}
    for latent in arguments.latent:
        point = growth.Point("ranks", *shape, num_ranks * arguments.batch)
        mesh = Mesh(num_ranks, num_ranks, 1, latent)
        models[f"data {num_ranks // latent} x latent {latent}"] = growth.model(
            point, arguments.arch, rates, mesh
        )
    return {
        name: {f"model_{key}": value for key, value in found.items()}
        | {f"{key}_per_second": rate for key, rate in (solo if name == ALONE else rates).items()}
        for name, found in models.items()
    }


def _functions(
    rank: int, arguments: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Of this rank: what is timed, and the squared error of each mesh on the first batch of all ranks."""
    from bigsae.parallel import collectives
    from bigsae.parallel.mesh import alone, build_mesh, share_latents

    mesh = build_mesh()
    parts = step.make_batches(arguments, mesh.device, seed=rank)
    first = collectives.gather(parts[0], mesh.world)
    solo = step.make_trainer(arguments, alone(mesh.device), first)
    step.settle(solo, arguments.settle, [collectives.gather(x, mesh.world) for x in parts])
    errors = {ALONE: step.contender(solo).squared_error(first)}
    functions = {ALONE: _only_first(rank, solo, parts)}
    for latent in arguments.latent:
        shared = share_latents(mesh, latent)
        trainer = step.make_trainer(arguments, shared, collectives.gather(parts[0], shared.latent))
        own = trainer.sae.shape.latents.own
        weights = solo.sae.state_dict()
        for name, parameter in trainer.sae.named_parameters():
            whole = weights[name]
            parameter.data.copy_(whole if name in trainer.sae.shared else own(whole))
        name = f"data {shared.num_data} x latent {latent}"
        error = step.contender(trainer).squared_error(collectives.gather(parts[0], shared.latent))
        errors[name] = float(collectives.sum_(torch.tensor(error), shared.data)) / shared.num_data
        functions[name] = _together(trainer, shared, parts)
    return functions, errors


def _only_first(rank: int, trainer: Any, parts: list[torch.Tensor]) -> Callable[[], None]:
    inputs = itertools.cycle(parts)

    def call() -> None:
        if rank == 0:
            trainer.train_step(next(inputs))
        dist.barrier()

    return call


def _together(trainer: Any, mesh: Any, parts: list[torch.Tensor]) -> Callable[[], None]:
    from bigsae.parallel import collectives

    inputs = itertools.cycle(parts)

    def call() -> None:
        trainer.train_step(collectives.gather(next(inputs), mesh.latent))
        dist.barrier()

    return call
