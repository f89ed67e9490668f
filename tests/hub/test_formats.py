"""Which format a folder is in, and folders that are in none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bigsae
from bigsae.config import UserError
from bigsae.hub.formats import read_sae, save_sae
from tests.hub.saes import D_IN, D_OUT, D_SAE, K, activations, assert_computes, random_sae

FILES = {"saelens": "sae_weights.safetensors", "sparsify": "sae.safetensors"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A TopK SAE in both formats that are written."""
    home = tmp_path_factory.mktemp("formats")
    for format in ("saelens", "sparsify"):
        save_sae(random_sae("topk", k=K), home / format, format=format)
    return {format: home / format for format in FILES}


def test_the_default_is_what_some_library_reads(tmp_path):
    frequencies = torch.rand(D_SAE)
    for name, sae, file in (
        ("sae", random_sae("topk", k=K), "sae_weights.safetensors"),
        ("transcoder", random_sae("topk", k=K, d_out=D_IN), "sae.safetensors"),
        ("other", random_sae("batchtopk", k=K, d_out=D_IN), "sae_weights.safetensors"),
    ):
        save_sae(sae, tmp_path / name, frequencies)
        assert {p.name for p in (tmp_path / name).iterdir()} == {"cfg.json", file, "sparsity.safetensors"}
        assert read_sae(tmp_path / name).metadata["hook_name"] == "model.layers.6"


def test_cfg_json_decides_where_both_were_written(tmp_path):
    """One format over the other: what was saved last is what is read."""
    sae, transcoder = random_sae("topk", k=K), random_sae("topk", k=K, d_out=D_IN, skip=True)
    for last in (sae, transcoder, sae):
        save_sae(last, tmp_path)
        assert_computes(read_sae(tmp_path), last, activations())


@pytest.mark.parametrize(
    ("sae", "format", "message"),
    [
        (("topk", {"k": K, "d_out": D_IN}), "saelens", 'topk transcoder: save it with format="sparsify"'),
        (("topk", {"k": K, "d_out": D_OUT}), None, f"d_in {D_IN}, d_out {D_OUT}"),
        (("topk", {"k": K, "normalize": "layer_norm"}), "sparsify", "normalise nothing"),
        (("topk", {"k": K, "apply_b_dec_to_input": False}), "sparsify", "subtract b_dec"),
        (("gated", {}), "sparsify", "TopK alone, not gated"),
    ],
)
def test_refuses_what_a_format_cannot_hold(sae, format, message, tmp_path):
    architecture, fields = sae
    with pytest.raises(UserError, match=message):
        save_sae(random_sae(architecture, **fields), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("saelens", {"architecture": "temporal"}, "architecture 'temporal'"),
        ("saelens", {"architecture": ["topk"]}, r"architecture \['topk'\]"),
        ("saelens", {"architecture": "jumprelu"}, "threshold"),
        ("saelens", {"architecture": "jumprelu_transcoder", "d_out": D_IN}, "apply_b_dec_to_input True"),
        ("saelens", {"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'"),
        ("saelens", {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ("saelens", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input 'yes'"),
        ("saelens", {"k": "many"}, "k 'many'"),
        ("saelens", {"k": 1000}, "k 1000"),
        ("saelens", {"d_in": True}, "d_in True"),
        ("saelens", {"d_sae": 63}, "it holds"),
        ("saelens", {"d_sae": 10**30}, "d_sae 1000000.* is beyond"),
        ("sparsify", {"activation": "groupmax"}, "activation 'groupmax'"),
        ("sparsify", {"skip_connection": True}, "W_skip"),
        ("sparsify", {"num_latents": 0}, "it holds"),  # then expansion_factor would be taken
        ("sparsify", {"num_latents": -3}, "num_latents -3"),
        ("sparsify", {"k": 0}, "k 0"),
        ("sparsify", {"k": 73}, "k 73"),
    ],
)
def test_refuses_what_it_would_misread(folders, tmp_path, format, change, message):
    broken = tmp_path / "broken"
    shutil.copytree(folders[format], broken)
    config = json.loads((broken / "cfg.json").read_text())
    if change == {"num_latents": 0}:
        change = change | {"expansion_factor": 4}
    (broken / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        bigsae.load_sae(broken)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "null", "{}", b"\xff\xfe"])
def test_broken_configurations_are_a_users_error(folders, tmp_path, text):
    for format in FILES:
        broken = tmp_path / format
        shutil.copytree(folders[format], broken)
        (broken / "cfg.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=r"cfg\.json"):
            bigsae.load_sae(broken)


@pytest.mark.parametrize("format", FILES)
def test_broken_weights_are_a_users_error(folders, tmp_path, format):
    with pytest.raises(UserError, match="cannot be read"):
        bigsae.load_sae(tmp_path / "nowhere")
    whole = (folders[format] / FILES[format]).read_bytes()
    tensors = load_file(folders[format] / FILES[format])
    (tmp_path / "a").mkdir()
    shutil.copy(folders[format] / "cfg.json", tmp_path / "a")
    weights = tmp_path / "a" / FILES[format]
    if format == "saelens":  # without its weights a folder of sparsify's is none that is known
        with pytest.raises(UserError, match="cannot be read"):
            bigsae.load_sae(tmp_path / "a")
    for size in (0, 7, 8, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be read"):
            bigsae.load_sae(tmp_path / "a")
    more = tensors | {"extra": torch.zeros(1)}
    without = {name: t for name, t in tensors.items() if name != "b_dec"}
    integers = tensors | {"b_dec": torch.zeros(D_IN, dtype=torch.int64)}
    for content in (more, without, integers):
        save_file(content, weights)
        with pytest.raises(UserError, match="holds"):
            bigsae.load_sae(tmp_path / "a")


def test_what_was_loaded_outlives_its_file(folders, tmp_path):
    """safetensors maps files: another's writing into one must not change, nor end, what was loaded from it."""
    shutil.copytree(folders["saelens"], tmp_path / "a")
    sae = bigsae.load_sae(tmp_path / "a")
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    (tmp_path / "a" / FILES["saelens"]).write_bytes(b"")
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())
