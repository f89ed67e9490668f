"""Exported folders in SAELens's own hands, and its folders in ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bigsae
from bigsae.config import OptimConfig, SAEConfig, UserError
from bigsae.hub.saelens import save_sae
from bigsae.training.fit import fit_trainer

sae_lens = pytest.importorskip("sae_lens")


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    """In a language model's own scale: long mean, large values."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, 16, generator=generator)
    return 30 * torch.rand(512, 64, generator=generator).pow(8) @ directions + 100


@pytest.fixture(scope="module")
def folder(activations, tmp_path_factory) -> Path:
    """A trained SAE, its scale folded, on disk."""
    trainer = fit_trainer(
        [activations] * 30, SAEConfig(k=5, d_sae=64), OptimConfig(lr=1e-3), seed=0, num_steps=None
    )
    assert not 0.5 < trainer.scale < 2  # there is something to fold
    sae = trainer.folded()
    sae.metadata = {"model_name": "some/model", "hook_name": "model.layers.6"}
    folder = tmp_path_factory.mktemp("sae")
    save_sae(sae, folder, trainer.firing.frequencies())
    return folder


def test_saelens_computes_the_same(folder, activations):
    ours, theirs = bigsae.load_sae(folder), sae_lens.SAE.load_from_disk(folder, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(activations), theirs.encode(activations), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(activations), theirs(activations), rtol=1e-5, atol=1e-5)
    assert (ours.encode(activations) > 0).sum(1).max() <= 5
    assert theirs.cfg.metadata.hook_name == "model.layers.6"


def test_the_scale_was_folded(folder, activations):
    """On activations as the model gives them, far from unit scale, the reconstruction is a good one."""
    x_hat = bigsae.load_sae(folder)(activations)
    fvu = (x_hat - activations).square().sum() / (activations - activations.mean(0)).square().sum()
    assert fvu < 0.6


def test_sparsity_is_log10_of_the_frequencies(folder, activations):
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (64,)
    assert (10**sparsity).sum().item() == pytest.approx(5, rel=0.05)  # k fire on each token
    assert sparsity.min() >= -10


def test_save_writes_what_it_read(folder, tmp_path):
    sae = bigsae.load_sae(folder)
    sae.save(str(tmp_path / "again"))
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_reads_what_saelens_trained(tmp_path, activations):
    """SAELens's TopK multiplies pre_acts by the decoder's norm unless told not to; its own files say which."""
    config = sae_lens.TopKSAEConfig(d_in=16, d_sae=48, k=4, rescale_acts_by_decoder_norm=True)
    theirs = sae_lens.SAE.from_dict(config.to_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_model(str(tmp_path))
    ours = bigsae.load_sae(tmp_path)
    with torch.no_grad():
        x = activations / 100
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"k": "many"}, "k 'many'"),
        ({"k": 1000}, "k 1000"),
        ({"d_sae": 63}, "sae_weights.safetensors holds"),
    ],
)
def test_refuses_what_it_would_misread(folder, tmp_path, change, message):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((folder / "cfg.json").read_text())
    (broken / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        bigsae.load_sae(broken)


def test_broken_files_are_a_users_error(folder, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        bigsae.load_sae(tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "torn")
    weights = tmp_path / "torn" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        bigsae.load_sae(tmp_path / "torn")
    shutil.copytree(folder, tmp_path / "lacking")
    tensors = load_file(folder / "sae_weights.safetensors")
    del tensors["b_dec"]
    save_file(tensors, tmp_path / "lacking" / "sae_weights.safetensors")
    with pytest.raises(UserError, match="holds"):
        bigsae.load_sae(tmp_path / "lacking")
