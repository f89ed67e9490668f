"""A small corpus with a model's tokenizer, and the command and its rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets

from bigsae.pretokenizing.options import CorpusConfig, PretokenizeConfig
from tests.data.corpora import texts
from tests.models import english, tiny_tokenizer

DOCUMENTS = [*texts(60), "", "   ", english(400, seed=7)]


def make_home(folder: Path) -> Path:
    """`folder` with lm/ (a tokenizer) and corpus.jsonl."""
    tiny_tokenizer(folder / "lm")
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def configured(home: Path, out: Path, streaming: bool = False, **more: Any) -> PretokenizeConfig:
    """Rows of 16 from four virtual shards, in files of 20 rows, by one process."""
    base: dict[str, Any] = {
        "model": str(home / "lm"), "dataset": str(home / "corpus.jsonl"), "output_dir": str(out), "ctx_len": 16,
        "tokens_per_file": 320, "num_workers": 1, "data": CorpusConfig(num_shards=4, streaming=streaming),
    }  # fmt: skip
    return PretokenizeConfig(**(base | more))


def written(out: Path) -> list[list[int]]:
    """All rows in the order of the files."""
    if (out / "state.json").is_file():
        saved = datasets.load_from_disk(str(out))
    else:
        saved = datasets.load_dataset(str(out), split="train", cache_dir=str(out.parent / "cache"))
    assert isinstance(saved, datasets.Dataset)
    return saved["input_ids"][:]


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every file below `out`, by its path."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
