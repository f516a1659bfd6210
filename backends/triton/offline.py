"""Compiling the backend's kernels for a chip that is not there: for tests and for reading machine code."""
from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from backends.problem import Fc2Problem
from backends.triton import tiled
from backends.triton.tactic import TritonTactic

_TRITON_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_for(problem: Fc2Problem, tactic: TritonTactic, capability: tuple[int, int]) -> dict[str, CompiledKernel]:
    """The kernels a tactic launches, by name, compiled for `capability` as at a launch with aligned operands.

    Needs no GPU: `CompiledKernel.asm` holds "ptx" and "cubin".
    """
    sums = "*" + (_TRITON_TYPE[problem.out_dtype] if tactic.split == 1 else "fp32")
    pointers = {"a_data": "*u8", "a_scale": "*u8", "b_data": "*u8", "b_scale": "*u8", "alpha": "*fp32", "out": sums}
    constants = dict(
        EXPERTS=problem.experts, INNER=problem.intermediate,
        A_SWIZZLED=problem.a_layout == "128x4", B_SWIZZLED=problem.b_layout == "128x4",
        BLOCK_N=tactic.block_n, BLOCK_M=tactic.block_m, BLOCK_K=tactic.block_k, SPLIT=tactic.split,
    )  # fmt: skip
    options = {"num_warps": tactic.num_warps, "num_stages": tactic.num_stages}
    hidden_aligned = problem.n % 16 == 0
    kernels = {
        "fc2_tiled": _compile(
            tiled.fc2_tiled, {**pointers, "tokens": "i32", "hidden": "i32"}, constants,
            {*pointers} | ({"hidden"} if hidden_aligned else set()), capability, options,
        )  # fmt: skip
    }
    if tactic.split > 1:
        kernels["sum_parts"] = _compile(
            tiled.sum_parts, {"parts": "*fp32", "out": "*" + _TRITON_TYPE[problem.out_dtype], "numel": "i32"},
            {"SPLIT": tactic.split, "BLOCK": 1024}, {"parts", "out"}, capability, {},
        )  # fmt: skip
    return kernels


def _compile(
    fn: object,
    signature: dict[str, str],
    constants: dict[str, object],
    aligned: set[str],
    capability: tuple[int, int],
    options: dict[str, int],
) -> CompiledKernel:
    full = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn, full, {(fn.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=options)
