"""Compiling the backend's kernels for a chip that is not there: for tests and for reading machine code."""
from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

from backends.problem import Fc2Problem
from backends.triton import few, plan, prepared, routed, tiled, warpgroup
from backends.triton.tactic import CHUNK, TritonTactic, dense_tiling

_TRITON_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BYTES, _WORDS, _FLOATS = "*u8", "*i32", "*fp32"


def compile_for(problem: Fc2Problem, tactic: TritonTactic, capability: tuple[int, int]) -> dict[str, CompiledKernel]:
    """The kernels a tactic launches, by name, compiled for `capability` as at a launch with aligned operands.

    Needs no GPU: `CompiledKernel.asm` holds "ptx" and "cubin".
    """
    return {"tiled": _tiled, "few": _few, "gathered": _gathered}[tactic.form](problem, tactic, capability)


def _tiled(problem: Fc2Problem, tactic: TritonTactic, capability: tuple[int, int]) -> dict[str, CompiledKernel]:
    out = "*" + _TRITON_TYPE[problem.out_dtype]
    kernels = {
        "fc2_tiled": compile_kernel(
            tiled.fc2_tiled, capability,
            dict(a_data=_BYTES, a_scale=_BYTES, b_data=_BYTES, b_scale=_BYTES, alpha=_FLOATS,
                 out=out if tactic.split == 1 else _FLOATS, tokens="i32", hidden="i32"),
            dict(EXPERTS=problem.experts, INNER=problem.intermediate, A_SWIZZLED=problem.a_layout == "128x4",
                 B_SWIZZLED=problem.b_layout == "128x4", BLOCK_N=tactic.block_n, BLOCK_M=tactic.block_m,
                 BLOCK_K=tactic.block_k, SPLIT=tactic.split),
            num_warps=tactic.num_warps, num_stages=tactic.num_stages,
        )
    }  # fmt: skip
    if tactic.split > 1:
        kernels["sum_parts"] = compile_kernel(
            tiled.sum_parts, capability, dict(parts=_FLOATS, out=out, numel="i32"), dict(SPLIT=tactic.split, BLOCK=1024)
        )
    return kernels


def _few(problem: Fc2Problem, tactic: TritonTactic, capability: tuple[int, int]) -> dict[str, CompiledKernel]:
    return {
        "fc2_few": compile_kernel(
            few.fc2_few, capability,
            dict(a_data=_WORDS, a_scale=_BYTES, w_data=_WORDS, w_scale=_WORDS, alpha=_FLOATS,
                 out="*" + _TRITON_TYPE[problem.out_dtype], lists=_WORDS, tokens="i32", hidden="i32"),
            dict(EXPERTS=problem.experts, INNER=problem.intermediate, A_SWIZZLED=problem.a_layout == "128x4",
                 BLOCKS=tactic.block_n // 32, GROUPS=tactic.num_warps // 4, DEPTH=tactic.num_stages),
            num_warps=tactic.num_warps,
        )
    }  # fmt: skip


def _gathered(problem: Fc2Problem, tactic: TritonTactic, capability: tuple[int, int]) -> dict[str, CompiledKernel]:
    has_dense = capability == (9, 0)
    overlap = capability >= (9, 0)
    experts = dict(EXPERTS=problem.experts, EXPERTS_PADDED=1 << (problem.experts - 1).bit_length())
    swizzled = problem.a_layout == "128x4"
    tiling = dense_tiling(problem.m, problem.n, problem.k)
    kernels = {
        "list_tokens": compile_kernel(
            plan.list_tokens, capability,
            dict(alpha=_FLOATS, counts=_WORDS, token_of=_WORDS, weight_of=_FLOATS, alpha_t=_FLOATS, tokens="i32",
                 columns="i32"),
            dict(EXPERTS=problem.experts, BLOCK=128, OVERLAP=overlap),
            launch_pdl=overlap,
        ),
        "gather_tokens": compile_kernel(
            plan.gather_tokens, capability,
            dict(a_data=_WORDS, a_scale=_BYTES, counts=_WORDS, token_of=_WORDS, gathered=_WORDS, tokens="i32"),
            dict(**experts, INNER=problem.intermediate, A_SWIZZLED=swizzled, ROWS=8, HAS_DENSE=has_dense,
                 OVERLAP=overlap),
            launch_pdl=overlap,
        ),
        "fc2_routed": compile_kernel(
            routed.fc2_routed, capability,
            dict(w_data=_WORDS, w_scale=_WORDS, gathered=_WORDS, counts=_WORDS, token_of=_WORDS, weight_of=_FLOATS,
                 lists=_WORDS, sums=_FLOATS, tokens="i32", hidden="i32"),
            dict(**experts, INNER=problem.intermediate, SETS=tactic.split, WIDTH=tactic.block_m, WARPS=tactic.num_warps,
                 HAS_DENSE=has_dense, OVERLAP=overlap),
            num_warps=tactic.num_warps, maxnreg=prepared.registers(tactic), launch_pdl=overlap,
        ),
        "finish": compile_kernel(
            plan.finish, capability,
            dict(sums=_FLOATS, parts=_FLOATS, counts=_WORDS, out="*" + _TRITON_TYPE[problem.out_dtype], tokens="i32",
                 hidden="i32", tiles="i32", token_tiles="i32", programs="i32"),
            dict(**experts, CHUNKS=problem.k // CHUNK, SETS=tactic.split, TOKENS=tiling.tokens, SLOTS=tiling.slots, BLOCK=8,
                 ROWS=tactic.block_n, DENSE_ROWS=tiling.rows, HAS_DENSE=has_dense, OVERLAP=overlap),
            launch_pdl=overlap,
        ),
    }  # fmt: skip
    if has_dense:
        kernels["pack_activations"] = compile_kernel(
            warpgroup.pack_activations, capability,
            dict(a_data=_WORDS, a_scale=_BYTES, counts=_WORDS, packed=_WORDS, units=_WORDS, tokens="i32", columns="i32"),
            dict(**experts, INNER=problem.intermediate, A_SWIZZLED=swizzled, TOKENS=tiling.tokens),
        )  # fmt: skip
        kernels["fc2_warpgroup"] = compile_kernel(
            warpgroup.fc2_warpgroup, capability,
            dict(packed=_WORDS, units=_WORDS, w_data=_WORDS, w_scale=_WORDS, alpha_t=_FLOATS, counts=_WORDS, parts=_FLOATS,
                 tokens="i32", tiles="i32", slots="i32", blocks="i32"),
            dict(**experts, INNER=problem.intermediate, TOKENS=tiling.tokens, CONSUMERS=tiling.rows // 64,
                 PRODUCERS=tiling.producers, STAGES=tiling.stages, COPY_STAGES=tiling.copy_stages, REGISTERS=tiling.registers),
        )  # fmt: skip
    return kernels


def compile_kernel(
    fn: object, capability: tuple[int, int], arguments: dict[str, str], constants: dict[str, object], **options: int
) -> CompiledKernel:
    """One kernel, with pointers known to be 16-byte aligned, and `hidden` and `columns` to be multiples of 16."""
    signature = {name: arguments.get(name, "constexpr") for name in fn.arg_names}
    aligned = {name for name, kind in arguments.items() if kind.startswith("*") or name in ("hidden", "columns")}
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source_type = GluonASTSource if fn.is_gluon() else ASTSource
    source = source_type(fn, signature, {(fn.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(source, target=target, options=options)
