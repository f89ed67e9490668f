"""Which implementation of the kernels a device gets: decided once per device type, and logged once."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]

logger = logging.getLogger("bigsae")

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _backend_of_type(device_type: str) -> Backend:
    chosen: Backend = "torch"
    if device_type == "cuda":
        try:
            importlib.import_module("triton")
            chosen = "triton"
        except ImportError as error:
            logger.warning(
                "triton cannot be imported (%s): the kernels on CUDA fall back to torch's own ops, which are much "
                "slower and need more memory. Install triton to get the fast path.",
                error,
            )
    logger.info("kernels on %s: %s", device_type, chosen)
    return chosen


def backend(device: torch.device) -> Backend:
    """Returns "triton" for CUDA devices where triton can be imported, else "torch"."""
    return _backend_of_type(device.type)


def use_triton(*tensors: Tensor) -> bool:
    """Whether an op on these tensors runs in Triton: they lie on such a device, and none is float64.

    The Triton kernels accumulate in float32, so float64 inputs (gradient checks) keep torch's ops everywhere.
    """
    return backend(tensors[0].device) == "triton" and all(t.dtype != torch.float64 for t in tensors)


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Have a launcher run with its tensors' device as the current one, which is where Triton launches kernels."""

    @functools.wraps(launch)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device_of(tensor):
            return launch(*args, **kwargs)

    return wrapper
