"""The plain model's activations, by torch's own hooks: what extraction has to equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def plain_model(folder: Path) -> PreTrainedModel:
    """The whole model in float32, loaded in the ordinary way."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_activations(
    model: PreTrainedModel, ids: Tensor, names: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Activations of the modules in `names` (`:input` for inputs) and the logits, from one forward."""
    taken: dict[str, Tensor] = {}

    def take(name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, (tuple, list)) else value
        assert isinstance(tensor, Tensor)
        taken[name] = tensor.clone()

    handles = []
    for name in names:
        module = model.get_submodule(name.removesuffix(":input"))
        if name.endswith(":input"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: take(name, [*args, *kwargs.values()]), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: take(name, out)))
    logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return taken, logits
