"""What the language model makes of reconstructions in the place of its activations: cross-entropy and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bigsae.lm.activations import Extractor
from bigsae.parallel import collectives

Function = Callable[[Tensor], Tensor]
"""From an activation [rows, ctx, d] to what takes its place, of the same shape."""
Intervention = Callable[[Tensor], dict[str, Function]]
"""From the mask [rows, ctx] of positions that are spliced to the functions of a forward, by hookpoint."""

CLEAN = "clean"


@dataclass(frozen=True)
class Batch:
    """Token rows of one forward of this rank."""

    ids: Tensor
    """[rows, ctx_len]"""
    keep: Tensor
    """bool [rows, ctx_len]: positions that are spliced, and count."""


@dataclass(frozen=True)
class Splice:
    """An SAE or transcoder in its place in the model."""

    reads: str
    """Hookpoint that it reads."""
    predicts: str
    """Hookpoint whose activation it replaces; an SAE's is the one that it reads."""
    reconstruct: Function
    """[rows, ctx, d_in] to [rows, ctx, d_out], in the LM's own scale."""


@dataclass(frozen=True)
class Scores:
    """Means over tokens of all ranks, in nats."""

    ce: float
    """Cross-entropy of the next token, over the counted positions that have one."""
    kl: float
    """KL divergence from the clean model's prediction to this one, over the counted positions."""


def reconstructions(splices: Sequence[Splice]) -> Intervention:
    """All of `splices` in one forward: each reads what those before it have left."""

    def functions(keep: Tensor) -> dict[str, Function]:
        chains: dict[str, list[Function]] = {}
        read: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> Tensor:
            read[name] = x.clone()  # what runs after may write into it in place
            return x

        def replace(splice: Splice, y: Tensor) -> Tensor:
            x = y if splice.reads == splice.predicts else read[splice.reads]
            return torch.where(_mask(keep, y), splice.reconstruct(x).to(y.device, y.dtype), y)

        for splice in splices:
            chains.setdefault(splice.predicts, []).append(lambda y, s=splice: replace(s, y))
        for name in {s.reads for s in splices if s.reads != s.predicts}:
            chains.setdefault(name, []).append(lambda x, name=name: note(name, x))
        return {name: _chain(chain) for name, chain in chains.items()}

    return functions


def ablations(values: Mapping[str, Tensor], *, everywhere: bool) -> Intervention:
    """Each hookpoint's activation replaced by its value [d] at the spliced positions, or `everywhere`."""

    def replace(keep: Tensor, value: Tensor, y: Tensor) -> Tensor:
        value = value.to(y.device, y.dtype).expand_as(y)
        return value if everywhere else torch.where(_mask(keep, y), value, y)

    return lambda keep: {
        name: lambda y, value=value: replace(keep, value, y) for name, value in values.items()
    }


def _mask(keep: Tensor, y: Tensor) -> Tensor:
    return keep.to(y.device)[..., None]


def _chain(functions: Sequence[Function]) -> Function:
    def run(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return run


@torch.no_grad()
def score(
    extractor: Extractor,
    batches: Iterable[Batch],
    interventions: Mapping[str, Intervention],
    group: ProcessGroup | None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Scores of the clean model (`CLEAN`) and under each intervention.

    Collective over `group`, all ranks; under FSDP each rank brings as many batches. `advance` is called after each
    forward.
    """
    names = [CLEAN, *interventions]
    sums = torch.zeros(len(names) + 1, 2, dtype=torch.float64)
    for batch in batches:
        clean = extractor.splice(batch.ids, {})
        sums[-1] += torch.stack([batch.keep[:, :-1].sum(), batch.keep.sum()])
        sums[0] += _sums(clean, clean, batch)
        advance()
        for i, intervention in enumerate(interventions.values(), 1):
            sums[i] += _sums(extractor.splice(batch.ids, intervention(batch.keep)), clean, batch)
            advance()
    on_device = collectives.sum_(sums.to(_device(extractor)), group)
    means = (on_device[:-1] / on_device[-1]).tolist()
    return {name: Scores(*values) for name, values in zip(names, means, strict=True)}


def _device(extractor: Extractor) -> torch.device:
    return next(extractor.model.parameters()).device


def _sums(logits: Tensor, clean: Tensor, batch: Batch) -> Tensor:
    """Σ cross-entropy and Σ KL(clean ‖ logits) over the counted positions, float64 [2] on the CPU."""
    sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
    ids, keep = batch.ids.to(logits.device), batch.keep.to(logits.device)
    for row in range(len(ids)):  # the vocabulary is wide: float32 copies of one row at a time
        found = logits[row].float().log_softmax(-1)
        ce = -found[:-1].gather(1, ids[row, 1:, None]).squeeze(1)
        sums[0] += ce[keep[row, :-1]].sum(dtype=torch.float64)
        if clean is not logits:
            true = clean[row].float().log_softmax(-1)
            kl = (true.exp() * (true - found)).sum(-1)
            sums[1] += kl[keep[row]].sum(dtype=torch.float64)
    return sums.cpu()


def recovered(baseline: float, spliced: float, clean: float) -> float:
    """The part of what an ablation (`baseline`) costs that a reconstruction (`spliced`) does not."""
    cost = baseline - clean
    return (baseline - spliced) / cost if cost else math.nan  # an ablation that changes nothing
