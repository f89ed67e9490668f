"""Which implementation of the kernels a device gets: decided once per device type, and logged once."""

import functools
import importlib
import logging
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]

logger = logging.getLogger("bigsae")


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
