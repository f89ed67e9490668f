"""Operations of a language model's forward up to the last activation that is read, counted from shapes.

Multiplications and additions of matmuls, as torch.utils.flop_counter counts them (tests/lm/test_flops.py), but for
attention, which is counted as causal: half of the pairs of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bigsae.lm.hookpoints import ATTENTION_NAMES, Site, decoder_layers


@dataclass(frozen=True)
class ForwardWork:
    """What a forward that ends at the last hookpoint does for each token."""

    matmul_weights: float
    """Elements of the matrices by which a token is multiplied; of experts those that it goes to."""
    attention_width: int
    """heads x head_dim, over all layers whose attention runs."""

    def flops(self, ctx_len: int) -> float:
        """Of a token in a row of `ctx_len`; attention as causal, and over the whole row."""
        return 2 * self.matmul_weights + 2 * ctx_len * self.attention_width


def forward_work(meta: PreTrainedModel, sites: Sequence[Site]) -> ForwardWork:
    """Of `meta`, on the meta device, up to the last of `sites` (from `hookpoints.locate`).

    Of the last layer what has run by then counts; the layers before it run whole. Modules outside of the decoder
    layers (embeddings, norms) have no matmuls; logits are not computed.
    """
    _, layers = decoder_layers(meta)
    text = meta.config.get_text_config()
    last = max(sites, key=lambda site: (site.layer, len(site.ran)))
    matrices: list[tuple[float, int, int]] = []
    num_attentions = 0
    for index in range(last.layer + 1):
        whole = index < last.layer or "" in last.ran
        ran = {name: m for name, m in layers[index].named_modules() if whole or name in last.ran}
        matrices += [matrix for module in ran.values() for matrix in matrices_of(module, text, recurse=False)]
        num_attentions += any(_is_attention(name) for name in ran)
    weights = sum(part * rows * cols for part, rows, cols in matrices)
    return ForwardWork(weights, attention_width(text) * num_attentions)


def _is_attention(name: str) -> bool:
    """Whether a module of a layer is its attention, or comes after it by name."""
    return any(word in name.lower() for word in ATTENTION_NAMES)


def matrices_of(module: nn.Module, text: Any, *, recurse: bool = True) -> list[tuple[float, int, int]]:
    """The matrices of a module by which a token is multiplied: how many of each on average, outputs, inputs.

    `text` is the configuration of the language model.
    """
    active = getattr(text, "num_experts_per_tok", None) or 1
    found: list[tuple[float, int, int]] = []
    for parameter in module.parameters(recurse):
        shape = tuple(parameter.shape)
        if len(shape) == 2:
            found.append((1, *shape))
        elif len(shape) == 3 and shape[0] in _num_experts(text):
            found.append((active, shape[1], shape[2]))
    return found


def _num_experts(text: Any) -> Sequence[int]:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return [value for name in names if (value := getattr(text, name, None))]


def attention_width(text: Any) -> int:
    """heads x head_dim of a layer."""
    heads = getattr(text, "num_attention_heads", 0) or 0
    head_dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    return heads * head_dim
