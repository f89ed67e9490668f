"""`--config`: what files may hold, what they mean, and that a run's own file makes the same run again."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import bigsae
from bigsae.commands import parse_train_config
from bigsae.config import TrainConfig, UserError
from bigsae.configfile import read_config, to_dict
from tests.launch import write_corpus
from tests.models import tiny_llama

WORDS = st.text("abc.{}=,0:#- 'é", min_size=1)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an option of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return configs(typing.cast(type, hint))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if a is type(None) else values(a) for a in arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(-(2**60), 2**60),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: WORDS,
    }[hint]


def configs(cls: type) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: values(hint) for name, hint in typing.get_type_hints(cls).items()})


@settings(max_examples=25, deadline=None)
@given(config=configs(TrainConfig), as_yaml=st.booleans())
def test_every_configuration_comes_back_from_its_file(tmp_path_factory, config, as_yaml):
    path = tmp_path_factory.mktemp("file") / ("config.yaml" if as_yaml else "config.json")
    plain = to_dict(config)
    path.write_text(yaml.safe_dump(plain, allow_unicode=True) if as_yaml else json.dumps(plain))
    allowed = ["--lm.trust-remote-code"] if config.lm.trust_remote_code else []
    assert parse_train_config(["--config", str(path), *allowed]) == config


@pytest.mark.parametrize("form", ["--config", "--config="])
def test_a_file_alone_runs_nobodys_code(tmp_path, form):
    """It may be another's config.json, of which the model card says that it makes the run again."""
    flag, path = write(tmp_path, RECIPE + "lm: {trust_remote_code: true}\n")
    file = [flag, path] if form == "--config" else [f"{flag}={path}"]
    with pytest.raises(
        UserError, match=r"--config asks for the code .* add --lm\.trust-remote-code to allow it"
    ):
        parse_train_config([*file, "--output-dir", "x"])
    for flag, trusted in (("--lm.trust-remote-code", True), ("--lm.no-trust-remote-code", False)):
        assert parse_train_config([*file, "--output-dir", "x", flag]).lm.trust_remote_code is trusted


def write(folder: Path, text: str, name: str = "run.yaml") -> list[str]:
    (folder / name).write_text(text)
    return ["--config", str(folder / name)]


RECIPE = """
# All that has no default, but not --output-dir; and some of the rest.
model: gpt2
dataset: text.jsonl
hookpoints:
  - model.layers.{1,2}
  - model.layers.3.mlp:input
tokens: 1_000_000
optim: {lr: 1e-4, eps: 1E-9, beta2: 0.99}
sae:
  k: 16
  normalize: none
  dead_after_tokens: 5000
"""


def test_a_part_of_the_options_is_enough(tmp_path):
    config = parse_train_config([*write(tmp_path, RECIPE), "--output-dir", "runs/x", "--sae.k", "8"])
    assert config == TrainConfig(
        model="gpt2",
        dataset="text.jsonl",
        hookpoints=("model.layers.{1,2}", "model.layers.3.mlp:input"),
        output_dir="runs/x",
        tokens=1_000_000,
        optim=bigsae.OptimConfig(lr=1e-4, eps=1e-9, beta2=0.99),
        sae=bigsae.SAEConfig(k=8, normalize="none", dead_after_tokens=5000),
    )


def test_flags_override_wherever_they_stand(tmp_path):
    file = write(tmp_path, RECIPE)
    config = parse_train_config(["--hookpoints", "a", "b", *file, "--output-dir", "x", "--data.streaming"])
    assert config.hookpoints == ("a", "b") and config.data.streaming
    assert config.optim.lr == 1e-4
    again = parse_train_config([f"--config={file[1]}", "--output-dir=x", "--optim.lr", "None"])
    assert again.optim.lr is None and again.sae.k == 16


def test_what_neither_file_nor_flags_give_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train_config(write(tmp_path, RECIPE))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "--output-dir" in message and "--dataset" not in message


def test_an_empty_file_gives_nothing(tmp_path):
    flags = "--model m --dataset d --hookpoints h --output-dir o --tokens 9".split()
    assert parse_train_config([*write(tmp_path, "# nothing\n"), *flags]) == parse_train_config(flags)


REFUSED = {
    "a near name": ("sae: {kaux: 8}", "sae: unknown option 'kaux': the nearest is 'k_aux'"),
    "as a flag": ("batch-size-tokens: 8", "unknown option 'batch-size-tokens': the nearest is 'batch_size_tokens'"),
    "in the wrong place": ("lr: 1e-4", "unknown option 'lr': 'lr' belongs under 'optim'"),
    "with a point": ("sae.k: 8", "unknown option 'sae.k': write 'k' under 'sae'"),
    "far from all": ("zzzzzzzz: 1", "unknown option 'zzzzzzzz': known are "),
    "a number for a name": ("7: 1", "unknown option 7: known are"),
    "a word for a number": ("tokens: many", "tokens: expected int, found 'many'"),
    "yes for a number": ("sae: {k: yes}", "sae: k: expected int, found True"),
    "one for a list": ("hookpoints: model.layers.6", "hookpoints: expected a list, found 'model.layers.6'"),
    "none of the choices": ("sae: {architecture: relu}", "sae: architecture: 'relu' is none of topk, "),
    "a group without options": ("sae:", "sae: expected options and their values, found None"),
    "a list": ("- model", "run.yaml: expected options and their values, found ['model']"),
    "twice": ("seed: 1\nmodel: m\nseed: 2", "is not YAML: 'seed' stands in it twice"),
    "broken": ("sae: {k: 8", "is not YAML: while parsing a flow mapping"),
    "code": ("model: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    "bombs": (
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
        "unknown option 'a'",
    ),
    "a bomb as a value": (
        "sweep: &a [x,x,x,x]\nbuffer: &b [*a,*a,*a,*a]\nseed: [*b,*b,*b,*b]\n",
        "seed: expected int, found [",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    text, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        parse_train_config(write(tmp_path, text))
    message = str(caught.value)
    assert message.startswith(f"--config {tmp_path}/run.yaml") and expected in message
    assert len(message) < 700 and "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{'seed': 1}", "is not JSON: Expecting property name"),
        ('{"seed": 1, "seed": 2}', "is not JSON: 'seed' stands in it twice"),
        ("[" * 100_000, "is not JSON: "),
        ('{"sae": {"kk": 3}}', "sae: unknown option 'kk': the nearest is 'k'"),
    ],
)
def test_refused_as_json(tmp_path, text, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_train_config(write(tmp_path, text, "run.json"))


def test_what_is_no_file(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, expected in (
        ("nowhere", "cannot be read: No such file"),
        ("", "cannot be read"),
        ("binary", "UTF-8"),
    ):
        with pytest.raises(UserError, match=expected):
            parse_train_config(["--config", str(tmp_path / path)])
    with pytest.raises(UserError, match="--config needs a file"):
        parse_train_config(["--seed", "1", "--config"])


def test_a_runs_own_file_is_whole(tmp_path):
    """Where a run is gone on from, an option that is missing is an error, not a question."""
    (tmp_path / "config.json").write_text('{"model": "m", "dataset": "d", "hookpoints": [], "tokens": 9}')
    with pytest.raises(UserError, match="option 'output_dir' is missing"):
        read_config(tmp_path / "config.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=12)
    return folder


RUNS: dict[str, dict[str, Any]] = {
    "json": {
        "hookpoints": ("model.layers.{0,1}.mlp", "blocks.0.hook_resid_post"),
        "sae": bigsae.SAEConfig(architecture="jumprelu", d_sae=64, target_l0=4.0, normalize="layer_norm"),
        "optim": bigsae.OptimConfig(lr=1e-3, schedule="cosine_restarts", num_cycles=2, moments_dtype="int8"),
        "data": bigsae.DataConfig(num_shards=3, heldout_documents=2, drop_first_position=False),
    },
    "yaml": {
        "hookpoints": ("model.layers.0.mlp:input",),
        "sae": bigsae.SAEConfig(k=3, d_sae=64, output_hookpoint=("model.layers.0.mlp",), skip=True),
        "sweep": ("sae.k=2,3", "seed=1,2"),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_runs_file_makes_it_again_bit_for_bit(home, tmp_path, kind):
    options = {
        "model": str(home / "lm"), "dataset": str(home / "corpus.jsonl"), "output_dir": str(tmp_path / "first"),
        "tokens": 640, "batch_size_tokens": 64, "ctx_len": 16, "seed": 11,
        "lm": bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
        "buffer": bigsae.BufferConfig(tokens=128, dtype="float32"),
    }  # fmt: skip
    first = TrainConfig(**(options | RUNS[kind]))
    bigsae.train_saes(first)
    file = tmp_path / "first" / "config.json"
    if kind == "yaml":
        file.with_suffix(".yaml").write_text(yaml.safe_dump(json.loads(file.read_text())))
        file = file.with_suffix(".yaml")
    config = parse_train_config(["--config", str(file), "--output-dir", str(tmp_path / "again")])
    assert config == replace(first, output_dir=str(tmp_path / "again"))
    bigsae.train_saes(config)
    written = [p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("sae*.safetensors")]
    assert len(written) == {"json": 3, "yaml": 4}[kind]
    for path in written:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()
