"""A Hub on this machine, for this process and for those that it starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.hub.hub_server import TOKEN, Hub, serve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    """The Hub is a server of the test's, with an empty cache; the token is in the environment."""
    with serve() as server:
        environment = {
            "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # huggingface_hub read them when it was imported.
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", environment["HF_TOKEN_PATH"])
        monkeypatch.setattr(datasets_config, "HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
        # Its retries wait for seconds.
        unhurried = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=lambda seconds: None)
        monkeypatch.setattr(_http, "time", unhurried)
        yield server
        _http.close_session()
