"""Small caches, and trainings from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bigsae
from tests.launch import write_corpus
from tests.models import tiny_llama

HOOKPOINTS = ("model.layers.0.mlp:input", "model.layers.0.mlp", "model.layers.1")
LM = bigsae.LMConfig(dtype="float32", micro_batch_rows=4)
DATA = bigsae.DataConfig(num_shards=8, heldout_documents=3)
CTX_LEN = 32


def make_home(folder: Path) -> Path:
    """A model in `folder`/lm and a text in `folder`/corpus.jsonl."""
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl")
    return folder


def cache_config(home: Path, out: Path, **options: Any) -> bigsae.CacheConfig:
    base: dict[str, Any] = {
        "model": str(home / "lm"), "dataset": str(home / "corpus.jsonl"), "hookpoints": HOOKPOINTS, "seed": 3,
        "output_dir": str(out), "tokens": 6000, "ctx_len": CTX_LEN, "dtype": "float32", "shard_tokens": 1024,
        "heldout_rows": 16, "lm": LM, "data": DATA,
    }  # fmt: skip
    return bigsae.CacheConfig(**(base | options))


def run_config(home: Path, out: Path, **options: Any) -> bigsae.TrainConfig:
    """A training on the fly on the rows of `cache_config`."""
    base: dict[str, Any] = {
        "model": str(home / "lm"), "dataset": str(home / "corpus.jsonl"), "hookpoints": HOOKPOINTS[1:], "seed": 3,
        "output_dir": str(out), "tokens": 30 * 128, "batch_size_tokens": 128, "ctx_len": CTX_LEN, "log_every": 7,
        "sae": bigsae.SAEConfig(k=4, d_sae=128, dead_after_tokens=1000, init_tokens=512),
        "optim": bigsae.OptimConfig(lr=1e-3), "lm": LM, "data": DATA,
        "buffer": bigsae.BufferConfig(tokens=512, dtype="float32"), "eval": bigsae.EvalConfig(every=10, rows=16),
    }  # fmt: skip
    return bigsae.TrainConfig(**(base | options))


def cached_config(cache: str | Path, home: Path, out: Path, **options: Any) -> bigsae.TrainConfig:
    """The same training, from `cache`: what the cache knows is left out."""
    left_out: dict[str, Any] = {
        "model": "", "dataset": "", "ctx_len": 256, "lm": bigsae.LMConfig(), "activations": str(cache),
        "data": bigsae.DataConfig(cached_order="as_made"),
    }  # fmt: skip
    return run_config(home, out, **(left_out | options))
