"""Kernels of the SAE step: one file per op, `reference` the oracle, `*_triton` loaded only where CUDA is."""

from bigsae.kernels.decode import sparse_decode
from bigsae.kernels.dispatch import backend
from bigsae.kernels.encode import topk_encode
from bigsae.kernels.sparse_grad import LatentMajor
from bigsae.kernels.topk import select_topk

__all__ = ["LatentMajor", "backend", "select_topk", "sparse_decode", "topk_encode"]
