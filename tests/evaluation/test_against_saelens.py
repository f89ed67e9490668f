"""The quickstart's SAE on its own model: the same numbers as SAELens's evaluation of the same tokens, to 1e-4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import bigsae
from bigsae.data.text import open_text
from bigsae.evaluation.run import some_rows
from tests.launch import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Ours, and where SAELens has it. All but the last are means over the same tokens.
NAMES = {
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_spliced": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_zero": ("model_performance_preservation", "ce_loss_with_ablation"),
    "loss_recovered": ("model_performance_preservation", "ce_loss_score"),
    "kl_spliced": ("model_behavior_preservation", "kl_div_with_sae"),
    "kl_zero": ("model_behavior_preservation", "kl_div_with_ablation"),
    "kl_recovered": ("model_behavior_preservation", "kl_div_score"),
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "mse": ("reconstruction_quality", "mse"),
    "cosine": ("reconstruction_quality", "cossim"),
    "norm": ("shrinkage", "l2_norm_in"),
    "norm_ratio": ("shrinkage", "l2_ratio"),
    "relative_reconstruction_bias": ("shrinkage", "relative_reconstruction_bias"),
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
}
NUM_ROWS, CTX_LEN = 6, 128


class Store:
    """As much of SAELens's ActivationsStore as its evaluation asks for."""

    context_size = CTX_LEN
    store_batch_size_prompts = NUM_ROWS

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def get_batch_tokens(self, num_rows: int) -> Tensor:
        assert num_rows == len(self.rows)
        return self.rows

    def reset_input_dataset(self) -> None:
        """The next batch is the first anyway."""


def test_saelens_finds_the_same(quickstart_run):
    evals = pytest.importorskip("sae_lens.evals")
    from sae_lens import SAE
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    folder = quickstart_run[0] / "model.layers.6"
    config = bigsae.EvaluateConfig(
        saes=(str(folder),),
        model=str(ROOT / ".quickstart/SmolLM2-135M"),
        dataset=str(ROOT / ".quickstart/sotu"),
        rows=NUM_ROWS,
        ctx_len=CTX_LEN,
        ablate_everywhere=True,
        lm=bigsae.LMConfig(dtype="float32"),
    )
    ours: dict[str, Any] = bigsae.evaluate_saes(config)["saes"]["model.layers.6"]

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    text = open_text(str(config.dataset), config.data, str(config.model), config.lm, model.config, CTX_LEN)
    rows = some_rows(text, 0, NUM_ROWS)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()  # so that SAELens leaves position 0 out as well
    theirs, of_latents = evals.run_evals(
        SAE.load_from_disk(folder, device="cpu"),
        Store(rows),
        HookedProxyLM(model, tokenizer, hook_names=["model.layers.6"]),
        ActivationScaler(),
        evals.get_eval_everything_config(NUM_ROWS, 1, 1),
    )
    for name, (group, key) in NAMES.items():
        print(f"{name:<30}{ours[name]:>14.6f}{theirs[group][key]:>14.6f}")
        assert ours[name] == pytest.approx(theirs[group][key], rel=1e-4), name
    density = torch.tensor(of_latents["feature_density"])
    assert ours["dead_latents"] == (density == 0).sum()
    assert ours["dense_latents"] == (density > 0.1).sum()
    assert 0.9 < ours["loss_recovered"] < 1
