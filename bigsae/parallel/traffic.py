"""What an SAE's step sends, as numbers: every collective of training/ and sae/ on a mesh, by name and size.

Only topk has candidates. Not counted are the scalars of the other architectures, and of batchtopk and matryoshka the
histograms of the selection: 16 KB or less a time, over all ranks, as often as the values ask for (about four times).

docs/mesh.md explains the terms; tests/distributed/test_traffic.py counts the collectives of real steps against them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepShape:
    """One step of one SAE, as far as it decides what is sent."""

    d_in: int
    d_sae: int
    k: int
    """Latents kept per token (topk)."""
    batch_tokens: int
    """Tokens of the global batch."""
    num_data: int
    num_latent: int
    d_out: int | None = None
    k_aux: int | None = None
    """Latents that AuxK keeps per token, where a latent is dead; None where none is."""
    grad_bytes: int = 4
    """Bytes of an element of the gradients of the matrices."""
    act_bytes: int = 4
    """Bytes of an activation as it waits in the buffer."""
    shard_optimizer: bool = False
    num_vectors: int = 1
    """Parameters with one element a latent."""
    num_sums: int = 1
    """Reconstructions whose parts are added up."""
    weight_bytes: int = 4
    """Of an element of the weights."""
    encoder_bytes: int = 4
    """Of an element of what the encoder's matmul writes."""
    skip: bool = False
    """Whether there is a W_skip."""
    centred: bool = True
    """Whether the encoder's input has b_dec subtracted, whose gradient then has a part for each latent."""


@dataclass(frozen=True)
class Payload:
    """One collective. `num_bytes`: the tensor of an all_reduce, this rank's part in an all_gather, all that goes into a
    reduce_scatter."""

    name: str
    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    group: Literal["data", "latent"]
    num_bytes: int


def sent_bytes(payload: Payload, num_ranks: int) -> float:
    """What each of `num_ranks` ranks sends in a ring: the least that a collective can be had for."""
    if payload.kind == "all_gather":
        return (num_ranks - 1) * payload.num_bytes
    once = (num_ranks - 1) / num_ranks * payload.num_bytes
    return 2 * once if payload.kind == "all_reduce" else once


def step_payloads(shape: StepShape) -> list[Payload]:
    """Every collective of one step in which weights are updated, in the order in which they are made.

    Not in it: the question how long the most silent latent has been silent (8 bytes, at most every 32 steps), and what
    a log or a checkpoint sends.
    """
    return [p for p in (*_forward(shape), *_backward(shape)) if _num_ranks(shape, p) > 1 and p.num_bytes]


def _num_ranks(shape: StepShape, payload: Payload) -> int:
    return shape.num_data if payload.group == "data" else shape.num_latent


def _forward(shape: StepShape) -> list[Payload]:
    d_out = shape.d_out or shape.d_in
    group_tokens = shape.batch_tokens // shape.num_data
    own_tokens = group_tokens // shape.num_latent
    d_own = shape.d_sae // shape.num_latent
    reconstruction = group_tokens * d_out * max(shape.weight_bytes, shape.encoder_bytes)
    payloads = [Payload("tokens", "all_gather", "latent", own_tokens * shape.d_in * shape.act_bytes)]
    if shape.d_out is not None:
        payloads += [Payload("targets", "all_gather", "latent", own_tokens * d_out * shape.act_bytes)]
    payloads += [Payload("moments", "all_reduce", "data", (d_out + 1) * 8)]
    if shape.k_aux is not None:
        payloads += [Payload("number of dead latents", "all_reduce", "latent", 8)]
    payloads += [
        Payload(
            "candidates", "all_gather", "latent", group_tokens * min(shape.k, d_own) * shape.encoder_bytes
        ),
        Payload("reconstruction", "all_reduce", "latent", shape.num_sums * reconstruction),
    ]
    if shape.k_aux is not None:
        k_own = min(shape.k_aux, shape.d_sae, d_own)
        payloads += [
            Payload("AuxK candidates", "all_gather", "latent", group_tokens * k_own * shape.encoder_bytes),
            Payload("AuxK reconstruction", "all_reduce", "latent", reconstruction),
            Payload("AuxK moments", "all_reduce", "data", (d_out + 1) * 8),
        ]
    return payloads


def _backward(shape: StepShape) -> list[Payload]:
    d_out, d_own = shape.d_out or shape.d_in, shape.d_sae // shape.num_latent
    matrices, w = d_own * (shape.d_in + d_out), shape.weight_bytes
    skipped = shape.d_in if shape.skip else 0
    payloads = []
    if shape.centred and shape.d_out is None:
        payloads += [Payload("gradient of b_dec by the encoder", "all_reduce", "latent", shape.d_in * w)]
    reduction = "reduce_scatter" if shape.shard_optimizer else "all_reduce"
    payloads += [
        Payload("gradients of W_enc and W_dec", reduction, "data", matrices * shape.grad_bytes),
        Payload("gradients of the vectors", reduction, "data", d_own * shape.num_vectors * w),
        Payload("gradients of b_dec and W_skip", "all_reduce", "data", d_out * (1 + skipped) * w),
        Payload("gradient norm", "all_reduce", "latent", 4),
    ]
    if shape.shard_optimizer:
        part = (matrices + d_own * shape.num_vectors) // shape.num_data * w
        payloads += [
            Payload("gradient norm", "all_reduce", "data", 4),
            Payload("weights", "all_gather", "data", part),
        ]
    return [*payloads, Payload("firing counts", "all_reduce", "data", d_own * 8)]
