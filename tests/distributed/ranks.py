"""Run a function on several gloo ranks of this machine and collect what each returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, by the server that all ranks are forked from; a rank that does it itself takes seconds.
_PRELOADED = ["bigsae.training.setup", "bigsae.training.run", "bigsae.training.fit", "pytest", __name__]


def _rank_main(rank: int, num_ranks: int, folder: str, function: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    try:
        torch.save(function(*arguments), f"{folder}/result_{rank}.pt")
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        raise
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's own end: a rank was once seen to abort ("terminate called without an active
    # exception", native threads that outlive their owner), on a machine with fewer cores than ranks.
    os._exit(0)


def start_server() -> None:
    """Start what ranks are forked from, where it does not run yet; its environment stays that of this moment."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    ensure_running()


def run_ranks(num_ranks: int, function: Callable, *arguments: Any) -> list[Any]:
    """What the module-level `function(*arguments)` returns on each of `num_ranks` gloo ranks, each with one thread.

    Their environment is that of `start_server`, which the first call is.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_server()
            mp.start_processes(
                _rank_main, (num_ranks, folder, function, arguments), num_ranks, start_method="forkserver"
            )
        except Exception as error:
            texts = [p.read_text() for p in sorted(Path(folder).glob("error_*"))]
            raise AssertionError("\n".join(texts) or str(error)) from None
        return [torch.load(f"{folder}/result_{rank}.pt", weights_only=False) for rank in range(num_ranks)]
