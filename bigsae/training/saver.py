"""Checkpoints are written beside training: copied to the host's memory, then to disk by a thread of each rank."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from bigsae.parallel.mesh import Mesh, on_host
from bigsae.parallel.nodes import limit_waits
from bigsae.training import checkpoint


class Saver:
    """Writes the checkpoints of a run to `folder`, one at a time. All ranks have it and call it alike."""

    def __init__(self, folder: Path, keep: int, mesh: Mesh, timeout: float, *, beside: bool):
        """Each rank waits for another one for `timeout` minutes at most; `beside`: training goes on meanwhile.

        All ranks call this together: what is written beside training has a process group of its own.
        """
        self.folder, self.keep, self.beside = folder, keep, beside
        self.mesh = on_host(mesh) if beside else mesh
        if beside:
            limit_waits((self.mesh.control,), timeout)
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None

    def start(
        self,
        step: int,
        tensors: dict[str, Tensor],
        rank_tensors: dict[str, Tensor],
        state: dict[str, Any],
        rank_state: dict[str, Any],
    ) -> None:
        """Begin to write what stands in the arguments now, as `checkpoint.save` takes them. None may be under way."""
        assert self._thread is None
        self._step = step
        if self.beside:
            tensors, rank_tensors = self._copies(tensors), self._copies(rank_tensors)
            state, rank_state = copy.deepcopy(state), copy.deepcopy(rank_state)
        arguments = (self.folder, step, tensors, rank_tensors, state, rank_state, self.keep, self.mesh)
        # A daemon: where another rank is gone nobody waits for this one.
        self._thread = threading.Thread(
            target=self._write, args=arguments, name="bigsae-checkpoint", daemon=True
        )
        if self.beside:
            self._thread.start()
        else:
            self._thread.run()

    def _write(self, *arguments: Any) -> None:
        try:
            checkpoint.save(*arguments)
        except BaseException as error:  # raised anew where it is waited for
            self._error = error

    def wait(self) -> int | None:
        """Wait for what is under way. Returns its step, or None where nothing was.

        Raises NotSaved, on all ranks, where it could not be written.
        """
        if self._thread is None:
            return None
        if self.beside:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._step

    def _copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, DTensors among them, in memory of their own on the host."""
        return {name: self._copy(tensor.detach()) for name, tensor in tensors.items()}

    def _copy(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.to("cpu", copy=True)
        assert self.mesh.devices is not None
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(local, self.mesh.devices, tensor.placements, run_check=False)
