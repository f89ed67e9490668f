"""Folders that sparsify's own class reads, and its folders in our hands."""

from __future__ import annotations

import pytest
import torch

import bigsae
from bigsae.hub.formats import save_sae
from bigsae.sae.base import SAE
from tests.hub.saes import D_IN, D_SAE, K, activations, assert_same, random_sae

sparsify = pytest.importorskip("sparsify")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """On the CPU its Triton decoder runs in the interpreter, slowly, if at all."""
    monkeypatch.setattr("sparsify.sparse_coder.decoder_impl", sparsify.utils.eager_decode)


def assert_computes(theirs: sparsify.SparseCoder, ours: SAE) -> None:
    """The same k latents and output."""
    x = activations().flatten(0, 1)
    with torch.no_grad():
        acts, indices, _ = theirs.encode(x)
        latents = torch.zeros(len(x), D_SAE).scatter(1, indices, acts)
        assert_same(ours.encode(x), latents)
        assert (latents > 0).sum(1).max() == K
        assert_same(ours(x), theirs(x).sae_out)


@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"d_out": D_IN}, {"d_out": D_IN, "skip": True}], ids=["sae", "transcoder", "skip"]
)
def test_sparsify_computes_what_was_saved(fields, multi_topk, tmp_path):
    sae = random_sae("topk", k=K, multi_topk=multi_topk, **fields)
    save_sae(sae, tmp_path, torch.rand(D_SAE), format="sparsify")
    theirs, ours = sparsify.SparseCoder.load_from_disk(tmp_path), bigsae.load_sae(tmp_path)
    assert theirs.cfg.transcode == ("d_out" in fields)
    assert_computes(theirs, sae)
    assert_computes(theirs, ours)
    assert ours.metadata == sae.metadata | ({"multi_topk": True} if multi_topk else {})
    save_sae(ours, tmp_path / "again", format="sparsify")
    for file in ("cfg.json", "sae.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize(
    ("width", "dtype"),
    [({"num_latents": D_SAE}, torch.float32), ({"expansion_factor": D_SAE // D_IN}, torch.bfloat16)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_reads_what_sparsify_saved(transcode, skip, dtype, width, tmp_path):
    """Also an SAE with a skip connection, which sparsify does not forbid."""
    config = sparsify.SparseCoderConfig(
        k=K, transcode=transcode, skip_connection=skip, multi_topk=skip, **width
    )
    theirs = sparsify.SparseCoder(D_IN, config, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_to_disk(tmp_path)
    theirs.cfg.multi_topk = False  # or its forward's output were that of 4 k latents
    ours = bigsae.load_sae(tmp_path)
    assert (ours.is_transcoder, ours.W_skip is not None) == (transcode, skip)
    assert ours.metadata.get("multi_topk", False) == skip
    assert_computes(theirs.float(), ours)
    ours.save(str(tmp_path / "again"))
    if transcode or skip:
        assert_computes(sparsify.SparseCoder.load_from_disk(tmp_path / "again"), ours)
