"""What an export is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class ExportConfig:
    """Publish the SAEs of a run on the Hub, or write them, in any format, to a folder, with a model card."""

    run: tyro.conf.Positional[str]
    """Folder of a run; or of SAEs, or of one, that bigsae, SAELens, sparsify or dictionary_learning wrote."""
    push_to_hub: str | None = None
    """Repository to push to, user/name; made where there is none. The access token is the environment's HF_TOKEN, or
    that of `hf auth login`."""
    output: str | None = None
    """Folder to write to, new or empty, instead of the Hub or beside it."""
    format: Literal["saelens", "sparsify", "dictionary_learning"] | None = None
    """Format of the SAEs. Default: saelens, and sparsify for TopK transcoders, which SAELens does not have."""
    private: bool = False
    """Make the repository private; one that is there and public is refused."""
    license: str = "unknown"
    """License of the SAEs, by the Hub's name for it, e.g. apache-2.0 or mit."""
    base_model: str | None = None
    """The language model's name on the Hub, where the run had it from a folder."""
    dataset: str | None = None
    """The dataset's name on the Hub, where the run had it from a folder."""
    message: str | None = None
    """Of the commit."""
