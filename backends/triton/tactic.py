"""Tactics of the Triton backend and the rules they obey; pure values, no triton import."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from backends.interface import SUPPORTED, Support
from backends.operand import BLOCK
from backends.problem import OUT_DTYPES, Fc2Problem
from backends.tactic import Tactic

#: `Fc2Problem.b_layout` of weights that this backend's `prepare` made.
PREPARED = "triton/fragments"
#: Values of K that the kernels for prepared weights take at a time; an expert is a multiple of it.
CHUNK = 256
#: Most tokens of the "few" form: the width of the tensor core instruction it uses.
FEW_TOKENS = 8

#: Programs that a default launch of the tiled form aims for: some four per multiprocessor of today's largest chips.
_TARGET_PROGRAMS = 512
_MAX_SPLIT = 32
#: block_n, block_m, split of the "gathered" tactics that were best at some number of tokens.
_GATHERED = ((64, 8, 4), (64, 8, 5), (64, 8, 7), (64, 16, 3), (64, 16, 4), (128, 16, 4))


@dataclass(frozen=True)
class TritonTactic(Tactic):
    """How the Triton backend runs.

    Attributes:
        form: "tiled" reads the operands as users have them, any shape. The others read prepared weights: "few" is one
            kernel for up to 8 tokens; "gathered" takes any number, and on the device, from alpha, the way that suits it:
            each expert with only the tokens that selected it, or (SM 9.0, alpha more than a quarter nonzero) all with all.
        block_n: rows of B (columns of out) per program; the left side of the matrix instruction.
        block_m: tokens per program, in the "gathered" form of one expert at a time; the right side.
        block_k: values along K per step inside one expert; a larger step than the expert is masked.
        split: "tiled" and "gathered": parts that the experts are divided into, added in order by a last kernel.
        num_warps: warps per program.
        num_stages: steps in flight: in the compiler's pipeline ("tiled"), or in registers ("few" and "gathered").
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
    rules = {"tiled": _tiled, "few": _few, "gathered": _gathered}.get(tactic.form)
    if rules is None:
        return Support(False, f"form is {tactic.form!r}; it is 'tiled', 'few' or 'gathered'")
    if problem.k % problem.experts or problem.intermediate % BLOCK:
        return Support(False, f"K / E = {problem.k}/{problem.experts} is not a multiple of {BLOCK}")
    if problem.out_dtype not in OUT_DTYPES.values():
        return Support(False, f"out_dtype {problem.out_dtype} is not one of {', '.join(OUT_DTYPES)}")
    return rules(problem, tactic)


def _tiled(problem: Fc2Problem, tactic: TritonTactic) -> Support:
    if "/" in problem.b_layout:
        owner = problem.b_layout.partition("/")[0]
        return Support(
            False,
            f"form 'tiled' reads plain weights and b was prepared for backend {owner!r}; "
            "pass the Nvfp4Tensor, or that backend's unprepare(b)",
        )
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


def _prepared(problem: Fc2Problem, tactic: TritonTactic) -> Support:
    """What the forms for prepared weights have in common."""
    if problem.b_layout != PREPARED:
        return Support(False, f"form {tactic.form!r} reads weights from prepare(b), and b has layout {problem.b_layout!r}")
    if problem.device_type != "cuda":
        return Support(False, f"form {tactic.form!r} is machine code for NVIDIA GPUs, and the operands are on {problem.device_type!r}")
    if problem.intermediate % CHUNK:
        return Support(
            False,
            f"K / E is {problem.intermediate}; prepared weights take multiples of {CHUNK}: pass the Nvfp4Tensor, unprepare(b)",
        )
    if tactic.block_k != CHUNK:
        return Support(False, f"block_k is {tactic.block_k}; form {tactic.form!r} takes {CHUNK}")
    return SUPPORTED


def _few(problem: Fc2Problem, tactic: TritonTactic) -> Support:
    common = _prepared(problem, tactic)
    if not common:
        return common
    if problem.m > FEW_TOKENS:
        return Support(False, f"M is {problem.m}; form 'few' takes up to {FEW_TOKENS} tokens")
    if (tactic.block_m, tactic.split) != (FEW_TOKENS, 1):
        return Support(False, f"block_m, split are {tactic.block_m}, {tactic.split}; form 'few' takes {FEW_TOKENS}, 1")
    if tactic.block_n not in (32, 64):
        return Support(False, f"block_n is {tactic.block_n}; form 'few' takes 32 or 64")
    if tactic.num_warps not in (4, 8, 16):
        return Support(False, f"num_warps is {tactic.num_warps}; form 'few' takes 4, 8 or 16")
    if not 1 <= tactic.num_stages <= 4:
        return Support(False, f"num_stages is {tactic.num_stages}; form 'few' takes 1 to 4")
    return SUPPORTED


def _gathered(problem: Fc2Problem, tactic: TritonTactic) -> Support:
    common = _prepared(problem, tactic)
    if not common:
        return common
    if (tactic.block_n, tactic.num_warps) not in ((64, 4), (128, 8)):
        return Support(False, f"block_n, num_warps are {tactic.block_n}, {tactic.num_warps}; form 'gathered' takes 64, 4 or 128, 8")
    if tactic.block_m not in (8, 16):
        return Support(False, f"block_m is {tactic.block_m}; form 'gathered' takes 8 or 16")
    if not 1 <= tactic.split <= 8:
        return Support(False, f"split is {tactic.split}; form 'gathered' takes 1 to 8")
    if tactic.num_stages != 1:
        return Support(False, f"num_stages is {tactic.num_stages}; form 'gathered' takes 1")
    return SUPPORTED


class DenseTiling(NamedTuple):
    """How the dense kernel of form "gathered" divides a call: see `warpgroup.fc2_warpgroup`."""

    tokens: int  # per tile
    rows: int  # of B per tile: 64 for each group of 4 warps that multiplies
    token_tiles: int
    tiles: int
    programs: int
    slots: int  # most programs that share a tile
    producers: int  # groups of 4 warps that decode activations
    stages: int  # chunks of decoded activations in shared memory
    copy_stages: int  # chunks of weights and packed activations in shared memory
    registers: int  # of a thread that multiplies


#: Tokens per pass of the "gathered" form: bounds its scratch memory (at most 0.2 GB at N = 7168, K = 65536).
PASS_TOKENS = 512
# Tokens per tile of the dense kernel -> rows, producers, stages, copy_stages, registers: the best measured of those that
# shared memory (227 KB) and 65,536 registers hold without spills.
_DENSE = {16: (256, 1, 2, 5, 104), 32: (256, 1, 2, 4, 104), 64: (128, 2, 2, 5, 168), 128: (128, 2, 1, 4, 200)}
# Programs of the dense kernel: one per multiprocessor of an H100 or H200. They decide the order of additions, hence a
# constant and not a property of the device.
_DENSE_PROGRAMS = 132


def dense_tiling(tokens: int, hidden: int, k: int) -> DenseTiling:
    """The tiling for one pass of up to `PASS_TOKENS` tokens."""
    width = min(128, max(16, _next_power_of_two(tokens)))
    rows, *resources = _DENSE[width]
    token_tiles = -(-tokens // width)
    tiles = -(-hidden // rows) * token_tiles
    programs = min(_DENSE_PROGRAMS, tiles * (k // CHUNK))
    return DenseTiling(width, rows, token_tiles, tiles, programs, -(-programs // tiles) + 1, *resources)


def specialization(problem: Fc2Problem, tactic: TritonTactic) -> tuple:
    """Everything that selects compiled kernels. Token counts that need the same kernels give equal values."""
    passes: set = set()
    if tactic.form == "gathered":
        last = problem.m % PASS_TOKENS
        sizes = [PASS_TOKENS] * (problem.m >= PASS_TOKENS) + [last] * (last > 0)
        tilings = (dense_tiling(size, problem.n, problem.k) for size in sizes)
        passes = {(t.tokens, t.slots) for t in tilings}
    layouts = (problem.out_dtype, problem.a_layout, problem.b_layout)
    return (tactic, problem.n, problem.k, problem.experts, *layouts, frozenset(passes))


def default_tactic(problem: Fc2Problem) -> TritonTactic:
    """The tactic for a problem, from its shape alone. The numbers were measured on an H200 in November 2026."""
    if problem.b_layout == PREPARED and problem.m <= FEW_TOKENS:
        return TritonTactic("few", 64, FEW_TOKENS, CHUNK, 1, num_warps=16, num_stages=2)
    if problem.b_layout == PREPARED:
        if problem.m <= 128:
            return TritonTactic("gathered", 64, 8, CHUNK, split=7, num_warps=4, num_stages=1)
        if problem.m <= 256:
            return TritonTactic("gathered", 128, 16, CHUNK, split=4, num_warps=8, num_stages=1)
        return TritonTactic("gathered", 64, 16, CHUNK, split=3, num_warps=4, num_stages=1)
    block_m = min(64, max(16, _next_power_of_two(problem.m)))
    block_k = min(128, max(32, _next_power_of_two(problem.intermediate)))
    tiles = -(-problem.n // 64) * -(-problem.m // block_m)
    split = max(1, min(problem.experts, _MAX_SPLIT, _TARGET_PROGRAMS // tiles))
    return TritonTactic(block_m=block_m, block_k=block_k, split=split)


def tactics(problem: Fc2Problem) -> list[TritonTactic]:
    """The default and its neighbours, those that can be implemented, without repetition."""
    base = default_tactic(problem)
    grid = [base]
    if problem.b_layout == PREPARED:
        for block_n, num_warps, num_stages in ((64, 16, 1), (32, 8, 4)):
            grid.append(TritonTactic("few", block_n, FEW_TOKENS, CHUNK, 1, num_warps, num_stages))
        for block_n, block_m, split in _GATHERED:
            grid.append(TritonTactic("gathered", block_n, block_m, CHUNK, split, block_n // 16, 1))
    else:
        for block_n, num_warps in ((64, 4), (128, 8)):
            for block_m in (16, 32, 64):
                grid.append(TritonTactic("tiled", block_n, block_m, base.block_k, base.split, num_warps))
        grid.append(replace(base, split=1))
    return [t for t in dict.fromkeys(grid) if can_implement(problem, t)]


def _next_power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()
