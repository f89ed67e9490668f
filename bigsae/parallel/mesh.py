"""The ranks of a run: who computes what with whom."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the run and the groups it talks in. A group of one rank is None: its collectives vanish."""

    rank: int
    num_ranks: int
    num_local_ranks: int
    device: torch.device
    data: ProcessGroup | None
    """Ranks that hold the same SAE weights and see different tokens."""
    control: ProcessGroup | None
    """All ranks, over CPU (gloo): counts, stop flags, checkpoint plans. Never waits for a device."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what one rank alone prints and writes."""
        return self.rank == 0


def build_mesh() -> Mesh:
    """The mesh of the default process group, or of this process alone where there is none.

    The device follows from the *local* rank: on a second node the global rank names a device that isn't there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Mesh(0, 1, 1, device, data=None, control=None)
    num_ranks = dist.get_world_size()
    on_gloo = dist.get_backend() == "gloo"
    return Mesh(
        rank=dist.get_rank(),
        num_ranks=num_ranks,
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks))),
        device=device,
        data=dist.group.WORLD,
        control=dist.group.WORLD if on_gloo else cast(ProcessGroup, dist.new_group(backend="gloo")),
    )
