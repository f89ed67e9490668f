import importlib
import logging
import subprocess
import sys

import pytest
import torch

from bigsae.kernels import dispatch


@pytest.fixture(autouse=True)
def fresh_decision():
    dispatch._backend_of_type.cache_clear()
    yield
    dispatch._backend_of_type.cache_clear()


def test_cpu_is_torch_and_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="bigsae"):
        assert [dispatch.backend(torch.device("cpu")) for _ in range(3)] == ["torch"] * 3
    assert [r.getMessage() for r in caplog.records] == ["kernels on cpu: torch"]


def test_cuda_is_triton_where_it_can_be_imported(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert dispatch.backend(torch.device("cuda", 1)) == "triton"


def test_cuda_without_triton_warns_once(monkeypatch, caplog):
    def fail(name):
        raise ImportError("no triton here")

    monkeypatch.setattr(importlib, "import_module", fail)
    with caplog.at_level(logging.WARNING, logger="bigsae"):
        assert [dispatch.backend(torch.device("cuda", i)) for i in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1
    assert "no triton here" in caplog.text


def test_float64_stays_with_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "backend", lambda device: "triton")
    assert dispatch.use_triton(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not dispatch.use_triton(torch.zeros(1), torch.zeros(1, dtype=torch.float64))


def test_importing_the_kernels_loads_torch_alone():
    code = (
        "import sys, bigsae.kernels, bigsae.kernels.reference\n"
        "loaded = {m for m in sys.modules if m.startswith('bigsae.') and not m.startswith('bigsae.kernels')}\n"
        "assert loaded <= {'bigsae.config'}, loaded\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
