"""How much of what the device can do language model and SAEs make use of: counted operations by the time they took.

The times are those of metrics.jsonl, of the whole stage: in the language model's, reading and shuffling; in the SAEs',
the optimiser and whatever else a run does between two refills. No clock is read within a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bigsae.config import TrainConfig
from bigsae.parallel.flops import step_flops
from bigsae.parallel.memory import sae_shape
from bigsae.parallel.peaks import Peak, peak_of
from bigsae.training.trainer import SAETrainer

_TERA = 1e12


@dataclass
class Throughput:
    """Of this rank, from log to log."""

    lm_flops: float
    """Of a token's way to the last hookpoint; 0 where activations come from disk."""
    peaks: tuple[float, float] | None
    """Of this rank's device, operations a second: in the language model's data type, and in the SAEs'."""
    lm_tokens: int = 0
    """Tokens that had gone through the language model at the last log."""

    def metrics(
        self,
        lm_tokens: int,
        lm_seconds: float,
        sae_flops: float,
        sae_seconds: float,
    ) -> dict[str, float]:
        """TFLOP/s and shares of the peak since the last log; of the language model only where it ran."""
        new_tokens, self.lm_tokens = lm_tokens - self.lm_tokens, lm_tokens
        reached = {}
        if new_tokens and self.lm_flops:
            reached["lm"] = new_tokens * self.lm_flops / lm_seconds
        if sae_flops:
            reached["sae"] = sae_flops / sae_seconds
        metrics = {f"{stage}_tflops": rate / _TERA for stage, rate in reached.items()}
        if self.peaks is not None:
            peaks = dict(zip(("lm", "sae"), self.peaks, strict=True))
            metrics |= {f"{stage}_mfu": rate / peaks[stage] for stage, rate in reached.items()}
        return metrics


def throughput(config: TrainConfig, device: torch.device, lm_flops: float) -> Throughput:
    """Of a run of `config` on `device`, at its beginning."""
    return Throughput(lm_flops, _peaks(config, device))


def _peaks(config: TrainConfig, device: torch.device) -> tuple[float, float] | None:
    if config.peak_tflops:
        return config.peak_tflops[0] * _TERA, config.peak_tflops[-1] * _TERA
    peak: Peak | None = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    lm_dtype = "bfloat16" if config.lm.autocast else config.lm.dtype
    sae_dtype = "bfloat16" if config.sae.autocast else config.sae.dtype
    return peak.of(lm_dtype), peak.of(sae_dtype)


def sae_flops(trainer: SAETrainer, batch_tokens: int, metrics: dict[str, float]) -> float:
    """Operations of the steps that `trainer` has done since the last call, of global batches of `batch_tokens`.

    `metrics`: those of these steps. Latents that a k selects are computed on whether or not they are active; where no
    k says how many, the mean l0 does. As many latents were dead in each step as at the end.
    """
    sae, steps = trainer.sae, trainer.take_steps()
    d_out = sae.d_out if sae.is_transcoder else None
    shape = sae_shape(trainer.config, trainer.optim, sae.d_in, sae.d_sae, d_out)
    batch = batch_tokens // trainer.mesh.num_data
    selected = metrics["l0"] if shape.selects == "threshold" else shape.k
    pairs = batch * selected / trainer.mesh.num_latent
    dense = step_flops(shape, batch, sae.d_own, batch * sae.d_own)
    sparse = step_flops(shape, batch, sae.d_own, pairs)
    with_dead = step_flops(shape, batch, sae.d_own, pairs, metrics["dead_fraction"] * sae.d_own)
    return steps.dense * dense + (steps.all - steps.dense) * sparse + steps.dead * (with_dead - sparse)
