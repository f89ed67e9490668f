"""The examples of the documentation run as they stand."""

from __future__ import annotations

import doctest

import pytest
import torch

import bigsae
from bigsae.hub.formats import save_sae
from bigsae.sae.build import build_sae
from tests.launch import ROOT
from tests.models import tiny_llama


@pytest.fixture
def _stand_ins(tmp_path, monkeypatch):
    """A tiny model and an SAE where docs/using.md looks for them."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "HuggingFaceTB/SmolLM2-135M", num_layers=8)
    sae = build_sae(bigsae.SAEConfig(k=4, d_sae=64), 32, 64, 0, torch.device("cpu"))
    sae.metadata = {"hook_name": "model.layers.6"}
    save_sae(sae, tmp_path / "runs/smol/model.layers.6")


@pytest.mark.usefixtures("_stand_ins")
def test_using():
    result = doctest.testfile(str(ROOT / "docs/using.md"), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
