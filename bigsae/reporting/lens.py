"""The logit lens: which tokens a latent promotes, by its decoder row alone (nostalgebraist 2020).

logits = W_U · norm(w): the decoder row w goes through the model's own final norm and unembedding, as if it were all
there is in the residual stream. Of the norm only what is linear in the direction of w is taken, its scale and weight:
a bias would promote the same tokens for every latent. So is the bias of the unembedding left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bigsae.lm.hookpoints import decoder_layers

_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Lens:
    """The end of a language model."""

    norm: nn.Module | None
    weight: Tensor
    """Of the unembedding, [vocabulary, d_model]."""
    description: str
    """The modules, by their names in the model."""

    @property
    def width(self) -> int:
        """Of the directions that it can take."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class Promoted:
    """Token ids and logits, [n, number] each, the largest first, and the smallest first."""

    top: tuple[Tensor, Tensor]
    bottom: tuple[Tensor, Tensor]


def find_lens(model: PreTrainedModel) -> Lens | None:
    """The final norm and the unembedding of a loaded, unsharded model; None where it has no unembedding.

    The norm is the last module beside the decoder layers that a forward calls after them.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    norm = _last_norm(model)
    parts = [names[id(head)], *([names[id(norm)]] if norm is not None else [])]
    return Lens(norm, head.weight, " · ".join(parts))


@torch.no_grad()
def _last_norm(model: PreTrainedModel) -> nn.Module | None:
    path, layers = decoder_layers(model)
    parent = model.get_submodule(path.rpartition(".")[0])
    called: list[nn.Module] = []
    watched = [layers[-1], *(child for child in parent.children() if "norm" in type(child).__name__.lower())]
    handles = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in watched]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called and called[-1] is not layers[-1] else None


@torch.no_grad()
def promoted(lens: Lens, directions: Tensor, number: int, num_tokens: int) -> Promoted:
    """The `number` tokens below id `num_tokens` that each of `directions` [n, d_model] promotes most, and least."""
    rows = directions.to(lens.weight.device, lens.weight.dtype)
    if lens.norm is not None:
        rows = (lens.norm(rows) - lens.norm(-rows)) / 2
    weight = lens.weight[:num_tokens]
    logits = torch.cat([rows.float() @ part.float().T for part in weight.split(_ROWS_AT_ONCE)], dim=1)
    number = min(number, logits.shape[1])
    top, bottom = logits.topk(number), logits.topk(number, largest=False)
    return Promoted((top.indices.cpu(), top.values.cpu()), (bottom.indices.cpu(), bottom.values.cpu()))
