"""Finished runs of a tiny language model on text that wants to be markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import bigsae
from tests.models import english, tiny_llama

# Both in the text, which the tokenizer cuts to pieces, and as one token of its vocabulary.
EVIL_TEXT = "</script><img src=x onerror=\"window.harm='text'\"><script>window.harm='script'</script>"
EVIL_TOKEN = "</script><img/onerror=window.harm='token'/src=x>"
WIDTH = 24


@pytest.fixture(scope="package")
def home(tmp_path_factory) -> Path:
    """lm, corpus.jsonl, and two runs: `grid`, a sweep on two hookpoints with held-out text, and `plain`."""
    folder = tmp_path_factory.mktemp("reporting")
    tiny_llama(folder / "lm", num_layers=3)
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    tokenizer.add_tokens([EVIL_TOKEN])
    tokenizer.save_pretrained(folder / "lm")
    model = AutoModelForCausalLM.from_pretrained(folder / "lm")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "lm")
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(24):
            text = f"{english(6, seed=i)} {EVIL_TOKEN} {english(4, seed=i)} {EVIL_TEXT} {english(60, seed=i)}"
            file.write(json.dumps({"text": text}) + "\n")
    bigsae.train_saes(tiny_config(folder, "plain"))
    grid = tiny_config(
        folder,
        "grid",
        hookpoints=("model.layers.0", "model.layers.1.mlp"),
        sweep=("sae.k=2,4",),
        data=bigsae.DataConfig(num_shards=4, heldout_documents=4),
        eval=bigsae.EvalConfig(every=4),
    )
    bigsae.train_saes(grid)
    return folder


def tiny_config(home: Path, name: str, **options) -> bigsae.TrainConfig:
    """A run of a few steps in `home`/`name`."""
    return bigsae.TrainConfig(
        **{
            "model": str(home / "lm"),
            "dataset": str(home / "corpus.jsonl"),
            "hookpoints": ("model.layers.1",),
            "output_dir": str(home / name),
            "tokens": 64 * 10,
            "batch_size_tokens": 64,
            "ctx_len": 32,
            "log_every": 2,
            "lm": bigsae.LMConfig(dtype="float32", micro_batch_rows=4),
            "data": bigsae.DataConfig(num_shards=4),
            "buffer": bigsae.BufferConfig(tokens=256, dtype="float32"),
            "sae": bigsae.SAEConfig(k=3, d_sae=WIDTH),
            "optim": bigsae.OptimConfig(lr=3e-3),
        }
        | options
    )
