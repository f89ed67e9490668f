"""Kernels of the SAE step: one file per op, `reference` the oracle, `*_triton` loaded only where CUDA is."""

from bigsae.kernels.batchtopk import batchtopk_encode
from bigsae.kernels.decode import sparse_decode
from bigsae.kernels.dispatch import backend
from bigsae.kernels.encode import topk_encode
from bigsae.kernels.global_topk import select_global
from bigsae.kernels.pairs import DensePairs, RaggedPairs
from bigsae.kernels.sparse_grad import LatentMajor
from bigsae.kernels.topk import select_topk

__all__ = [
    "DensePairs", "LatentMajor", "RaggedPairs", "backend", "batchtopk_encode", "select_global", "select_topk",
    "sparse_decode", "topk_encode",
]  # fmt: skip
