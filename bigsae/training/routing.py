"""The way of a batch from the ranks that harvested it to those that train on it.

On a data × latent mesh the ranks that share an SAE bring their parts together. Where SAEs are dealt to ranks, every
part goes to the owners of the SAEs that read it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.training.variants import Job


class Routing:
    """Brings activations to where they are trained on. All ranks make the same calls."""

    def __init__(self, mesh: Mesh, jobs: Sequence[Job]):
        self.mesh = mesh
        self.owners: dict[str, list[int]] | None = None
        """Of the SAEs of each hookpoint, where SAEs are dealt to ranks."""
        if any(job.owner is not None for job in jobs):
            self.owners = {}
            for job in jobs:
                assert job.owner is not None
                for hookpoint in {job.reads, job.predicts}:
                    owners = self.owners.setdefault(hookpoint, [])
                    owners += [] if job.owner in owners else [job.owner]

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From this rank's `[n, d_in]` of each hookpoint to what is trained on here; n is the same on all ranks.

        The rows come by rank. Hookpoints that no SAE of this rank reads are left out.
        """
        if self.mesh.num_ranks == 1:
            return dict(batch)
        if self.owners is not None:
            return self._to_owners(batch)
        if self.mesh.latent is None:
            return dict(batch)
        return {name: collectives.gather(self._here(x), self.mesh.latent) for name, x in batch.items()}

    def uneven(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As a call, for numbers of rows that differ between ranks."""
        counts = collectives.objects(len(next(iter(batch.values()))), self.mesh.control)
        longest = max(counts)
        routed = self({name: pad(x, (0, 0, 0, longest - len(x))) for name, x in batch.items()})
        sources = range(self.mesh.num_ranks) if self.owners is not None else self._group()
        kept = [counts[source] for source in sources]
        return {
            name: torch.cat([part[:n] for part, n in zip(x.split(max(longest, 1)), kept, strict=True)])
            if longest
            else x
            for name, x in routed.items()
        }

    def _group(self) -> range:
        """The ranks whose tokens this one sees."""
        first = self.mesh.data_rank * self.mesh.num_latent
        return range(first, first + self.mesh.num_latent)

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.mesh.device, non_blocking=True)

    def _to_owners(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.owners is not None
        received: dict[str, Tensor] = {}
        sent = []
        for name, value in batch.items():
            x = self._here(value).contiguous()
            for owner in self.owners[name]:
                parts = None
                if owner == self.mesh.rank:
                    whole = x.new_empty(len(x) * self.mesh.num_ranks, x.shape[1])
                    received[name], parts = whole, list(whole.split(len(x))) if len(x) else None
                if len(x):
                    sent.append(dist.gather(x, parts, dst=owner, group=self.mesh.world, async_op=True))
        for work in sent:
            work.wait()
        return received
