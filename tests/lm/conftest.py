"""Tiny models of the architectures that bigsae is tested on, with random weights, saved as from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 96
NUM_LAYERS = 4
D_MODEL = 32


def _configs() -> dict[str, PreTrainedConfig]:
    tokens: dict[str, Any] = {
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    shape: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        **tokens,
    }
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {
        "gpt2": GPT2Config(n_embd=D_MODEL, n_layer=NUM_LAYERS, n_head=4, n_positions=64, **tokens),
        "gpt_neox": GPTNeoXConfig(num_attention_heads=4, max_position_embeddings=64, **shape),
        "llama": LlamaConfig(**shape, **heads),
        "qwen3": Qwen3Config(head_dim=8, **shape, **heads),
        "gemma2": Gemma2Config(head_dim=8, sliding_window=8, **shape, **heads),
        "qwen3_moe": Qwen3MoeConfig(
            moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **shape, **heads
        ),
    }


ARCHITECTURES = tuple(_configs())


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of four layers for each architecture."""
    folders = {}
    for name, config in _configs().items():
        folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(params=ARCHITECTURES)
def model_folder(request: pytest.FixtureRequest, model_folders: dict[str, Path]) -> Path:
    """The saved models, one after the other."""
    return model_folders[request.param]
