"""The functions behind the commands, from a script on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bigsae
from tests.distributed.ranks import run_ranks
from tests.launch import write_corpus
from tests.models import tiny_llama


def train_twice(home: Path) -> dict[str, Any]:
    """Two trainings in one process group, and what the folder of the first gives back."""
    config = bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.{0,1}",),
        output_dir=str(home / "one"),
        tokens=64 * 10,
        batch_size_tokens=64,
        ctx_len=16,
        lm=bigsae.LMConfig(dtype="float32", shard_size=2, micro_batch_rows=2),
        buffer=bigsae.BufferConfig(tokens=128, dtype="float32"),
        sae=bigsae.SAEConfig(k=3, d_sae=64),
    )
    first = bigsae.train_saes(config)
    again = bigsae.train_saes(replace(config, output_dir=str(home / "two")))
    other = bigsae.train_saes(replace(config, output_dir=str(home / "three"), seed=1))
    loaded = bigsae.load_sae(home / "one" / "model.layers.1")
    return {
        "names": list(first),
        "first": first["model.layers.1"].state_dict(),
        "again": again["model.layers.1"].state_dict(),
        "other": other["model.layers.1"].state_dict(),
        "loaded": loaded.state_dict(),
    }


def test_training_from_a_script(tmp_path):
    tiny_llama(tmp_path / "lm", num_layers=2)
    write_corpus(tmp_path / "corpus.jsonl", num_documents=80)
    results = run_ranks(2, train_twice, tmp_path)
    for result in results:
        assert result["names"] == ["model.layers.0", "model.layers.1"]
        for name, tensor in result["first"].items():
            assert torch.equal(tensor, result["again"][name])
            assert torch.equal(tensor, result["loaded"][name])
            assert torch.equal(tensor, results[0]["first"][name])
        assert not torch.equal(result["first"]["W_dec"], result["other"]["W_dec"])
