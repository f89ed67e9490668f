"""What must not happen with what comes from elsewhere: rules of the code, by its syntax, and what they are for."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import pickle
import subprocess
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bigsae
from bigsae.caching.options import CacheConfig
from bigsae.config import LMConfig, TrainConfig, UserError
from bigsae.configfile import _Loader
from bigsae.evaluation.options import EvaluateConfig
from bigsae.lm.loading import meta_model
from bigsae.planning.options import PlanConfig
from bigsae.pretokenizing.options import PretokenizeConfig
from bigsae.reporting.options import ReportConfig
from bigsae.training.saved import _Unpickler
from tests.launch import ROOT, write_corpus
from tests.models import tiny_llama

FILES = [path for room in ("bigsae", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
_MAY_TRUST = (
    "AutoConfig.from_pretrained",
    "AutoModelForCausalLM.from_pretrained",
    "AutoModelForCausalLM.from_config",
    "transformers.AutoTokenizer.from_pretrained",
)
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with what is called as it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_evaluates_or_trusts(path):
    for name, call in calls(path):
        where, given = f"{name} in line {call.lineno}", keywords(call)
        if name == "torch.load":
            assert given.get("weights_only") == "True", where
        if name in ("yaml.load", "yaml.load_all"):
            assert [ast.unparse(argument) for argument in call.args[1:]] == ["_Loader"], where
        assert not name.startswith(("yaml.unsafe", "yaml.full", "os.system", "os.popen")), where
        assert name not in ("eval", "exec", "compile", "__import__"), where
        assert given.get("shell") != "True" and given.get("allow_pickle") != "True", where
        # Of the calls that may run a repository's code each says whether it may.
        if name in _MAY_TRUST and "scripts" not in path.parts:
            assert "trust_remote_code" in given, where
        assert given.get("trust_remote_code") != "True", where


def test_one_file_imports_pickle_to_keep_torch_from_it():
    users = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in PICKLES for name in names):
                users.add(str(path.relative_to(ROOT)))
    assert users == {"bigsae/training/saved.py"}


def test_the_calls_that_may_trust_are_there():
    """Else the rule above looks for calls that are written otherwise."""
    made = {name for path in FILES if "scripts" not in path.parts for name, _ in calls(path)}
    assert made.issuperset(_MAY_TRUST)
    assert {name for name in made if name.endswith(".from_pretrained")} <= set(_MAY_TRUST)


def test_the_yaml_loader_is_a_safe_one():
    assert issubclass(_Loader, yaml.SafeLoader)


class Harm:
    def __reduce__(self) -> Any:
        return subprocess.check_output, (["true"],)


@pytest.mark.parametrize(
    "value", [Harm(), [torch.nn.Linear(1, 1)], print, {"a": Path("x")}, b"".join, complex(1, 2)]
)
def test_metadata_of_checkpoints_is_of_tensors_alone(value, tmp_path):
    (tmp_path / "file").write_bytes(pickle.dumps({"it": value}))
    allowed = isinstance(value, dict)  # a path, which names nothing that is run
    with (tmp_path / "file").open("rb") as file:
        if allowed:
            assert _Unpickler(file).load() == {"it": value}
        else:
            with pytest.raises(UserError, match="which may be harmful"):
                _Unpickler(file).load()


def trusting(cls: type, prefix: str = "") -> dict[str, Any]:
    """The defaults of all options, at any depth, that let code of others run."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= trusting(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
        elif "trust" in field.name:
            found[prefix + field.name] = field.default
    return found


@pytest.mark.parametrize(
    "options", [TrainConfig, PlanConfig, CacheConfig, EvaluateConfig, PretokenizeConfig, ReportConfig]
)
def test_no_code_of_others_is_run_unless_asked_for(options):
    found = trusting(options)
    assert found and set(found.values()) == {False}


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A model whose folder brings Python code, which leaves a file behind when it is run."""
    folder = tiny_llama(tmp_path / "foreign", num_layers=1)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.ForeignConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig\nclass ForeignConfig(LlamaConfig):\n    model_type = 'foreign'\n"
    )
    return folder


def test_a_models_own_code_runs_only_by_its_flag(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match=r"brings code of its own: .*add --lm\.trust-remote-code"):
        meta_model(str(foreign), LMConfig())
    assert not (tmp_path / "ran").exists()
    with pytest.raises(
        UserError, match="cannot be built as a causal language model"
    ):  # of that kind there is none
        meta_model(str(foreign), LMConfig(trust_remote_code=True))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "kwargs",
    [{"attn_implementation": "user/kernel"}, {"use_kernels": True}, {"allow_all_kernels": True},
     {"experts_implementation": "user/kernel@main"}, {"weights_only": False}, {"use_auth_token": "hf_x"},
     {"trust_remote_code": True}],
)  # fmt: skip
def test_no_argument_of_the_model_runs_code_or_holds_a_token(kwargs, tmp_path):
    with pytest.raises(UserError, match=f"--lm.kwargs sets '{next(iter(kwargs))}'"):
        meta_model(str(tmp_path), LMConfig(kwargs=json.dumps(kwargs)))


def test_a_run_keeps_and_says_no_token(tmp_path, monkeypatch, caplog, capfd):
    """Whatever is in the environment: not in a file, a log or what is printed."""
    secrets = {
        name: f"hf_{name.lower()}0123456789"
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
    }
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    tiny_llama(tmp_path / "lm", num_layers=2)
    write_corpus(tmp_path / "corpus.jsonl", num_documents=12)
    config = TrainConfig(
        model=str(tmp_path / "lm"), dataset=str(tmp_path / "corpus.jsonl"), hookpoints=("model.layers.1",),
        output_dir=str(tmp_path / "run"), tokens=256, batch_size_tokens=64, ctx_len=16,
        lm=LMConfig(dtype="float32", micro_batch_rows=2), data=bigsae.DataConfig(num_shards=2),
        sae=bigsae.SAEConfig(k=2, d_sae=64), buffer=bigsae.BufferConfig(tokens=128), log_every=1,
        log_with=("tensorboard",),
    )  # fmt: skip
    pytest.importorskip("tensorboardX")
    with caplog.at_level(logging.DEBUG):
        bigsae.train_saes(config)
        bigsae.export_run(bigsae.ExportConfig(str(tmp_path / "run"), output=str(tmp_path / "out")))
    said = caplog.text + "".join(capfd.readouterr())
    written = [path for room in ("run", "out") for path in (tmp_path / room).rglob("*") if path.is_file()]
    assert len(written) > 15
    for secret in secrets.values():
        assert secret not in said
        assert not [path for path in written if secret.encode() in path.read_bytes()]
