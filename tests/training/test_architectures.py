"""Every architecture, and transcoders, through whole runs: trained, resumed bit for bit, exported, started from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bigsae
from bigsae.config import SAEConfig, UserError
from bigsae.training.fit import fit, fit_trainer
from tests.launch import metrics, write_corpus
from tests.models import tiny_llama

sae_lens = pytest.importorskip("sae_lens")

IN, OUT = "model.layers.1.mlp:input", "model.layers.1.mlp"
SAES: dict[str, SAEConfig] = {
    "topk": SAEConfig(k=3, multi_topk=True),
    "batchtopk": SAEConfig(architecture="batchtopk", k=3),
    "matryoshka": SAEConfig(architecture="matryoshka", k=3, prefixes=(8, 24)),
    "jumprelu": SAEConfig(architecture="jumprelu", target_l0=4),
    "jumprelu from dense": SAEConfig(architecture="jumprelu", sparsity_loss="tanh"),
    "gated": SAEConfig(architecture="gated", resample_every_tokens=300),
    "standard": SAEConfig(architecture="standard", p_norm=0.9, resample_every_tokens=300),
    "layer_norm": SAEConfig(k=3, normalize="layer_norm", apply_b_dec_to_input=False),
    "topk transcoder": SAEConfig(k=3, output_hookpoint=(OUT,), skip=True),
    "batchtopk transcoder": SAEConfig(architecture="batchtopk", k=3, output_hookpoint=(OUT,)),
    "jumprelu transcoder": SAEConfig(
        architecture="jumprelu", target_l0=4, output_hookpoint=(OUT,), skip=True
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=40)
    return folder


@pytest.fixture
def config(home, tmp_path) -> bigsae.TrainConfig:
    return bigsae.TrainConfig(
        model=str(home / "lm"),
        dataset=str(home / "corpus.jsonl"),
        hookpoints=("model.layers.1",),
        output_dir=str(tmp_path / "out"),
        tokens=64 * 24,
        batch_size_tokens=64,
        ctx_len=16,
        lm=bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        data=bigsae.DataConfig(num_shards=4, heldout_documents=4),
        buffer=bigsae.BufferConfig(tokens=256, dtype="float32"),
        checkpoint=bigsae.CheckpointConfig(every=9, keep=0),
        optim=bigsae.OptimConfig(lr=3e-3),
    )


def with_sae(config: bigsae.TrainConfig, sae: SAEConfig) -> bigsae.TrainConfig:
    hookpoints = (IN,) if sae.output_hookpoint else config.hookpoints
    return replace(config, hookpoints=hookpoints, sae=replace(sae, d_sae=64, dead_after_tokens=256))


@pytest.mark.parametrize("name", SAES)
def test_trains_resumes_and_exports(config, name):
    config = with_sae(config, SAES[name])
    config = replace(config, optim=replace(config.optim, accumulation_steps=2))  # 9 steps: within an update
    straight = bigsae.train_saes(config)[config.hookpoints[0]]
    out = Path(config.output_dir)
    rows = metrics(out)
    training = [row for row in rows if "fvu" in row]
    assert training[-1]["loss"] < training[0]["loss"]
    assert 0 < rows[-1]["heldout_fvu"] < 1.5 and rows[-1]["heldout_l0"] > 0
    assert set(straight.loss_parts) <= set(training[0])

    weights = sorted((out / config.hookpoints[0]).glob("*.safetensors"))
    before = [path.read_bytes() for path in weights]
    for step in (24, 18):
        shutil.rmtree(out / "checkpoints" / f"step_{step}")
    resumed = bigsae.train_saes(replace(config, resume=True))[config.hookpoints[0]]
    for key, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert [path.read_bytes() for path in weights] == before
    assert metrics(out) == rows

    loaded, x = bigsae.load_sae(out / config.hookpoints[0]), torch.randn(50, 32)
    torch.testing.assert_close(loaded(x), straight(x), rtol=1e-5, atol=1e-5)
    if name != "topk transcoder":  # SAELens has no class for it
        theirs = sae_lens.SAE.load_from_disk(out / config.hookpoints[0], device="cpu")
        torch.testing.assert_close(theirs(x).detach(), straight(x), rtol=1e-5, atol=1e-5)


def test_transcoders_pair_up_and_say_so(config):
    """Two transcoders, in the user's order of pairs and not the forward's; each file names what it maps to what."""
    sae = SAEConfig(k=3, d_sae=64, output_hookpoint=("model.layers.1", "model.layers.0.mlp"))
    config = replace(config, hookpoints=("model.layers.0", "model.layers.0.mlp:input"), sae=sae)
    saes = bigsae.train_saes(config)
    assert set(saes) == set(config.hookpoints)
    for read, predicted in zip(config.hookpoints, sae.output_hookpoint, strict=True):
        cfg = json.loads((Path(config.output_dir) / read / "cfg.json").read_text())
        assert cfg["metadata"]["hook_name"] == read and cfg["metadata"]["hook_name_out"] == predicted
    heldout = {
        row["hookpoint"]: row["heldout_fvu"]
        for row in metrics(Path(config.output_dir))
        if "heldout_fvu" in row
    }
    assert set(heldout) == set(config.hookpoints)


def test_a_transcoder_predicts_the_other_hookpoint_and_not_its_own():
    """y is a linear map of x: with a skip alone it is learnt; had x been the target, it could not be told."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 7, generator=generator)
    batches = [(x, 50 * x @ mixing + 20) for x in torch.randn(300, 128, 12, generator=generator)]
    sae = fit(
        batches, SAEConfig(k=2, d_sae=32, skip=True, init_tokens=256), bigsae.OptimConfig(lr=1e-2), seed=0
    )
    x, y = batches[0]
    assert sae.d_out == 7 and sae(x).shape == y.shape
    fvu = (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert fvu < 0.02


def test_fit_refuses_transcoders_that_are_none():
    pairs = [(torch.randn(32, 8), torch.randn(32, 8))]
    with pytest.raises(UserError, match="gated makes no transcoders"):
        fit(pairs, SAEConfig(architecture="gated", d_sae=16))
    with pytest.raises(UserError, match="give batches of pairs"):
        fit([torch.randn(32, 8)], SAEConfig(d_sae=16, k=2, output_hookpoint=("model.layers.0",)))
    with pytest.raises(UserError, match="schedule cosine needs the number of batches: pass num_steps"):
        fit(iter([torch.randn(32, 8)]), SAEConfig(d_sae=16, k=2), bigsae.OptimConfig(schedule="cosine"))
    with pytest.raises(UserError, match="32 inputs and 16 targets"):
        fit([(torch.randn(32, 8), torch.randn(16, 8))], SAEConfig(d_sae=16, k=2))


STARTS = [
    ("topk", SAEConfig(k=3), SAEConfig(k=3)),
    ("batchtopk", SAEConfig(architecture="batchtopk", k=3), SAEConfig(architecture="batchtopk", k=3)),
    ("matryoshka", SAEConfig(architecture="batchtopk", k=3), SAEConfig(architecture="matryoshka", k=3)),
    ("jumprelu", SAEConfig(architecture="jumprelu", target_l0=4), SAEConfig(architecture="jumprelu", target_l0=4)),
    ("gated", SAEConfig(architecture="gated"), SAEConfig(architecture="gated")),
    ("standard", SAEConfig(architecture="standard"), SAEConfig(architecture="standard")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "second"), STARTS, ids=[start[0] for start in STARTS])
def test_init_from_starts_where_the_other_ended(config, tmp_path, name, first, second):
    done = bigsae.train_saes(with_sae(config, first))["model.layers.1"]
    start = replace(
        with_sae(config, replace(second, init_from=config.output_dir)),
        output_dir=str(tmp_path / "second"),
        optim=replace(config.optim, lr=1e-12),
        tokens=64,
    )
    if name == "jumprelu":
        start = replace(start, sae=replace(start.sae, threshold_lr=1e-12))
    begun = bigsae.train_saes(start)["model.layers.1"]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) + done.b_dec
    for key, tensor in done.named_parameters():
        torch.testing.assert_close(begun.get_parameter(key), tensor, rtol=1e-5, atol=1e-6, msg=key)
    if "topk" not in name and name != "matryoshka":  # their running threshold takes in a batch
        torch.testing.assert_close(begun(x), done(x), rtol=1e-4, atol=1e-5)


TRANSCODERS = [name for name in SAES if name.endswith("transcoder")]


@pytest.mark.parametrize("name", TRANSCODERS)
def test_init_from_a_transcoder(config, tmp_path, name):
    """In the model's scale its decoder rows are far from norm 1: that of what it reads and what it predicts differ."""
    done = bigsae.train_saes(with_sae(config, SAES[name]))[IN]
    assert not 0.9 < done.W_dec.norm(dim=1).mean() < 1.1
    sae = replace(with_sae(config, SAES[name]).sae, init_from=config.output_dir)
    sae = replace(sae, threshold_lr=1e-12) if "jumprelu" in name else sae
    start = replace(with_sae(config, sae), output_dir=str(tmp_path / "second"), tokens=64)
    begun = bigsae.train_saes(replace(start, optim=replace(config.optim, lr=1e-12)))[IN]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    for key in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(
            begun.get_parameter(key), done.get_parameter(key), rtol=1e-4, atol=1e-6, msg=key
        )
    if "batchtopk" not in name:
        torch.testing.assert_close(begun(x), done(x), rtol=1e-4, atol=1e-5)


def test_init_from_survives_a_stop_before_the_first_step(config, tmp_path, monkeypatch):
    from bigsae.data.harvest import Harvest
    from bigsae.training.run import Preempted

    bigsae.train_saes(with_sae(config, SAEConfig(k=3)))
    second = with_sae(config, SAEConfig(k=3, init_from=config.output_dir))
    second = replace(second, output_dir=str(tmp_path / "second"))
    plain = Harvest.fill
    with monkeypatch.context() as patch:
        patch.setattr(Harvest, "fill", lambda self, step, should_stop: plain(self, step, lambda: True))
        with pytest.raises(Preempted):
            bigsae.train_saes(second)
    resumed = bigsae.train_saes(replace(second, resume=True))["model.layers.1"]
    straight = bigsae.train_saes(replace(second, output_dir=str(tmp_path / "straight")))["model.layers.1"]
    for key, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_init_from_refuses_what_does_not_fit(config, tmp_path):
    bigsae.train_saes(with_sae(config, SAEConfig(k=3)))
    other = replace(config, output_dir=str(tmp_path / "second"))
    for sae, message in (
        (SAEConfig(architecture="gated", d_sae=64), "holds a topk SAE: set --sae.architecture topk"),
        (SAEConfig(k=3, d_sae=128), "d_sae 64, not 128: set --sae.d-sae 64"),
        (SAEConfig(k=3, d_sae=64, apply_b_dec_to_input=False), "set --sae.apply-b-dec-to-input to it"),
    ):
        with pytest.raises(UserError, match=message):
            bigsae.train_saes(replace(other, sae=replace(sae, init_from=config.output_dir)))
    several = replace(other, hookpoints=("model.layers.0", "model.layers.1"), sae=SAEConfig(k=3, d_sae=64))
    with pytest.raises(
        UserError, match=r"has no folder model\.layers\.0: with several --hookpoints each needs one"
    ):
        bigsae.train_saes(replace(several, sae=replace(several.sae, init_from=config.output_dir)))


FLAGS = {
    "bfloat16": {"dtype": "bfloat16"},
    "autocast": {"autocast": True},
    "compile": {"compile": True},
}


@pytest.mark.parametrize("architecture", ["topk", "standard"])
@pytest.mark.parametrize("flag", FLAGS)
def test_precision_and_compile_flags_train_as_without(architecture, flag):
    """To bfloat16's rounding, or float32's; and the flag does something."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 16, generator=generator)
    strengths = torch.rand(30, 128, 40, generator=generator) * (
        torch.rand(30, 128, 40, generator=generator) < 0.1
    )
    batches = list(3 * strengths @ directions + 2)
    sae = SAEConfig(architecture=architecture, d_sae=48, init_tokens=512)
    plain, flagged = (
        fit_trainer(batches, config, bigsae.OptimConfig(lr=3e-3, beta2=0.99), seed=0, num_steps=None)
        for config in (sae, replace(sae, **FLAGS[flag]))
    )
    ours, theirs = flagged.read_metrics(), plain.read_metrics()
    assert ours["fvu"] == pytest.approx(theirs["fvu"], rel=1e-4 if flag == "compile" else 0.02)
    dtype = torch.bfloat16 if flag == "bfloat16" else torch.float32
    assert all(p.dtype == dtype for p in flagged.sae.parameters())
    if flag != "compile":
        assert ours["fvu"] != theirs["fvu"]


def test_lm_flags_reach_the_model(config):
    """Under autocast the activations are rounded to bfloat16: another SAE, but hardly."""
    sae = with_sae(config, SAEConfig(k=3))
    plain = bigsae.train_saes(sae)["model.layers.1"]
    rounded = replace(sae, lm=replace(sae.lm, autocast=True), output_dir=sae.output_dir + "-autocast")
    half = bigsae.train_saes(rounded)["model.layers.1"]
    assert not torch.equal(plain.W_dec, half.W_dec)
    ours, theirs = (metrics(Path(c.output_dir))[-1]["heldout_fvu"] for c in (rounded, sae))
    assert ours == pytest.approx(theirs, rel=0.05)
