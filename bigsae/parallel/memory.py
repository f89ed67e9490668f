"""What an SAE and the activations that wait take of a rank's memory and of the disk, from shapes alone.

Pure arithmetic: nothing here is allocated or measured. docs/plan.md explains the terms; tests/planning/ holds them
against the tensors of real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bigsae.config import OptimConfig, SAEConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of an element."""

_MIB = 2**20
MOMENT_BLOCK = 256
"""Values of a row that share a float32 scale in int8 moments."""
# Parameters [d_sae] of each architecture.
_VECTORS = {"jumprelu": 2, "gated": 3}
SPARSE_BELOW = 1 / 16
"""At most this part of the pairs (token, latent) fire where a step without a k is computed sparsely.

JumpReLU, forward and backward, [2048, 576] x 16,384, one thread: dense 2.7 s; sparse 0.57, 0.98, 1.28, 2.08 s at
densities of 0.2, 1.6, 3.1, 6.3 %."""
# Bytes of a step for each selected pair: value, index, its place in the sorted list of pairs, and their gradients.
_PAIR_BYTES = 64
# float32 copies of an output [batch, d_out] that a step holds: sums, reconstruction, residual, its square, gradients.
_OUTPUT_COPIES = 5
# Matrices [batch, d_sae] that the dense path holds: pre_acts, activations, mask and their gradients.
_DENSE_COPIES = 5


@dataclass(frozen=True)
class SAEShape:
    """One SAE as far as it decides what it costs: bytes, traffic, time."""

    d_in: int
    d_sae: int
    d_out: int
    k: float
    """Latents of a token, on average."""
    k_aux: int = 0
    """Latents of a token that AuxK keeps in a step in which some are dead; 0 without AuxK."""
    num_vectors: int = 1
    """Parameters with one element a latent."""
    transcoder: bool = False
    """Whether its targets, [batch, d_out], are other activations than its inputs."""
    skip: bool = False
    dtype: str = "float32"
    """Of the weights."""
    autocast: bool = False
    grad_dtype: str = "float32"
    moments_dtype: str = "float32"
    slab_mb: int = 256
    may_be_dense: bool = False
    """Whether it begins with steps that are computed on all latents of each token."""
    selects: Literal["token", "batch", "threshold"] = "token"
    """Among what a latent is selected: those of its token (topk), those of the batch, or by itself."""
    centred: bool = True
    """Whether b_dec is subtracted from the encoder's input, and has a gradient through the encoder."""
    unit_decoder: bool = True
    num_prefixes: int = 1
    """Nested SAEs, each with a reconstruction of its own (matryoshka)."""
    num_sums: int = 1
    """Reconstructions that ranks which share the latents add up in a step: one a prefix; topk has a second one with
    --sae.multi-topk, gated one of its gates."""

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights."""
        return DTYPE_BYTES[self.dtype]

    @property
    def encoder_bytes(self) -> int:
        """Of an element of what the encoder's matmul reads and writes."""
        return 2 if self.autocast else self.weight_bytes

    @property
    def grad_bytes(self) -> int:
        """Of an element of the gradients of W_enc and W_dec."""
        return min(DTYPE_BYTES[self.grad_dtype], self.weight_bytes)


def sae_shape(
    sae: SAEConfig, optim: OptimConfig, d_in: int, d_sae: int, d_out: int | None = None
) -> SAEShape:
    """The shape of the SAE that `sae`, with its defaults resolved, describes; `d_out` makes it a transcoder."""
    topk = sae.architecture in ("topk", "batchtopk", "matryoshka")
    width = d_out if d_out is not None else d_in
    uses_auxk = topk and sae.auxk_coefficient != 0
    num_prefixes = _num_prefixes(sae, d_sae) if sae.architecture == "matryoshka" else 1
    return SAEShape(
        d_in=d_in,
        d_sae=d_sae,
        d_out=width,
        k=_mean_active(sae, d_sae),
        k_aux=min(sae.k_aux or max(width // 2, 1), d_sae) if uses_auxk else 0,
        num_vectors=_VECTORS.get(sae.architecture, 1),
        transcoder=d_out is not None,
        skip=sae.skip,
        dtype=sae.dtype,
        autocast=sae.autocast,
        grad_dtype=optim.grad_dtype,
        moments_dtype=optim.moments_dtype,
        slab_mb=sae.slab_mb,
        may_be_dense=not topk and sae.target_l0 is None,
        selects="token" if sae.architecture == "topk" else "batch" if topk else "threshold",
        centred=d_out is None and sae.apply_b_dec_to_input is not False,
        unit_decoder=bool(sae.normalize_decoder),
        num_prefixes=num_prefixes,
        num_sums=num_prefixes + (sae.multi_topk or sae.architecture == "gated"),
    )


def _num_prefixes(sae: SAEConfig, d_sae: int) -> int:
    """As `checks.resolve_prefixes`, a neighbour of this room, resolves them."""
    prefixes = sae.prefixes or [d_sae // part for part in (16, 8, 4, 2) if d_sae // part]
    return len({d_sae, *(p for p in prefixes if p < d_sae)})


def _mean_active(sae: SAEConfig, d_sae: int) -> float:
    if sae.k is not None:
        return sae.k * (4 if sae.multi_topk else 1)
    return sae.target_l0 if sae.target_l0 is not None else d_sae * SPARSE_BELOW


@dataclass(frozen=True)
class SAEBytes:
    """Bytes of one SAE on one rank."""

    weights: int
    moments: int
    """Adam's, those of the biases with them."""
    statistics: int
    """Firing counts and the sums of the log."""
    gradients: int
    working_copy: int
    """W_enc in bfloat16, under autocast."""
    slab: int
    """Pre-activations that exist at a time."""
    activations: int
    """Of a step: what is proportional to its tokens and not to d_sae. An estimate."""

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.weights + self.moments + self.statistics

    @property
    def step(self) -> int:
        """What a step needs beside it."""
        return self.gradients + self.working_copy + self.slab + self.activations


def sae_bytes(
    shape: SAEShape,
    num_latent: int,
    num_data: int,
    batch_tokens: int,
    shard_optimizer: bool = False,
    first_tokens: int = 0,
    act_bytes: int = 4,
) -> SAEBytes:
    """Bytes of one SAE on each rank of a mesh of `num_data` x `num_latent`.

    `batch_tokens`: of the global batch; `first_tokens`: those of the whole run from which it is initialised;
    `act_bytes`: of an activation as it comes from the buffer.
    """
    own = shape.d_sae // num_latent
    in_, out = own * shape.d_in, own * shape.d_out
    vectors = own * shape.num_vectors
    shared = shape.d_out * (1 + (shape.d_in if shape.skip else 0))
    weights = shape.weight_bytes * (in_ + out + vectors + shared)
    parts = num_data if shard_optimizer else 1
    moments = 2 * shape.weight_bytes * (vectors // parts + shared)
    moments += _moment_bytes(shape, own // parts, shape.d_in) + _moment_bytes(
        shape, own // parts, shape.d_out
    )
    gradients = shape.grad_bytes * (in_ + out)
    if parts > 1:  # this rank's part of a sum, beside what is summed, one matrix after the other
        gradients += shape.grad_bytes * max(in_, out) // parts
    gradients += shape.weight_bytes * (vectors + shared)
    group_batch, group_first = batch_tokens // num_data, first_tokens // num_data
    activations = _activation_bytes(shape, group_batch, own, num_latent, act_bytes)
    return SAEBytes(
        weights=weights,
        moments=moments,
        statistics=3 * 8 * own + 8 * shape.d_out,
        gradients=gradients,
        working_copy=2 * in_ if shape.autocast and shape.weight_bytes != 2 else 0,
        slab=slab_bytes(shape, num_latent, max(group_batch, group_first)),
        activations=max(activations, group_first * _first_bytes(shape, act_bytes)),
    )


def _moment_bytes(shape: SAEShape, rows: int, cols: int) -> int:
    """Of both moments of a matrix."""
    if shape.moments_dtype == "int8":
        return 2 * rows * (cols + 4 * -(-cols // MOMENT_BLOCK))
    return 2 * rows * cols * min(DTYPE_BYTES[shape.moments_dtype], shape.weight_bytes)


def slab_bytes(shape: SAEShape, num_latent: int, num_tokens: int) -> int:
    """Of the pre-activations of `num_tokens` tokens that exist at a time on a rank."""
    row = shape.d_sae // num_latent * shape.encoder_bytes
    return min(max(1, shape.slab_mb * _MIB // row), max(num_tokens, 1)) * row


def _first_bytes(shape: SAEShape, act_bytes: int) -> int:
    """Of a token from which the SAE is initialised: input, reconstruction, and what is selected."""
    inputs = shape.d_in * (act_bytes + 4 + shape.encoder_bytes) + 3 * 4 * shape.d_out
    return inputs + int(_PAIR_BYTES * shape.k)


def _activation_bytes(shape: SAEShape, batch: int, own: int, num_latent: int, act_bytes: int) -> int:
    outputs = _OUTPUT_COPIES * 4 * shape.d_out * shape.num_prefixes
    per_token = shape.d_in * (act_bytes + 4 + shape.encoder_bytes) + outputs
    if shape.transcoder:
        per_token += shape.d_out * (act_bytes + 4)
    per_token += int(_PAIR_BYTES * (shape.k + shape.k_aux) / num_latent)
    if shape.k_aux:
        per_token += 3 * 4 * shape.d_out
    if shape.may_be_dense:
        per_token += _DENSE_COPIES * 4 * own
    candidates = 0
    if num_latent > 1:
        of_step = min(shape.k, own) if shape.selects == "token" else 0
        of_auxk = min(shape.k_aux, own)
        # Those of all ranks while places are found, bounded by the slab (kernels/topk_pairs.py); this rank's wait for
        # that as value and index.
        candidates = min(16 * num_latent * batch * int(max(of_step, of_auxk)), shape.slab_mb * _MIB)
        candidates += 12 * batch * int(of_step + of_auxk)
    return batch * per_token + candidates


def all_bytes(saes: Sequence[SAEBytes], *, accumulates: bool = False) -> int:
    """The most that several SAEs of one rank take at a time: they step one after the other.

    `accumulates`: gradients stay from step to step.
    """
    kept = sum(s.kept for s in saes)
    if accumulates:
        return kept + sum(s.gradients for s in saes) + max((s.step - s.gradients for s in saes), default=0)
    return kept + max((s.step for s in saes), default=0)


def buffer_bytes(widths: Sequence[int], tokens: int, headroom: int, dtype: str) -> int:
    """Of a rank's buffer: `tokens` activations of each width, and room for a micro-batch of `headroom` tokens more."""
    return (tokens + headroom) * sum(widths) * DTYPE_BYTES[dtype]


def checkpoint_bytes(saes: Sequence[SAEShape], buffer: int, num_ranks: int, num_sums: int = 0) -> int:
    """Of a checkpoint on disk, where each of `num_ranks` buffers holds `buffer` bytes of waiting activations.

    `num_sums`: gradients of each SAE that wait for an update, one of each copy; 0 without accumulation.
    """
    whole = [sae_bytes(replace(s, slab_mb=1), 1, 1, 1) for s in saes]
    return num_ranks * buffer + sum(b.kept + num_sums * b.gradients for b in whole)
