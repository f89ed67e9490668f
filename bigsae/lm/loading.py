"""The language model, on this rank: its shard of the layers that are needed, and nothing else.

Sharded loading is transformers' own (`DistributedConfig`): each rank reads the slices of its parameters from
safetensors and FSDP2 holds them. Layers beyond the last hookpoint are left out of the configuration, so they are
neither built nor read.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from bigsae.config import LMConfig, UserError, lm_kwargs
from bigsae.lm.compiling import check_compiler, compile_layers
from bigsae.lm.hookpoints import Site, decoder_layers, num_layers_needed
from bigsae.lm.kwargs import OF_THIS_MACHINE
from bigsae.lm.layout import LMLayout, resolve_layout

__all__ = [
    "LMLayout", "download_lm", "load_lm", "local_bytes", "meta_model", "num_dropped_layers", "process_groups",
    "resolve_layout", "runs_under_autocast", "vocab_size",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Arguments of from_pretrained that have a flag of their own or that the layout decides.
_RESERVED_KWARGS = {
    "config": "--model",
    "revision": "--lm.revision",
    "trust_remote_code": "--lm.trust-remote-code",
    "dtype": "--lm.dtype",
    "torch_dtype": "--lm.dtype",
    "num_hidden_layers": "--hookpoints",
    "distributed_config": "--lm.shard-size",
    "device_map": "--lm.shard-size",
    "tp_plan": "--lm.shard-size",
    "tp_size": "--lm.shard-size",
    "output_loading_info": "--model",
    "token": "the environment's HF_TOKEN",  # here it would be written to config.json
    "use_auth_token": "the environment's HF_TOKEN",
    "weights_only": "bigsae, which unpickles nothing,",
}
# By these transformers runs code of repositories on the Hub, whatever trust_remote_code says.
_RUNS_CODE = ("use_kernels", "allow_all_kernels", "attn_implementation", "experts_implementation")
# Arguments by which the Hub is asked; the configuration and the weights both need them.
_HUB_KWARGS = (*OF_THIS_MACHINE, "subfolder")


def _kwargs(lm: LMConfig) -> dict[str, Any]:
    kwargs = lm_kwargs(lm)
    for name, flag in _RESERVED_KWARGS.items():
        if name in kwargs:
            raise UserError(f"--lm.kwargs sets {name!r}: leave it out, {flag} decides it")
    for name in _RUNS_CODE:
        foreign = kwargs.get(name) is True or "/" in str(kwargs.get(name))
        if foreign and not lm.trust_remote_code:
            raise UserError(
                f"--lm.kwargs sets {name!r} to code of the Hub: add --lm.trust-remote-code to run it"
            )
    return kwargs


def _split_kwargs(lm: LMConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`--lm.kwargs` as (arguments for the Hub, all others)."""
    kwargs = _kwargs(lm)
    hub = {name: kwargs.pop(name) for name in _HUB_KWARGS if name in kwargs}
    return hub, kwargs


def meta_model(model: str, lm: LMConfig) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The whole causal LM on the meta device (shapes without weights), in evaluation mode, and its configuration.

    Reads the configuration alone. Raises UserError where `model` cannot be opened or is not a causal LM.
    """
    hub, rest = _split_kwargs(lm)
    implementations = {
        name: rest.pop(name)
        for name in ("attn_implementation", "experts_implementation")
        if rest.get(name) is not None
    }
    try:
        config = AutoConfig.from_pretrained(
            model, revision=lm.revision, trust_remote_code=lm.trust_remote_code, **hub, **rest
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"--model {model} brings code of its own: read it, and add --lm.trust-remote-code to run it"
            ) from None
        raise UserError(f"--model {model} cannot be opened: {_first_lines(error)}") from error
    if config.is_encoder_decoder:
        raise UserError(f"--model {model} is an encoder-decoder: use a decoder-only (causal) language model")
    try:
        meta = _on_meta(config, lm, **implementations)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"--model {model} cannot be built as a causal language model: {_first_lines(error)}"
        ) from error
    return meta, meta.config


def _first_lines(error: BaseException, num_characters: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= num_characters else text[: num_characters - 1] + "…"


def _on_meta(config: PreTrainedConfig, lm: LMConfig, **kwargs: Any) -> PreTrainedModel:
    # bfloat16 whatever --lm.dtype is: torch's shape rule for grouped matmuls (mixtures of experts) knows no other.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=lm.trust_remote_code, dtype=torch.bfloat16, **kwargs
        )
    return model.eval()


def vocab_size(config: PreTrainedConfig) -> int:
    """Number of token ids that the model embeds; a tokenizer must not have more."""
    return config.get_text_config().vocab_size


# -- leaving layers out ------------------------------------------------------------------------------------------


def _truncated_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The configuration of the first `num_layers` layers, lists with one entry for each layer cut as well."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == total and "token" not in name:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return config


def _layer_constants(layer: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }


def _difference(full: PreTrainedModel, truncated: PreTrainedModel) -> str | None:
    """What differs in the kept part of the model from the full one, if anything does.

    MiniCPM scales each layer's part by 1 / sqrt(number of layers), Gemma-3n counts from the last layer those that
    share keys and values: cut, they would be other models, silently.
    """
    shapes = {name: parameter.shape for name, parameter in full.named_parameters()}
    for name, parameter in truncated.named_parameters():
        if parameter.shape != shapes.get(name):
            return f"{name} would be {tuple(parameter.shape)}, not {tuple(shapes.get(name, ()))}"
    kept_layers = decoder_layers(truncated)[1]
    for index, (kept, original) in enumerate(zip(kept_layers, decoder_layers(full)[1], strict=False)):
        ours, theirs = _layer_constants(kept), _layer_constants(original)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                return f"layer {index}: {name.strip('.')} would be {ours.get(name)}, not {theirs.get(name)}"
    return None


def cut_config(meta: PreTrainedModel, lm: LMConfig, num_layers: int) -> PreTrainedConfig:
    """The configuration with which to load: the truncated one where that computes the same, else the whole."""
    total = meta.config.get_text_config().num_hidden_layers
    if num_layers >= total:
        return meta.config
    config = _truncated_config(meta.config, num_layers)
    try:
        difference = _difference(meta, _on_meta(config, lm))
    except (ValueError, TypeError, IndexError, KeyError) as error:
        difference = f"it cannot be built with fewer ({_first_lines(error)})"
    if difference is None:
        return config
    logger.warning(
        "all %d layers of the language model are loaded, though %d would do: its layers depend on their number; %s",
        total,
        num_layers,
        difference,
    )
    return meta.config


# -- loading -----------------------------------------------------------------------------------------------------


def load_lm(
    model: str,
    lm: LMConfig,
    meta: PreTrainedModel,
    layout: LMLayout,
    device: torch.device,
    sites: Sequence[Site] = (),
    *,
    all_layers: bool = False,
) -> PreTrainedModel:
    """This rank's part of the language model: frozen, in evaluation mode, without a key-value cache.

    `meta` is what `meta_model` gave for the same `model` and `lm`; `sites` are the hookpoints to be computed, which
    decide how many layers are loaded (`all_layers` loads the whole model, for splicing) and, under `lm.compile`, which
    are left uncompiled: an Extractor takes no others then. A sharded layout is collective over all ranks and puts the
    model on the accelerator with the index `LOCAL_RANK`, which `device` must name. Raises UserError for a checkpoint
    that lacks parameters or a machine that cannot compile, RuntimeError where the outcome is not as asked.
    """
    if lm.compile:
        check_compiler(device)
    num_layers = meta.config.get_text_config().num_hidden_layers
    if not all_layers:
        if not sites:
            raise ValueError("load_lm needs the sites to compute, or all_layers=True")
        num_layers = min(num_layers, num_layers_needed(sites))
    config = cut_config(meta, lm, num_layers)
    where: dict[str, Any] = {"device_map": {"": device}}
    if layout.shard_size > 1:
        where = {
            "distributed_config": DistributedConfig(
                fsdp_size=layout.shard_size,
                dp_replicate_size=layout.replicate_size,
                fsdp_plan=_fsdp_plan(meta),
            )
        }
    with _silence_dropped_layers(meta, config):
        loaded, report = _from_pretrained(model, lm, config, where)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"--model {model} lacks {len(missing)} parameters of its architecture, e.g. {missing[0]}: "
            "use a whole checkpoint of a causal language model"
        )
    loaded.eval().requires_grad_(False)
    for part in {id(c): c for c in (loaded.config, loaded.config.get_text_config())}.values():
        part.use_cache = False
    loaded.bigsae_num_dropped_layers = (
        meta.config.get_text_config().num_hidden_layers - loaded.config.get_text_config().num_hidden_layers
    )
    loaded.bigsae_autocast = lm.autocast
    _check_loaded(loaded, layout, device)
    if lm.compile:
        compile_layers(loaded, sites)
    return loaded


def download_lm(model: str, lm: LMConfig, meta: PreTrainedModel) -> None:
    """Bring the weights that `load_lm` reads, with the same arguments, from the Hub to this node's cache.

    Talks to no other rank, reads no weight, and does nothing for a `model` that is a folder. Raises UserError.
    """
    if os.path.isdir(model):
        return
    _from_pretrained(model, lm, meta.config, {"device_map": "meta"})


def _from_pretrained(
    model: str, lm: LMConfig, config: PreTrainedConfig, where: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The loaded model and transformers' report. Raises UserError."""
    hub, rest = _split_kwargs(lm)
    # What the configuration has stands in there.
    rest = {name: value for name, value in rest.items() if not hasattr(config, name)}
    try:
        with _own_loading():
            pair: Any = AutoModelForCausalLM.from_pretrained(
                model,
                config=config,
                revision=lm.revision,
                trust_remote_code=lm.trust_remote_code,
                dtype=getattr(torch, lm.dtype),
                output_loading_info=True,
                **where,
                **hub,
                **rest,
            )
    except OSError as error:
        raise UserError(f"--model {model}: its weights cannot be opened: {_first_lines(error)}") from error
    except TypeError as error:
        if unknown := [name for name in rest if f"'{name}'" in str(error)]:
            raise UserError(f"--lm.kwargs: from_pretrained knows no {unknown[0]!r}: leave it out") from error
        raise
    return pair


def num_dropped_layers(model: nn.Module) -> int:
    """Layers that `load_lm` left out of this model; 0 for a model that it did not load."""
    return getattr(model, "bigsae_num_dropped_layers", 0)


def runs_under_autocast(model: nn.Module) -> bool:
    """Whether `load_lm` was told that this model's forward runs under bfloat16 autocast."""
    return getattr(model, "bigsae_autocast", False)


def local_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers on this rank, tied ones counted once.

    By their elements: on a CPU a shard may be a view into the mapped file, whose storage is the whole tensor.
    """
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        tensors[local.data_ptr(), local.numel()] = local.nbytes
    return sum(tensors.values())


def process_groups(model: nn.Module) -> list[ProcessGroup]:
    """The groups of ranks in which a sharded model's weights travel; none of a model that is whole on each rank."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def _fsdp_plan(meta: PreTrainedModel) -> dict[str, str]:
    """What is gathered for its own forward and freed after it: each layer, and embedding and head where untied.

    Else they would belong to the root's group, gathered whole for the length of each forward, the head unused.
    Tied, they are one parameter, which has to stay in that group.
    """
    plan = {f"{decoder_layers(meta)[0]}.*": "free_full_weight"}
    ends: tuple[Any, Any] = (meta.get_input_embeddings(), meta.get_output_embeddings())
    names = {id(module): name for name, module in meta.named_modules()}
    if all(type(end) in (nn.Embedding, nn.Linear) for end in ends) and ends[0].weight is not ends[1].weight:
        plan |= {names[id(end)]: "free_full_weight" for end in ends}
    return plan


@contextmanager
def _own_loading() -> Iterator[None]:
    """Keep transformers from leaving loading to accelerate, and its progress bar to the first rank.

    Under an accelerate FSDP configuration with fsdp_cpu_ram_efficient_loading (its default) transformers takes each
    node's first rank to be the one that matters: on the others it leaves buffers on the CPU and missing parameters
    without values, for accelerate to broadcast later (transformers.distributed.fsdp.is_fsdp_enabled). Nobody
    broadcasts here.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    hide_bar = os.environ.get("RANK", "0") != "0" and transformers.utils.logging.is_progress_bar_enabled()
    if hide_bar:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide_bar:
            transformers.utils.logging.enable_progress_bar()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _silence_dropped_layers(meta: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    """Leave the layers that were dropped on purpose out of transformers' report of unexpected parameters."""
    total, kept = (c.get_text_config().num_hidden_layers for c in (meta.config, config))
    if kept == total:
        yield
        return
    path = decoder_layers(meta)[0].removeprefix(f"{meta.base_model_prefix}.")
    dropped = "|".join(str(index) for index in range(kept, total))
    cls = type(meta)
    before = cls._keys_to_ignore_on_load_unexpected
    cls._keys_to_ignore_on_load_unexpected = [*(before or ()), rf"(^|\.){re.escape(path)}\.({dropped})\."]
    try:
        yield
    finally:
        cls._keys_to_ignore_on_load_unexpected = before


def _check_loaded(model: PreTrainedModel, layout: LMLayout, device: torch.device) -> None:
    """Assert that the model is where, and as sharded as, it was asked to be."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type != device.type or (device.index or 0) != (local.device.index or 0):
            raise RuntimeError(f"{name} was loaded to {local.device}, not to {device}")
    sharded = isinstance(model, FSDPModule)
    if sharded != (layout.shard_size > 1):
        raise RuntimeError(
            f"the language model is {'' if sharded else 'not '}sharded, but its layout is {layout}"
        )
