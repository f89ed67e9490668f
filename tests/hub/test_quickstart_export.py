"""The quickstart's SAE on a Hub, in every format that holds it, and back."""

from __future__ import annotations

import pytest
import torch

import bigsae
from tests.hub.hub_server import Hub


@pytest.mark.slow
def test_the_quickstarts_sae_survives_the_hub(hub: Hub, quickstart_run):
    sae_lens = pytest.importorskip("sae_lens")
    run, _ = quickstart_run
    sae = bigsae.load_sae(run, "model.layers.6")
    generator = torch.Generator().manual_seed(0)
    x = sae.b_dec + 30 * torch.randn(256, sae.d_in, generator=generator)
    expected = sae(x)
    for i, format in enumerate(("saelens", "dictionary_learning", "sparsify")):
        config = bigsae.ExportConfig(
            str(run), "user/smol", format=format, base_model="HuggingFaceTB/SmolLM2-135M"
        )
        bigsae.export_run(config)
        loaded = bigsae.load_sae("user/smol", "model.layers.6")
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-3)
        assert loaded.metadata["model_name"] == "HuggingFaceTB/SmolLM2-135M"
        if format == "saelens":
            theirs = sae_lens.SAE.from_pretrained("user/smol", "model.layers.6")
            with torch.no_grad():
                torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-3)
        files = hub.repositories["user/smol"].files
        assert len(hub.repositories["user/smol"].commits) == i + 2
        assert sum(name.startswith("model.layers.6/") for name in files) == 3
    card = files["README.md"].decode()
    assert "base_model: HuggingFaceTB/SmolLM2-135M" in card and "| 230,400 | 0.0" in card
