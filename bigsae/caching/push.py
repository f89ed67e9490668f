"""Uploading a finished cache to the Hub, as a dataset repository."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from bigsae.config import UserError
from bigsae.data.cache_index import INDEX, Index, read_index
from bigsae.hub.files import write_atomic

logger = logging.getLogger("bigsae")


def push_cache(folder: Path, repository: str, *, private: bool = False) -> None:
    """Upload the cache in `folder` to the dataset `repository`, user/name. Raises UserError.

    Files that are there already are not sent again, so an interrupted upload is begun anew by the same call.
    """
    index = read_index(folder / INDEX)
    write_atomic(folder / "README.md", lambda path: path.write_text(card(index, repository)))
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        # Sends a large folder in several commits, and goes on where an earlier call was interrupted.
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="dataset",
            allow_patterns=[INDEX, "README.md", "tokens/*.safetensors", "activations/*.safetensors"],
            commit_message="Activations",
        )
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--push-to-hub {repository}: {reason} (the cache in {folder} is whole: the same command with --resume "
            "uploads it)"
        ) from error
    logger.info("%s lies at %s", folder, repository)


def card(index: Index, repository: str) -> str:
    """The repository's README.md."""
    widths = "\n".join(f"| `{name}` | {d_in} |" for name, d_in in index.hookpoints.items())
    return f"""---
tags:
- activations
- bigsae
---
# Activations of {index.model}

{index.num_activations:,} tokens of {index.dataset}, in rows of {index.ctx_len}, in {index.dtype};
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
