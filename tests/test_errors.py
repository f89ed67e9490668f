"""What a user can get wrong on the command line: a short message with the flag and the fix, exit status 2."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigsae.commands import run_command
from bigsae.train import main
from tests.launch import flags, write_corpus
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=12)
    (folder / "short.jsonl").write_text('{"text": "too short"}\n')
    datasets.Dataset.from_dict({"label": [1, 2, 3]}).save_to_disk(str(folder / "labels"))
    return folder


def arguments(home: Path, out: Path, **more: Any) -> list[str]:
    base: dict[str, Any] = {
        "model": home / "lm", "dataset": home / "corpus.jsonl", "output_dir": out, "hookpoints": "model.layers.1",
        "tokens": 640, "batch_size_tokens": 64, "ctx_len": 16, "sae__k": 2, "sae__d_sae": 64, "data__num_shards": 2,
        "lm__dtype": "float32", "lm__micro_batch_rows": 2, "buffer__tokens": 128, "buffer__dtype": "float32",
    }  # fmt: skip
    return flags(**{name: value for name, value in (base | more).items() if value is not None})


def call(monkeypatch, command_line: list[str]) -> int:
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bigsae.train", *command_line])
    try:
        run_command(main)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def refused(monkeypatch, capsys, command_line: list[str]) -> str:
    """The message with which the command refuses."""
    capsys.readouterr()
    assert call(monkeypatch, command_line) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


MISTAKES = {
    "no such module": ({"hookpoints": "model.layer.1"}, r"--hookpoints model\.layer\.1: .*nearest are model\.layers\."),
    "no such layer": ({"hookpoints": "model.layers.7"}, r"--hookpoints model\.layers\.7"),
    "no such model": ({"model": "nowhere/at-all"}, r"--model nowhere/at-all"),
    "k beyond d_sae": ({"sae__k": 65}, r"--sae\.k 65 exceeds d_sae 64: raise --sae\.d-sae"),
    "k beyond the expansion": (
        {"sae__k": 65, "sae__d_sae": None, "sae__expansion_factor": 2},
        r"--sae\.k 65 exceeds d_sae 64: raise --sae\.expansion-factor",
    ),
    "both widths": ({"sae__expansion_factor": 2}, r"--sae\.d-sae and --sae\.expansion-factor"),
    "buffer below a batch": ({"buffer__tokens": 63}, r"--buffer\.tokens 63 is smaller .*raise --buffer\.tokens"),
    "less than a batch": ({"tokens": 63}, r"--tokens 63 is less than one batch: lower --batch-size-tokens"),
    "no text column": ({"data__text_column": "body"}, r"--data\.text-column.*text"),
    "no text at all": ({"dataset": "labels"}, r"label"),
    "no such dataset": ({"dataset": "missing.jsonl"}, r"--dataset .*missing\.jsonl"),
    "shorter than a row": ({"dataset": "short.jsonl"}, r"--dataset .*short\.jsonl"),
    "less than one row": ({"ctx_len": 1}, r"--ctx-len 1 must be at least 2"),
    "shorter than a batch": (
        {"batch_size_tokens": 50_000, "tokens": 50_000, "buffer__tokens": 50_000},
        r"--dataset .* holds less than one batch: lower --batch-size-tokens",
    ),
    "shorter than a batch, one epoch": (
        {"batch_size_tokens": 50_000, "tokens": 50_000, "buffer__tokens": 50_000, "data__epochs": 1},
        r"--dataset .* holds less than one batch: lower --batch-size-tokens",
    ),
    "all held out": ({"data__heldout_documents": 12}, r"--data\.heldout-documents 12"),
    "rows of nothing": ({"eval__rows": 5}, r"--eval\.rows and --eval\.ce need .*--data\.heldout-documents"),
    "no project": ({"wandb__name": "x"}, r"--wandb\.name .*--wandb\.project"),
    "no artifacts": ({"wandb__no_artifacts": True}, r"--wandb\.no-artifacts, do nothing .*--log-with wandb"),
    "no repository": ({"hub__push_every": 5}, r"--hub\.push-every, .* need a --hub\.repo-id"),
    "a token": ({"lm__kwargs": '{"token": "hf_x"}'}, r"--lm\.kwargs sets 'token': leave it out, .*HF_TOKEN decides it"),
    "no auxk": ({"sae__k_aux": 3, "sae__auxk_coefficient": 0}, r"--sae\.k-aux does nothing"),
    "nothing held out": ({"eval__every": 5}, r"--eval\.every, .*--data\.heldout-documents"),
    "layout": ({"lm__shard_size": 3}, r"--lm\.shard-size"),
    "kwargs": ({"lm__kwargs": "{attn"}, r"--lm\.kwargs is not JSON"),
    "reserved kwargs": ({"lm__kwargs": '{"dtype": "float16"}'}, r"--lm\.kwargs sets 'dtype': .*--lm\.dtype"),
    "beta": ({"optim__beta1": 1}, r"--optim\.beta1 1\.0"),
    "negative": ({"optim__lr": -1}, r"--optim\.lr -1\.0 must be greater than 0"),
    "decay": ({"optim__decay_fraction": 1.5}, r"--optim\.decay-fraction 1\.5"),
    "jumprelu's k": (
        {"sae__architecture": "jumprelu"}, r"--sae\.k is not used by --sae\.architecture jumprelu .*leave it out"
    ),
    "topk's threshold": ({"sae__target_l0": 8}, r"--sae\.target-l0 is not used by --sae\.architecture topk"),
    "topk's l1": ({"sae__l1_coefficient": 5}, r"--sae\.l1-coefficient is not used .*gated, standard"),
    "gated's auxk": (
        {"sae__architecture": "gated", "sae__k": None, "sae__auxk_coefficient": 0.1},
        r"--sae\.auxk-coefficient is not used by --sae\.architecture gated",
    ),
    "topk's resampling": ({"sae__resample_every_tokens": 64}, r"--sae\.resample-every-tokens is not used"),
    "gated transcoder": (
        {"sae__architecture": "gated", "sae__k": None, "sae__output_hookpoint": "model.layers.0"},
        r"--sae\.output-hookpoint is not used by --sae\.architecture gated",
    ),
    "quadratic without a target": (
        {"sae__architecture": "jumprelu", "sae__k": None, "sae__sparsity_loss": "quadratic"},
        r"--sae\.sparsity-loss quadratic needs --sae\.target-l0",
    ),
    "a target for tanh": (
        {"sae__architecture": "jumprelu", "sae__k": None, "sae__sparsity_loss": "tanh", "sae__target_l0": 8},
        r"--sae\.target-l0 does nothing with --sae\.sparsity-loss tanh",
    ),
    "a target beyond d_sae": (
        {"sae__architecture": "jumprelu", "sae__k": None, "sae__target_l0": 65},
        r"--sae\.target-l0 65 exceeds d_sae 64",
    ),
    "tanh's scale": (
        {"sae__architecture": "jumprelu", "sae__k": None, "sae__tanh_scale": 2}, r"--sae\.tanh-scale does nothing",
    ),
    "four times k": ({"sae__k": 20, "sae__multi_topk": True}, r"4 x --sae\.k 20 .*exceeds d_sae 64"),
    "prefixes": (
        {"sae__architecture": "matryoshka", "sae__prefixes": (16, 8)},
        r"--sae\.prefixes 16 8 must be positive and ascend",
    ),
    "wide prefixes": (
        {"sae__architecture": "matryoshka", "sae__prefixes": (16, 80)}, r"--sae\.prefixes 80 exceeds d_sae 64"
    ),
    "decoder norm": (
        {"sae__decoder_init_norm": 0.1},
        r"--sae\.decoder-init-norm does nothing .*normalize-decoder False",
    ),
    "skip without a transcoder": ({"sae__skip": True}, r"--sae\.skip is for transcoders: set --sae\.output-hookpoint"),
    "transcoder's layer_norm": (
        {"sae__normalize": "layer_norm", "sae__output_hookpoint": "model.layers.0"},
        r"--sae\.normalize layer_norm is not for transcoders",
    ),
    "no such output": (
        {"sae__output_hookpoint": "model.layer.0"},
        r"--sae\.output-hookpoint model\.layer\.0: .*nearest",
    ),
    "pairs": (
        {"sae__output_hookpoint": ("model.layers.0", "model.layers.1")},
        r"--hookpoints names 1 activations and --sae\.output-hookpoint 2: they pair up one to one",
    ),
    "predicts itself": (
        {"sae__output_hookpoint": "model.layers.1"},
        r"--sae\.output-hookpoint model\.layers\.1 is what",
    ),
    "no such start": ({"sae__init_from": "nowhere"}, r"--sae\.init-from: .*nowhere"),
    "start and b_dec": (
        {"sae__init_from": "nowhere", "sae__b_dec_init": "mean"},
        r"--sae\.b-dec-init does nothing with --sae\.init-from",
    ),
    "bfloat16's beta2": ({"sae__dtype": "bfloat16"}, r"--optim\.beta2 0\.999 is too slow .*set --optim\.beta2 0\.99"),
    "bfloat16 twice": (
        {"sae__dtype": "bfloat16", "sae__autocast": True, "optim__beta2": 0.99}, r"--sae\.autocast does nothing with"
    ),
    "never dead": (
        {"sae__architecture": "gated", "sae__k": None, "sae__resample_every_tokens": 64},
        r"--sae\.resample-every-tokens does nothing: .*lower --sae\.dead-after-tokens",
    ),
    "cycles": ({"optim__num_cycles": 2}, r"--optim\.num-cycles does nothing without --optim\.schedule cosine_restarts"),
    "floor": ({"optim__min_factor": 0.1}, r"--optim\.min-factor does nothing with --optim\.schedule constant"),
    "accumulation": ({"optim__accumulation_steps": 11}, r"--tokens 640 is less than one update of 11 batches"),
    "autocast": ({"lm__autocast": True, "lm__dtype": "bfloat16"}, r"--lm\.autocast does nothing .*--lm\.dtype float32"),
    "resume elsewhere": ({"config": "nowhere.json"}, r"--config nowhere\.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line(name, home, tmp_path, monkeypatch, capsys):
    change, expected = MISTAKES[name]
    if "dataset" in change:
        change = change | {"dataset": home / change["dataset"]}
    message = refused(monkeypatch, capsys, arguments(home, tmp_path / "out", **change))
    last = message.strip().splitlines()[-1]
    assert re.fullmatch(rf"error: .*{expected}.*", last), message
    assert len(last) < 400
    assert not (tmp_path / "out" / "config.json").exists() or "shorter than a batch" in name


def test_unknown_flags_keep_tyros_box(home, tmp_path, monkeypatch, capsys):
    assert "--sae.kk" in refused(monkeypatch, capsys, [*arguments(home, tmp_path), "--sae.kk", "5"])


def test_vocabulary_beyond_the_models(home, tmp_path, monkeypatch, capsys):
    """A tokenizer with ids that the embedding does not have."""
    model = tmp_path / "lm"
    tiny_llama(model, num_layers=2)
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    message = refused(monkeypatch, capsys, arguments(home, tmp_path / "out", model=model))
    assert "300" in message
    assert "--model" in message


def test_activations_that_are_no_numbers(home, tmp_path, monkeypatch, capsys):
    model = tmp_path / "lm"
    tiny_llama(model, num_layers=2)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    points = {"hookpoints": ("model.layers.0", "model.layers.1")}
    message = refused(monkeypatch, capsys, arguments(home, tmp_path / "out", model=model, **points))
    assert "non-finite activations at model.layers.1 before step 0" in message
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "model.layers.1" in status["reason"]


def test_an_output_folder_that_holds_a_run(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert call(monkeypatch, arguments(home, out)) == 0
    assert "already holds a run: go on with --resume" in refused(monkeypatch, capsys, arguments(home, out))
    message = refused(monkeypatch, capsys, arguments(home, out, resume=True, sae__d_sae=128))
    assert "--sae.d-sae is 128" in message
    assert "has 64" in message
    message = refused(monkeypatch, capsys, arguments(home, out, resume=True, tokens=1280))
    assert "--tokens is 1280" in message
    assert call(monkeypatch, arguments(home, out, resume=True, log_every=3)) == 0


def test_a_run_that_failed_before_its_first_checkpoint_can_be_mended(home, tmp_path, monkeypatch, capsys):
    out, wrong = tmp_path / "out", {"batch_size_tokens": 50_000, "tokens": 50_000, "buffer__tokens": 50_000}
    refused(monkeypatch, capsys, arguments(home, out, **wrong))
    assert json.loads((out / "status.json").read_text())["status"] == "failed"
    assert "already holds a run" in refused(monkeypatch, capsys, arguments(home, out))
    assert call(monkeypatch, arguments(home, out, resume=True)) == 0
    assert json.loads((out / "config.json").read_text())["batch_size_tokens"] == 64


def test_resume_where_there_is_nothing_starts_afresh_and_says_so(home, tmp_path, monkeypatch, caplog):
    assert call(monkeypatch, arguments(home, tmp_path / "run", resume=True)) == 0
    assert "starting afresh" in caplog.text


def test_config_reads_back_and_flags_override(home, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, arguments(home, tmp_path / "one", seed=5)) == 0
    again = ["--config", str(tmp_path / "one" / "config.json"), "--output-dir", str(tmp_path / "two")]
    assert call(monkeypatch, again) == 0
    weights = "model.layers.1/sae_weights.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert call(monkeypatch, [*again[:3], str(tmp_path / "three"), "--seed", "6"]) == 0
    assert (tmp_path / "one" / weights).read_bytes() != (tmp_path / "three" / weights).read_bytes()
    broken = tmp_path / "broken.json"
    broken.write_text('{"sae": {"kk": 3}}')
    assert "unknown option 'kk'" in refused(monkeypatch, capsys, ["--config", str(broken)])
