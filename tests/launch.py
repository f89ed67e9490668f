"""The command as users run it: real processes, real models and text on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.models import english

ROOT = Path(__file__).parent.parent
TWO_RANKS = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "bigsae.train",
)  # fmt: skip
TIMINGS = (
    "tokens_per_second", "lm_time_share", "sae_time_share", "lm_tflops", "sae_tflops", "lm_mfu", "sae_mfu"
)  # fmt: skip
ONE_RANK = (sys.executable, "-m", "bigsae.train")


def write_corpus(path: Path, num_documents: int = 60, num_words: int = 150) -> Path:
    """A .jsonl of documents with a `text` column, no two alike."""
    with path.open("w") as file:
        for i in range(num_documents):
            file.write(json.dumps({"text": english(num_words + 7 * (i % 11), seed=i)}) + "\n")
    return path


def flags(**options: Any) -> list[str]:
    """Options as flags: `sae__k=3` is --sae.k 3, True is a bare flag, a tuple several values."""
    arguments = []
    for name, value in options.items():
        arguments.append("--" + name.replace("__", ".").replace("_", "-"))
        if value is not True:
            arguments += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return arguments


def environment() -> dict[str, str]:
    """This process's environment, with one thread a rank and nothing of a surrounding launch."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    }
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def start(command: tuple[str, ...], arguments: list[str]) -> subprocess.Popen[str]:
    """The command, running; stdout and stderr in one pipe."""
    return subprocess.Popen(
        [*command, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(command: tuple[str, ...], arguments: list[str], timeout: float = 240) -> tuple[int, str]:
    """Exit status and output of the command."""
    process = start(command, arguments)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what only times things."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def checkpoint_tensors(checkpoint: Path, scratch: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of every rank."""
    dcp_to_torch_save(checkpoint, scratch)
    return torch.load(scratch, weights_only=True)


def quickstart(out: Path, *flags: str) -> str:
    """What `scripts/quickstart.sh` prints, for a run in `out` with more `flags`."""
    env = {
        k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "TRITON_INTERPRET", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--output-dir", str(out), *flags],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
