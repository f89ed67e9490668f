"""torch.compile for the decoder layers around which nothing is traced.

Each layer is compiled by itself and in place, so one graph serves all layers of a kind; FSDP's hooks, which gather and
free its weights, stay outside of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bigsae.config import UserError
from bigsae.lm.hookpoints import Site, decoder_layers

logger = logging.getLogger(__name__)

# The number of rows differs: the last rows of the data, a rank that has none. Left to torch, two sizes are compiled
# each for itself before one graph serves all but 1; asked for at once, there are two graphs: one row, and several.
_OPTIONS: dict[str, Any] = {"dynamic": True}


def check_compiler(device: torch.device) -> None:
    """Compile something small, so that a missing compiler is found before any weight is read."""
    try:
        torch.compile(_small, **_OPTIONS)(torch.ones(8, device=device))
    except Exception as error:  # of many types: torch's, Triton's, a compiler's own
        text = " ".join(str(error).partition("\n\n")[0].split())
        raise UserError(
            f"--lm.compile: torch.compile does not work on this machine ({text[:200]}): install a C++ compiler, g++ "
            "or what the variable CXX names (for a GPU Triton as well), or leave --lm.compile out"
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def compile_layers(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Compile, in place, each decoder layer that neither holds a hooked module nor lies within one.

    They are compiled when they first run. Without such a layer nothing is compiled, and a warning says so.
    """
    path, layers = decoder_layers(model)
    names = [f"{path}.{index}" for index in range(len(layers))]
    free = [name for name in names if not any(_overlap(name, site.hookpoint.path) for site in sites)]
    for name in free:
        model.get_submodule(name).compile(**_OPTIONS)
    model.bigsae_compiled_layers = free  # pyright: ignore[reportArgumentType]
    if free:
        logger.info("%d of %d layers of the language model are compiled", len(free), len(names))
    else:
        logger.warning(
            "--lm.compile compiles nothing: each layer of the language model that is loaded (%d) holds a hookpoint",
            len(names),
        )


def compiled_overlap(model: nn.Module, paths: Iterable[str]) -> str | None:
    """A compiled layer that holds one of the modules at `paths`, or lies within one; None where there is none."""
    compiled: Sequence[str] = getattr(model, "bigsae_compiled_layers", ())
    return next((layer for layer in compiled if any(_overlap(layer, path) for path in paths)), None)


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
