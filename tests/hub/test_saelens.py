"""Exported folders in SAELens's own hands, and its folders in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bigsae
from bigsae.config import OptimConfig, SAEConfig, UserError
from bigsae.hub.formats import save_sae
from bigsae.training.fit import fit_trainer
from tests.hub.saes import D_IN, D_OUT, D_SAE, K, activations, assert_computes, random_sae

sae_lens = pytest.importorskip("sae_lens")

# What is saved: architecture, fields, and SAELens's name for it.
SAVED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "topk": ("topk", {"k": K}, "topk"),
    "topk normalised": ("topk", {"k": K, "normalize": "layer_norm"}, "topk"),
    "topk not centred": ("topk", {"k": K, "apply_b_dec_to_input": False}, "topk"),
    "batchtopk": ("batchtopk", {"k": K}, "jumprelu"),
    "matryoshka": ("matryoshka", {"k": K, "normalize": "layer_norm"}, "jumprelu"),
    "jumprelu": ("jumprelu", {}, "jumprelu"),
    "jumprelu normalised": ("jumprelu", {"normalize": "layer_norm"}, "jumprelu"),
    "jumprelu not centred": ("jumprelu", {"apply_b_dec_to_input": False}, "jumprelu"),
    "gated": ("gated", {}, "gated"),
    "gated both": ("gated", {"normalize": "layer_norm", "apply_b_dec_to_input": False}, "gated"),
    "standard": ("standard", {}, "standard"),
    "standard both": ("standard", {"normalize": "layer_norm", "apply_b_dec_to_input": False}, "standard"),
    "batchtopk transcoder": ("batchtopk", {"k": K, "d_out": D_OUT}, "jumprelu_transcoder"),
    "batchtopk skip": ("batchtopk", {"k": K, "d_out": D_IN, "skip": True}, "jumprelu_skip_transcoder"),
    "jumprelu transcoder": ("jumprelu", {"d_out": D_IN}, "jumprelu_transcoder"),
    "jumprelu skip": ("jumprelu", {"d_out": D_OUT, "skip": True}, "jumprelu_skip_transcoder"),
}


@pytest.mark.parametrize("name", SAVED)
def test_saelens_computes_what_was_saved(name, tmp_path):
    architecture, fields, theirs_is = SAVED[name]
    sae = random_sae(architecture, **fields)
    save_sae(sae, tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(tmp_path, device="cpu"), bigsae.load_sae(tmp_path)
    assert theirs.cfg.architecture() == theirs_is
    assert theirs.cfg.metadata.hook_name == "model.layers.6"
    assert_computes(theirs, sae, activations())
    assert_computes(ours, sae, activations())
    ours.save(str(tmp_path / "again"))
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def randomised(theirs: Any) -> Any:
    """An SAE of SAELens with weights that leave nothing at zero or one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
    return theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        {"architecture": "topk", "k": K, "apply_b_dec_to_input": False},
        {"architecture": "jumprelu", "normalize_activations": "layer_norm"},
        {"architecture": "gated", "apply_b_dec_to_input": False},
        {"architecture": "standard", "normalize_activations": "layer_norm"},
        *(
            {"architecture": architecture, "d_out": D_OUT, "apply_b_dec_to_input": False}
            for architecture in (
                "transcoder",
                "skip_transcoder",
                "jumprelu_transcoder",
                "jumprelu_skip_transcoder",
            )
        ),
    ],
    ids=lambda fields: (
        " ".join(str(value) for value in fields.values()) if isinstance(fields, dict) else fields
    ),
)
def test_reads_what_saelens_saved(fields, dtype, tmp_path):
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": dtype, "metadata": {"hook_name": "h"}, **fields}
    randomised(sae_lens.SAE.from_dict(config)).save_model(tmp_path)
    ours = bigsae.load_sae(tmp_path)
    assert ours.W_enc.is_contiguous() and ours.metadata["hook_name"] == "h"
    assert_computes(sae_lens.SAE.load_from_disk(tmp_path, dtype="float32"), ours, activations() / 100)
    ours.save(str(tmp_path / "again"))
    assert_computes(sae_lens.SAE.load_from_disk(tmp_path / "again"), ours, activations() / 100)


@pytest.mark.parametrize(
    "architecture", ["topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated", "standard"]
)
def test_reads_what_saelens_trained(architecture, tmp_path):
    config: dict[str, Any] = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE}
    if "topk" in architecture:
        config |= {"k": K}
    if "matryoshka" in architecture:
        config |= {"matryoshka_widths": [16, D_SAE]}
    theirs = randomised(sae_lens.TrainingSAE.from_dict(config))
    if "batchtopk" in architecture:
        theirs.topk_threshold.fill_(0.5)
    theirs.save_inference_model(tmp_path)
    assert_computes(sae_lens.SAE.load_from_disk(tmp_path), bigsae.load_sae(tmp_path), activations() / 100)


def old_folder(folder: Path, changes: dict[str, Any], factor: float | None = None) -> None:
    """A folder as versions before 6.0 wrote it, of a standard SAE's weights."""
    save_sae(random_sae("standard"), folder)
    config = {
        "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "relu",
        "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "context_size": 128,
        "model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "hook_head_index": None,
        "prepend_bos": True, "dataset_path": "some/text", "normalize_activations": "none", "dtype": "float32",
        "device": "cpu", "sae_lens_training_version": None, "sae_lens_version": "3.14.0",
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    if factor is not None:
        tensors = load_file(folder / "sae_weights.safetensors")
        tensors["scaling_factor"] = torch.full((D_SAE,), factor)
        save_file(tensors, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_activations": False, "apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm", "architecture": None},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": None},
    ],
)
def test_reads_folders_of_older_versions(changes, tmp_path):
    """As SAELens 6 reads them; saved again they are in the format of 6."""
    old_folder(tmp_path, changes, factor=1.0)
    if "architecture" in changes:
        config = json.loads((tmp_path / "cfg.json").read_text())
        del config["architecture"], config["sae_lens_version"]
        (tmp_path / "cfg.json").write_text(json.dumps(config))
    ours = bigsae.load_sae(tmp_path)
    assert ours.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    assert_computes(sae_lens.SAE.load_from_disk(tmp_path), ours, activations())
    ours.save(str(tmp_path / "again"))
    again = sae_lens.SAE.load_from_disk(tmp_path / "again")
    assert_computes(again, ours, activations())
    assert again.cfg.metadata.model_name == "gpt2"


@pytest.mark.parametrize(
    ("changes", "factor", "message"),
    [
        ({}, 0.5, "scaling_factor"),
        ({"activation_fn_str": "tanh-relu"}, None, "activation function 'tanh-relu'"),
        ({"activation_fn_str": "topk"}, None, "k None"),
        ({"normalize_activations": True}, None, "'expected_average_only_in'"),
        ({"hook_name": "blocks.8.attn.hook_z"}, None, "reshape_activations 'hook_z'"),
    ],
)
def test_refuses_what_it_would_misread_of_older_versions(changes, factor, message, tmp_path):
    old_folder(tmp_path, changes, factor)
    with pytest.raises(UserError, match=message):
        bigsae.load_sae(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of an SAE trained on `correlated`, its scale folded."""
    trainer = fit_trainer(
        [correlated()] * 30, SAEConfig(k=5, d_sae=64), OptimConfig(lr=1e-3), seed=0, num_steps=None
    )
    assert not 0.5 < trainer.scale < 2  # there is something to fold
    folder = tmp_path_factory.mktemp("sae")
    save_sae(trainer.folded(), folder, trainer.firing.frequencies())
    return folder


def correlated() -> torch.Tensor:
    """[512, 16] that an SAE can learn, far from unit scale, with a long mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 16, generator=generator)
    return 30 * torch.rand(512, 64, generator=generator).pow(8) @ directions + 100


def test_the_scale_was_folded(trained):
    """On activations as the model gives them the reconstruction is a good one, in both libraries."""
    x = correlated()
    ours, theirs = bigsae.load_sae(trained), sae_lens.SAE.load_from_disk(trained)
    assert_computes(theirs, ours, x)
    assert (ours(x) - x).square().sum() / (x - x.mean(0)).square().sum() < 0.6


def test_sparsity_is_log10_of_the_frequencies(trained):
    sparsity = load_file(trained / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (64,)
    assert (10**sparsity).sum().item() == pytest.approx(5, rel=0.05)  # k fire on each token
    assert sparsity.min() >= -10
