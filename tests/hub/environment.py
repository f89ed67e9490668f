"""What has a process talk to a Hub of the tests'."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants

from tests.hub.hub_server import TOKEN


def use_hub(patch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """The Hub is at `endpoint`, its cache in `home`: for this process and for those that it starts."""
    environment = {
        "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    for name, value in environment.items():
        patch.setenv(name, value)
    # huggingface_hub read them when it was imported.
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
    patch.setattr(constants, "HF_TOKEN_PATH", environment["HF_TOKEN_PATH"])
    patch.setattr(datasets_config, "HF_ENDPOINT", endpoint)
    patch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets_config, "HF_DATASETS_CACHE", home / "datasets")
