"""Cross-entropy and KL divergence of the whole language model on documents that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bigsae.config import UserError
from bigsae.data.harvest import Extract
from bigsae.evaluation.language import CLEAN, Batch, Splice, ablations, reconstructions, recovered, score
from bigsae.lm.activations import Extractor
from bigsae.parallel import collectives
from bigsae.parallel.mesh import Mesh
from bigsae.training.trainer import SAETrainer
from bigsae.training.variants import Job


def check_order(jobs: Sequence[Job], hookpoints: Sequence[str]) -> None:
    """Find a transcoder whose output is computed before its input: it cannot be spliced in. Raises UserError.

    `hookpoints` come in the order in which a forward meets them.
    """
    for job in jobs:
        if hookpoints.index(job.predicts) < hookpoints.index(job.reads):
            raise UserError(
                f"--eval.ce: {job.predicts} is computed before {job.reads}, from which it is predicted, so nothing can "
                "be spliced in: leave --eval.ce out"
            )


def measure_heldout_ce(
    rows: Tensor,
    keep: Tensor,
    extract: Extract,
    trainers: Mapping[str, SAETrainer],
    jobs: Mapping[str, Job],
    mesh: Mesh,
    micro_batch_rows: int,
) -> dict[str, dict[str, float]]:
    """What the model makes of each SAE's reconstructions where `keep`, bool [rows, ctx_len], is True; of all SAEs.

    Every rank has the same `rows` [rows, ctx_len], a multiple of the ranks, and runs its part of them; a rank that
    holds the SAE, or a part of it, reconstructs for the others while all of them stand at the hookpoint.
    """
    assert isinstance(extract, Extractor) and len(rows) % mesh.num_ranks == 0
    own_rows, own_keep = rows[mesh.rank :: mesh.num_ranks], keep[mesh.rank :: mesh.num_ranks]
    batches = [
        Batch(own_rows[i : i + micro_batch_rows], own_keep[i : i + micro_batch_rows])
        for i in range(0, len(own_rows), micro_batch_rows)
    ]
    widths = {site.name: site.d_in for site in extract.sites}
    interventions = {
        f"sae {name}": reconstructions(
            [
                Splice(
                    job.reads, job.predicts, _reconstruct(trainers.get(name), job, widths[job.predicts], mesh)
                )
            ]
        )
        for name, job in jobs.items()
    }
    for name in dict.fromkeys(job.predicts for job in jobs.values()):
        interventions[f"zero {name}"] = ablations({name: torch.zeros(widths[name])}, everywhere=False)
    scores = score(extract, batches, interventions, mesh.world)
    clean = scores[CLEAN].ce
    measured = {}
    for name, job in jobs.items():
        sae, zero = scores[f"sae {name}"], scores[f"zero {job.predicts}"]
        measured[name] = {
            "heldout_ce_clean": clean,
            "heldout_ce_spliced": sae.ce,
            "heldout_ce_zero": zero.ce,
            "heldout_loss_recovered": recovered(zero.ce, sae.ce, clean),
            "heldout_kl": sae.kl,
        }
    return measured


def _reconstruct(trainer: SAETrainer | None, job: Job, d_out: int, mesh: Mesh) -> Callable[[Tensor], Tensor]:
    """From this rank's [rows, ctx, d_in] to [rows, ctx, d_out], with all ranks making the same call at once."""
    group, rank = (mesh.latent, mesh.latent_rank) if job.owner is None else (mesh.world, mesh.rank)

    def reconstruct(x: Tensor) -> Tensor:
        flat = x.to(mesh.device, torch.float32).flatten(0, 1)
        gathered = collectives.gather(flat, group)
        if trainer is not None:
            recon = trainer.reconstruct(gathered)[0].contiguous()
        else:
            recon = gathered.new_empty(len(gathered), d_out)
        if job.owner is not None and mesh.world is not None:
            dist.broadcast(recon, src=job.owner, group=mesh.world)
        own = recon[rank * len(flat) : (rank + 1) * len(flat)]
        return own.view(*x.shape[:-1], d_out)

    return reconstruct
