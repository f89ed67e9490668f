"""Whole runs, from tokens to a saved SAE, of bigsae and of SAELens's runner: the same rows, their time and their FVU.

Each training is a process of its own; the trainers take turns. Its time begins when everything is loaded and ends with
the last step: the first filling of the buffer is in it, and for bigsae the starts that it takes from that. SAELens gets
a single batch to estimate the activations' scale from, as it throws it away. It is trained by its defaults, and with
its sparse activations.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benching.common import commit, machine, percentile

TRAINERS = ("bigsae", "sae-lens", "sae-lens, sparse")
_SCRIPT = Path(__file__).resolve().parent.parent / "bench.py"
_HELDOUT_DOCUMENTS = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py train`."""
    parser.set_defaults(rounds=2)
    parser.add_argument("--model", default=".quickstart/SmolLM2-135M", help="Hub id or folder")
    parser.add_argument("--text", default=".quickstart/sotu", help="as bigsae.train's --dataset")
    parser.add_argument("--hookpoint", default="model.layers.6")
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="token rows in one forward of the language model")
    parser.add_argument("--buffer", type=int, default=16384, help="activations that are shuffled together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--heldout-rows", type=int, default=32)
    parser.add_argument("--under", default="", help="command to run each training under, e.g. taskset -c 0,1")
    parser.add_argument("--one", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """The trainers in turn, and what they took."""
    if arguments.device != "cpu":
        raise SystemExit("the whole runs are compared on the CPU alone: set --device cpu")
    if arguments.one:
        ours = arguments.one == "bigsae"
        print(json.dumps(_train_bigsae(arguments) if ours else _train_saelens(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINERS}
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(arguments, Path(folder))
        for number in range(arguments.rounds):
            for name in TRAINERS if number % 2 == 0 else TRAINERS[::-1]:
                found[name].append(_one(arguments, name, Path(folder)))
                print(f"{number + 1}/{arguments.rounds} {name}: {found[name][-1]}", flush=True)
    _finish(arguments, found)


def _one(arguments: argparse.Namespace, trainer: str, home: Path) -> dict[str, float]:
    """A training in a process of its own, with the options of this one."""
    given = sys.argv[2:]
    own = ["--one", trainer, "--home", str(home)]
    command = [*arguments.under.split(), sys.executable, str(_SCRIPT), "train", *given, *own]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{trainer}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _write_inputs(arguments: argparse.Namespace, home: Path) -> None:
    """Rows to train on, as a dataset of input_ids, and the held-out documents' activations [tokens, d_in]."""
    import datasets

    from bigsae.config import DataConfig, LMConfig
    from bigsae.data.text import open_text
    from bigsae.lm.activations import Extractor
    from bigsae.lm.hookpoints import locate, resolve_hookpoints
    from bigsae.lm.loading import load_lm, meta_model, resolve_layout

    lm, data = LMConfig(dtype="float32"), DataConfig(heldout_documents=_HELDOUT_DOCUMENTS)
    meta, config = meta_model(arguments.model, lm)
    text = open_text(arguments.text, data, arguments.model, lm, config, arguments.ctx_len)
    rows = text.rows(0)
    # What the buffers hold at the end has been harvested and not trained on; special tokens are left out.
    num_rows = 2 * (arguments.steps * arguments.batch + 2 * arguments.buffer) // arguments.ctx_len
    ids = [next(rows).tolist() for _ in range(num_rows)]
    rows.close()
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(home / "rows"))
    sites = locate(meta, resolve_hookpoints([arguments.hookpoint], meta))
    model = load_lm(arguments.model, lm, meta, resolve_layout(lm, 1, 1, {}), torch.device("cpu"), sites)
    extract, kept = Extractor(model, sites), []
    for part in text.heldout(0, arguments.heldout_rows, 1, "--heldout-rows").split(arguments.rows):
        kept.append(extract(part)[sites[0].name][text.kept(part)])
    torch.save(torch.cat(kept), home / "heldout.pt")


def _judged(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """FVU and L0 on the held-out tokens of what was exported, as SAELens loads it."""
    import quality_saelens

    heldout: Tensor = torch.load(arguments.home / "heldout.pt", weights_only=True)
    return quality_saelens.judge(folder, heldout, None)


def _train_bigsae(arguments: argparse.Namespace) -> dict[str, float]:
    import bigsae

    with tempfile.TemporaryDirectory() as folder:
        config = bigsae.TrainConfig(
            model=arguments.model,
            dataset=str(arguments.home / "rows"),
            hookpoints=(arguments.hookpoint,),
            output_dir=folder + "/out",
            tokens=arguments.steps * arguments.batch,
            batch_size_tokens=arguments.batch,
            ctx_len=arguments.ctx_len,
            log_every=arguments.steps,
            lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=arguments.rows),
            buffer=bigsae.BufferConfig(tokens=arguments.buffer, dtype="float32"),
            sae=bigsae.SAEConfig(k=arguments.k, d_sae=arguments.d_sae),
            optim=bigsae.OptimConfig(lr=arguments.lr, warmup_steps=_warmup(arguments)),
            checkpoint=bigsae.CheckpointConfig(every=0),
            peak_tflops=(_matmul_tflops(),),
        )
        bigsae.train_saes(config)
        out = Path(config.output_dir)
        (row,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        names = ("lm_time_share", "lm_tflops", "sae_tflops", "lm_mfu", "sae_mfu")
        reached = {name: row[name] for name in names} | {"peak_tflops": config.peak_tflops[0]}
        return {"seconds": config.tokens / row["tokens_per_second"], **reached} | _judged(
            arguments, out / arguments.hookpoint
        )


def _train_saelens(arguments: argparse.Namespace) -> dict[str, float]:
    import datasets
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer
    from transformers import AutoConfig

    sparse = "sparse" in arguments.one
    taken: list[float] = []
    fit = SAETrainer.fit

    def timed_fit(self: Any) -> Any:
        begun = time.perf_counter()
        outcome = fit(self)
        taken.append(time.perf_counter() - begun)
        return outcome

    SAETrainer.fit = timed_fit  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        sae = TopKTrainingSAEConfig(
            d_in=AutoConfig.from_pretrained(arguments.model).hidden_size,
            d_sae=arguments.d_sae,
            k=arguments.k,
            # Gradients of the norms by which it rescales, its default, need dense activations.
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
            normalize_activations="expected_average_only_in",
            decoder_init_norm=0.1,
        )
        config = LanguageModelSAERunnerConfig(
            sae=sae,
            model_name=arguments.model,
            model_class_name="AutoModelForCausalLM",
            hook_name=arguments.hookpoint,
            dataset_path="rows",
            is_dataset_tokenized=True,
            streaming=False,
            context_size=arguments.ctx_len,
            training_tokens=arguments.steps * arguments.batch,
            train_batch_size_tokens=arguments.batch,
            store_batch_size_prompts=arguments.rows,
            n_batches_in_buffer=arguments.buffer // arguments.ctx_len,
            lr=arguments.lr,
            lr_warm_up_steps=_warmup(arguments),
            lr_decay_steps=arguments.steps // 5,
            n_batches_for_norm_estimate=1,
            exclude_special_tokens=True,
            device="cpu",
            seed=0,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=folder,
            verbose=False,
        )
        rows: Any = datasets.load_from_disk(str(arguments.home / "rows"))
        runner = LanguageModelSAETrainingRunner(config, override_dataset=rows)
        runner.run()
        return {"seconds": taken[0]} | _judged(arguments, Path(folder))


def _warmup(arguments: argparse.Namespace) -> int:
    return round(0.05 * arguments.steps)


def _matmul_tflops(size: int = 2048, rounds: int = 7) -> float:
    """What a large float32 matmul reaches here: the most that can be asked of this CPU."""
    a, b = torch.randn(2, size, size)
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        torch.mm(a, b)
        taken.append(time.perf_counter() - begun)
    return 2 * size**3 / min(taken) / 1e12


def _finish(arguments: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    """Every value, medians, and the paired ratio of the times."""
    tokens = arguments.steps * arguments.batch
    ratios = {
        name: [run["seconds"] / ours["seconds"] for run, ours in zip(runs, found["bigsae"], strict=True)]
        for name, runs in found.items()
    }
    medians = {
        name: {key: percentile([run[key] for run in runs], 50) for key in runs[0]}
        for name, runs in found.items()
    }
    width = max(map(len, TRAINERS))
    for name, values in medians.items():
        rate, ratio = tokens / values["seconds"], percentile(ratios[name], 50)
        print(
            f"{name:{width}} {rate:8,.0f} tokens/s  x {ratio:.2f}  fvu {values['fvu']:.4f}  l0 {values['l0']:.1f}"
        )
    if arguments.json is None:
        return
    hidden = ("json", "run", "one", "home", "under")
    record = {
        "benchmark": "train",
        "arguments": {key: value for key, value in vars(arguments).items() if key not in hidden},
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "nnsight", "sae-lens")},
        "commit": commit(),
        "tokens": tokens,
        "runs": found,
        "medians": medians,
        "seconds_by_bigsae_s": ratios,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")
