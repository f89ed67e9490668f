"""The metrics against a plain model with torch's hooks and the formulas written out; ranks, formats, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

import bigsae
from bigsae.data.text import open_text
from bigsae.evaluation.run import some_rows
from bigsae.evaluation.table import as_table
from bigsae.hub.formats import save_sae
from tests.distributed.ranks import run_ranks
from tests.evaluation.saes import (
    CTX_LEN,
    MLP_OUT,
    RESIDUAL,
    make_sae,
    residual_sae,
    transcoder,
    write_model,
    write_saes,
)
from tests.launch import ONE_RANK, flags, run
from tests.lm.plain import plain_activations, plain_model

NUM_ROWS = 5
COMMAND = (*ONE_RANK[:-1], "bigsae.evaluate")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("evaluate"))
    write_saes(folder)
    return folder


@pytest.fixture
def config(home) -> bigsae.EvaluateConfig:
    return bigsae.EvaluateConfig(
        saes=(str(home / "residual"), str(home / "transcoder")),
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        rows=NUM_ROWS,
        seed=3,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
    )


class Plain:
    """The same by torch's hooks on the plain model."""

    def __init__(self, home: Path, config: bigsae.EvaluateConfig) -> None:
        self.model = plain_model(home / "lm")
        tokenizer = AutoTokenizer.from_pretrained(home / "lm")
        text = open_text(
            str(config.dataset), config.data, str(config.model), config.lm, self.model.config, CTX_LEN
        )
        self.ids = some_rows(text, config.seed, NUM_ROWS)
        self.keep = torch.ones_like(self.ids, dtype=torch.bool)
        if config.data.drop_first_position:
            self.keep[:, 0] = False
        if config.data.drop_special_tokens:
            for special in tokenizer.all_special_ids:
                self.keep &= self.ids != special
        self.activations, self.clean = plain_activations(
            self.model, self.ids, [RESIDUAL, MLP_OUT, MLP_OUT + ":input"]
        )

    def scores(self, *replacements: tuple[str, Callable[[Tensor], Tensor]]) -> tuple[float, float]:
        """Cross-entropy and KL with outputs of modules replaced."""
        handles = [
            self.model.get_submodule(name).register_forward_hook(lambda _, args, out, f=f: f(out))
            for name, f in replacements
        ]
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten(), reduction="none")
        before, after = self.clean.log_softmax(-1), logits.log_softmax(-1)
        kl = F.kl_div(after, before, reduction="none", log_target=True).sum(-1)
        return ce[self.keep[:, :-1].flatten()].mean().item(), kl[self.keep].mean().item()

    def where_kept(self, replacement: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.keep[..., None], replacement, y)


def test_every_metric(home, config):
    with torch.no_grad():
        results = bigsae.evaluate_saes(config)
        plain = Plain(home, config)
        assert 0.5 < plain.keep.float().mean() < 1
        assert results["tokens"] == plain.keep.sum()
        sae, coder = residual_sae(), transcoder()
        _check_reconstruction(results["saes"]["residual"], sae, plain, RESIDUAL, RESIDUAL)
        _check_reconstruction(results["saes"]["transcoder"], coder, plain, MLP_OUT + ":input", MLP_OUT)
        spliced = {
            RESIDUAL: lambda y: plain.where_kept(sae(y), y),
            MLP_OUT: lambda y: plain.where_kept(coder(plain.activations[MLP_OUT + ":input"]), y),
        }
        read: list[Tensor] = []
        plain.model.get_submodule(MLP_OUT).register_forward_pre_hook(lambda _, args: read.append(args[0]))
        together = spliced | {MLP_OUT: lambda y: plain.where_kept(coder(read[-1]), y)}
        mean = {name: plain.activations[name][plain.keep].mean(0) for name in spliced}
        zeroed = {name: lambda y: plain.where_kept(torch.zeros_like(y), y) for name in spliced}
        at_mean = {name: lambda y, m=m: plain.where_kept(m.expand_as(y), y) for name, m in mean.items()}
        for found, sites in (
            (results["saes"]["residual"], [RESIDUAL]),
            (results["saes"]["transcoder"], [MLP_OUT]),
            (results["joint"], [RESIDUAL, MLP_OUT]),
        ):
            functions = spliced if len(sites) == 1 else together
            expected = {
                kind: plain.scores(*((site, by_site[site]) for site in sites))
                for kind, by_site in (("spliced", functions), ("zero", zeroed), ("mean", at_mean))
            }
            _check_model(found, plain.scores()[0], expected)
    as_table(results)


def _check_reconstruction(found: dict[str, Any], sae: Any, plain: Plain, reads: str, predicts: str) -> None:
    x, y = plain.activations[reads][plain.keep], plain.activations[predicts][plain.keep]
    latents, recon = sae.encode(x), sae(x)
    assert found["tokens"] == len(x)
    fvu = (y - recon).square().sum() / (y - y.mean(0)).square().sum()
    density = (latents > 0).float().mean(0)
    expected = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": (y - recon).square().sum(1).mean(),
        "cosine": F.cosine_similarity(y, recon).mean(),
        "norm": y.norm(dim=1).mean(),
        "norm_ratio": (recon.norm(dim=1) / y.norm(dim=1)).mean(),
        "relative_reconstruction_bias": recon.square().sum(1).mean() / (recon * y).sum(1).mean(),
        "l0": (latents > 0).sum(1).float().mean(),
        "l1": latents.sum(1).mean(),
        "dead_latents": (density == 0).sum(),
        "dead_fraction": (density == 0).float().mean(),
        "dense_latents": (density > 0.1).sum(),
        "dense_fraction": (density > 0.1).float().mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name
    histogram = found["density_histogram"]
    assert histogram["num_never"] == found["dead_latents"]
    assert sum(histogram["num_latents"]) + histogram["num_never"] == sae.d_sae
    edges = histogram["log10_edges"]
    last = [i for i in range(len(edges) - 1) if histogram["num_latents"][i]][-1]
    assert edges[last] <= density.max().log10() <= edges[last + 1]


def _check_model(found: dict[str, float], clean: float, expected: dict[str, tuple[float, float]]) -> None:
    assert found["ce_clean"] == pytest.approx(clean, rel=1e-5)
    for kind, (ce, kl) in expected.items():
        assert found[f"ce_{kind}"] == pytest.approx(ce, rel=1e-5), kind
        assert found[f"kl_{kind}"] == pytest.approx(kl, rel=1e-4), kind
    spliced, zero, mean = (found[f"ce_{kind}"] for kind in ("spliced", "zero", "mean"))
    clean = found["ce_clean"]
    assert len({clean, spliced, zero, mean}) == 4
    assert found["loss_recovered"] == pytest.approx((zero - spliced) / (zero - clean))
    assert found["loss_recovered_mean"] == pytest.approx((mean - spliced) / (mean - clean))
    assert found["kl_recovered"] == pytest.approx(1 - found["kl_spliced"] / found["kl_zero"])


def test_positions(home, config):
    """What is left out is counted and spliced by flag, and ablated by another."""
    one = replace(config, saes=config.saes[:1])
    everything = replace(one, data=bigsae.DataConfig(drop_first_position=False, drop_special_tokens=False))
    found, default = bigsae.evaluate_saes(everything), bigsae.evaluate_saes(one)
    assert found["tokens"] == NUM_ROWS * CTX_LEN > default["tokens"]
    assert found["left_out"] == []
    with torch.no_grad():
        plain = Plain(home, everything)
        ce, kl = plain.scores((RESIDUAL, residual_sae()))
        everywhere = Plain(home, one).scores((RESIDUAL, torch.zeros_like))
    assert found["saes"]["residual"]["ce_spliced"] == pytest.approx(ce, rel=1e-5)
    assert found["saes"]["residual"]["kl_spliced"] == pytest.approx(kl, rel=1e-4)
    ablated = bigsae.evaluate_saes(replace(one, ablate_everywhere=True))["saes"]["residual"]
    assert ablated["ce_zero"] == pytest.approx(everywhere[0], rel=1e-5)
    default = default["saes"]["residual"]
    assert ablated["ce_spliced"] == default["ce_spliced"] and ablated["ce_zero"] != default["ce_zero"]


def numbers(values: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in numbers(value, f"{prefix}{name}.").items()}
    if isinstance(values, list):
        return {f"{prefix}{i}": v for i, v in enumerate(values) if isinstance(v, (int, float))}
    return {prefix: values} if isinstance(values, (int, float)) else {}


def test_two_ranks_with_a_sharded_model(config):
    """Five rows in parts of two: the second rank has one batch less than its share, and a row that does not count."""
    one = numbers(bigsae.evaluate_saes(config))
    assert len(one) > 60
    sharded = replace(config, lm=replace(config.lm, shard_size=2))
    for results in run_ranks(2, bigsae.evaluate_saes, sharded):
        assert numbers(results) == pytest.approx(one, rel=1e-6)


def test_without_the_model_behind_the_hookpoint(config):
    found, whole = bigsae.evaluate_saes(replace(config, ce=False)), bigsae.evaluate_saes(config)
    for name, values in found["saes"].items():
        assert values == {
            k: v for k, v in whole["saes"][name].items() if not k.startswith(("ce_", "kl_", "loss_"))
        }
    assert found["joint"] is None
    as_table(found)


def test_several_on_one_activation_are_not_spliced_together(home, config, tmp_path):
    save_sae(make_sae("standard", seed=5), tmp_path / "other")
    two = replace(config, saes=(config.saes[0], str(tmp_path / "other")), hookpoints=(RESIDUAL, RESIDUAL))
    results = bigsae.evaluate_saes(two)
    assert results["joint"] is None
    first, second = results["saes"].values()
    assert first["ce_zero"] == second["ce_zero"] and first["ce_spliced"] != second["ce_spliced"]
    assert second["l0"] > 6


def test_sparsify_and_transformer_lens_names(home, config, tmp_path):
    """sparsify's folders are named after the module below the head; SAELens's say TransformerLens's names."""
    sae = residual_sae()
    sae.metadata = {}
    save_sae(sae, tmp_path / "layers.0", format="sparsify")
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post", "model_name": "x", "context_size": CTX_LEN}
    save_sae(sae, tmp_path / "lens")
    expected = bigsae.evaluate_saes(replace(config, saes=config.saes[:1]))["saes"]["residual"]
    for folder in ("layers.0", "lens"):
        one = replace(config, saes=(str(tmp_path / folder),), ctx_len=CTX_LEN)
        found = bigsae.evaluate_saes(one)["saes"][folder]
        assert found | {"folder": ""} == expected | {"folder": ""}


def test_the_command(home, config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = flags(
        saes=config.saes, model=home / "lm", dataset=home / "corpus.jsonl", rows=NUM_ROWS, seed=3,
        lm__dtype="float32", lm__micro_batch_rows=2, output=tmp_path / "results.json",
        wandb__project="saes", wandb__name="a-name",
    )  # fmt: skip
    code, output = run((*COMMAND,), arguments)
    assert code == 0, output
    written = json.loads((tmp_path / "results.json").read_text())
    assert numbers(written) == pytest.approx(numbers(bigsae.evaluate_saes(config)), rel=1e-6)
    for text in ("cross-entropy, spliced", "loss recovered", "all spliced", "residual", "dead latents"):
        assert text in output
    assert f"{written['saes']['residual']['fvu']:.4f}" in output
    (tracked,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = tracked.read_bytes()
    for text in (
        "a-name",
        "micro_batch_rows",
        "residual/fvu",
        "residual/density_histogram",
        json.dumps(written["joint"]["loss_recovered"]),
    ):
        assert text.encode() in content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saes": ()}, "--saes is empty"),
        ({"rows": 0}, "--rows 0 must be greater"),
        ({"dataset": None, "seed": 0}, "--dataset: .* lies in no run"),
        ({"dataset": None}, "--seed does nothing without --dataset"),
        (
            {"dataset": None, "seed": 0, "data": bigsae.DataConfig(num_shards=2)},
            "does nothing without --dataset",
        ),
        ({"model": None}, "--model: they name some/model"),
        ({"ce": False, "ablate_everywhere": True}, "--ablate-everywhere does nothing"),
        ({"hookpoints": ("model.layers.0",)}, "--hookpoints names 1 hookpoints for 2 SAEs"),
        ({"hookpoints": ("model.layers.*", "model.layers.1")}, "names 3 activations"),
        ({"hookpoints": ("lm_head", "model.layers.1.mlp:input")}, "wide"),
        ({"hookpoints": (RESIDUAL, "model.layers.2")}, "computed before"),
    ],
)
def test_what_is_refused(config, change, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    if "model" in change:
        config = replace(config, saes=config.saes[:1])
        message = "--model some/model cannot be opened"
    monkeypatch.setattr("bigsae.evaluation.run.load_lm", refuse)
    with pytest.raises(bigsae.UserError, match=message):
        bigsae.evaluate_saes(replace(config, **change))
