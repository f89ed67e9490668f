"""What the language model costs, from its configuration: bytes of a shard, operations and bytes of a forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bigsae.config import LMConfig
from bigsae.lm import loading
from bigsae.lm.flops import ForwardWork, forward_work, matrices_of
from bigsae.lm.hookpoints import decoder_layers, locate, resolve_targets
from bigsae.lm.loading import meta_model
from bigsae.lm.micro_batch import activation_elements, refill_tokens, with_rows
from bigsae.parallel.memory import DTYPE_BYTES
from bigsae.planning.options import PlanConfig


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together."""

    shapes: tuple[tuple[int, ...], ...]

    def num_elements(self) -> int:
        """Of all of them."""
        return sum(_numel(shape) for shape in self.shapes)

    def num_local(self, shard_size: int) -> int:
        """Elements on the first of `shard_size` ranks, which share the first dimension of each."""
        return sum(-(-shape[0] // shard_size) * _numel(shape[1:]) for shape in self.shapes)


@dataclass(frozen=True)
class LMFacts:
    """The part of a language model that is loaded, and what is read from it."""

    root: Unit
    """What is gathered for the length of a forward: what is in no unit."""
    units: tuple[Unit, ...]
    """What is gathered by itself, in the order of the forward: embedding, layers; the head, which never is."""
    num_layers: int
    """Decoder layers that are loaded."""
    buffers: int
    """Bytes of what is no parameter."""
    matmul_weights: float
    """Elements of the matrices by which a token is multiplied."""
    layer_elements: int
    """Parameters of the layers that a forward goes through."""
    matmul_widths: float
    """Inputs and outputs of these matrices, elements a token."""
    activation_elements: float
    """What a forward holds of a token (`lm.micro_batch`)."""
    attention_width: int
    """heads x head_dim, over all layers whose attention runs."""
    widths: dict[str, int]
    """d_in of each hookpoint that is read, in the order of the forward."""
    targets: tuple[tuple[str, str], ...]
    """For each SAE what it reads and what it predicts."""
    logits_width: int
    """Logits of a token; 0 where none are computed."""

    def local_bytes(self, lm: LMConfig, shard_size: int) -> int:
        """Of this rank's shard."""
        local = sum(unit.num_local(shard_size) for unit in (self.root, *self.units))
        return local * DTYPE_BYTES[lm.dtype] + self.buffers

    def unsharded_bytes(self, lm: LMConfig, shard_size: int, ahead: bool) -> int:
        """The most that is whole at a time under FSDP; `ahead`: a unit is gathered while the one before it is used."""
        if shard_size == 1:
            return 0
        used = self.units if self.logits_width else self.units[: self.num_layers + 1]
        sizes = [unit.num_elements() for unit in used]
        pairs = [a + b for a, b in itertools.pairwise(sizes)]
        most = max(pairs, default=0) if ahead else 0
        return (self.root.num_elements() + max(most, *sizes)) * DTYPE_BYTES[lm.dtype]

    def gathered_bytes(self, lm: LMConfig) -> int:
        """What a forward gathers in all."""
        return sum(unit.num_elements() for unit in (self.root, *self.used_units)) * DTYPE_BYTES[lm.dtype]

    @property
    def used_units(self) -> tuple[Unit, ...]:
        """The units without the head."""
        return self.units[:-1] if self.has_own_head else self.units

    @property
    def has_own_head(self) -> bool:
        """Whether embedding and head are two parameters, and units of their own."""
        return len(self.units) == self.num_layers + 2

    def activation_bytes(self, lm: LMConfig, num_tokens: int) -> int:
        """Of a forward of `num_tokens` tokens, with what it hands over. An estimate."""
        return int(num_tokens * self.activation_elements * DTYPE_BYTES[lm.dtype])

    def logits_bytes(self, lm: LMConfig, rows: int, ctx_len: int) -> int:
        """Of a forward of the whole model: the clean model's logits and these, and float32 copies of one row."""
        return self.logits_width * ctx_len * (2 * rows * DTYPE_BYTES[lm.dtype] + 5 * DTYPE_BYTES["float32"])

    def flops(self, ctx_len: int) -> float:
        """Of a token's way to the last hookpoint; attention as causal."""
        return ForwardWork(self.matmul_weights, self.attention_width).flops(ctx_len)

    def moved_bytes(self, lm: LMConfig, num_tokens: int) -> float:
        """Bytes that a forward of `num_tokens` tokens reads and writes in the GPU's memory."""
        elements = self.layer_elements + num_tokens * self.matmul_widths
        return elements * DTYPE_BYTES[lm.dtype]


def lm_facts(config: PlanConfig) -> LMFacts:
    """What can be known of `config`'s model and hookpoints without weights. Raises UserError."""
    meta, _ = meta_model(config.model, config.lm)
    targets = resolve_targets(config.hookpoints, config.sae.output_hookpoint, meta)
    sites = locate(meta, list({h.name: h for pair in targets for h in pair}.values()))
    widths = {site.name: site.d_in for site in sites}
    targets.sort(key=lambda pair: list(widths).index(pair[0].name))
    num_needed = max(1, 1 + max(site.layer for site in sites))
    # The one place that knows whether layers can be left out.
    kept = loading.cut_config(meta, config.lm, num_needed).get_text_config().num_hidden_layers
    if config.eval.ce:
        kept = meta.config.get_text_config().num_hidden_layers
    names = tuple((a.name, b.name) for a, b in targets)
    work, elements = forward_work(meta, sites), activation_elements(meta, sites)
    facts = _facts(meta, kept, num_needed, widths, names, work, elements)
    return replace(facts, logits_width=loading.vocab_size(meta.config)) if config.eval.ce else facts


def with_chosen_rows(config: PlanConfig, facts: LMFacts) -> PlanConfig:
    """`config` with the rows of a forward that its run would choose, where it says none."""
    device_type = "cpu" if config.gpu == "cpu" else "cuda"
    elements, refill = facts.activation_elements, refill_tokens(config.buffer)
    return replace(config, lm=with_rows(config.lm, config.ctx_len, elements, refill, device_type))


def _facts(
    meta: Any,
    num_kept: int,
    num_used: int,
    widths: dict[str, int],
    targets: tuple[tuple[str, str], ...],
    work: ForwardWork,
    elements: float,
) -> LMFacts:
    path, layers = decoder_layers(meta)
    text = meta.config.get_text_config()
    kept_layers, used_layers = list(layers)[:num_kept], list(layers)[:num_used]
    in_layers = {id(p) for p in layers.parameters()}
    units = [_unit(layer.parameters()) for layer in kept_layers]
    ends = (meta.get_input_embeddings(), meta.get_output_embeddings())
    own_ends = (
        all(type(end) in (nn.Embedding, nn.Linear) for end in ends) and ends[0].weight is not ends[1].weight
    )
    if own_ends:
        units = [_unit(ends[0].parameters()), *units, _unit(ends[1].parameters())]
    in_units = in_layers | ({id(p) for end in ends for p in end.parameters()} if own_ends else set())
    per_layer = [matrices_of(layer, text) for layer in used_layers]
    matrices = [matrix for layer in per_layer for matrix in layer]
    dropped = tuple(f"{path}.{index}." for index in range(num_kept, len(layers)))
    buffers = [b for name, b in meta.named_buffers() if not name.startswith(dropped)]
    return LMFacts(
        root=_unit(p for p in meta.parameters() if id(p) not in in_units),
        units=tuple(units),
        num_layers=num_kept,
        buffers=sum(b.numel() * b.element_size() for b in buffers),
        matmul_weights=work.matmul_weights,
        layer_elements=sum(_unit(layer.parameters()).num_elements() for layer in used_layers),
        matmul_widths=sum(part * (rows + cols) for part, rows, cols in matrices),
        activation_elements=elements,
        attention_width=work.attention_width,
        widths=widths,
        targets=targets,
        logits_width=0,
    )


def _unit(parameters: Any) -> Unit:
    return Unit(tuple(tuple(parameter.shape) for parameter in parameters))


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
