from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device whose dispatch can be tested here."""
    return torch.device(request.param)


@pytest.fixture
def triton_device() -> torch.device:
    """Where Triton launchers take their tensors: the GPU, else the interpreter's CPU."""
    pytest.importorskip("triton")
    return torch.device(DEVICES[-1])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_values() -> Callable[..., Tensor]:
    """make_values(kind, batch, d_sae, dtype): rows to select from; most kinds are full of ties."""

    def make(kind: str, batch: int, d_sae: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(batch, d_sae)
        if kind == "levels":
            values = (values * 2).round()
        elif kind == "equal":
            values = torch.randn(batch, 1).expand(batch, d_sae).clone()
        elif kind == "zeros":
            values = torch.where(values > 0, 0.0, -0.0)
        elif kind == "negative":
            values = -(values.abs() * 4).round() - 1
        elif kind == "infinite":
            values = torch.where(values.abs() < 0.3, values, values * float("inf"))
        return values.to(dtype)

    return make


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN (integers: 3), so that reading what no kernel wrote shows."""
    empty = torch.empty

    def poisoned_empty(*args: object, **kwargs: object) -> Tensor:
        out = empty(*args, **kwargs)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return out.fill_(float("nan") if out.is_floating_point() else 3)

    monkeypatch.setattr(torch, "empty", poisoned_empty)
