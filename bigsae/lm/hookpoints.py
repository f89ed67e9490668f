"""Which activations are meant, when they appear in a forward, and how wide they are.

Everything here works on a model on the meta device, so a mistyped name is found before any weight is read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from bigsae.config import UserError

INPUT_SUFFIX = ":input"
_TRANSFORMER_LENS = re.compile(r"blocks\.([^.]+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)")
ATTENTION_NAMES = ("attn", "attention")
_MLP_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "moe")


@dataclass(frozen=True)
class Hookpoint:
    """One activation of the model: what a module returns, or what it is given."""

    name: str
    """Canonical name: the module's path, with the suffix `:input` for its input."""
    path: str
    """The module's path within the model, e.g. `model.layers.6.mlp`."""
    side: Literal["output", "input"]
    """Whether the module's output or its input is meant."""


@dataclass(frozen=True)
class Site:
    """A hookpoint as the forward meets it."""

    hookpoint: Hookpoint
    """Which activation."""
    d_in: int
    """Its width: the activation is `[rows, ctx, d_in]`."""
    layer: int
    """Last decoder layer (0-based) that has begun when it appears; -1 before the first."""
    ran: frozenset[str] = field(default=frozenset(), compare=False)
    """The modules of that layer that have been called by then, by their names within it; "" is the layer itself."""

    @property
    def name(self) -> str:
        """The hookpoint's canonical name."""
        return self.hookpoint.name


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The model's list of decoder layers and its path, e.g. `model.layers`, `transformer.h`, `gpt_neox.layers`.

    It is the list as long as the (text) configuration's number of layers; a vision tower of the same depth holds
    fewer parameters or lies outside the decoder. Raises UserError where there is none.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    ranked = sorted(lists.items(), key=lambda item: (id(item[1]) in inside, _num_parameters(item[1])))
    if not ranked:
        raise UserError(
            f"--model {model.config.name_or_path or type(model).__name__} has no list of {num_layers} decoder "
            "layers: use a decoder-only language model"
        )
    return ranked[-1]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def resolve_hookpoints(
    patterns: Sequence[str], model: PreTrainedModel, flag: str = "--hookpoints"
) -> tuple[Hookpoint, ...]:
    """The hookpoints that `patterns` name in `model` (which may lie on the meta device), without duplicates.

    A pattern is a module's name, an fnmatch pattern whose `*` stays within one component of the name
    (`model.layers.*.mlp`), a range (`model.layers.{4,8}`, `model.layers.{4..12}`), or a TransformerLens name
    (`blocks.6.hook_resid_post`, which may hold a pattern or range as well); `:input` takes the module's input.
    Raises UserError, with `flag` and the nearest names, for one that matches nothing.
    """
    layers_path, layers = decoder_layers(model)
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, Hookpoint] = {}
    for pattern in patterns:
        try:
            matches = _matches(pattern, names, layers_path, layers)
        except UserError as error:
            raise UserError(f"{flag} {error}") from None
        for hookpoint in matches:
            found.setdefault(hookpoint.name, hookpoint)
    return tuple(found.values())


def _matches(
    pattern: str, names: Sequence[str], layers_path: str, layers: nn.ModuleList
) -> Iterable[Hookpoint]:
    hits: dict[Hookpoint, None] = {}
    for plain in _expand_braces(pattern):
        path, side = _split_side(_from_transformer_lens(plain, layers_path, layers))
        matched = [name for name in names if _match_components(name, path)]
        if not matched:
            raise UserError(f"{pattern}: {_no_match(plain, path, names, layers_path)}")
        suffix = INPUT_SUFFIX if side == "input" else ""
        hits.update(dict.fromkeys(Hookpoint(name + suffix, name, side) for name in matched))
    return hits


def match_names(patterns: Sequence[str], names: Sequence[str], flag: str = "--hookpoints") -> list[str]:
    """Those of `names`, hookpoints' canonical ones, that `patterns` name, as `resolve_hookpoints` reads patterns.

    Without a model, so TransformerLens names are not known. Raises UserError for a pattern that matches none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        for plain in _expand_braces(pattern):
            path, side = _split_side(plain)
            matched = [
                name for name in names
                if _split_side(name)[1] == side and _match_components(_split_side(name)[0], path)
            ]  # fmt: skip
            if not matched:
                raise UserError(f"{flag} {plain}: there are only {', '.join(names)}")
            found.update(dict.fromkeys(matched))
    return list(found)


def _split_side(name: str) -> tuple[str, Literal["output", "input"]]:
    if name.endswith(INPUT_SUFFIX):
        return name.removesuffix(INPUT_SUFFIX), "input"
    return name, "output"


def _match_components(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _expand_braces(pattern: str) -> list[str]:
    """`a.{4,8}` as `a.4`, `a.8`; `a.{4..6}` as `a.4`, `a.5`, `a.6`; several braces multiply."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    choices: list[str] = []
    for part in brace[1].split(","):
        ends = re.fullmatch(r"\s*(\d+)\.\.(\d+)\s*", part)
        if ends and int(ends[1]) > int(ends[2]):
            raise UserError(f"{pattern}: the range {part.strip()} runs backwards")
        choices += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part.strip()]
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [expanded for choice in choices for expanded in _expand_braces(head + choice + tail)]


def _from_transformer_lens(name: str, layers_path: str, layers: nn.ModuleList) -> str:
    """A TransformerLens name as the model's own; any other name as it is."""
    parsed = _TRANSFORMER_LENS.fullmatch(name)
    if parsed is None:
        return name
    index, kind = parsed.groups()
    layer = f"{layers_path}.{index}"
    if kind == "resid_post":
        return layer
    if kind == "resid_pre":
        return layer + INPUT_SUFFIX
    return f"{layer}.{_block_child(layers[0], kind, name)}"


def _block_child(layer: nn.Module, kind: str, name: str) -> str:
    """The child of a decoder layer that writes its attention's or MLP's part to the residual stream.

    Layers that normalise once more before adding (Gemma-2, OLMo-2) have TransformerLens's hook after that norm
    (`use_normalization_before_and_after` in its TransformerBlock): what is added to the residual stream.
    """
    children = [child for child, _ in layer.named_children()]
    if "post_feedforward_layernorm" in children:
        return "post_attention_layernorm" if kind == "attn_out" else "post_feedforward_layernorm"
    wanted = ATTENTION_NAMES if kind == "attn_out" else _MLP_NAMES
    candidates = [
        child
        for child in children
        if any(word in child.lower() for word in wanted)
        and not any(word in child.lower() for word in ("norm", "ln_", "dropout", "gate"))
    ]
    if len(candidates) != 1:
        raise UserError(
            f"{name}: which child of {type(layer).__name__} is meant is not clear: "
            f"name one of {', '.join(children)} in full"
        )
    return candidates[0]


def _no_match(plain: str, path: str, names: Sequence[str], layers_path: str) -> str:
    if re.match(r"blocks\.", path):
        return (
            f"{plain} is not known; of TransformerLens's names there are blocks.N.hook_resid_pre, hook_resid_post, "
            f"hook_mlp_out and hook_attn_out. This model's own begin with {layers_path}.N"
        )
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.5) or [layers_path + ".0"]
    return f"no module of the model is named {path}; nearest are {', '.join(near)}"


# -- values of modules -------------------------------------------------------------------------------------------


def activation_of(value: Any) -> Any:
    """The activation in what a module returns: a tensor, or the first item of a tuple, list or ModelOutput."""
    while isinstance(value, (tuple, list, Mapping)) and value:
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    return value


def with_activation(value: Any, activation: Tensor) -> Any:
    """What a module returned, with `activation` in the place where `activation_of` finds it."""
    if isinstance(value, Mapping):
        replaced: Any = type(value)(**value)  # a ModelOutput: a dictionary with a field for each key
        key = next(iter(value))
        replaced[key] = with_activation(value[key], activation)
        return replaced
    if isinstance(value, (tuple, list)):
        items = [with_activation(value[0], activation), *value[1:]]
        return (
            type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        )  # a named tuple, or not
    return activation


# -- order and width ---------------------------------------------------------------------------------------------


class _Seen(Exception):
    """Ends the forward once every hookpoint has been met."""


def locate(model: PreTrainedModel, hookpoints: Sequence[Hookpoint]) -> tuple[Site, ...]:
    """The hookpoints in the order in which a forward meets them, with their widths.

    `model` lies on the meta device (`loading.meta_model`); its forward runs with fake tensors, which have shapes
    and no values, and ends at the last hookpoint. Raises UserError for a hookpoint that the forward never meets or
    whose activation is not a floating `[rows, ctx, d]`.
    """
    layers_path, layers = decoder_layers(model)
    met: dict[str, Site] = {}
    begun, ran = -1, set()
    rows, ctx = 2, 4

    def begin_layer(index: int) -> None:
        nonlocal begun, ran
        if index > begun:
            begun, ran = index, set()

    def meet(hookpoint: Hookpoint, value: Any) -> None:
        if hookpoint.name in met:
            return
        activation = activation_of(value)
        _check_activation(hookpoint, activation, (rows, ctx))
        met[hookpoint.name] = Site(hookpoint, activation.shape[-1], begun, frozenset(ran))
        if len(met) == len(hookpoints):
            raise _Seen

    handles = [
        layer.register_forward_pre_hook(lambda *_, index=index: begin_layer(index))
        for index, layer in enumerate(layers)
    ]
    for layer in layers:
        for name, module in layer.named_modules():
            handles.append(module.register_forward_hook(lambda *_, name=name: ran.add(name)))
    for hookpoint in hookpoints:
        module = model.get_submodule(hookpoint.path)
        if hookpoint.side == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, h=hookpoint: meet(h, [*args, *kwargs.values()]), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, h=hookpoint: meet(h, out)))
    try:
        _fake_forward(model, rows, ctx)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missed = [hookpoint.name for hookpoint in hookpoints if hookpoint.name not in met]
    if missed:
        raise UserError(
            f"--hookpoints {missed[0]}: the model's forward never calls this module ({layers_path}.N are its layers)"
        )
    return tuple(met.values())


def _fake_forward(model: PreTrainedModel, rows: int, ctx: int) -> None:
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model(input_ids=torch.zeros(rows, ctx, dtype=torch.long, device="meta"), use_cache=False)
    except (_Seen, UserError):
        raise
    except Exception as error:
        raise UserError(
            f"--model {model.config.name_or_path}: its code does not run on shapes alone, which is how the order "
            f"and width of the hookpoints are found ({type(error).__name__}: {error})"
        ) from error


def _check_activation(hookpoint: Hookpoint, activation: Any, shape: tuple[int, int]) -> None:
    if not isinstance(activation, Tensor):
        problem = f"{type(activation).__name__}, not a tensor"
    elif activation.ndim != 3 or tuple(activation.shape[:2]) != shape:
        problem = f"a tensor of {activation.ndim} dimensions that are not rows x ctx x d"
    elif not activation.is_floating_point():
        problem = f"{activation.dtype}, not floating point"
    else:
        return
    raise UserError(
        f"--hookpoints {hookpoint.name}: its {hookpoint.side} is {problem}; take a decoder layer, its attention or MLP"
    )


def num_layers_needed(sites: Sequence[Site]) -> int:
    """Decoder layers that must be loaded to compute these activations; at least one."""
    return max(1, 1 + max(site.layer for site in sites))


def resolve_targets(
    hookpoints: Sequence[str], output_hookpoints: Sequence[str], meta: PreTrainedModel
) -> list[tuple[Hookpoint, Hookpoint]]:
    """What each SAE reads and what it predicts, by `--hookpoints` and `--sae.output-hookpoint`. Raises UserError."""
    reads = resolve_hookpoints(hookpoints, meta)
    if not output_hookpoints:
        return [(hookpoint, hookpoint) for hookpoint in reads]
    predicted = resolve_hookpoints(output_hookpoints, meta, flag="--sae.output-hookpoint")
    if len(reads) != len(predicted):
        raise UserError(
            f"--hookpoints names {len(reads)} activations and --sae.output-hookpoint {len(predicted)}: they pair up "
            "one to one"
        )
    for ours, theirs in zip(reads, predicted, strict=True):
        if ours == theirs:
            raise UserError(
                f"--sae.output-hookpoint {theirs.name} is what it is predicted from: name another, or none"
            )
    return list(zip(reads, predicted, strict=True))
