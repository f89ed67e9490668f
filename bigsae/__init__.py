"""bigsae: train sparse autoencoders on the activations of language models that fit no single GPU."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bigsae.config import (
    BufferConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HubConfig,
    LMConfig,
    MeshConfig,
    OptimConfig,
    SAEConfig,
    TrainConfig,
    UserError,
    WandbConfig,
)

if TYPE_CHECKING:
    from bigsae.hub.export import export_run, push_saes
    from bigsae.hub.load import load_sae
    from bigsae.hub.options import ExportConfig
    from bigsae.training.fit import fit
    from bigsae.training.run import train_saes

# Imported at first use, so that `import bigsae` loads neither nnsight nor transformers.
_LAZY = {
    "fit": "bigsae.training.fit",
    "train_saes": "bigsae.training.run",
    "load_sae": "bigsae.hub.load",
    "export_run": "bigsae.hub.export",
    "push_saes": "bigsae.hub.export",
    "ExportConfig": "bigsae.hub.options",
}

__all__ = [
    "BufferConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "HubConfig",
    "LMConfig",
    "MeshConfig",
    "OptimConfig",
    "SAEConfig",
    "TrainConfig",
    "UserError",
    "WandbConfig",
    "export_run",
    "fit",
    "load_sae",
    "push_saes",
    "train_saes",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bigsae' has no attribute {name!r}")
