"""A user's own model with an SAE in it: steering, ablation, and what the reconstruction does to the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bigsae.evaluation.targets import find_hookpoint, find_output_hookpoint
from bigsae.lm.activations import replacing
from bigsae.sae.base import SAE


@contextmanager
def splice(
    model: PreTrainedModel,
    sae: SAE,
    hookpoint: str | None = None,
    *,
    output_hookpoint: str | None = None,
    edit: Callable[[Tensor], Tensor] | None = None,
    ablate: Iterable[int] = (),
    steer: Mapping[int, float] | None = None,
    keep_error: bool = False,
    first_position: bool = False,
) -> Iterator[PreTrainedModel]:
    """A block within which `model(...)` and `model.generate(...)` run with `sae`'s reconstruction in its place.

    `model` is any causal language model of transformers. `hookpoint` is the activation that `sae` reads, and
    `output_hookpoint` the one that a transcoder replaces; by default those that `sae` names in its metadata. `sae` must
    lie on the device of that activation.

    Latents `[rows, ctx, d_sae]` go through `edit`, then those in `ablate` are set to 0 and those in `steer` to their
    values; later tokens of `generate` come one at a time, `[rows, 1, d_sae]`. With `keep_error` what the SAE does not
    reconstruct stays: the activation changes only by what the edits change, and without any not by a bit. The first
    token of each row is left as it is, an attention sink in most models that training leaves out by default;
    `first_position` splices it too.

    Blocks may be nested, for several SAEs. Raises UserError for a hookpoint that the model does not have, ValueError
    for a latent that the SAE does not have, for an SAE of another width, or for an `edit` that changes the shape.
    """
    reads = find_hookpoint(sae, model, hookpoint, "the SAE", flag="hookpoint")
    edits = _Edits(sae, edit, tuple(ablate), dict(steer or {}), keep_error, first_position)
    if sae.is_transcoder:
        predicts = find_output_hookpoint(sae, model, output_hookpoint, "the transcoder", "output_hookpoint")
        functions = [(reads, edits.note), (predicts, edits.predict)]
    elif output_hookpoint is not None:
        raise ValueError("output_hookpoint is for transcoders: leave it out")
    else:
        functions = [(reads, edits.reconstruct)]
    with replacing(model, functions, edits.begin):
        yield model


class _Edits:
    """What a block does to the activations of one call after the other."""

    def __init__(
        self,
        sae: SAE,
        edit: Callable[[Tensor], Tensor] | None,
        ablate: tuple[int, ...],
        steer: dict[int, float],
        keep_error: bool,
        first_position: bool,
    ) -> None:
        self.sae, self.edit, self.keep_error, self.first_position = sae, edit, keep_error, first_position
        values = dict.fromkeys(ablate, 0.0) | steer
        for latent in values:
            if not 0 <= latent < sae.d_sae:
                raise ValueError(f"there is no latent {latent}: the SAE has {sae.d_sae}")
        self.fixed = torch.tensor(list(values), dtype=torch.long, device=sae.W_dec.device)
        self.values = torch.tensor(list(values.values()), dtype=sae.W_dec.dtype, device=sae.W_dec.device)
        self.mask: Tensor | None = None
        self.begins = True
        self.read = torch.empty(0)

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Note what tells where rows begin, before the layers write into the cache."""
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        self.begins = cache is None or cache.get_seq_length() == 0
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def note(self, x: Tensor) -> Tensor:
        self.read = x.clone()  # what runs after may write into it in place
        return x

    def reconstruct(self, x: Tensor) -> Tensor:
        return self._replaced(x, x)

    def predict(self, y: Tensor) -> Tensor:
        x, self.read = self.read, torch.empty(0)
        return self._replaced(x, y)

    def _replaced(self, x: Tensor, y: Tensor) -> Tensor:
        """What takes the place of `y` [rows, ctx, d_out] where the SAE reads `x` [rows, ctx, d_in]."""
        if x.shape[-1] != self.sae.d_in or y.shape[-1] != self.sae.d_out:
            raise ValueError(
                f"the SAE maps {self.sae.d_in} to {self.sae.d_out}, the activations are {x.shape[-1]} and "
                f"{y.shape[-1]} wide: name the hookpoint that it was trained on"
            )
        latents = self.sae.encode(x)
        edited = self._edited(latents)
        if self.keep_error:
            # Not x̂' + (y − x̂): that is y to rounding alone where nothing was edited.
            spliced = y + self.sae.decode_change(x, edited - latents)
        else:
            spliced = self.sae.reconstruct_from(x, edited)
        spliced = spliced.to(y.dtype)
        if self.first_position or not self.begins:
            return spliced
        return torch.where(first_tokens(y, self.mask)[..., None], y, spliced)

    def _edited(self, latents: Tensor) -> Tensor:
        edited = latents if self.edit is None else self.edit(latents.clone())
        if edited.shape != latents.shape:
            raise ValueError(f"edit gave {tuple(edited.shape)}, not {tuple(latents.shape)}")
        if len(self.fixed):
            edited = edited.clone()
            edited[..., self.fixed] = self.values.to(edited.dtype)
        return edited


def first_tokens(activation: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which of `activation` [rows, ctx, d] is the first of its row, padding aside: bool [rows, ctx].

    `attention_mask` is [rows, ctx], 0 for padding; None where there is no padding.
    """
    rows, ctx = activation.shape[:2]
    first = torch.zeros(rows, dtype=torch.long, device=activation.device)
    if attention_mask is not None:
        first = attention_mask.to(activation.device).long().argmax(1)  # the first of the largest
    return torch.arange(ctx, device=activation.device) == first[:, None]
