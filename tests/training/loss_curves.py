"""Short runs whose losses are stored: `python -m tests.training.loss_curves` writes loss_curves.json anew.

A change that is meant to leave every result as it was leaves these as they were. Where results are meant to change,
write them anew, and say in the commit why they moved.

Losses are compared to 1e-5 of themselves, as processors and math libraries round in their own ways. A run in which one
rounding decides which latent a token selects would tell them apart by more, so these are short, in float32 throughout,
and of few tokens: with the language model's weights moved at random by 1e-6 of themselves the losses moved by 2e-6, and
without the processor's vector instructions (ATEN_CPU_CAPABILITY=default, MKL_ENABLE_INSTRUCTIONS=SSE4_2) by 3e-7.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bigsae
from tests.launch import write_corpus
from tests.models import tiny_llama

STORED = Path(__file__).with_name("loss_curves.json")
NUM_STEPS = 100
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "jumprelu": {"target_l0": 4.0, "threshold_lr": 1e-3},
}


def write_inputs(home: Path) -> None:
    """The language model and the text of all runs, in `home`."""
    tiny_llama(home / "lm", num_layers=2)
    write_corpus(home / "corpus.jsonl", num_documents=60)


def configuration(architecture: str, home: Path, out: Path) -> bigsae.TrainConfig:
    """A run of NUM_STEPS steps, each of which is logged, from what lies in `home`."""
    return bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.1",),
        output_dir=str(out),
        tokens=32 * NUM_STEPS,
        batch_size_tokens=32,
        ctx_len=16,
        log_every=1,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=8),
        data=bigsae.DataConfig(num_shards=4, heldout_documents=2),
        buffer=bigsae.BufferConfig(tokens=512, dtype="float32"),
        sae=bigsae.SAEConfig(
            architecture=architecture,  # pyright: ignore[reportArgumentType]
            d_sae=64,
            **_OBJECTIVES[architecture],
        ),
        optim=bigsae.OptimConfig(lr=2e-3),
        checkpoint=bigsae.CheckpointConfig(every=0),
    )


def losses(out: Path) -> list[float]:
    """The loss of each step of the run in `out`."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    """Train, and store the losses."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_inputs(home)
        curves = {}
        for architecture in _OBJECTIVES:
            bigsae.train_saes(configuration(architecture, home, home / architecture))
            curves[architecture] = [float(f"{loss:.9g}") for loss in losses(home / architecture)]
    STORED.write_text(json.dumps(curves) + "\n")
    print(f"{STORED}: {', '.join(curves)}", file=sys.stderr)


if __name__ == "__main__":
    main()
