"""The quality of SAEs that bigsae trains, beside that of SAELens's own from the same activations.

python scripts/quality.py --model .quickstart/SmolLM2-135M --text .quickstart/sotu

Both trainers see the same batches in the same order, with the same width, sparsity target, learning rate and schedule,
Adam, clipping, warm-up of the sparsity loss, and window in which a latent is dead. All else is what each trainer takes
to be best. Both export, and both exports are judged as SAELens loads them: on synthetic activations whose features are
known, and on a real model's. A finished training is a line of <out>.jsonl and is not repeated while nothing it depends
on among the settings changes (delete the file after a change of code); the table goes to <out>.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quality_saelens
import quality_table
import torch
from benching.common import commit, machine
from torch import Tensor

from bigsae.checks import resolve_prefixes, resolve_sae
from bigsae.config import DataConfig, LMConfig, OptimConfig, SAEConfig
from bigsae.configfile import to_dict
from bigsae.seeds import derive_seed

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "standard")
TRAINERS = ("bigsae", "sae-lens")
CTX_LEN = 256
# Rows of CTX_LEN tokens, the beginnings of so many documents in turn.
HELDOUT_ROWS, HELDOUT_DOCUMENTS = 80, 16


@dataclass(frozen=True)
class Task:
    """Activations to train on, and what both trainers are told alike."""

    name: str
    d_in: int
    d_sae: int
    num_steps: int
    batch_size: int
    lr: float
    target: int
    """k, or L0 to aim at."""
    dead_steps: int
    coefficients: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Of the L1 penalty, by architecture. From several, FVU at an L0 of `target` is interpolated."""

    @property
    def warmup_steps(self) -> int:
        """Of the learning rate and of the sparsity loss."""
        return round(0.05 * self.num_steps)

    @property
    def decay_steps(self) -> int:
        """Last steps, over which the learning rate falls to zero."""
        return round(0.2 * self.num_steps)


@dataclass(frozen=True)
class Problem:
    """A task's activations."""

    train: Tensor
    """[num_steps * batch_size, d_in]"""
    order: Tensor
    """Permutation of the rows of `train`."""
    heldout: Tensor
    features: Tensor | None = None
    """[num_features, d_in]: the directions that synthetic activations are made of."""

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Batches [batch_size, d_in], float32, in the one order."""
        for rows in self.order.split(batch_size):
            yield self.train[rows].float()


@dataclass(frozen=True)
class Run:
    """One training."""

    task: Task
    architecture: str
    trainer: str
    seed: int
    settings: dict[str, Any]
    """Fields of the trainer's own configuration of the SAE that are not its defaults."""

    @property
    def identity(self) -> str:
        """Equal for runs that are the same; knows bigsae's defaults, so that a new one makes a new run."""
        decided = self.settings
        if self.trainer == "bigsae":
            decided = to_dict(resolve_sae(SAEConfig(**decided)))
        task = asdict(self.task)
        del task["coefficients"]  # this run's own is among its settings
        return json.dumps([task, self.architecture, self.trainer, self.seed, decided])


# -- what is trained ---------------------------------------------------------------------------------------------


def synthetic_task() -> Task:
    """256 features in 64 dimensions: as many latents, and on average as many of them as fire."""
    from sae_lens.synthetic import ZipfianFiringProbabilityConfig

    l0 = round(ZipfianFiringProbabilityConfig().generate(256).sum().item())
    penalties = {"gated": (3.0, 4.5), "standard": (2.0,)}
    return Task("synthetic", 64, 256, 1000, 1024, 3e-3, l0, 100, penalties)


def real_tasks(hookpoints: list[str], num_steps: int, d_in: int = 576) -> list[Task]:
    """SAEs of four times the width, on each hookpoint of SmolLM2-135M."""
    penalties = {"gated": (4.0, 8.0), "standard": (4.0, 8.0)}
    return [Task(name, d_in, 4 * d_in, num_steps, 1024, 2e-3, 32, 100, penalties) for name in hookpoints]


def plan(tasks: list[Task], seeds: dict[str, list[int]]) -> list[Run]:
    """Every training, task by task; `seeds` of each task by its name. What is compared comes in succession."""
    return [
        Run(task, architecture, trainer, seed, settings(task, architecture, trainer, coefficient))
        for task in tasks
        for seed in seeds[task.name]
        for architecture in ARCHITECTURES
        for coefficient in task.coefficients.get(architecture, (None,))
        for trainer in TRAINERS
    ]


def settings(task: Task, architecture: str, trainer: str, coefficient: float | None) -> dict[str, Any]:
    """Fields of the trainer's configuration of the SAE that are not its defaults."""
    sparsity: dict[str, Any] = {"l1_coefficient": coefficient}
    if architecture == "jumprelu":
        sparsity = {"target_l0": float(task.target)}
    elif coefficient is None:
        sparsity = {"k": task.target}
    if trainer == "bigsae":
        dead_after = task.dead_steps * task.batch_size
        ours = {"architecture": architecture, "d_sae": task.d_sae, "dead_after_tokens": dead_after}
        if architecture in ("jumprelu", "gated", "standard"):
            ours["sparsity_warmup_steps"] = task.warmup_steps
        if architecture == "gated":
            ours["resample_every_tokens"] = 2 * dead_after
        return {**ours, **sparsity}
    if architecture == "matryoshka":
        return {**sparsity, "matryoshka_widths": list(resolve_prefixes(SAEConfig(), task.d_sae))}
    if architecture == "jumprelu":
        # Its aux loss is off by default, and 3e-6 what its documentation names.
        aux = {"jumprelu_sparsity_loss_mode": "quadratic", "pre_act_loss_coefficient": 3e-6}
        return {**sparsity, **aux, "l0_warm_up_steps": task.warmup_steps}
    return sparsity if coefficient is None else {**sparsity, "l1_warm_up_steps": task.warmup_steps}


def train_bigsae(run: Run, problem: Problem, folder: Path) -> float:
    """Train by bigsae's own step and save what it would publish to `folder`; returns the seconds of training."""
    from bigsae.training.fit import fit_trainer

    task = run.task
    optim = OptimConfig(
        lr=task.lr, warmup_steps=task.warmup_steps, decay_fraction=task.decay_steps / task.num_steps
    )
    start = time.perf_counter()
    batches = problem.batches(task.batch_size)
    trainer = fit_trainer(batches, SAEConfig(**run.settings), optim, seed=run.seed, num_steps=task.num_steps)
    seconds = time.perf_counter() - start
    trainer.folded().save(str(folder))
    return seconds


def train_saelens(run: Run, problem: Problem, folder: Path) -> float:
    """As `train_bigsae`, by SAELens."""
    task = run.task
    schedule = quality_saelens.Schedule(
        task.num_steps, task.batch_size, task.lr, task.warmup_steps, task.decay_steps, task.dead_steps,
        num_scale_batches=-(-SAEConfig.init_tokens // task.batch_size),
    )  # fmt: skip
    widths = {"d_in": task.d_in, "d_sae": task.d_sae}
    sae = quality_saelens.build(run.architecture, {**widths, **run.settings}, run.seed)
    return quality_saelens.train(sae, schedule, lambda: problem.batches(task.batch_size), folder)


def perform(run: Run, problem: Problem) -> dict[str, Any]:
    """Train, export, judge: the line of the run."""
    train = train_bigsae if run.trainer == "bigsae" else train_saelens
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        seconds = train(run, problem, path)
        scores = quality_saelens.judge(path, problem.heldout, problem.features)
        if run.architecture in ("batchtopk", "matryoshka"):
            quality_saelens.move_threshold(path, problem.heldout, run.task.target)
            scores["fvu_at_target"] = quality_saelens.judge(path, problem.heldout, None)["fvu"]
    return {"run": json.loads(run.identity), "scores": scores, "seconds": seconds}


# -- activations -------------------------------------------------------------------------------------------------


def synthetic_problem(task: Task, seed: int, num_heldout: int = 20_000) -> Problem:
    """Features, their correlations and their activations from `seed`, by SAELens's generator with its defaults.

    Zipfian probabilities, low-rank correlations, directions as orthogonal as they can be; each feature fires with a
    magnitude of 1 ± 0.1.
    """
    from sae_lens.synthetic import (
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
    )

    config = SyntheticModelConfig(
        num_features=task.d_sae,
        hidden_dim=task.d_in,
        orthogonalization=OrthogonalizationConfig(),
        correlation=LowRankCorrelationConfig(),
        std_firing_magnitudes=0.1,
        seed=seed,
    )
    with torch.random.fork_rng(devices=[]), quality_saelens.quietly():
        model = SyntheticModel(config)
        torch.manual_seed(derive_seed(seed, "heldout"))
        heldout = model.sample(num_heldout)
        torch.manual_seed(derive_seed(seed, "train"))
        train = torch.cat([model.sample(task.batch_size) for _ in range(task.num_steps)])
    features = model.feature_dict.feature_vectors.detach()
    return Problem(train, torch.arange(len(train)), heldout, features)


def real_problems(model: str, text: str, tasks: list[Task]) -> dict[str, Problem]:
    """Activations of the model on the text, by bigsae's own reading of both: each hookpoint's, from the same tokens.

    Documents are held out whole; position 0 of each row and special tokens are left out.
    """
    from bigsae.data.tokens import TokenRows, heldout_rows, load_tokenizer, open_dataset, token_mask
    from bigsae.lm.activations import Extractor
    from bigsae.lm.hookpoints import locate, resolve_hookpoints
    from bigsae.lm.loading import load_lm, meta_model, resolve_layout

    lm, data = (
        LMConfig(dtype="float32", micro_batch_rows=8),
        DataConfig(heldout_documents=HELDOUT_DOCUMENTS, epochs=1),
    )
    meta, _ = meta_model(model, lm)
    sites = locate(meta, resolve_hookpoints([task.name for task in tasks], meta))
    tokenizer, source = load_tokenizer(model), open_dataset(text, data)
    loaded = load_lm(model, lm, meta, resolve_layout(lm, 1, 1, {}), torch.device("cpu"), sites)
    extract = Extractor(loaded, sites)
    num_tokens = tasks[0].num_steps * tasks[0].batch_size

    def harvest(rows: Iterator[Tensor], at_most: int | None) -> dict[str, Tensor]:
        """float16: the same ten bits of mantissa in a model of this size, in half the memory."""
        kept: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        num_kept = 0
        while (at_most is None or num_kept < at_most) and (micro := [*_take(rows, lm.chosen_rows)]):
            ids = torch.stack(micro)
            mask = token_mask(ids, tokenizer.all_special_ids, data)
            num_kept += int(mask.sum())
            for name, values in extract(ids).items():
                kept[name].append(values[mask].half())
        if at_most is not None and num_kept < at_most:
            raise SystemExit(f"--text holds {num_kept} tokens, --steps needs {at_most}: lower --steps")
        return {name: torch.cat(parts)[:at_most] for name, parts in kept.items()}

    rows = TokenRows(source, tokenizer, CTX_LEN, data, 0, 0, 1)
    heldout = harvest(iter(heldout_rows(source, tokenizer, CTX_LEN, data, 0, HELDOUT_ROWS)), None)
    train = harvest(rows, num_tokens)
    rows.close()
    assert all(x.isfinite().all() for x in (*heldout.values(), *train.values()))
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
    return {name: Problem(train[name], order, heldout[name]) for name in train}


def _take(rows: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _, row in zip(range(count), rows, strict=False):
        yield row


# -- running -----------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The finished runs of `path` by their identity."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {json.dumps(line["run"]): line for line in lines}


def perform_all(runs: list[Run], problem_of: Callable[[Run], Problem], path: Path) -> None:
    """Perform what `path` does not hold yet, and add it there."""
    finished = read_lines(path)
    waiting = [run for run in runs if run.identity not in finished]
    circumstances = {
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "sae-lens", "bigsae")},
        "commit": commit(),
    }
    for number, run in enumerate(waiting, 1):
        line = perform(run, problem_of(run))
        with path.open("a") as file:
            file.write(json.dumps({**line, **circumstances}) + "\n")
        scores = " ".join(f"{name} {value:.4g}" for name, value in line["scores"].items())
        what = f"{run.task.name} {run.architecture} {run.trainer} seed {run.seed}"
        print(f"{number}/{len(waiting)} {what}: {scores} ({line['seconds']:.0f} s)", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("synthetic", "real"), help="one half of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the synthetic half")
    parser.add_argument(
        "--real-seeds", type=int, nargs="+", default=[0], help="of the real half (SAEs alone)"
    )
    parser.add_argument("--model", default=".quickstart/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument("--text", default=".quickstart/sotu", help="as bigsae.train's --dataset")
    parser.add_argument("--hookpoints", nargs="+", default=["model.layers.6", "model.layers.6.mlp"])
    parser.add_argument("--steps", type=int, default=256, help="of each training in the real half")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/quality"), help="without its suffix")
    parser.add_argument("--table", action="store_true", help="only make the table of what has been trained")
    arguments = parser.parse_args(argv)

    synthetic, real = synthetic_task(), real_tasks(arguments.hookpoints, arguments.steps)
    halves = {"synthetic": [synthetic], "real": real}
    tasks = [task for half, group in halves.items() if arguments.only in (None, half) for task in group]
    seeds = {synthetic.name: arguments.seeds} | {task.name: arguments.real_seeds for task in real}
    runs = plan(tasks, seeds)
    path = arguments.out.with_suffix(".jsonl")
    if not arguments.table:
        path.parent.mkdir(parents=True, exist_ok=True)
        perform_all([run for run in runs if run.task is synthetic], _Synthetic(), path)
        perform_all([run for run in runs if run.task is not synthetic], _Real(arguments, real), path)
    command = " ".join(["python", "scripts/quality.py", *(sys.argv[1:] if argv is None else argv)])
    finished = read_lines(path)
    lines = [finished[run.identity] for run in runs if run.identity in finished]
    table = quality_table.table(lines, command.replace(" --table", ""))
    arguments.out.with_suffix(".md").write_text(table)
    print(table)


class _Synthetic:
    """Problems by seed; the last one is kept."""

    def __init__(self) -> None:
        self._seed: int | None = None

    def __call__(self, run: Run) -> Problem:
        if self._seed != run.seed:
            self._problem, self._seed = synthetic_problem(run.task, run.seed), run.seed
        return self._problem


class _Real:
    """Problems by task, harvested at the first question."""

    def __init__(self, arguments: argparse.Namespace, tasks: list[Task]) -> None:
        self._arguments, self._tasks = arguments, tasks
        self._problems: dict[str, Problem] = {}

    def __call__(self, run: Run) -> Problem:
        if not self._problems:
            self._problems = real_problems(self._arguments.model, self._arguments.text, self._tasks)
        return self._problems[run.task.name]


if __name__ == "__main__":
    main()
