"""docs/migration.md against the trainers it comes from, as installed, and against the flags that there are."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.launch import environment

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "migration.md").read_text()
# Flags of training that come with a command of their own.
COMES_WITH = {"--activations": "cache_activations"}


def sections() -> dict[str, str]:
    """The page's text by its headings, in backticks or not; sparsify's classes as sparsify.TrainConfig."""
    found, package = {}, ""
    for part in re.split(r"^(?=##)", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        name = heading.strip("# `")
        if heading.startswith("## "):
            package = name
        found[f"{package}.{name}"] = text
    return found


SECTIONS = sections()


def options(section: str) -> list[str]:
    """What stands in the first column."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", SECTIONS[section], re.MULTILINE)
    assert all(cell for row in rows for cell in row)
    return [first.strip("`") for first, _ in rows if first != "option"]


def own_fields(cls: Any, *bases: Any) -> set[str]:
    """The fields of a dataclass that its bases do not have, or have otherwise."""
    inherited = {f.name for base in bases for f in dataclasses.fields(base)}
    own = {f.name for f in dataclasses.fields(cls)} - inherited
    return own | (set(cls.__annotations__) if bases else set())


def saelens() -> dict[str, set[str]]:
    config = pytest.importorskip("sae_lens.config", reason="needs bigsae[saelens]")
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import TrainingSAEConfig

    names = "LanguageModelSAERunnerConfig LoggingConfig CacheActivationsRunnerConfig PretokenizeRunnerConfig"
    expected = {name: own_fields(getattr(config, name)) for name in names.split()}
    expected["TrainingSAEConfig"] = own_fields(TrainingSAEConfig)
    for _, cls in SAE_TRAINING_CLASS_REGISTRY.values():
        bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
        expected[cls.__name__] = own_fields(cls, *bases)
    return {f"SAELens.{name}": fields for name, fields in expected.items()}


def sparsify() -> dict[str, set[str]]:
    config = pytest.importorskip("sparsify.config", reason="needs bigsae[sparsify]")
    command = pytest.importorskip("sparsify.__main__", reason="needs bigsae[sparsify]")
    return {
        "sparsify.SparseCoderConfig": own_fields(config.SparseCoderConfig),
        "sparsify.TrainConfig": own_fields(config.TrainConfig),
        "sparsify.RunConfig": own_fields(command.RunConfig, config.TrainConfig),
    }


def dictionary_learning() -> dict[str, set[str]]:
    reason = "needs pip install --no-deps dictionary-learning==0.1.0"
    trainers = pytest.importorskip("dictionary_learning.trainers", reason=reason)
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.training import trainSAE

    shared = set(options("dictionary_learning.Options of all trainers"))
    classes = [getattr(trainers, name) for name in trainers.__all__ if name.endswith("Trainer")]
    classes += [MatryoshkaBatchTopKTrainer, StandardTrainerAprilUpdate]
    expected = {cls.__name__: set(inspect.signature(cls).parameters) - shared for cls in classes}
    expected["trainSAE"] = set(inspect.signature(trainSAE).parameters)
    expected["ActivationBuffer"] = set(inspect.signature(ActivationBuffer).parameters)
    return {f"dictionary_learning.{name}": arguments for name, arguments in expected.items()}


@pytest.mark.parametrize("package", [saelens, sparsify, dictionary_learning], ids=lambda p: p.__name__)
def test_every_option_is_on_the_page_and_no_other(package):
    for section, expected in package().items():
        assert section in SECTIONS
        on_page = options(section)
        assert set(on_page) == expected, section
        assert len(on_page) == len(expected), section


def test_the_page_has_no_other_sections():
    known = set(saelens()) | set(sparsify())
    other = {name for name in SECTIONS if name.partition(".")[0] != "dictionary_learning"} - known
    assert other == {"SAELens.SAELens", "sparsify.sparsify"}


@cache
def flags_of(command: str) -> frozenset[str]:
    """All flags in the --help of a command."""
    done = subprocess.run(
        [sys.executable, "-m", f"bigsae.{command}", "--help"],
        env=environment() | {"COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"--[a-z0-9][\w.-]*", done.stdout))


def named() -> set[tuple[str, str]]:
    """Commands and the flags that the page gives them."""
    found = set()
    for text in [PAGE.partition("\n## ")[0], *SECTIONS.values()]:
        default = re.match(r"\s*Flags of `bigsae\.(\w+)`", text)
        for span in re.findall(r"`([^`]+)`", text):
            command = re.match(r"bigsae\.(\w+) --", span)
            name = command[1] if command else default[1] if default else "train"
            found |= {(name, flag) for flag in re.findall(r"(?<!\S)--[a-z0-9][\w.-]*[a-z0-9]", span)}
    return found


def test_every_flag_exists():
    checked = set()
    for command, flag in sorted(named()):
        needs = COMES_WITH.get(flag, command)
        if (ROOT / "bigsae" / f"{needs}.py").exists():
            assert flag in flags_of(command), f"bigsae.{command} {flag}"
            checked.add(flag)
    assert len(checked) > 60


def test_flags_with_their_values_are_taken():
    """Where the page writes a flag with its value, the parser knows the value."""
    from bigsae.commands import parse_train_config

    required = "--model m --dataset d --hookpoints h --output-dir o --tokens 9".split()
    spans = {" ".join(s.split()) for s in re.findall(r"`(--[^`…<]+ [^`…<]+)`", PAGE)}
    assert len(spans) > 12
    for span in sorted(spans):
        parse_train_config([*required, *span.split()])
