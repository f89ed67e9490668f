"""What a GPU can do: the makers' figures, and the part of them that a run is taken to reach.

These parts are assumptions, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigsae.parallel.peaks import PEAKS

Resource = Literal["compute", "memory bandwidth", "NVLink", "network"]

MATMUL_EFFICIENCY = 0.6
"""Part of the peak that matmuls reach."""
MEMORY_EFFICIENCY = 0.7
"""Part of the memory's bandwidth that streams and gathers of rows reach."""
LINK_EFFICIENCY = 0.7
"""Part of a link's bandwidth that collectives reach."""
USABLE_MEMORY = 0.92
"""Part of the memory that tensors can have: the rest is the driver's, NCCL's, and lost between blocks."""


@dataclass(frozen=True)
class GPU:
    """One rank's device. Bytes and operations a second; links count one direction."""

    memory_gib: float | None
    """None: not known."""
    bf16: float
    """Of dense matmuls in bfloat16, operations a second."""
    fp32: float
    """Of matmuls in float32, without TF32, as the SAE's are by default."""
    memory: float
    nvlink: float
    network: float
    """One GPU's share of its node's network."""
    gather: float | None = None
    """Of rows of a matrix read here and there. None: as of streams, which rows of some kilobytes reach on a GPU."""
    select: float | None = None
    """Pre-activations a second that a selection looks through, after their matmul. None: as fast as they are read."""
    fresh: float | None = None
    """Bytes a second of memory that the system gives anew. None: it is kept from step to step, as on CUDA."""


# NVIDIA's data sheets, SXM boards; eight 400 Gbit/s ports a node (A100: 200 Gbit/s). cpu: one core of a server.
GPUS = {
    "h100": GPU(80, PEAKS["h100"].bf16, PEAKS["h100"].fp32, 3.35e12, 450e9, 50e9),
    "h200": GPU(141, PEAKS["h200"].bf16, PEAKS["h200"].fp32, 4.8e12, 450e9, 50e9),
    "a100": GPU(80, PEAKS["a100"].bf16, PEAKS["a100"].fp32, 2.0e12, 300e9, 25e9),
    "b200": GPU(180, PEAKS["b200"].bf16, PEAKS["b200"].fp32, 7.7e12, 900e9, 50e9),
    "cpu": GPU(None, 0.1e12, 0.1e12, 10e9, 5e9, 1e9, gather=7e9, select=0.25e9, fresh=7e9),
}


def usable_bytes(gpu: GPU) -> int | None:
    """Bytes of a GPU that a run's tensors can have; None where that is not known."""
    return None if gpu.memory_gib is None else int(gpu.memory_gib * 2**30 * USABLE_MEMORY)


def seconds(
    gpu: GPU, matmul_dtype: str, flops: float, moved: float, gathered: float, nvlink: float, network: float
) -> dict[Resource, float]:
    """How long each resource is busy with so many operations and bytes; of the bytes `gathered` those of rows."""
    peak = gpu.fp32 if matmul_dtype == "float32" else gpu.bf16
    return {
        "compute": flops / (peak * MATMUL_EFFICIENCY),
        "memory bandwidth": (moved / gpu.memory + gathered / (gpu.gather or gpu.memory)) / MEMORY_EFFICIENCY,
        "NVLink": nvlink / (gpu.nvlink * LINK_EFFICIENCY),
        "network": network / (gpu.network * LINK_EFFICIENCY),
    }
