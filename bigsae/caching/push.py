"""Uploading a finished cache to the Hub, as a dataset repository."""

from __future__ import annotations

import logging
from pathlib import Path

from bigsae.data.cache_index import INDEX, Index, read_index
from bigsae.hub.dataset_repository import push_dataset
from bigsae.hub.files import write_atomic
from bigsae.hub.names import shown
from bigsae.hub.secrets import without_secrets

logger = logging.getLogger("bigsae")

_DATA = ("tokens/*.safetensors", "activations/*/*.safetensors")
_CARD = "README.md"


def push_cache(folder: Path, repository: str, *, private: bool = False) -> None:
    """Upload the cache in `folder` to the dataset `repository`, user/name. Raises UserError.

    Files that are there already are not sent again, so the same call goes on with an upload that broke off.
    """
    index = read_index(folder / INDEX)
    write_atomic(folder / _CARD, lambda path: path.write_text(card(index, repository)))
    address = push_dataset(folder, repository, private, _DATA, (INDEX, _CARD), "Activations")
    logger.info("%s lies at %s", folder, address)


def card(index: Index, repository: str) -> str:
    """The repository's README.md."""
    widths = "\n".join(f"| `{name}` | {d_in} |" for name, d_in in index.hookpoints.items())
    text = f"""---
tags:
- activations
- bigsae
---
# Activations of {shown(index.model)}

{index.num_activations:,} tokens of {shown(index.dataset)}, in rows of {index.ctx_len}, in {index.dtype};
{index.num_heldout_activations:,} of documents that are kept aside. Written by bigsae {index.bigsae_version}.

| hookpoint | d_in |
|---|---|
{widths}

```bash
python -m bigsae.train --activations {repository} --hookpoints {next(iter(index.hookpoints))} \\
    --sae.k 32 --tokens 1_000_000 --output-dir run
```

`index.json` names every file with its checksum. `activations/<hookpoint>/*.safetensors` hold `activations` [n, d_in];
`tokens/*.safetensors` the token rows they belong to: `input_ids` and `kept` [rows, ctx_len], `starts` [rows + 1].
"""
    return without_secrets(text)
