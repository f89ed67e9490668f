"""Other trainers' steps from the same weights on the same activations, each with the settings that make it fastest.

What a peer has no name for is left out by name: its package where it cannot be imported, the architecture where it has
none. dictionary_learning may also lie in a folder that the environment variable DICTIONARY_LEARNING names, since its
package asks for old versions of what everything else here needs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LR = 2e-4
_NEVER = 10**9  # steps, and tokens, that no benchmark reaches


@dataclass(frozen=True)
class Problem:
    """What is timed: the shape, and where all begin."""

    arch: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    weights: dict[str, Tensor]
    """bigsae's names and layout: W_enc and W_dec [d_sae, d_in], b_enc, b_dec, threshold."""
    dead: Tensor | None = None
    """bool [d_sae]: latents that each step takes to be dead."""
    bf16: bool = False
    """Whether the matmuls that can run in bfloat16 do."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.weights["W_enc"].device


@dataclass(frozen=True)
class Contender:
    """A trainer, as far as a benchmark needs it."""

    name: str
    step: Callable[[Tensor], Any]
    """A whole training step on `x` [batch, d_in]: forward, backward, clipping, update, renormalisation, statistics."""
    squared_error: Callable[[Tensor], float]
    """Mean over the tokens of `x` [batch, d_in] of ‖x − x̂‖², x̂ being the training forward's."""


class Unsupported(Exception):
    """The peer has nothing of this kind."""


def saelens(problem: Problem) -> Contender:
    """SAELens's trainer; sparse activations where its class has them, no rescaling, autocast with `bf16`."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape: dict[str, Any] = {"d_in": problem.d_in, "d_sae": problem.d_sae, "device": str(problem.device)}
    unscaled = {**shape, "k": problem.k, "rescale_acts_by_decoder_norm": False}
    if problem.arch == "topk":
        sparse = not problem.bf16  # its documentation: worthwhile in float32 without autocast alone
        sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**unscaled, use_sparse_activations=sparse))
    elif problem.arch == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**unscaled))
    else:
        aux: dict[str, Any] = {"pre_act_loss_coefficient": 3e-6} if problem.dead is not None else {}
        config = JumpReLUTrainingSAEConfig(
            **shape, jumprelu_sparsity_loss_mode="quadratic", target_l0=float(problem.k), **aux
        )
        sae = JumpReLUTrainingSAE(config)
    ours = problem.weights
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(ours[name].T if name == "W_enc" else ours[name])
    config = SAETrainerConfig(
        total_training_samples=_NEVER * problem.batch,
        train_batch_size_samples=problem.batch,
        lr=LR,
        lr_end=LR,
        device=str(problem.device),
        autocast=problem.bf16,
        dead_feature_window=_NEVER,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        if problem.dead is not None:
            trainer.n_forward_passes_since_fired[problem.dead] = _NEVER + 1.0
        trainer.step(x)
        trainer.n_training_steps += 1

    @torch.no_grad()
    def squared_error(x: Tensor) -> float:
        inputs = TrainStepInput(x, trainer.get_coefficients(), trainer.dead_neurons, 0, False)
        with trainer.autocast_if_enabled:
            return float(sae.training_forward_pass(step_input=inputs).losses["mse_loss"])

    return Contender("sae-lens", step, squared_error)


def sparsify(problem: Problem) -> Contender:
    """sparsify's SparseCoder in the step of its trainer, which is one with the language model's forward; with Adam."""
    if problem.arch != "topk":
        raise Unsupported(f"it has no {problem.arch}")
    if problem.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its switch to torch's own embedding_bag
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(
        problem.d_in, SparseCoderConfig(num_latents=problem.d_sae, k=problem.k), problem.device
    )
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    coder.load_state_dict({name: problem.weights[names.get(name, name)] for name in coder.state_dict()})
    adam = torch.optim.Adam(coder.parameters(), lr=LR)
    num_tokens_since_fired = torch.zeros(problem.d_sae, dtype=torch.int64, device=problem.device)
    did_fire = torch.zeros(problem.d_sae, dtype=torch.bool, device=problem.device)
    auxk_alpha = 0.0 if problem.dead is None else 1 / 32

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        dead = None
        if problem.dead is not None:
            num_tokens_since_fired[problem.dead] = _NEVER + 1
            dead = num_tokens_since_fired > _NEVER
        output = coder(x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        did_fire[output.latent_indices.flatten()] = True
        float(output.fvu.detach())
        (output.fvu + auxk_alpha * output.auxk_loss + output.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        num_tokens_since_fired.add_(len(x))
        num_tokens_since_fired[did_fire] = 0
        did_fire.zero_()

    @torch.no_grad()
    def squared_error(x: Tensor) -> float:
        return float((x - coder(x).sae_out).square().sum() / len(x))

    return Contender("eai-sparsify", step, squared_error)


def dictionary_learning(problem: Problem) -> Contender:
    """dictionary_learning's trainers; of its own options none is about speed but autocast, which it does not set."""
    if (folder := os.environ.get("DICTIONARY_LEARNING")) and folder not in sys.path:
        sys.path.append(folder)
    trainers = importlib.import_module("dictionary_learning.trainers")

    shape: dict[str, Any] = {
        "activation_dim": problem.d_in,
        "dict_size": problem.d_sae,
        "layer": 0,
        "lm_name": "none",
    }
    settings = {**shape, "steps": _NEVER, "warmup_steps": 0, "lr": LR, "device": str(problem.device)}
    ours = problem.weights
    if problem.arch == "jumprelu":
        target_l0 = float(problem.k)
        trainer: Any = trainers.JumpReluTrainer(**settings, target_l0=target_l0, sparsity_warmup_steps=None)
        # Theirs does not subtract b_dec from the input.
        b_enc = ours["b_enc"] - ours["W_enc"] @ ours["b_dec"]
        theirs = {
            "W_enc": ours["W_enc"].T,
            "W_dec": ours["W_dec"],
            "b_enc": b_enc,
            "b_dec": ours["b_dec"],
            "threshold": ours["threshold"],
        }
    else:
        trainer_class = trainers.TopKTrainer if problem.arch == "topk" else trainers.BatchTopKTrainer
        trainer = trainer_class(**settings, k=problem.k)
        theirs = {
            "encoder.weight": ours["W_enc"],
            "encoder.bias": ours["b_enc"],
            "decoder.weight": ours["W_dec"].T,
            "b_dec": ours["b_dec"],
        }
    with torch.no_grad():
        for name, parameter in trainer.ae.named_parameters():
            parameter.copy_(theirs[name])
    num_steps = 0

    def step(x: Tensor) -> None:
        nonlocal num_steps
        num_steps += 1  # not from 0: there it sets b_dec anew
        if problem.dead is not None:
            trainer.num_tokens_since_fired[problem.dead] = trainer.dead_feature_threshold + 1
        trainer.update(num_steps, x)

    @torch.no_grad()
    def squared_error(x: Tensor) -> float:
        if problem.arch == "batchtopk":
            recon = trainer.ae.decode(trainer.ae.encode(x, use_threshold=False))
        else:
            recon = trainer.ae(x)
        return float((x - recon).square().sum() / len(x))

    return Contender("dictionary-learning", step, squared_error)


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "sae-lens": saelens,
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
}


def contenders(names: list[str], problem: Problem) -> Iterator[Contender]:
    """Those of the peers that are here and have the architecture; of the others it is said why not."""
    for name in names:
        try:
            with quietly():
                peer = PEERS[name](problem)
        except ImportError as error:
            print(f"{name}: skipped, as it cannot be imported ({error})")
        except Unsupported as error:
            print(f"{name}: skipped, as {error}")
        else:
            yield peer


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what peers print and warn of when they are made."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
