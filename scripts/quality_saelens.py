"""SAELens's part in scripts/quality.py: its trainer on batches that are given, and the judging of both exports."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.synthetic import cosine_similarities, mean_correlation_coefficient
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

_CLASSES: dict[str, tuple[Any, Any]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
}
_JUDGED_ROWS = 2048


@dataclass(frozen=True)
class Schedule:
    """What the trainer is told beside the SAE's own configuration."""

    num_steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    decay_steps: int
    dead_steps: int
    num_scale_batches: int
    """First batches from which the scale of the activations is estimated; they are trained on as well."""


class _Batches:
    """Endless for the trainer: the first `num_first`, for the scale, and then all of them from the beginning."""

    def __init__(self, batches: Callable[[], Iterator[Tensor]], num_first: int):
        self._batches, self._num_left = batches, num_first
        self._iterator = batches()

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Tensor:
        if self._num_left == 0:
            self._iterator = self._batches()
        self._num_left -= 1
        return next(self._iterator)


def build(architecture: str, settings: dict[str, Any], seed: int) -> Any:
    """SAELens's SAE for training; `settings` go beyond its defaults.

    Its guide to training asks for this normalisation, and the decoder's norm is its default, written out.
    """
    sae_class, config_class = _CLASSES[architecture]
    config = config_class(normalize_activations="expected_average_only_in", decoder_init_norm=0.1, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sae_class(config)


def train(sae: Any, schedule: Schedule, batches: Callable[[], Iterator[Tensor]], folder: Path) -> float:
    """Train by SAELens's own trainer and save what it would publish to `folder`; returns the seconds of training."""
    num_first = min(schedule.num_scale_batches, schedule.num_steps)
    config = SAETrainerConfig(
        total_training_samples=schedule.num_steps * schedule.batch_size,
        train_batch_size_samples=schedule.batch_size,
        lr=schedule.lr,
        lr_warm_up_steps=schedule.warmup_steps,
        lr_decay_steps=schedule.decay_steps,
        lr_end=schedule.lr,
        dead_feature_window=schedule.dead_steps,
        n_batches_for_norm_estimate=num_first,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with quietly():
        trainer = SAETrainer(config, sae, _Batches(batches, num_first))
        start = time.perf_counter()
        trained = trainer.fit()
        seconds = time.perf_counter() - start
    trained.save_inference_model(folder)
    return seconds


@torch.no_grad()
def judge(folder: Path, heldout: Tensor, features: Tensor | None) -> dict[str, float]:
    """What the SAE that SAELens loads from `folder` does on `heldout` [tokens, d_in]: l0, fvu and dead, the part of
    the latents that never fire there.

    With `features` [num_features, d_in] also mmcs, the mean over features of the largest cosine with a decoder row,
    and mcc, SAELens's mean over one-to-one pairs.
    """
    sae = SAE.load_from_disk(folder)
    fired = torch.zeros(int(sae.cfg.d_sae), dtype=torch.bool)
    num_active, squared_error = 0, 0.0
    for part in heldout.split(_JUDGED_ROWS):
        x = part.float()
        latents = sae.encode(x)
        squared_error += (x - sae.decode(latents)).double().square().sum().item()
        num_active += int((latents != 0).sum())
        fired |= (latents != 0).any(0)
    centred = heldout.double() - heldout.double().mean(0)
    scores = {
        "l0": num_active / len(heldout),
        "fvu": squared_error / centred.square().sum().item(),
        "dead": 1 - fired.double().mean().item(),
    }
    if features is not None:
        rows = sae.W_dec.detach()
        scores["mmcs"] = cosine_similarities(features, rows).amax(1).mean().item()
        scores["mcc"] = mean_correlation_coefficient(features, rows)
    return scores


@torch.no_grad()
def move_threshold(folder: Path, heldout: Tensor, l0: float) -> None:
    """Bring all thresholds of the JumpReLU SAE in `folder` to the one at which `heldout` [tokens, d_in] has `l0`."""
    sae: Any = SAE.load_from_disk(folder)
    sae.threshold.zero_()
    latents = torch.cat([sae.encode(part.float()).flatten() for part in heldout.split(_JUDGED_ROWS)])
    num_left_out = len(latents) - round(l0 * len(heldout))
    sae.threshold.fill_(latents.kthvalue(num_left_out).values)  # what equals it is left out
    sae.save_model(folder)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars and warnings."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
