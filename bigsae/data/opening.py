"""Opening --dataset: Hub ids, `save_to_disk` folders, .jsonl, .parquet and .txt files, and folders of those."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from huggingface_hub import constants

from bigsae.config import DataConfig, UserError
from bigsae.data.reading import FAILURES, OPENING_SECONDS, persistently, reason
from bigsae.data.sources import MapSource, Source, StreamSource

_BUILDERS = {".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_KINDS = ".jsonl, .parquet or .txt"
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def open_dataset(dataset: str, data: DataConfig) -> Source:
    """Open `dataset`, a Hub id or a local path.

    A .txt file is one document. In a folder every file counts, whatever its depth; where all of them are named after
    splits (train-00000.parquet, test/x.jsonl) they are those splits, else all are the split "train". --data.streaming
    means nothing to a `save_to_disk` folder, which is memory-mapped as it is. Raises UserError where there is no
    such dataset, split or column of text.
    """
    path = Path(dataset).expanduser()
    if path.exists():
        if data.name is not None or data.revision is not None:
            flag = "--data.name" if data.name is not None else "--data.revision"
            raise UserError(
                f"{flag} is for datasets of the Hub, and --dataset {dataset} is a local path: leave it out"
            )
        opened = _open_saved(path, dataset, data) if _is_saved(path) else _open_files(path, dataset, data)
    elif _looks_like_hub_id(dataset):
        opened = _load(dataset, data, dataset, name=data.name, revision=data.revision)
    else:
        raise UserError(f"--dataset {dataset}: there is no such file or folder")
    column, pretokenised = _find_column(opened, dataset, data.text_column)
    opened = opened.select_columns([column])
    if isinstance(opened, datasets.IterableDataset):
        return StreamSource(opened, dataset, column, pretokenised)
    return MapSource(cast(datasets.Dataset, opened), dataset, column, pretokenised)


def _looks_like_hub_id(dataset: str) -> bool:
    shape = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", dataset)
    return bool(shape) and _builder(Path(dataset)) is None


def _builder(path: Path) -> str | None:
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return _BUILDERS.get(Path(name).suffix)


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _open_saved(path: Path, dataset: str, data: DataConfig) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(str(path))
    except FAILURES as error:
        raise UserError(f"--dataset {dataset} cannot be opened: {reason(error)}") from error
    if isinstance(saved, datasets.Dataset):
        # A single Dataset often does not know its split: the default fits any.
        if data.split not in ("train", str(saved.split)):
            raise _unknown_split(dataset, data.split, [str(saved.split or "train")])
        return saved
    if data.split not in saved:
        raise _unknown_split(dataset, data.split, [str(name) for name in saved])
    return saved[data.split]


def _open_files(path: Path, dataset: str, data: DataConfig) -> Any:
    files = [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file() and _builder(file) is not None)
        files = sorted(file for file in inside if not _hidden(file.relative_to(path)))
    builders = sorted({builder for builder in map(_builder, files) if builder is not None})
    if not builders:
        what = "holds no" if path.is_dir() else "is none of"
        raise UserError(
            f"--dataset {dataset} {what} {_KINDS}: point --dataset at such a file, or a folder of them"
        )
    if len(builders) > 1:
        raise UserError(
            f"--dataset {dataset} mixes {' and '.join(builders)} files: keep one kind of {_KINDS} in it"
        )
    splits = _split_files(files, path) if path.is_dir() else {"train": files}
    if data.split not in splits:
        raise _unknown_split(dataset, data.split, list(splits))
    # `datasets` takes each name as a glob pattern.
    data_files = {data.split: [glob.escape(str(file.resolve())) for file in splits[data.split]]}
    extra = {"sample_by": "document"} if builders == ["text"] else {}
    return _load(builders[0], data, dataset, data_files=data_files, **extra)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_files(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = (re.split(r"[-_.]", part.lower())[0] for part in file.relative_to(folder).parts)
        names = [_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES]
        if not names:
            return {"train": files}
        splits.setdefault(names[0], []).append(file)
    return splits


def _load(path: str, data: DataConfig, dataset: str, **kwargs: Any) -> Any:
    try:
        return persistently(
            lambda: datasets.load_dataset(path, split=data.split, streaming=data.streaming, **kwargs),
            dataset,
            _seconds(),
        )
    except StopIteration:  # what it raises on an empty .jsonl
        raise UserError(f"--dataset {dataset} holds no documents") from None
    except FAILURES as error:
        if re.search("Unknown split|Bad split", str(error)):
            raise UserError(f"--data.split {data.split} of --dataset {dataset}: {reason(error)}") from error
        if re.search("Config name is missing|BuilderConfig .* not found", str(error)):
            raise UserError(f"--data.name of --dataset {dataset}: {reason(error)}") from error
        raise UserError(
            f"--dataset {dataset} cannot be opened (no local path of this name exists): {reason(error)}"
            if path == dataset
            else f"--dataset {dataset} cannot be read: {reason(error)}"
        ) from error


def _seconds() -> float:
    """For how long opening is tried again; not where the Hub is not to be asked at all."""
    return 0.0 if constants.HF_HUB_OFFLINE else OPENING_SECONDS


def _unknown_split(dataset: str, split: str, known: list[str]) -> UserError:
    return UserError(
        f"--data.split {split}: --dataset {dataset} has only {', '.join(known)}: choose one of these"
    )


def _find_column(opened: Any, dataset: str, text_column: str) -> tuple[str, bool]:
    """The column that is read, and whether it holds token ids."""
    if opened.features is not None:
        types = {name: opened.features.arrow_schema.field(name).type for name in opened.features}
    else:
        first = _first_document(opened, dataset)
        types = {name: pa.infer_type([value]) for name, value in first.items()}
    if "input_ids" in types:
        kind = types["input_ids"]
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and pa.types.is_integer(kind.value_type)):
            raise UserError(f"--dataset {dataset}: its column input_ids holds {kind}, not lists of integers")
        return "input_ids", True
    strings = [
        name for name, kind in types.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ]
    if text_column not in types:
        raise UserError(
            f"--data.text-column {text_column}: --dataset {dataset} has no such column; it has {', '.join(types)}"
        )
    if text_column not in strings:
        kind = (
            "values of mixed types"
            if isinstance(types[text_column], pa.BaseExtensionType)
            else types[text_column]
        )
        fix = f"choose among {', '.join(strings)}" if strings else "it has no column of strings"
        raise UserError(
            f"--data.text-column {text_column} of --dataset {dataset} holds {kind}, not text: {fix}"
        )
    return text_column, False


def _first_document(opened: Any, dataset: str) -> dict[str, Any]:
    try:
        first = persistently(lambda: next(iter(opened), None), dataset, _seconds())
    except FAILURES as error:
        raise UserError(f"--dataset {dataset} cannot be read: {reason(error)}") from error
    if first is None:
        raise UserError(f"--dataset {dataset} holds no documents")
    return first
