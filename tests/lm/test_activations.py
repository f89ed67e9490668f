"""Extraction equals a plain forward with torch hooks, bit for bit; splicing replaces exactly what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bigsae.config import LMConfig
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import (
    Site,
    activation_of,
    decoder_layers,
    locate,
    resolve_hookpoints,
    with_activation,
)
from bigsae.lm.loading import load_lm, meta_model, num_dropped_layers, resolve_layout
from tests.lm.conftest import D_MODEL, NUM_LAYERS, VOCAB
from tests.lm.plain import plain_activations, plain_model

LM = LMConfig(dtype="float32")
CPU = torch.device("cpu")
IDS = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


def extractor(
    folder: Path, patterns: Sequence[str], all_layers: bool = False, lm: LMConfig = LM
) -> Extractor:
    meta, _ = meta_model(str(folder), lm)
    sites = locate(meta, resolve_hookpoints(patterns, meta))
    layout = resolve_layout(lm, 1, 1, {})
    return Extractor(load_lm(str(folder), lm, meta, layout, CPU, sites, all_layers=all_layers), sites)


def names(sites: Sequence[Site]) -> list[str]:
    return [site.name for site in sites]


def test_extraction_equals_torch_hooks(model_folder: Path) -> None:
    extract = extractor(
        model_folder,
        [
            "blocks.2.hook_resid_post",
            "blocks.2.hook_attn_out",
            "blocks.1.hook_mlp_out",
            "blocks.1.hook_resid_pre",
            "blocks.0.hook_resid_post",
        ],
    )
    expected, _ = plain_activations(plain_model(model_folder), IDS, names(extract.sites))
    for _ in range(2):
        found = extract(IDS)
        assert list(found) == names(extract.sites)
        for name, activation in found.items():
            assert torch.equal(activation, expected[name]), name
            assert not activation.requires_grad
            assert not activation.is_inference()


@pytest.mark.parametrize(
    ("architecture", "mlp"),
    [("llama", "model.layers.1.mlp"), ("gpt2", "transformer.h.1.mlp"), ("qwen3_moe", "model.layers.1.mlp")],
)
def test_a_modules_input_and_output_in_one_forward(
    model_folders: dict[str, Path], architecture: str, mlp: str
) -> None:
    both = [f"{mlp}:input", mlp]
    expected, logits = plain_activations(plain_model(model_folders[architecture]), IDS, both)
    for patterns in (both, both[::-1]):
        extract = extractor(model_folders[architecture], patterns, all_layers=True)
        found = extract(IDS)
        assert list(found) == names(extract.sites) == both
        for name in both:
            assert torch.equal(found[name], expected[name]), name
        assert torch.equal(extract.splice(IDS, {name: lambda x: x.clone() for name in both}), logits)


def test_autocast_equals_the_plain_model_under_autocast(model_folder: Path) -> None:
    patterns = ["blocks.1.hook_mlp_out", "blocks.2.hook_attn_out", "blocks.2.hook_resid_post"]
    extract = extractor(model_folder, patterns, True, replace(LM, autocast=True))
    plain = plain_model(model_folder)
    exact, _ = plain_activations(plain, IDS, names(extract.sites))
    with torch.autocast("cpu", torch.bfloat16):
        expected, logits = plain_activations(plain, IDS, names(extract.sites))
    for name, activation in extract(IDS).items():
        assert activation.dtype == expected[name].dtype
        assert torch.equal(activation, expected[name]), name
        assert not torch.equal(activation, exact[name])

    def in_float32(x: Tensor) -> Tensor:
        scale = 1 + 2**-20  # which bfloat16 rounds to 1
        assert torch.equal(x.float() @ (torch.eye(D_MODEL) * scale), x.float() * scale)
        return x.clone()

    assert torch.equal(extract.splice(IDS, dict.fromkeys(names(extract.sites), in_float32)), logits)
    assert not torch.is_autocast_enabled("cpu")


def test_only_the_needed_layers_are_loaded(model_folder: Path) -> None:
    extract = extractor(model_folder, ["blocks.1.hook_resid_post"])
    assert len(decoder_layers(extract.model)[1]) == 2
    assert num_dropped_layers(extract.model) == NUM_LAYERS - 2
    with pytest.raises(ValueError, match="last 2 layers"):
        extract.splice(IDS, {})


def test_the_forward_ends_at_the_last_hookpoint(model_folders: dict[str, Path]) -> None:
    extract = extractor(model_folders["llama"], ["model.layers.1.self_attn"])
    called: list[str] = []
    for name in ("model.layers.1.self_attn", "model.layers.1.mlp", "model.norm", "lm_head"):
        extract.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    extract(IDS)
    assert called == ["model.layers.1.self_attn"]


def test_splicing_is_exact(model_folder: Path) -> None:
    extract = extractor(
        model_folder, ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.3.hook_resid_pre"], True
    )
    model = plain_model(model_folder)
    _, logits = plain_activations(model, IDS, [])
    same = {name: (lambda x: x.clone()) for name in names(extract.sites)}
    assert torch.equal(extract.splice(IDS, same), logits)
    assert torch.equal(extract.splice(IDS, {}), logits)

    residual, mlp, _ = extract.sites
    handles = [
        _replace(model.get_submodule(residual.hookpoint.path), lambda x: x * 0.5 + 1),
        _replace(model.get_submodule(mlp.hookpoint.path), torch.zeros_like),
    ]
    _, expected = plain_activations(model, IDS, [])
    for handle in handles:
        handle.remove()
    changed = {mlp.name: torch.zeros_like, residual.name: lambda x: x * 0.5 + 1}
    assert torch.equal(extract.splice(IDS, changed), expected)
    assert not torch.equal(expected, logits)
    # Replacing a layer's input is replacing the output of the layer before.
    before = {f"{extract.sites[2].name}": torch.zeros_like}
    path = extract.sites[2].hookpoint.path
    previous = f"{path.rpartition('.')[0]}.2"
    handle = _replace(model.get_submodule(previous), torch.zeros_like)
    assert torch.equal(extract.splice(IDS, before), plain_activations(model, IDS, [])[1])
    handle.remove()
    assert torch.equal(
        extract(IDS)[residual.name], plain_activations(model, IDS, [residual.name])[0][residual.name]
    )


def _replace(module: nn.Module, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
    return module.register_forward_hook(lambda _, __, out: with_activation(out, function(activation_of(out))))


def test_what_splicing_refuses(model_folders: dict[str, Path]) -> None:
    extract = extractor(model_folders["llama"], ["model.layers.1"], True)
    with pytest.raises(KeyError, match=r"model\.layers\.0"):
        extract.splice(IDS, {"model.layers.0": torch.zeros_like})
    with pytest.raises(ValueError, match="gave"):
        extract.splice(IDS, {"model.layers.1": lambda x: x[..., :-1]})
    _, logits = plain_activations(plain_model(model_folders["llama"]), IDS, [])
    assert torch.equal(extract.splice(IDS, {}), logits), "an error leaves the model usable"


def test_nested_modules_and_two_extractors_of_one_model(model_folders: dict[str, Path]) -> None:
    one = extractor(
        model_folders["llama"],
        ["model.layers.1.mlp.down_proj:input", "model.layers.1", "model.layers.1.mlp", "model.embed_tokens"],
    )
    other = Extractor(one.model, one.sites[-1:])
    expected, _ = plain_activations(plain_model(model_folders["llama"]), IDS, names(one.sites))
    for extract in (one, other, one):
        for name, activation in extract(IDS).items():
            assert torch.equal(activation, expected[name]), name


def test_extraction_from_the_embedding_alone(model_folders: dict[str, Path]) -> None:
    extract = extractor(model_folders["llama"], ["model.embed_tokens"])
    assert len(decoder_layers(extract.model)[1]) == 1
    expected, _ = plain_activations(plain_model(model_folders["llama"]), IDS, ["model.embed_tokens"])
    assert torch.equal(extract(IDS)["model.embed_tokens"], expected["model.embed_tokens"])
