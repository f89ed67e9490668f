"""bigsae: train sparse autoencoders on the activations of language models that fit no single GPU."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from bigsae.hub.load import load_sae
    from bigsae.pretokenizing.options import PretokenizeConfig
    from bigsae.pretokenizing.run import pretokenize_dataset
    from bigsae.training.fit import fit
    from bigsae.training.run import train_saes

# Imported at first use, so that `import bigsae` loads neither nnsight nor transformers.
_LAZY = {
    "PretokenizeConfig": "bigsae.pretokenizing.options",
    "fit": "bigsae.training.fit",
    "load_sae": "bigsae.hub.load",
    "pretokenize_dataset": "bigsae.pretokenizing.run",
    "train_saes": "bigsae.training.run",
}

__all__ = [
    "BufferConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LMConfig",
    "MeshConfig",
    "OptimConfig",
    "PretokenizeConfig",
    "SAEConfig",
    "TrainConfig",
    "UserError",
    "WandbConfig",
    "fit",
    "load_sae",
    "pretokenize_dataset",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bigsae' has no attribute {name!r}")
