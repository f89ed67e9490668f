"""Names of hookpoints, their order in a forward, and their widths."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigsae.config import LMConfig, UserError
from bigsae.lm.hookpoints import decoder_layers, locate, num_layers_needed, resolve_hookpoints
from bigsae.lm.loading import meta_model
from tests.lm.conftest import ARCHITECTURES, D_MODEL, NUM_LAYERS

LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention", "gemma2": "post_attention_layernorm"}
MLP = {"gemma2": "post_feedforward_layernorm"}


@pytest.fixture(scope="session")
def metas(model_folders: dict[str, Path]) -> dict:
    return {name: meta_model(str(folder), LMConfig())[0] for name, folder in model_folders.items()}


def names(metas: dict, architecture: str, *patterns: str) -> list[str]:
    return [hookpoint.name for hookpoint in resolve_hookpoints(patterns, metas[architecture])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformer_lens_names(metas: dict, architecture: str) -> None:
    layers = LAYERS.get(architecture, "model.layers")
    attention, mlp = ATTENTION.get(architecture, "self_attn"), MLP.get(architecture, "mlp")
    assert decoder_layers(metas[architecture])[0] == layers
    assert names(metas, architecture, "blocks.2.hook_resid_post") == [f"{layers}.2"]
    assert names(metas, architecture, "blocks.2.hook_resid_pre") == [f"{layers}.2:input"]
    assert names(metas, architecture, "blocks.1.hook_attn_out") == [f"{layers}.1.{attention}"]
    assert names(metas, architecture, "blocks.{0,3}.hook_mlp_out") == [
        f"{layers}.0.{mlp}",
        f"{layers}.3.{mlp}",
    ]


def test_patterns_stay_within_a_component(metas: dict) -> None:
    every = [f"model.layers.{i}" for i in range(NUM_LAYERS)]
    assert names(metas, "llama", "model.layers.*") == every
    assert names(metas, "llama", "model.layers.*.mlp") == [f"{layer}.mlp" for layer in every]
    assert names(metas, "llama", "model.layers.[12]:input") == [
        "model.layers.1:input",
        "model.layers.2:input",
    ]


def test_ranges_multiply_and_duplicates_collapse(metas: dict) -> None:
    assert names(metas, "llama", "model.layers.{0,2..3}.{mlp,self_attn}") == [
        f"model.layers.{i}.{child}" for i in (0, 2, 3) for child in ("mlp", "self_attn")
    ]
    same = ("model.layers.1", "blocks.1.hook_resid_post", "model.layers.{1,1}", "model.layers.1")
    assert names(metas, "llama", *same) == ["model.layers.1"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layer.2", "model.layers"),
        ("model.layers.2.mpl", "model.layers.2.mlp"),
        ("model.layers.{1,9}", "model.layers.1"),
        ("blocks.9.hook_resid_post", "model.layers.3"),
        ("blocks.1.hook_z", "hook_resid_post"),
        ("model.layers.{3..1}", "backwards"),
        ("zzz", "nearest"),
    ],
)
def test_a_name_that_matches_nothing(metas: dict, pattern: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        resolve_hookpoints([pattern], metas["llama"])
    assert str(caught.value).startswith(f"--hookpoints {pattern}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_order_width_and_layer_are_found_whatever_the_order_of_names(metas: dict, architecture: str) -> None:
    meta = metas[architecture]
    patterns = [
        "blocks.2.hook_resid_post",
        "blocks.2.hook_mlp_out",
        "blocks.2.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.1.hook_resid_post",
    ]
    layers = decoder_layers(meta)[0]
    for given in (patterns, patterns[::-1]):
        sites = locate(meta, resolve_hookpoints(given, meta))
        kinds = [site.name.removeprefix(layers) for site in sites]
        assert kinds[0].startswith(".0.")
        assert kinds[1:3] == [".1", ".2:input"]
        assert kinds[3].startswith(".2.")
        assert kinds[4] == ".2"
        assert [site.layer for site in sites] == [0, 1, 2, 2, 2]
        assert {site.d_in for site in sites} == {D_MODEL}
        assert num_layers_needed(sites) == 3


def test_widths_differ_within_a_layer(metas: dict) -> None:
    sites = locate(
        metas["llama"],
        resolve_hookpoints(["model.layers.0.mlp.down_proj:input", "model.layers.0.mlp"], metas["llama"]),
    )
    assert [site.d_in for site in sites] == [64, D_MODEL]


def test_hookpoints_outside_the_layers(metas: dict) -> None:
    sites = locate(metas["llama"], resolve_hookpoints(["model.norm", "model.embed_tokens"], metas["llama"]))
    assert [(site.name, site.layer) for site in sites] == [
        ("model.embed_tokens", -1),
        ("model.norm", NUM_LAYERS - 1),
    ]
    assert num_layers_needed(sites) == NUM_LAYERS
    assert num_layers_needed(sites[:1]) == 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.embed_tokens:input", "rows x ctx x d"),
        ("model.rotary_emb", "rows x ctx"),
        ("model.layers", "never calls"),
    ],
)
def test_what_is_no_activation_is_refused(metas: dict, name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        locate(metas["llama"], resolve_hookpoints([name], metas["llama"]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in metas["llama"].modules())
