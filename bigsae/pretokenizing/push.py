"""A whole folder of tokens to the Hub, and its dataset card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigsae.data.origin import ORIGIN_FILE
from bigsae.hub.dataset_repository import push_dataset
from bigsae.hub.names import shown
from bigsae.hub.secrets import without_secrets

CARD = "README.md"


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload `folder` to the dataset `repository`, user/name; its address. Raises UserError.

    Files that are there already are not sent again, so the same call goes on with an upload that broke off.
    """
    return push_dataset(folder, repository, private, ("data/*.parquet",), (ORIGIN_FILE, CARD), "Token rows")


def card(origin: dict[str, Any]) -> str:
    """README.md of the folder, for the sae_lens.json that holds `origin`."""
    counts = origin["bigsae"]["counts"]
    text = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
tags:
- bigsae
- saelens
- pretokenized
---

# Rows of tokens

{counts["num_rows"]:,} rows of {origin["context_size"]} token ids (column `input_ids`), made by `bigsae.pretokenize`
from {counts["num_documents"]:,} documents of {shown(origin["original_dataset"])}
with the tokenizer of {shown(origin["tokenizer_name"])}. How, stands in `{ORIGIN_FILE}`.
"""
    return without_secrets(text)
