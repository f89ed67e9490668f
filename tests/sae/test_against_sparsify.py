"""The TopK objective against sparsify's SparseCoder, with the same weights and activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigsae.config import SAEConfig
from bigsae.sae.base import SAE
from tests.sae.saes import (
    BATCH,
    D_IN,
    D_SAE,
    K,
    assert_same,
    assert_same_grads,
    make_batch,
    make_sae,
    run_step,
)

sparsify = pytest.importorskip("sparsify")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """On the CPU its Triton decoder runs in the interpreter, slowly, if at all."""
    monkeypatch.setattr("sparsify.sparse_coder.decoder_impl", sparsify.utils.eager_decode)


NAMES: dict[str, str] = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
KINDS: list[tuple[str, dict[str, Any], int | None]] = [
    ("sae", {}, None),
    ("transcoder", {}, D_IN),
    ("skip", {"skip": True}, D_IN),
]
IDS = [kind for kind, _, _ in KINDS]


def their_sae(ours: SAE, **fields: Any) -> Any:
    """sparsify's class with the weights of `ours`."""
    config = sparsify.SparseCoderConfig(
        num_latents=D_SAE,
        k=K,
        transcode=ours.is_transcoder,
        skip_connection=ours.W_skip is not None,
        **fields,
    )
    theirs = sparsify.SparseCoder(D_IN, config)
    weights = ours.state_dict()
    state: dict[str, Tensor] = theirs.state_dict()
    theirs.load_state_dict({name: weights[NAMES.get(name, name)] for name in state})
    return theirs


def their_grads(theirs: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {NAMES.get(name, name): p for name, p in theirs.named_parameters()}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


def loud_batch(sae: SAE) -> tuple[Tensor, Tensor]:
    """Tokens on each of which latents fire, and their targets."""
    x, y = make_batch(sae, batch=BATCH + 2)
    return x[2:], y[2:]


def scatter(x: Tensor) -> Tensor:
    return (x.double() - x.double().mean(0)).square().sum().float()


@pytest.mark.parametrize(("kind", "fields", "d_out"), KINDS, ids=IDS)
def test_fvu(kind, fields, d_out):
    """Where a token has fewer than k pre_acts above 0, their encoder learns from those it clamped; here none has."""
    ours = make_sae(SAEConfig(k=K, **fields), d_out)
    theirs = their_sae(ours)
    x, y = loud_batch(ours)
    output, grads = run_step(ours, x, y)
    assert int(output.num_active) == K * len(x)
    their_output = theirs(x, y)
    assert_same(output.residual, y - their_output.sae_out)
    assert_same(output.loss, their_output.fvu)
    assert_same_grads(grads, their_grads(theirs, their_output.fvu))


@pytest.mark.parametrize(("kind", "fields", "d_out"), KINDS, ids=IDS)
def test_multi_topk(kind, fields, d_out):
    """With 4 k latents they leave out W_skip, so that a transcoder's 4 k reconstruct another target than its k: their
    term is ours without one. And their encoder gets no gradient of it (see `test_auxk`); decoder and b_dec do."""
    ours = make_sae(SAEConfig(k=K, multi_topk=True, **fields), d_out)
    theirs = their_sae(ours, multi_topk=True)
    x, y = loud_batch(ours)
    if ours.W_skip is not None:
        ours.W_skip.data.zero_()
    output, grads = run_step(ours, x, y)
    their_term = theirs(x, y).multi_topk_fvu
    assert_same(output.parts["multi_topk_loss"], their_term / 8)
    plain = make_sae(SAEConfig(k=K, **fields), d_out)
    plain.load_state_dict(ours.state_dict())
    _, without = run_step(plain, x, y)
    expected = their_grads(theirs, their_term / 8)
    assert_same(grads["W_dec"] - without["W_dec"], expected["W_dec"])
    if ours.is_transcoder:  # an SAE's encoder passes a part of it on to b_dec
        assert_same(grads["b_dec"] - without["b_dec"], expected["b_dec"])
    assert not expected["W_enc"].any() and not expected["b_enc"].any()


@pytest.mark.parametrize("num_dead", [3, 20])
@pytest.mark.parametrize(("kind", "fields", "d_out"), KINDS, ids=IDS)
def test_auxk(kind, fields, d_out, num_dead):
    """They divide by the targets' Σ‖y − ȳ‖² where we divide by the residual's Σ‖e − ē‖² (Gao et al.'s own code), so
    that AuxK's weight does not shrink as the SAE gets better; and they weigh it in their trainer.

    Their encoder gets no gradient of it: the backward of their fused encoder drops that of pre_acts, of which AuxK
    selects. They also clamp those at zero; here all dead latents' are above.
    """
    ours = make_sae(SAEConfig(k=K, auxk_coefficient=0.5, **fields), d_out)
    dead = torch.arange(D_SAE) < num_dead
    with torch.no_grad():
        ours.get_parameter("b_enc")[dead] = 20.0
    theirs = their_sae(ours)
    x, y = loud_batch(ours)
    output, grads = run_step(ours, x, y, dead)
    _, without = run_step(ours, x, y)
    their_output = theirs(x, y, dead_mask=dead)
    expected = 0.5 * their_output.auxk_loss * scatter(y) / scatter((y - their_output.sae_out).detach())
    assert_same(output.parts["auxk_loss"], expected)
    assert expected > 1e-3
    expected_grads = their_grads(theirs, expected)
    assert_same(grads["W_dec"] - without["W_dec"], expected_grads["W_dec"])
    assert not expected_grads["W_enc"].any() and not expected_grads["b_enc"].any()
    assert (grads["W_enc"] - without["W_enc"]).abs().max() > 1e-3
