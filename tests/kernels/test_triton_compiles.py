"""Every Triton kernel compiles to machine code for a GPU, also where there is none.

The interpreter runs the kernels as Python; only the compiler sees that types do not fit. It runs in a process of its
own, since here the kernels may have been decorated for the interpreter.
"""

import os
import subprocess
import sys

import pytest

COMPILE_ALL = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bigsae.kernels import decode_triton, ragged_triton, sparse_grad_triton, topk_triton


def compile_kernel(kernel, constants, **pointers):
    # Arguments that are neither pointers nor constants are sizes, but for one.
    signature = {name: "i32" for name in kernel.arg_names} | {n: "*" + t for n, t in pointers.items()}
    signature |= {name: "fp32" for name in kernel.arg_names if name == "bandwidth"}
    signature |= {name: "constexpr" for name in constants}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print(kernel.__module__ + kernel.__name__)


for t in ("fp32", "bf16"):
    # Triton makes a constant of an argument that equals 1: hence k=1 and d_in=1.
    select = dict(HAS_MASK=True, TILE=64) if t == "fp32" else dict(HAS_MASK=False, TILE=64, k=1)
    compile_kernel(topk_triton._tile_maxima_kernel, dict(HAS_MASK=t == "fp32", TILE=64, TILES=32),
                   values_ptr=t, mask_ptr="u8", maxima_ptr="i32")
    for source in ("maxima", "tiles", "values"):
        compile_kernel(topk_triton._select_row_kernel, dict(select, SOURCE=source, BLOCK=1024), values_ptr=t,
                       mask_ptr="u8", maxima_ptr="i32", tiles_ptr="i64", out_values_ptr=t, out_indices_ptr="i64")
    blocks = dict(BLOCK_K=8, BLOCK_D=128)
    compile_kernel(decode_triton._gather_sum_kernel, blocks, coefficients_ptr=t, indices_ptr="i64", weight_ptr="fp32",
                   out_ptr="fp32")
    compile_kernel(decode_triton._gather_dot_kernel, blocks, dense_ptr=t, weight_ptr=t, indices_ptr="i64", out_ptr=t)
    for chunks in (dict(CHUNK=128, BLOCK_N=8, BLOCK_D=512), dict(CHUNK=128, BLOCK_N=8, BLOCK_D=1, d_in=1)):
        pairs = dict(tokens_ptr="i64", coefficients_ptr=t, dense_ptr=t, partial_ptr="fp32")
        compile_kernel(sparse_grad_triton._whole_chunks_kernel, chunks, latents_ptr="i32", **pairs)
        compile_kernel(sparse_grad_triton._latent_rows_kernel, chunks, crow_ptr="i64", out_ptr=t, **pairs)
    ones = [] if t == "fp32" else ["d_sae", "capacity", "num_jobs", "d_in", "n"]

    def compile_ragged(name, constants, **pointers):
        kernel = getattr(ragged_triton, name)
        compile_kernel(kernel, constants | {n: 1 for n in ones if n in kernel.arg_names}, **pointers)

    for latents in ("i32", "i64"):
        compile_ragged("_find_above_kernel", dict(TILE=2048, TILES=4), pre_acts_ptr=t, bound_ptr="fp32",
                       starts_ptr="i64", values_ptr=t, latents_ptr=latents, counts_ptr="i32")
    compile_ragged("_compact_slots_kernel", dict(JOBS=16, BLOCK=32), slot_values_ptr=t, slot_latents_ptr="i32",
                   counts_ptr="i32", starts_ptr="i64", values_ptr=t, latents_ptr="i64")
    rows = dict(latents_ptr="i64", crow_ptr="i64", weight_ptr="fp32", out_ptr=t)
    compile_ragged("_gather_sum_kernel", dict(BLOCK_K=256, BLOCK_D=1) if ones else dict(BLOCK_K=8, BLOCK_D=512),
                   coefficients_ptr=t, **rows)
    compile_ragged("_gather_dot_kernel", dict(BLOCK_K=32, BLOCK_D=128), dense_ptr=t, **rows)
    pairs = dict(pre_acts_ptr=t, latents_ptr="i64", threshold_ptr="fp32")
    compile_ragged("_jumprelu_forward_kernel", dict(BLOCK=1024), acts_ptr=t, active_ptr="fp32", **pairs)
    compile_ragged("_jumprelu_backward_kernel", dict(BLOCK=1024), g_acts_ptr=t, g_active_ptr="fp32", d_pre_ptr=t,
                   d_threshold_ptr="fp32", **pairs)
"""


def test_every_kernel_compiles_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_ALL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 12
