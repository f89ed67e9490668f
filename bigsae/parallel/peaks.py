"""What a device can do at most: the makers' figures of dense matmuls, operations a second."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Of one device."""

    bf16: float
    """In bfloat16 and float16."""
    fp32: float
    """In float32, without TF32, as the SAE's matmuls are by default."""

    def of(self, dtype: str) -> float:
        """In a data type by its name."""
        return self.fp32 if dtype == "float32" else self.bf16


# NVIDIA's data sheets, SXM boards.
PEAKS = {
    "a100": Peak(312e12, 19.5e12),
    "h100": Peak(989e12, 67e12),
    "h200": Peak(989e12, 67e12),
    "b200": Peak(2250e12, 75e12),
}
# The same chips on cards of less power are slower, and have other names: A100 alone has one figure for all boards.
_NAMES = {
    "a100": r"A100",
    "h100": r"H100 80GB HBM3$",
    "h200": r"H200$",
    "b200": r"B200$",
}


def peak_of(device_name: str) -> Peak | None:
    """That of a GPU by the name that its driver gives it, e.g. "NVIDIA H100 80GB HBM3"; None where it is not known."""
    if "MIG" in device_name:  # a part of the card
        return None
    for key, name in _NAMES.items():
        if re.search(rf"\b{name}", device_name):
            return PEAKS[key]
    return None
