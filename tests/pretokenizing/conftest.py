from __future__ import annotations

import datasets
import pytest

from tests.pretokenizing.corpus import make_home


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="package", autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
