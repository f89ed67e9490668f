"""The second half: spooled rows to the files of the dataset, in a random order of all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigsae.data.sources import permuted
from bigsae.hub.files import write_atomic, write_json
from bigsae.pretokenizing.spool import Spool
from bigsae.seeds import derive_seed

_ROW_GROUP_TOKENS = 1 << 22


def num_files(num_rows: int, ctx_len: int, tokens_per_file: int) -> int:
    """Files of about `tokens_per_file` each that hold `num_rows`, and never more files than rows."""
    return min(num_rows, -(-num_rows * ctx_len // tokens_per_file))


def file_path(folder: Path, format: str, number: int, count: int) -> Path:
    """Where file `number` of `count` lies, by the names that `datasets` and the Hub give such files."""
    name = f"{number:05}-of-{count:05}"
    return folder / "data" / f"train-{name}.parquet" if format == "parquet" else folder / f"data-{name}.arrow"


def gather(spools: list[Spool], indices: np.ndarray) -> np.ndarray:
    """Rows [n, ctx_len] by their numbers [n] in the row of all spools."""
    ends = np.cumsum([spool.num_rows for spool in spools])
    owners = np.searchsorted(ends, indices, side="right")
    gathered = np.empty((len(indices), spools[0].layout.ctx_len), dtype=spools[0].layout.dtype)
    for owner in np.unique(owners).tolist():
        places = np.flatnonzero(owners == owner)
        local = indices[places] - (ends[owner] - spools[owner].num_rows)
        order = np.argsort(local)  # forward through the file
        gathered[places[order]] = spools[owner].rows()[local[order]]
    return gathered


def write_file(
    folder: Path, spools: list[Spool], format: str, shuffle_seed: int | None, number: int, count: int
) -> int:
    """Write file `number` of `count`, unless it is there; its number of rows."""
    total = sum(spool.num_rows for spool in spools)
    low, high = (total * n // count for n in (number, number + 1))
    path = file_path(folder, format, number, count)
    if path.is_file():
        return high - low
    indices = np.arange(low, high)
    if shuffle_seed is not None:
        indices = permuted(indices, total, derive_seed(shuffle_seed, "rows"))
    table = as_table(gather(spools, indices))
    write_atomic(path, lambda p: _write_table(table, p, format, spools[0].layout.ctx_len))
    return high - low


def features(dtype: Any) -> datasets.Features:
    """The one column of the dataset."""
    return datasets.Features({"input_ids": datasets.List(datasets.Value(np.dtype(dtype).name))})


def as_table(rows: np.ndarray) -> pa.Table:
    """Rows [n, ctx_len] as a table that `datasets` knows the features of."""
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1])
    column = pa.ListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
    return pa.table({"input_ids": column}, schema=features(rows.dtype).arrow_schema)


def _write_table(table: pa.Table, path: Path, format: str, ctx_len: int) -> None:
    group = max(1, _ROW_GROUP_TOKENS // ctx_len)
    if format == "parquet":
        pq.write_table(table, path, compression="zstd", row_group_size=group)
        return
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # as `datasets` does: it looks rows up by their batches


def write_saved_dataset(folder: Path, count: int, dtype: Any, fingerprint: str) -> None:
    """state.json and dataset_info.json, with which `load_from_disk` reads the files of the format "arrow"."""
    empty = datasets.Dataset(
        as_table(np.empty((0, 1), dtype=dtype)), split=datasets.Split.TRAIN, fingerprint=fingerprint
    )
    scratch = folder / "empty"
    empty.save_to_disk(scratch)
    state = json.loads((scratch / "state.json").read_text())
    state["_data_files"] = [{"filename": file_path(folder, "arrow", n, count).name} for n in range(count)]
    info = json.loads((scratch / "dataset_info.json").read_text())
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    write_json(folder / "dataset_info.json", info)
    write_json(folder / "state.json", state)
