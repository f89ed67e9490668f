"""A Hub on this machine, for this process and for those that it starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _http

from tests.distributed.ranks import start_server
from tests.hub.environment import use_hub
from tests.hub.hub_server import Hub, serve


@pytest.fixture(scope="module")
def rank_server() -> None:
    """Ranks, for a test that comes to their server first: without the Hub that is set about each test."""
    start_server()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    """The Hub is a server of the test's, with an empty cache; the token is in the environment."""
    with serve() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "hf")
        # Its retries wait for seconds.
        unhurried = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=lambda seconds: None)
        monkeypatch.setattr(_http, "time", unhurried)
        yield server
        _http.close_session()
