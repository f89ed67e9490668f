"""Curves, distributions, latents alike, and the logit lens, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from bigsae.config import UserError
from bigsae.reporting import weights
from bigsae.reporting.curves import curves, time_spent
from bigsae.reporting.lens import find_lens, promoted
from bigsae.reporting.runs import SAEFolder
from bigsae.reporting.texts import Texts
from bigsae.reporting.weights import Distributions, choose_latents, histograms, nearest_latents


def test_long_curves_are_means_of_stretches():
    rows = [{"tokens": i, "fvu": i / 2_000, "auxk_loss": 0.0, "dead_fraction": 0.0} for i in range(2_000)]
    thinned = curves(rows)
    assert set(thinned) == {"fvu", "dead_fraction"}
    assert len(thinned["fvu"]["x"]) == 500
    assert thinned["fvu"]["x"][:2] == [1.5, 5.5]
    assert thinned["fvu"]["y"][:2] == pytest.approx([1.5 / 2_000, 5.5 / 2_000], rel=1e-4)


def test_time_is_that_of_the_logged_steps(tmp_path):
    rows = (
        {"tokens": 100, "tokens_per_second": 10.0, "lm_time_share": 0.9},
        {"tokens": 100, "heldout_fvu": 0.5},
        {"tokens": 300, "tokens_per_second": 100.0, "lm_time_share": 0.0},
    )
    spent = time_spent(SAEFolder("a", "a", tmp_path, rows))
    assert spent == pytest.approx({"lm": 9.0, "sae": 3.0, "tokens_per_second": 25.0})
    assert time_spent(SAEFolder("a", "a", tmp_path, ())) is None


def test_nearest_latents_in_parts(monkeypatch):
    decoder = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([299, 0, 41])
    cosines = F.cosine_similarity(decoder[queries][:, None], decoder[None], dim=2)
    cosines[range(3), queries] = -2
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    monkeypatch.setattr(weights, "_SLAB_ELEMENTS", 3_000)
    found, others = nearest_latents(decoder, queries, 4)
    torch.testing.assert_close(found, cosines.topk(4).values)
    assert torch.equal(others, cosines.topk(4).indices)
    with Watch():
        nearest_latents(decoder, torch.arange(300), 1)
    assert max(largest) <= 3_000


def test_shares_of_all_latents():
    density = torch.tensor([-10.0, -1.1, -3.05, -3.05])
    one = Distributions(density, torch.ones(4), torch.tensor([0.1, 0.2, 1.0, 0.0]), None)
    other = Distributions(None, torch.tensor([0.5, 2.0]), torch.tensor([0.3, 0.3]), torch.tensor([-1.0, 1.0]))
    first, second = histograms([one, other])
    assert first["never"] == 0.25
    assert sum(first["density"]["share"]) == pytest.approx(0.75)
    assert first["density"]["share"][int((7 - 3.05) * 5)] == 0.5
    assert "density" not in second and "encoder" not in first
    assert first["norm"]["lo"] == second["norm"]["lo"] == 0.5
    assert second["norm"]["share"][0] == second["norm"]["share"][-1] == 0.5
    assert second["encoder"]["share"][0] == second["encoder"]["share"][-1] == 0.5
    (alone,) = histograms([one])
    assert alone["norm"]["share"][20] == 1.0  # one norm for all, in the middle


def test_latents_that_never_fired_are_not_drawn():
    density = torch.full((50,), -10.0)
    density[[7, 9, 30]] = -2.0
    assert choose_latents((), 10, 50, density, 0, "a") == [7, 9, 30]
    assert len(choose_latents((), 10, 50, None, 0, "a")) == 10
    assert choose_latents((9, 3, 3), 10, 50, density, 0, "a") == [3, 9]
    with pytest.raises(UserError, match="--latents 50: a has latents 0 to 49"):
        choose_latents((50,), 10, 50, density, 0, "a")


CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50),
    "neox": GPTNeoXConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    ),
    # It has another norm behind its embedding.
    "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50),
    # It defines its final norm before its layers.
    "opt": OPTConfig(
        hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, word_embed_proj_dim=16
    ),
}  # fmt: skip
NORMS = {
    "llama": "lm_head · model.norm",
    "gpt2": "lm_head · transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
    "bloom": "lm_head · transformer.ln_f",
    "opt": "lm_head · model.decoder.final_layer_norm",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_lens_is_norm_and_unembedding(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    lens = find_lens(model)
    assert lens is not None and lens.norm is not None
    assert NORMS[name] in lens.description
    with torch.no_grad():
        for parameter in lens.norm.parameters():
            parameter.add_(torch.randn_like(parameter))  # also a bias that would drown every direction
    directions = torch.randn(3, 16)
    x = directions - directions.mean(1, keepdim=True) if isinstance(lens.norm, nn.LayerNorm) else directions
    logits = (x / x.square().mean(1, keepdim=True).sqrt() * lens.norm.weight) @ lens.weight[:45].T
    found = promoted(lens, directions, 5, 45)
    torch.testing.assert_close(found.top[1], logits.topk(5).values, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.top[0], logits.topk(5).indices)
    assert torch.equal(found.bottom[0], logits.topk(5, largest=False).indices)


def test_tokens_are_read_as_they_stand_in_a_text(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "lm")
    table: list[str] = []
    texts = Texts(tokenizer, table)
    ids = tokenizer.encode("the state of our union", add_special_tokens=False)
    assert "".join(table[texts(token)] for token in ids) == "the state of our union"
    assert texts(ids[0]) == texts(ids[0]) and len(table) == len(set(ids))
    (byte, *_) = tokenizer.encode("é", add_special_tokens=False)
    assert texts.text(byte) == tokenizer.convert_ids_to_tokens(byte)  # half a character
    assert texts.text(tokenizer.bos_token_id) == "<bos>"


def test_a_leading_space_is_kept_where_decoding_drops_it():
    """As the tokenizers of Llama-2, Mistral and Gemma do at the beginning of a text."""
    words = {"▁a": 0, "▁the": 1, "n": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="n"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [])
    assert tokenizer.decode([1]) == "the"
    assert [texts.text(token) for token in range(3)] == [" a", " the", "n"]
