"""What a wrong command line, file or folder is, and what is asked of every one of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bigsae
from bigsae.hub.formats import save_sae
from bigsae.sae.build import build_sae
from tests.launch import flags, write_corpus
from tests.models import tiny_llama

Prepare = Callable[[Path, Path], object]
"""Called with the shared folder and the case's own, to put wrong things into the latter."""

Change = Callable[[Path], object]
"""What makes a right file or folder a wrong one."""

HOOKPOINT = "model.layers.1"
TRAIN: dict[str, Any] = {
    "model": "{home}/lm", "dataset": "{home}/corpus.jsonl", "output_dir": "{tmp}/out", "hookpoints": HOOKPOINT,
    "tokens": 640, "batch_size_tokens": 64, "ctx_len": 16, "sae__k": 2, "sae__d_sae": 64, "data__num_shards": 2,
    "lm__dtype": "float32", "lm__micro_batch_rows": 2, "buffer__tokens": 128, "buffer__dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One wrong input."""

    command: str
    arguments: tuple[str, ...]
    """With {home} and {tmp} for the shared folder and the case's own."""
    message: str
    """What it must hold, as a regular expression: the flag and what to do."""
    prepare: Prepare | None = None
    begun: bool = False
    """Whether it shows only when the data is read on, when the run's folder has its configuration and its status."""
    boxed: bool = False
    """Whether it is the parser's own message, in a box."""

    def command_line(self, home: Path, tmp: Path) -> list[str]:
        """The arguments, with what is wrong in place."""
        if self.prepare is not None:
            self.prepare(home, tmp)
        return [a.replace("{home}", str(home)).replace("{tmp}", str(tmp)) for a in self.arguments]


def train(message: str, prepare: Prepare | None = None, begun: bool = False, **changes: Any) -> Case:
    """A training that is right but for `changes`, options as of `tests.launch.flags`; None leaves one out."""
    options = {name: value for name, value in (TRAIN | changes).items() if value is not None}
    return Case("train", tuple(flags(**options)), message, prepare, begun)


def call(command: str, arguments: str, message: str, prepare: Prepare | None = None, **more: bool) -> Case:
    """Another command."""
    return Case(command, tuple(shlex.split(arguments)), message, prepare, **more)


def main_of(command: str) -> Callable[[], None]:
    return importlib.import_module(f"bigsae.{command}").main


def check_message(case: Case, output: str, tmp: Path) -> None:
    """One message, short, that says what `case` asks for; and no traceback."""
    assert "Traceback" not in output, output
    if case.boxed:
        assert re.search(case.message, output), output
        return
    messages = re.findall(r"^error.*(?:\n.*)*", output, re.MULTILINE)
    assert len(messages) == 1, output
    message = messages[0].strip().replace(str(tmp), "{tmp}")
    assert "\n" not in message, message
    assert re.search(case.message, message), message
    assert len(message) <= 400, f"{len(message)} characters: {message}"


def content(folder: Path) -> dict[str, str]:
    """Every path below `folder`, and what is there."""
    return {str(path.relative_to(folder)): _what(path) for path in sorted(folder.rglob("*"))}


def _what(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


def make_home(home: Path) -> Path:
    """All that is right: a model and text, a finished run, SAEs in each format, a cache and tokenised text."""
    tiny_llama(home / "lm", num_layers=2)
    write_corpus(home / "corpus.jsonl", num_documents=12)
    (home / "short.jsonl").write_text('{"text": "too short"}\n')
    common: dict[str, Any] = {
        "model": str(home / "lm"), "dataset": str(home / "corpus.jsonl"), "hookpoints": (HOOKPOINT,), "ctx_len": 16,
        "lm": bigsae.LMConfig(dtype="float32", micro_batch_rows=2),
    }  # fmt: skip
    bigsae.train_saes(bigsae.TrainConfig(
        **common, output_dir=str(home / "run"), tokens=640, batch_size_tokens=64,
        data=bigsae.DataConfig(num_shards=2), sae=bigsae.SAEConfig(k=2, d_sae=64),
        buffer=bigsae.BufferConfig(tokens=128, dtype="float32"), checkpoint=bigsae.CheckpointConfig(every=5),
    ))  # fmt: skip
    bigsae.write_activations(bigsae.CacheConfig(
        **common, output_dir=str(home / "cache"), tokens=1000, dtype="float32", shard_tokens=256,
        data=bigsae.DataConfig(num_shards=2, heldout_documents=2), heldout_rows=4,
    ))  # fmt: skip
    for format in ("saelens", "sparsify", "dictionary_learning"):
        sae = build_sae(bigsae.SAEConfig(k=2, d_sae=64), 32, 64, 0, torch.device("cpu"))
        sae.metadata = {"hook_name": HOOKPOINT, "model_name": str(home / "lm")}
        save_sae(sae.requires_grad_(False), home / "saes" / format, format=format)
    return home


class Harm:
    """What a pickle may do to those who load it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harm",)


def copied(name: str, *changes: Change) -> Prepare:
    """A copy of `name` of the shared folder in the case's own, with `changes` made to it."""

    def prepare(home: Path, tmp: Path) -> None:
        if (home / name).is_dir():
            shutil.copytree(home / name, tmp / name)
        else:
            shutil.copy(home / name, tmp / name)
        for change in changes:
            change(tmp / name)

    return prepare


def written(name: str, text: str | bytes) -> Prepare:
    """A file `name` of `text` in the case's own folder."""

    def prepare(home: Path, tmp: Path) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def holding(file: str, text: str | bytes) -> Change:
    """A change of a folder: `file` in it holds `text`."""
    return lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(file: str, num_bytes: int) -> Change:
    """A change of a folder: of `file` only the first `num_bytes` are left."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:num_bytes])


def without(file: str) -> Change:
    """A change of a folder: `file` is gone."""
    return lambda folder: (folder / file).unlink()


def with_json(file: str, **values: Any) -> Change:
    """A change of a folder: `values` in the JSON object of `file`; None leaves one out."""

    def change(folder: Path) -> None:
        old = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(
            json.dumps({name: value for name, value in old.items() if value is not ...})
        )

    return change
