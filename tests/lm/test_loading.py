"""Opening, cutting and loading models."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig, MiniCPM3Config, T5Config
from transformers.distributed import fsdp

from bigsae.config import LMConfig, UserError
from bigsae.lm import loading
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import decoder_layers, locate, resolve_hookpoints
from bigsae.lm.loading import load_lm, local_bytes, meta_model, num_dropped_layers, resolve_layout, vocab_size
from tests.lm.conftest import NUM_LAYERS, VOCAB
from tests.lm.plain import plain_activations, plain_model

LM = LMConfig(dtype="float32")
CPU = torch.device("cpu")
ALONE = resolve_layout(LM, 1, 1, {})
IDS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def test_meta_model_reads_the_configuration_alone(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    meta, config = meta_model(str(tmp_path), LM)
    assert len(decoder_layers(meta)[1]) == NUM_LAYERS
    assert vocab_size(config) == VOCAB
    assert not meta.training
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model .*nowhere cannot be opened"):
        meta_model(str(tmp_path / "nowhere"), LM)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"--model .* encoder-decoder"):
        meta_model(str(tmp_path / "t5"), LM)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="cannot be built as a causal language model"):
        meta_model(str(tmp_path / "vit"), LM)


def test_a_loaded_model_is_frozen_and_whole(model_folders: dict[str, Path]) -> None:
    folder = str(model_folders["llama"])
    meta, _ = meta_model(folder, LM)
    model = load_lm(folder, LM, meta, ALONE, CPU, all_layers=True)
    assert num_dropped_layers(model) == 0
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(input_ids=IDS).past_key_values is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    half = load_lm(folder, LMConfig(dtype="bfloat16"), meta, ALONE, CPU, all_layers=True)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * weights <= local_bytes(model) < 4 * weights + 1024


def test_further_arguments_reach_from_pretrained(model_folders: dict[str, Path]) -> None:
    folder = str(model_folders["llama"])
    lm = LMConfig(dtype="float32", kwargs='{"attn_implementation": "eager"}')
    meta, config = meta_model(folder, lm)
    assert config._attn_implementation == "eager"
    assert load_lm(folder, lm, meta, ALONE, CPU, all_layers=True).config._attn_implementation == "eager"
    other = LMConfig(dtype="float32", kwargs='{"rms_norm_eps": 0.25, "use_safetensors": true}')
    meta, _ = meta_model(folder, other)
    assert load_lm(folder, other, meta, ALONE, CPU, all_layers=True).config.rms_norm_eps == 0.25
    unknown = LMConfig(kwargs='{"atn_implementation": "sdpa"}')
    meta, _ = meta_model(folder, unknown)
    with pytest.raises(UserError, match=r"--lm.kwargs.*atn_implementation"):
        load_lm(folder, unknown, meta, ALONE, CPU, all_layers=True)
    with pytest.raises(UserError, match=r"'device_map'.*--lm.shard-size"):
        meta_model(folder, LMConfig(kwargs='{"device_map": "auto"}'))


def test_loading_is_not_left_to_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(fsdp, "_is_torch_distributed_initialized", lambda: True)
    assert fsdp.is_fsdp_enabled()
    with loading._own_loading():
        assert not fsdp.is_fsdp_enabled()
    assert fsdp.is_fsdp_enabled()


def test_only_the_dropped_layers_are_left_out_of_the_report(
    model_folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in model_folders["gpt2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "transformer.extra.weight": torch.zeros(2)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    meta, _ = meta_model(str(tmp_path), LM)
    sites = locate(meta, resolve_hookpoints(["transformer.h.0"], meta))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(
            logging.WARNING, logger="transformers"
        ):  # other packages turn it down when imported
            load_lm(str(tmp_path), LM, meta, ALONE, CPU, sites)
    finally:
        logger.removeHandler(caplog.handler)
    assert "transformer.extra.weight" in caplog.text
    assert "h.1" not in caplog.text
    assert "h.{" not in caplog.text


def test_a_checkpoint_that_lacks_parameters_is_refused(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in model_folders["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    meta, _ = meta_model(str(tmp_path), LM)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj"):
        load_lm(str(tmp_path), LM, meta, ALONE, CPU, all_layers=True)


def test_layers_that_depend_on_their_number_are_all_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MiniCPM3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    meta, _ = meta_model(str(tmp_path), LM)
    sites = locate(meta, resolve_hookpoints(["model.layers.1"], meta))
    with caplog.at_level(logging.WARNING, logger="bigsae"):
        model = load_lm(str(tmp_path), LM, meta, ALONE, CPU, sites)
    assert "residual_scale" in caplog.text
    assert num_dropped_layers(model) == 0
    expected, _ = plain_activations(plain_model(tmp_path), IDS, ["model.layers.1"])
    assert torch.equal(Extractor(model, sites)(IDS)["model.layers.1"], expected["model.layers.1"])


def test_layers_that_are_counted_from_the_end_are_all_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Gemma3nTextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    Gemma3nForCausalLM(config).save_pretrained(tmp_path)
    meta, _ = meta_model(str(tmp_path), LM)
    sites = locate(meta, resolve_hookpoints(["model.layers.2.mlp"], meta))
    with caplog.at_level(logging.WARNING, logger="bigsae"):
        model = load_lm(str(tmp_path), LM, meta, ALONE, CPU, sites)
    assert "all 6 layers" in caplog.text
    expected, _ = plain_activations(plain_model(tmp_path), IDS, ["model.layers.2.mlp"])
    assert torch.equal(Extractor(model, sites)(IDS)["model.layers.2.mlp"], expected["model.layers.2.mlp"])
