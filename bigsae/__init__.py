"""bigsae: train sparse autoencoders on the activations of language models that fit no single GPU."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bigsae.caching.options import CacheConfig
from bigsae.config import (
    BufferConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LMConfig,
    MeshConfig,
    OptimConfig,
    SAEConfig,
    TrainConfig,
    UserError,
    WandbConfig,
)

if TYPE_CHECKING:
    from bigsae.caching.read import open_activations
    from bigsae.caching.write import write_activations
    from bigsae.hub.load import load_sae
    from bigsae.training.fit import fit
    from bigsae.training.run import train_saes

# Imported at first use, so that `import bigsae` loads neither nnsight nor transformers.
_LAZY = {
    "fit": "bigsae.training.fit",
    "train_saes": "bigsae.training.run",
    "load_sae": "bigsae.hub.load",
    "open_activations": "bigsae.caching.read",
    "write_activations": "bigsae.caching.write",
}

__all__ = [
    "BufferConfig",
    "CacheConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LMConfig",
    "MeshConfig",
    "OptimConfig",
    "SAEConfig",
    "TrainConfig",
    "UserError",
    "WandbConfig",
    "fit",
    "load_sae",
    "open_activations",
    "train_saes",
    "write_activations",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bigsae' has no attribute {name!r}")
