"""Operations of an SAE's step on one rank, counted from shapes: multiplications and additions.

Those of the encoder's matmul and of what the selected pairs (token, latent) are multiplied by, in the forward and for
the gradients. On all pairs they are torch's own count of dense autograd (tests/training/test_throughput.py). The
optimiser has no matmuls and is left out, as is the loss by which JumpReLU's dead latents are lifted.
"""

from __future__ import annotations

from bigsae.parallel.memory import SAEShape


def encode_flops(shape: SAEShape, batch: int, own: float) -> float:
    """Pre-activations of `batch` tokens and the `own` latents of a rank."""
    return 2.0 * batch * shape.d_in * own


def decode_flops(shape: SAEShape, pairs: float) -> float:
    """Reconstruction from selected `pairs`."""
    return 2 * pairs * shape.d_out


def gradient_flops(shape: SAEShape, pairs: float) -> float:
    """For each pair: of its value, and of its rows of W_dec and W_enc."""
    return 2 * pairs * (2 * shape.d_out + shape.d_in)


def centre_flops(shape: SAEShape, own: float) -> float:
    """Of b_dec's gradient by its way through the encoder, from that of the encoder's bias (kernels/centre.py)."""
    return 2.0 * own * shape.d_in if shape.centred else 0.0


def step_flops(shape: SAEShape, batch: int, own: int, pairs: float, num_dead: float = 0.0) -> float:
    """A step on `batch` tokens with `own` latents, `pairs` of which are selected.

    `num_dead` of these latents are candidates of AuxK, where it has any; their pre-activations are there already.
    """
    flops = encode_flops(shape, batch, own) + decode_flops(shape, pairs) + gradient_flops(shape, pairs)
    flops += centre_flops(shape, own)
    if shape.k_aux and num_dead:
        aux_pairs = batch * min(shape.k_aux * own / shape.d_sae, num_dead)
        flops += decode_flops(shape, aux_pairs) + gradient_flops(shape, aux_pairs)
    if shape.num_sums > shape.num_prefixes:
        flops += _second_sum_flops(shape, pairs)
    if shape.skip:  # each rank has all of it: forward and gradient
        flops += 2 * 2.0 * batch * shape.d_in * shape.d_out
    return flops


def _second_sum_flops(shape: SAEShape, pairs: float) -> float:
    """--sae.multi-topk: the first quarter of the pairs, with gradients of value and W_dec. gated: what its gates add
    up to, with a gradient of the value alone."""
    if shape.selects == "token":
        return 3 * decode_flops(shape, pairs / 4)
    return 2 * decode_flops(shape, pairs)
