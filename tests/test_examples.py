"""examples/: every launch at a recipe's top, with the real parser, and every recipe on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tyro
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import bigsae
from bigsae.checks import check
from bigsae.commands import parse_train_config
from bigsae.training.variants import check_variants, variants
from tests.launch import flags, metrics, write_corpus
from tests.models import tiny_llama

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples").glob("*.yaml"))
HAS_CACHE = (ROOT / "bigsae" / "cache_activations.py").exists()


def recipes() -> list:
    """All, those from a cache only where there is such a thing."""
    cached = pytest.mark.skipif(not HAS_CACHE, reason="needs bigsae.cache_activations")
    return [
        pytest.param(path, id=path.stem, marks=cached if path.stem == "from_cache" else ())
        for path in RECIPES
    ]


def launches(recipe: Path, tmp_path: Path) -> list[list[str]]:
    """What each command in the comment at the top has accelerate launch, as a shell understands it."""
    lines = [line[1:] for line in recipe.read_text().splitlines() if line.startswith("#")]
    commands = "\n".join(line for line in lines if line.startswith("     "))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("accelerate", "sbatch"):
        (tools / name).write_text(
            f"#!/bin/sh\nprintf '%s\\0' {name} \"$@\" >>'{tmp_path}/calls'\necho >>'{tmp_path}/calls'\n"
        )
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", commands], cwd=ROOT, env=env, check=True)
    return [line.split("\0")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]


def launched(call: list[str]) -> tuple[str, int, list[str]]:
    """The module, on how many ranks, and its flags."""
    if call[0] == "sbatch":
        script = call.index("scripts/slurm/train.sbatch")
        assert call[1:script] == ["--nodes", "2"]
        return "bigsae.train", 16, call[script + 1 :]
    assert call[:2] == ["accelerate", "launch"]
    args = launch_command_parser().parse_args(call[2:])
    written = load_config_from_file(str(ROOT / args.config_file))
    return args.training_script, args.num_processes or written.num_processes, args.training_script_args


@pytest.mark.parametrize("recipe", recipes())
def test_it_is_launched_as_it_says(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    modules = set()
    for call in launches(recipe, tmp_path):
        module, num_ranks, arguments = launched(call)
        modules.add(module)
        if module == "bigsae.train":
            assert arguments[:2] == ["--config", f"examples/{recipe.name}"]
            config = parse_train_config(arguments)
            if recipe.stem == "from_cache":
                assert config.activations == "activations/gpt2"
                # As the cache says, which is not there.
                config = replace(
                    config, model="openai-community/gpt2", dataset="x", hookpoints=("transformer.h.8",)
                )
            check(config, num_ranks)
            check_variants(config, variants(config))
            assert config.resume and config.output_dir.startswith("runs/")
        else:
            assert_caches(arguments)
    assert "bigsae.train" in modules


def assert_caches(arguments: list[str]) -> None:
    """The flags are those of bigsae.cache_activations, for the folder that is trained from."""
    options: Any = import_module("bigsae.caching.options")
    config = tyro.cli(options.CacheConfig, args=arguments)
    assert config.output_dir == "activations/gpt2"


def test_the_page_lists_them():
    table = re.findall(r"^\| `(.+?)` \|", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == [path.name for path in RECIPES]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tiny_llama(folder / "lm", num_layers=2)
    write_corpus(folder / "corpus.jsonl", num_documents=40)
    return folder


TINY = {
    "tokens": 640, "batch_size_tokens": 128, "ctx_len": 16, "lm__micro_batch_rows": 4, "buffer__tokens": 256,
    "sae__d_sae": 256, "sae__expansion_factor": None, "checkpoint__every": 0, "log_every": 5, "eval__rows": 8,
    "data__heldout_documents": 2, "data__name": None, "data__num_shards": 4, "eval__every": 0,
}  # fmt: skip


# llama3_* are as gpt2, and longer; from_cache needs a cache, whose own tests train from one.
@pytest.mark.parametrize("name", ["gpt2", "batchtopk", "jumprelu", "transcoder", "sweep"])
def test_it_trains(name, home, tmp_path):
    """The recipe as it stands, but for a tiny model, little text and few latents."""
    recipe = str(ROOT / "examples" / f"{name}.yaml")
    change = {"model": home / "lm", "dataset": home / "corpus.jsonl", "hookpoints": "model.layers.1"}
    if name == "transcoder":
        change |= {"hookpoints": "model.layers.1.mlp:input", "sae__output_hookpoint": "model.layers.1.mlp"}
    config = parse_train_config(["--config", recipe, *flags(**change, **TINY, output_dir=tmp_path / "out")])
    saes = bigsae.train_saes(config)
    assert len(saes) == (8 if name == "sweep" else 1)
    expected = {"batchtopk": "batchtopk", "jumprelu": "jumprelu"}.get(name, "topk")
    assert {sae.architecture for sae in saes.values()} == {expected}
    assert metrics(tmp_path / "out")[-1]["step"] == 5
