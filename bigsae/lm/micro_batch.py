"""How many token rows go through the language model at a time, where --lm.micro-batch-rows does not say it.

Pure arithmetic on shapes. Nothing is timed and no memory is asked for: a matmul's bits depend on its number of rows, so
the same command must get the same number on every machine of a kind (CPU or GPU), any number of ranks and any mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from bigsae.config import BufferConfig, LMConfig
from bigsae.lm.flops import matrices_of
from bigsae.lm.hookpoints import Site, decoder_layers, num_layers_needed
from bigsae.parallel.memory import DTYPE_BYTES

# Of a forward's activations. Llama-3-70B in bfloat16 takes 1.9 GiB for 8,192 tokens: little beside its weights.
_BUDGET = 2 << 30
# A GPU is full with that many, also one that waits for a shard of each layer from the other GPUs of its node; a core of
# a CPU is with far fewer, and more would only be more memory.
_MOST_TOKENS, _MOST_TOKENS_ON_CPU = 8192, 2048


def choose_rows(ctx_len: int, bytes_per_token: float, useful_tokens: int, device_type: str) -> int:
    """The token rows of a forward: the largest power of two with which

    - the activations, rows x ctx_len x `bytes_per_token`, take at most 2 GiB;
    - rows x ctx_len is at most 8,192 tokens, on a CPU (`device_type` "cpu") 2,048;
    - rows x ctx_len is at most `useful_tokens`, what is asked of the forwards at a time;

    and 1 where even that is more.
    """
    most = _MOST_TOKENS_ON_CPU if device_type == "cpu" else _MOST_TOKENS
    num_tokens = min(most, useful_tokens, int(_BUDGET // bytes_per_token))
    return 1 << max(num_tokens // ctx_len, 1).bit_length() - 1


def refill_tokens(buffer: BufferConfig) -> int:
    """What a refill of `buffer` takes at most: it begins when half of it is used."""
    return buffer.tokens // 2


def with_rows(
    lm: LMConfig, ctx_len: int, num_elements: float, useful_tokens: int, device_type: str
) -> LMConfig:
    """`lm` with `choose_rows` in place of no --lm.micro-batch-rows; `num_elements`: `activation_elements`."""
    if lm.micro_batch_rows is not None:
        return lm
    rows = choose_rows(ctx_len, num_elements * DTYPE_BYTES[lm.dtype], useful_tokens, device_type)
    return replace(lm, micro_batch_rows=rows)


def activation_elements(meta: PreTrainedModel, sites: Sequence[Site]) -> float:
    """Elements that a forward of `meta` (on the meta device) to the last of `sites` holds for each token.

    With what it hands over. An estimate: the outputs of all matrices of the widest layer (where a token goes to several
    experts, twice their inputs too, which are copied for each and sorted), three of the residual stream's width, and
    each activation that is read twice, as it comes and what of it is kept.
    """
    text = meta.config.get_text_config()
    layers = list(decoder_layers(meta)[1])[: num_layers_needed(sites)]
    widest = max(sum(map(_held, matrices_of(layer, text))) for layer in layers)
    widths = [site.d_in for site in sites]
    return widest + 3 * max(widths) + 2 * sum(widths)


def _held(matrix: tuple[float, int, int]) -> float:
    num_taken, outputs, inputs = matrix
    return num_taken * (outputs + 2 * inputs * (num_taken > 1))
