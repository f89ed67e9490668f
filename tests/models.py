"""Small real models and tokenizers, made on disk for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = (
    "the state of our union is strong and we will work for the people of this nation because peace freedom and "
    "law are what every citizen asks of congress while trade roads schools and public credit grow year by year"
).split()


def english(num_words: int, seed: int = 0) -> str:
    """Sentences of plain words, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (num_words,), generator=generator).tolist()
    words = [WORDS[i] for i in picks]
    return ". ".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12))


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens with <bos> and <eos>, saved to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([english(2000)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return fast


def tiny_llama(folder: Path, num_layers: int = 4, d_model: int = 32, seed: int = 0) -> Path:
    """A Llama of random weights in float32 with `tiny_tokenizer`, saved to `folder` as from the Hub."""
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
