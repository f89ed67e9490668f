"""Compiled layers: which they are, how often they are compiled, and that values stay what they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from bigsae.config import LMConfig, UserError
from bigsae.lm import compiling
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import decoder_layers, locate, resolve_hookpoints
from bigsae.lm.loading import load_lm, meta_model, resolve_layout
from tests.lm.conftest import VOCAB
from tests.lm.plain import plain_activations, plain_model

LM = LMConfig(dtype="float32", compile=True)
CPU = torch.device("cpu")
ALONE = resolve_layout(LM, 1, 1, {})
IDS = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
HOOKPOINTS = ("model.layers.2.mlp:input", "model.layers.2.mlp", "model.norm")


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Nothing compiled by another test is used."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _without_building(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, and run as they are: what building takes most of the time of."""
    monkeypatch.setitem(compiling._OPTIONS, "backend", "aot_eager")


def extractor(folder: Path, lm: LMConfig, *patterns: str) -> Extractor:
    meta, _ = meta_model(str(folder), lm)
    sites = locate(meta, resolve_hookpoints(patterns, meta))
    return Extractor(load_lm(str(folder), lm, meta, ALONE, CPU, sites, all_layers=True), sites)


@pytest.mark.parametrize(
    ("hookpoint", "compiled"),
    [
        ("model.layers.1.mlp.up_proj", [0, *range(2, 12)]),
        ("model.layers.11:input", [*range(11)]),
        ("model.norm", [*range(12)]),
        ("model", []),
    ],
)
def test_what_holds_no_hookpoint_is_compiled(
    tmp_path: Path, hookpoint: str, compiled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    LlamaConfig(num_hidden_layers=12, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    meta, _ = meta_model(str(tmp_path), LM)
    sites, others = (
        locate(meta, resolve_hookpoints([name], meta)) for name in (hookpoint, "model.layers.5.mlp")
    )
    with caplog.at_level(logging.WARNING, logger="bigsae"):
        compiling.compile_layers(meta, sites)
    layers = decoder_layers(meta)[1]
    assert [i for i, layer in enumerate(layers) if layer._compiled_call_impl is not None] == compiled
    assert ("--lm.compile compiles nothing" in caplog.text) == (not compiled)
    if compiled:
        with pytest.raises(ValueError, match=r"model\.layers\.5 was compiled"):
            Extractor(meta, others)


def test_built_layers_equal_the_plain_ones(model_folders: dict[str, Path]) -> None:
    extract = extractor(model_folders["llama"], LM, *HOOKPOINTS)
    expected, logits = plain_activations(plain_model(model_folders["llama"]), IDS, HOOKPOINTS)
    for rows in (3, 2):
        for name, activation in extract(IDS[:rows]).items():
            close(activation, expected[name][:rows])
    close(extract.splice(IDS, {"model.layers.2.mlp": lambda x: x.clone()}), logits)
    # The compiler's trial, and one graph for three layers.
    assert counters["stats"]["unique_graphs"] == 2


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To float32's rounding: fused, sums run in another order. Over 4 layers that was seen to make 10 epsilons."""
    tolerance = 32 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("_without_building")
@pytest.mark.parametrize("autocast", [False, True])
def test_rows_that_differ_in_number_make_two_graphs(model_folders: dict[str, Path], autocast: bool) -> None:
    extract = extractor(model_folders["llama"], replace(LM, autocast=autocast), *HOOKPOINTS)
    plain = plain_model(model_folders["llama"])
    for rows in (3, 1, 2, 1, 3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, logits = plain_activations(plain, IDS[:rows], HOOKPOINTS)
        for name, activation in extract(IDS[:rows]).items():
            assert torch.equal(activation, expected[name]), name
        assert torch.equal(extract.splice(IDS[:rows], {}), logits)
    assert counters["stats"]["unique_graphs"] == 1 + 2
    assert not counters["graph_break"]


def test_a_missing_compiler_is_found_before_weights_are_read(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((model_folders["llama"] / "config.json").read_text())
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "g++"))}),
        pytest.raises(UserError, match=r"^--lm.compile: .*C\+\+ compiler found.*leave --lm.compile out$"),
    ):
        extractor(tmp_path, LM, "model.layers.1")


@pytest.mark.usefixtures("_without_building")
def test_the_first_layer_hooked_leaves_nothing_to_compile(
    model_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(model_folders["llama"])
    meta, _ = meta_model(folder, LM)
    sites = locate(meta, resolve_hookpoints(["model.layers.0"], meta))
    with caplog.at_level(logging.WARNING, logger="bigsae"):
        extract = Extractor(load_lm(folder, LM, meta, ALONE, CPU, sites), sites)
    assert "--lm.compile compiles nothing" in caplog.text
    expected, _ = plain_activations(plain_model(model_folders["llama"]), IDS, ["model.layers.0"])
    assert torch.equal(extract(IDS)["model.layers.0"], expected["model.layers.0"])
