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
    from bigsae.caching.options import CacheConfig
    from bigsae.caching.read import open_activations
    from bigsae.caching.write import write_activations
    from bigsae.evaluation.options import EvaluateConfig
    from bigsae.evaluation.run import evaluate_saes
    from bigsae.evaluation.splicing import splice
    from bigsae.hub.export import export_run, push_saes
    from bigsae.hub.load import load_sae
    from bigsae.hub.options import ExportConfig
    from bigsae.pretokenizing.options import PretokenizeConfig
    from bigsae.pretokenizing.run import pretokenize_dataset
    from bigsae.reporting.options import ReportConfig
    from bigsae.reporting.write import write_report
    from bigsae.training.fit import fit
    from bigsae.training.run import train_saes

# Imported at first use, so that `import bigsae` loads neither nnsight nor transformers.
_LAZY = {
    "CacheConfig": "bigsae.caching.options",
    "EvaluateConfig": "bigsae.evaluation.options",
    "ExportConfig": "bigsae.hub.options",
    "PretokenizeConfig": "bigsae.pretokenizing.options",
    "ReportConfig": "bigsae.reporting.options",
    "evaluate_saes": "bigsae.evaluation.run",
    "export_run": "bigsae.hub.export",
    "fit": "bigsae.training.fit",
    "load_sae": "bigsae.hub.load",
    "open_activations": "bigsae.caching.read",
    "pretokenize_dataset": "bigsae.pretokenizing.run",
    "push_saes": "bigsae.hub.export",
    "splice": "bigsae.evaluation.splicing",
    "train_saes": "bigsae.training.run",
    "write_activations": "bigsae.caching.write",
    "write_report": "bigsae.reporting.write",
}

__all__ = [
    "BufferConfig",
    "CacheConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "EvaluateConfig",
    "ExportConfig",
    "HubConfig",
    "LMConfig",
    "MeshConfig",
    "OptimConfig",
    "PretokenizeConfig",
    "ReportConfig",
    "SAEConfig",
    "TrainConfig",
    "UserError",
    "WandbConfig",
    "evaluate_saes",
    "export_run",
    "fit",
    "load_sae",
    "open_activations",
    "pretokenize_dataset",
    "push_saes",
    "splice",
    "train_saes",
    "write_activations",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bigsae' has no attribute {name!r}")
