"""Launches of the kernels for prepared weights."""
from __future__ import annotations

import torch

from backends.operand import Nvfp4Tensor, PreparedOperand, round_up
from backends.problem import Fc2Problem
from backends.triton.few import fc2_few
from backends.triton.plan import finish, gather_tokens, list_tokens
from backends.triton.routed import fc2_routed
from backends.triton.tactic import CHUNK, PASS_TOKENS, TritonTactic, dense_tiling
from backends.triton.warpgroup import fc2_warpgroup, pack_activations

def run(
    problem: Fc2Problem,
    tactic: TritonTactic,
    a: Nvfp4Tensor,
    b: PreparedOperand,
    alpha: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Enqueue the kernels of form "few" or "gathered". Scratch memory comes from torch's allocator."""
    if tactic.form == "few":
        _few(problem, tactic, a, b, alpha, out)
        return
    for first in range(0, problem.m, PASS_TOKENS):
        rows = slice(first, first + PASS_TOKENS)  # a multiple of 128, so the swizzled scale factors split here too
        _gathered(problem, tactic, a.data[rows], a.scale[rows], a.layout == "128x4", b, alpha[rows], out[rows])


def _few(
    problem: Fc2Problem, tactic: TritonTactic, a: Nvfp4Tensor, b: PreparedOperand, alpha: torch.Tensor, out: torch.Tensor
) -> None:
    programs = -(-problem.n // tactic.block_n)
    lists = torch.empty((programs, problem.experts), dtype=torch.int32, device=out.device)
    fc2_few[(programs,)](
        a.data.view(torch.int32), a.scale, b.data.view(torch.int32), b.scale.view(torch.int32), alpha, out, lists,
        problem.m, problem.n,
        EXPERTS=problem.experts, INNER=problem.intermediate, A_SWIZZLED=a.layout == "128x4",
        BLOCKS=tactic.block_n // 32, GROUPS=tactic.num_warps // 4, DEPTH=tactic.num_stages, num_warps=tactic.num_warps,
    )  # fmt: skip


def _gathered(
    problem: Fc2Problem,
    tactic: TritonTactic,
    a_data: torch.Tensor,
    a_scale: torch.Tensor,
    a_swizzled: bool,
    b: PreparedOperand,
    alpha: torch.Tensor,
    out: torch.Tensor,
) -> None:
    tokens, hidden, experts, inner = out.shape[0], problem.n, problem.experts, problem.intermediate
    device = out.device
    wide = round_up(tokens, 16)
    padded = 1 << (experts - 1).bit_length()
    sets, width, rows = tactic.split, tactic.block_m, tactic.block_n
    strips = -(-hidden // rows)
    has_dense = problem.capability == (9, 0)
    # Launching a kernel while the one before runs (programmatic dependent launch). Every kernel launched so waits for
    # that one before it touches memory.
    overlap = problem.capability >= (9, 0)
    tiling = dense_tiling(tokens, hidden, problem.k)
    columns = tiling.token_tiles * tiling.tokens

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    words, weights, factors = a_data.view(torch.int32), b.data.view(torch.int32), b.scale.view(torch.int32)
    counts = scratch(experts, dtype=torch.int32)
    token_of = scratch(experts, wide, dtype=torch.int32)
    weight_of = scratch(experts, wide)
    alpha_t = scratch(experts, columns)
    gathered = scratch(experts, wide, inner // 2, dtype=torch.int32)
    lists = scratch(sets, strips, experts * -(-tokens // width), dtype=torch.int32)
    sums = scratch(sets, strips, tokens, rows)
    parts = scratch(tiling.tiles if has_dense else 0, tiling.slots, tiling.tokens, tiling.rows)
    packed = scratch(problem.k // 8 if has_dense else 0, columns, dtype=torch.int32)
    units = scratch(problem.k // 64 if has_dense else 0, columns, dtype=torch.int32)

    list_tokens[(experts,)](
        alpha, counts, token_of, weight_of, alpha_t, tokens, columns,
        EXPERTS=experts, BLOCK=128, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    gather_tokens[(experts, min(4, -(-tokens // 8)))](
        words, a_scale, counts, token_of, gathered, tokens,
        EXPERTS=experts, EXPERTS_PADDED=padded, INNER=inner, A_SWIZZLED=a_swizzled, ROWS=8, HAS_DENSE=has_dense,
        OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    fc2_routed[(strips, sets)](
        weights, factors, gathered, counts, token_of, weight_of, lists, sums, tokens, hidden,
        EXPERTS=experts, EXPERTS_PADDED=padded, INNER=inner, SETS=sets, WIDTH=width, WARPS=tactic.num_warps,
        HAS_DENSE=has_dense, OVERLAP=overlap, num_warps=tactic.num_warps, maxnreg=registers(tactic), launch_pdl=overlap,
    )  # fmt: skip
    if has_dense:
        pack_activations[(problem.k // 64, -(-columns // 128))](
            words, a_scale, counts, packed, units, tokens, columns,
            EXPERTS=experts, EXPERTS_PADDED=padded, INNER=inner, A_SWIZZLED=a_swizzled, TOKENS=tiling.tokens, num_warps=4,
        )  # fmt: skip
        fc2_warpgroup[(tiling.programs,)](
            packed, units, weights, factors, alpha_t, counts, parts, tokens, tiling.tiles, tiling.slots,
            round_up(hidden, 128) // 32,
            EXPERTS=experts, EXPERTS_PADDED=padded, INNER=inner, TOKENS=tiling.tokens, CONSUMERS=tiling.rows // 64,
            PRODUCERS=tiling.producers, STAGES=tiling.stages, COPY_STAGES=tiling.copy_stages, REGISTERS=tiling.registers,
            num_warps=4,
        )  # fmt: skip
    finish[(-(-hidden // 64), -(-tokens // 8))](
        sums, parts, counts, out, tokens, hidden, tiling.tiles, tiling.token_tiles, tiling.programs,
        EXPERTS=experts, EXPERTS_PADDED=padded, CHUNKS=problem.k // CHUNK, SETS=sets, TOKENS=tiling.tokens,
        SLOTS=tiling.slots, BLOCK=8, ROWS=rows, DENSE_ROWS=tiling.rows,
        HAS_DENSE=has_dense, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip


def registers(tactic: TritonTactic) -> int:
    """Register limit of the routed kernel: the most warps per multiprocessor without spills inside the loop."""
    return 128 if tactic.block_m == 16 else 80 if tactic.split > 5 else 96
