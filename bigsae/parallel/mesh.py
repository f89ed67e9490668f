"""The ranks of a run: who computes what with whom."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the run and the groups it talks in. A group of one rank is None: its collectives vanish.

    The ranks are data × latent: rank r is number r // num_latent over `data` and r % num_latent over `latent`, so that
    those that share an SAE are neighbours, on one node where it has enough of them.
    """

    rank: int
    num_ranks: int
    num_local_ranks: int
    device: torch.device
    data: ProcessGroup | None
    """Ranks that hold the same latents and see different tokens."""
    control: ProcessGroup | None
    """All ranks, over CPU (gloo): counts, stop flags, checkpoint plans. Never waits for a device."""
    world: ProcessGroup | None = None
    """All ranks, over their devices."""
    latent: ProcessGroup | None = None
    """Ranks that hold different latents and see the same tokens."""
    num_latent: int = 1
    devices: DeviceMesh | None = None
    """The same as ("latent", "data"), for DTensor."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what one rank alone prints and writes."""
        return self.rank == 0

    @property
    def num_data(self) -> int:
        """Copies of each latent."""
        return self.num_ranks // self.num_latent

    @property
    def data_rank(self) -> int:
        """This rank's number among those that hold the same latents."""
        return self.rank // self.num_latent

    @property
    def latent_rank(self) -> int:
        """This rank's number among those that hold the other latents."""
        return self.rank % self.num_latent


def build_mesh(num_latent: int = 1) -> Mesh:
    """The mesh of the default process group, or of this process alone where there is none.

    The device follows from the *local* rank: on a second node the global rank names a device that isn't there.
    `num_latent`, a divisor of the ranks, is how many of them hold one SAE between them.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return alone(device)
    num_ranks = dist.get_world_size()
    mesh = Mesh(
        rank=dist.get_rank(),
        num_ranks=num_ranks,
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks))),
        device=device,
        data=dist.group.WORLD,
        control=_on_cpu(cast(ProcessGroup, dist.group.WORLD)),
        world=dist.group.WORLD,
    )
    return share_latents(mesh, num_latent)


def alone(device: torch.device) -> Mesh:
    """The mesh of one rank, which talks to no other."""
    return Mesh(0, 1, 1, device, data=None, control=None)


def share_latents(mesh: Mesh, num_latent: int) -> Mesh:
    """The same ranks with `num_latent` of them, a divisor, to an SAE. All ranks call this."""
    if mesh.num_ranks == 1:
        return mesh
    assert mesh.world is not None
    devices = _devices(mesh.world, mesh.device.type, num_latent)
    return replace(
        mesh,
        data=devices.get_group("data") if num_latent < mesh.num_ranks else None,
        latent=devices.get_group("latent") if num_latent > 1 else None,
        num_latent=num_latent,
        devices=devices,
    )


def on_host(mesh: Mesh) -> Mesh:
    """The same ranks for what a thread does beside training: over CPUs, with a control group of its own.

    Two threads must not talk over one group: which of them is meant depends on the order of the calls. All ranks call
    this.
    """
    if mesh.world is None:
        return mesh
    return replace(mesh, control=_beside(mesh.world), devices=_devices(mesh.world, "cpu", mesh.num_latent))


# Groups are made once: their descriptors and threads, on GPUs communicators, stay until the process ends.
@functools.cache
def _on_cpu(world: ProcessGroup) -> ProcessGroup:
    return world if dist.get_backend(world) == "gloo" else cast(ProcessGroup, dist.new_group(backend="gloo"))


@functools.cache
def _beside(world: ProcessGroup) -> ProcessGroup:
    return cast(ProcessGroup, dist.new_group(dist.get_process_group_ranks(world), backend="gloo"))


@functools.cache
def _devices(world: ProcessGroup, device_type: str, num_latent: int) -> DeviceMesh:
    ranks = torch.arange(dist.get_world_size(world)).view(-1, num_latent)
    return DeviceMesh(device_type, ranks.T.contiguous(), mesh_dim_names=("latent", "data"))


def rows_of_all(rows: Tensor, mesh: Mesh, over_data: bool = False) -> Tensor:
    """`rows`, this rank's latents' rows, as its part of all latents' over the mesh; as they are on one rank.

    `over_data` says that ranks which hold the same latents have a part of their rows each. A DTensor over the same
    memory: what is read into it lies in `rows`.
    """
    if mesh.devices is None:
        return rows
    # Opened when used: it takes a second, which what only reads or publishes SAEs need not wait for.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(0), Shard(0) if over_data else Replicate()]
    return DTensor.from_local(rows, mesh.devices, placements, run_check=False)
