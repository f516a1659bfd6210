"""Tactics of the Triton backend and the rules they obey; pure values, no triton import."""
from __future__ import annotations

from dataclasses import dataclass

from backends.interface import SUPPORTED, Support
from backends.operand import BLOCK
from backends.problem import OUT_DTYPES, Fc2Problem
from backends.tactic import Tactic

#: Programs that a default launch aims for: some four per multiprocessor of today's largest chips.
_TARGET_PROGRAMS = 512


@dataclass(frozen=True)
class TritonTactic(Tactic):
    """How the Triton backend runs.

    Attributes:
        form: "tiled" reads the operands as users have them, any shape.
        block_n: rows of B (columns of out) per program; the left side of the matrix instruction.
        block_m: tokens per program; the right side.
        block_k: values along K per step inside one expert; a larger step than the expert is masked.
        split: parts that the experts are divided into; part sums are added in order by a second kernel.
        num_warps: warps per program.
        num_stages: steps in flight in the compiler's software pipeline.
    """

    backend = "triton"
    form: str = "tiled"
    block_n: int = 64
    block_m: int = 16
    block_k: int = 128
    split: int = 1
    num_warps: int = 4
    num_stages: int = 3


def can_implement(problem: Fc2Problem, tactic: TritonTactic) -> Support:
    """Whether the tactic computes the problem correctly; the first broken rule is the reason."""
    if tactic.form != "tiled":
        return Support(False, f"form is {tactic.form!r}; it is 'tiled'")
    if "/" in problem.b_layout:
        owner = problem.b_layout.partition("/")[0]
        return Support(False, f"b was prepared for backend {owner!r}; pass the Nvfp4Tensor, or that backend's unprepare(b)")
    if problem.k % problem.experts or problem.intermediate % BLOCK:
        return Support(False, f"K / E = {problem.k}/{problem.experts} is not a multiple of {BLOCK}")
    if problem.out_dtype not in OUT_DTYPES.values():
        return Support(False, f"out_dtype {problem.out_dtype} is not one of {', '.join(OUT_DTYPES)}")
    for name in ("block_n", "block_m", "block_k"):
        value, low = getattr(tactic, name), 32 if name == "block_k" else 16
        if value < low or value & (value - 1):
            return Support(False, f"{name} is {value}; it takes a power of two, at least {low}")
    if not 1 <= tactic.split <= problem.experts:
        return Support(False, f"split is {tactic.split}; it takes 1 to {problem.experts}, the number of experts")
    if tactic.num_warps not in (1, 2, 4, 8):
        return Support(False, f"num_warps is {tactic.num_warps}; it takes 1, 2, 4 or 8")
    if tactic.num_stages < 1:
        return Support(False, f"num_stages is {tactic.num_stages}; it takes at least 1")
    return SUPPORTED


def default_tactic(problem: Fc2Problem) -> TritonTactic:
    """The tactic for a problem, from its shape alone."""
    block_m = min(64, max(16, _next_power_of_two(problem.m)))
    block_k = min(128, max(32, _next_power_of_two(problem.intermediate)))
    tiles = -(-problem.n // 64) * -(-problem.m // block_m)
    split = max(1, min(problem.experts, 32, _TARGET_PROGRAMS // tiles))
    return TritonTactic(block_m=block_m, block_k=block_k, split=split)


def tactics(problem: Fc2Problem) -> list[TritonTactic]:
    """The default and its neighbours, those that can be implemented, without repetition."""
    base = default_tactic(problem)
    grid = [base]
    for block_n, num_warps in ((64, 4), (128, 8)):
        for block_m in (16, 32, 64):
            for split in dict.fromkeys((1, base.split, min(problem.experts, 2 * base.split))):
                grid.append(TritonTactic("tiled", block_n, block_m, base.block_k, split, num_warps))
    return [t for t in dict.fromkeys(grid) if can_implement(problem, t)]


def _next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
