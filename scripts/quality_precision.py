"""What numbers in bfloat16, and moments in int8, cost in quality.

python scripts/quality_precision.py --model .quickstart/SmolLM2-135M --text .quickstart/sotu

Trains the same TopK SAE on the same batches from the same start, with each choice of --optim.grad-dtype and
--optim.moments-dtype, on synthetic activations (several seeds) and on a real model's (without --model: not); then, over
2,000 steps, all in float32 beside all that can be in bfloat16: activations, the encoder's matmul (--sae.autocast),
gradients and moments. FVU and dead latents are those of held-out tokens in float32. A finished training is a line of
<out>.jsonl and is not repeated (delete the file after a change of code); the table goes to <out>.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benching.common import commit, machine
from quality import Problem, Task, read_lines, real_problems, synthetic_problem
from torch import Tensor

from bigsae.config import OptimConfig, SAEConfig
from bigsae.sae.topk import TopKSAE
from bigsae.training.fit import fit_trainer


@dataclass(frozen=True)
class Precision:
    """Types of the numbers that a training computes with. Weights are in float32."""

    grads: Any = "float32"
    moments: Any = "float32"
    encoder: str = "float32"
    activations: str = "float32"


ALL_BFLOAT16 = Precision("bfloat16", "bfloat16", "bfloat16", "bfloat16")
CHOICES = (
    Precision(),
    Precision("bfloat16", "float32"),
    Precision("float32", "bfloat16"),
    Precision("float32", "int8"),
    Precision("bfloat16", "bfloat16"),
    Precision("bfloat16", "int8"),
)
LONG_CHOICES = (Precision(), ALL_BFLOAT16)
LONG_STEPS = 2000
HEAD = """\
# Quality of TopK SAEs with numbers below float32

Made by `{command}` on {made_on}.

Means over seeds, ± half the range. FVU, and dead latents (those that never fire), of held-out tokens; the ratio is to
float32 of the same seed. Weights are float32 throughout. CPU s: of a training, with all that is in a step.
"""
SYNTHETIC = Task("synthetic", 256, 1024, 500, 512, 2e-3, 8, 100)
LONG_SYNTHETIC = Task("synthetic", 256, 1024, LONG_STEPS, 512, 2e-3, 8, 100)


def real_task(hookpoint: str, num_steps: int, batch_size: int) -> Task:
    """An SAE of four times the width of SmolLM2-135M."""
    return Task(hookpoint, 576, 2304, num_steps, batch_size, 2e-3, 32, 50)


def perform(task: Task, problem: Problem, seed: int, precision: Precision) -> dict[str, Any]:
    """Train and judge: the line of the run."""
    sae = SAEConfig(
        k=task.target,
        d_sae=task.d_sae,
        dead_after_tokens=task.dead_steps * task.batch_size,
        init_tokens=8 * task.batch_size,
        autocast=precision.encoder == "bfloat16",
    )
    optim = OptimConfig(
        lr=task.lr,
        warmup_steps=task.warmup_steps,
        grad_dtype=precision.grads,
        moments_dtype=precision.moments,
    )
    start = time.process_time()
    dtype = getattr(torch, precision.activations)
    batches = (batch.to(dtype).float() for batch in problem.batches(task.batch_size))
    trainer = fit_trainer(batches, sae, optim, seed=seed, num_steps=task.num_steps)
    seconds = time.process_time() - start
    trained = trainer.folded()
    assert isinstance(trained, TopKSAE)
    return {
        "run": identity(task, seed, precision),
        "scores": judge(trained, problem.heldout.float()),
        "seconds": seconds,
    }


def identity(task: Task, seed: int, precision: Precision) -> list[Any]:
    """Equal for runs that are the same."""
    return [asdict(task), seed, asdict(precision)]


@torch.no_grad()
def judge(sae: TopKSAE, heldout: Tensor) -> dict[str, float]:
    """FVU, and the part of the latents that never fire, on `heldout` [tokens, d_in]."""
    error, fired = 0.0, torch.zeros(sae.d_sae, dtype=torch.bool)
    for rows in heldout.split(2048):
        error += (rows - sae(rows)).square().sum().item()
        acts, indices = sae.encode_sparse(rows)
        fired[indices[acts > 0]] = True
    variance = (heldout - heldout.mean(0)).square().sum().item()
    return {"fvu": error / variance, "dead": 1 - fired.double().mean().item()}


def problems(task: Task, model: str, text: str) -> Callable[[int], Problem]:
    """The activations of a task for each seed: those of a real model are harvested once, where they are wanted."""
    if task.name == "synthetic":
        return partial(synthetic_problem, task)
    harvest = cache(lambda: real_problems(model, text, [task])[task.name])
    return lambda _seed: harvest()


def perform_all(
    task: Task,
    choices: Iterable[Precision],
    seeds: Iterable[int],
    problem_of: Callable[[int], Problem],
    path: Path,
) -> list[dict[str, Any]]:
    """The lines of a task, of which those that `path` does not hold yet are performed and added there."""
    finished, lines = read_lines(path), []
    circumstances = {
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "commit": commit(),
    }
    for seed in seeds:
        problem = None
        for choice in choices:
            key = json.dumps(identity(task, seed, choice))
            if key not in finished:
                problem = problem or problem_of(seed)
                finished[key] = perform(task, problem, seed, choice) | circumstances
                with path.open("a") as file:
                    file.write(json.dumps(finished[key]) + "\n")
                print(task.name, seed, choice, finished[key]["scores"], f"{finished[key]['seconds']:.0f} s")
            lines.append(finished[key])
    return lines


def table(task: Task, lines: list[dict[str, Any]]) -> str:
    """A section of the page: means over seeds."""
    by_choice: dict[Precision, dict[int, dict[str, Any]]] = {}
    for line in lines:
        _, seed, choice = line["run"]
        by_choice.setdefault(Precision(**choice), {})[seed] = line
    reference = by_choice[Precision()]
    seeds = ", ".join(map(str, reference))
    rows = [
        f"## {task.name}, {task.num_steps} steps",
        "",
        f"d_in {task.d_in}, d_sae {task.d_sae}, k {task.target}, {task.num_steps} steps of {task.batch_size}, "
        f"learning rate {task.lr}, seeds {seeds}.",
        "",
        "| gradients | moments | encoder | activations | FVU | FVU / float32's | dead | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for choice, runs in by_choice.items():
        ratios = [run["scores"]["fvu"] / reference[seed]["scores"]["fvu"] for seed, run in runs.items()]
        scores = [run["scores"] for run in runs.values()]
        seconds = statistics.mean(run["seconds"] for run in runs.values())
        rows.append(
            f"| {' | '.join(asdict(choice).values())} | {_spread([s['fvu'] for s in scores])} | {_spread(ratios)} | "
            f"{_spread([s['dead'] for s in scores])} | {seconds:.0f} |"
        )
    return "\n".join([*rows, ""])


def _spread(values: list[float]) -> str:
    """The mean, and half the range where there are several."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def _made_on(line: dict[str, Any]) -> str:
    machine, versions = line["machine"], line["versions"]
    what = [machine["cpu"], f"{machine['num_threads']} threads", *(f"{n} {v}" for n, v in versions.items())]
    return ", ".join([*what, f"commit {line['commit']}"])


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the synthetic part")
    parser.add_argument(
        "--real-seeds", type=int, nargs="+", default=[0], help="of the real part (SAEs alone)"
    )
    parser.add_argument("--model", help="Hub id or folder")
    parser.add_argument("--text", default=".quickstart/sotu", help="as bigsae.train's --dataset")
    parser.add_argument("--hookpoint", default="model.layers.6")
    parser.add_argument("--steps", type=int, default=128, help="of each training in the real part")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/precision"), help="without its suffix")
    arguments = parser.parse_args(argv)
    path = arguments.out.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)

    parts = [
        (SYNTHETIC, CHOICES, arguments.seeds),
        (LONG_SYNTHETIC, LONG_CHOICES, arguments.seeds),
    ]
    if arguments.model:
        parts += [
            (real_task(arguments.hookpoint, arguments.steps, 1024), CHOICES, arguments.real_seeds),
            (real_task(arguments.hookpoint, LONG_STEPS, 256), LONG_CHOICES, arguments.real_seeds),
        ]
    lines, sections = [], []
    for task, choices, seeds in parts:
        finished = perform_all(task, choices, seeds, problems(task, arguments.model, arguments.text), path)
        sections.append(table(task, finished))
        lines += finished
    command = " ".join(["python scripts/quality_precision.py", *(sys.argv[1:] if argv is None else argv)])
    page = "\n".join(
        [HEAD.format(command=command, made_on=", ".join(sorted(set(map(_made_on, lines))))), *sections]
    )
    arguments.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
