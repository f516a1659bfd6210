"""Tactics of the Hopper backend and the rules they obey; pure values, no cutlass and no triton import."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from backends.hopper.dense_plan import STREAM_TOKENS, DenseKernelTile, kernel_tile
from backends.hopper.stream_plan import BLOCK_ROWS, SMEM_BYTES, StreamConfig
from backends.interface import SUPPORTED, Support
from backends.problem import OUT_DTYPES, Fc2Problem, dtype_name
from backends.tactic import Tactic
from backends.triton.tactic import CHUNK, PREPARED


class ListConfig(NamedTuple):
    """What selects the kernel that lists tokens."""

    a_swizzled: bool  # A's scale factors are in the "128x4" layout, else linear


#: What selects a compiled kernel of the DSL.
KernelConfig = ListConfig | StreamConfig | DenseKernelTile
CAPABILITY = (9, 0)
#: Tokens per pass: what the sums of a strip of 64 rows may fill of shared memory.
PASS_TOKENS = 512
# Numbers of tokens that streaming kernels are compiled for, each with its own passes and order (`StreamConfig`); of them only
# the sums of 512 leave less room than `_MOST_BLOCKS` take.
_CAPACITIES = (STREAM_TOKENS, 256, 384, 512)
# Most weights in shared memory, in blocks of 32 rows of an item: 54 KB, six stages of 64 rows. What is free in the ring has been
# asked for, and too much of it makes memory slower: with 14 to 16 stages M = 8, 16, 32, 64 and 128 took 30, 46, 69, 91 and 96 us
# instead of 26, 42, 65, 84 and 94, with 4 up to 2% more (H100, 2026-11-26).
_MOST_BLOCKS = 12
# What M = 512 has room for with seven items in work; with two, M = 448 took 13% more than with three (H100, 2026-11-26).
_MIN_STAGES = 3
# Warps that multiply; with the two that copy, four per scheduler, which leaves each thread 128 registers.
_MAX_CONSUMERS = 14
#: The table of selected experts holds an expert in 16 bits.
_MAX_EXPERTS = 1 << 15


@dataclass(frozen=True)
class HopperTactic(Tactic):
    """How the streaming kernel runs; the dense one follows from the problem (`dense_plan.dense_tiling`).

    Attributes:
        rows: of B per CTA, 32 or 64.
        phases: items (an expert's 256 values of K) in work at once, each by one warp per 32 rows.
        slots: groups of 8 tokens of activations in shared memory. Weights take what is left, up to 54 KB.
        cluster: CTAs with neighbouring rows that share every copy of activations, 1 or 2.
        helpers: multiprocessors that no strip of rows needs take a share of every strip's items even where they are few
            (`stream_plan.division`).
    """

    backend = "hopper"
    rows: int = 64
    phases: int = 4
    slots: int = 12
    cluster: int = 1
    helpers: bool = False

    def __str__(self) -> str:
        """Without a cluster of one and helpers that are not: the models of tables made before them know tactics by this text."""
        return super().__str__().replace(",helpers=False)", ")").replace(",cluster=1)", ")")


def can_implement(problem: Fc2Problem, tactic: HopperTactic) -> Support:
    """Whether the tactic computes the problem correctly; the first broken rule is the reason."""
    if problem.b_layout != PREPARED:
        return Support(False, f"it reads weights from prepare(b), and b has layout {problem.b_layout!r}")
    if problem.device_type != "cuda" or problem.capability != CAPABILITY:
        return Support(False, "its kernels are machine code for SM 9.0 (H100, H200)")
    if problem.k % problem.experts or problem.intermediate % CHUNK:
        return Support(False, f"K / E = {problem.k}/{problem.experts} is not a multiple of {CHUNK}")
    if problem.out_dtype not in OUT_DTYPES.values():
        return Support(False, f"out_dtype {problem.out_dtype} is not one of {', '.join(OUT_DTYPES)}")
    if problem.experts > _MAX_EXPERTS:
        return Support(False, f"E is {problem.experts}; the table of experts takes up to {_MAX_EXPERTS}")
    if tactic.rows not in (32, 64):
        return Support(False, f"rows is {tactic.rows}; it takes 32 or 64")
    most = _MAX_CONSUMERS * BLOCK_ROWS // tactic.rows
    if not 1 <= tactic.phases <= most:
        return Support(False, f"phases is {tactic.phases}; {tactic.rows} rows take 1 to {most}")
    if not 4 <= tactic.slots <= 16:
        return Support(False, f"slots is {tactic.slots}; it takes 4 to 16")
    if tactic.cluster not in (1, 2):
        return Support(False, f"cluster is {tactic.cluster}; it takes 1 or 2")
    if stream_config(problem, tactic, min(problem.m, PASS_TOKENS)) is None:
        return Support(
            False,
            f"shared memory ({SMEM_BYTES} bytes) does not hold the sums, {tactic.slots} slots and {_MIN_STAGES} stages",
        )
    return SUPPORTED


@functools.lru_cache(maxsize=4096)  # every call asks
def stream_config(problem: Fc2Problem, tactic: HopperTactic, tokens: int) -> StreamConfig | None:
    """The streaming kernel for a pass of that many tokens; None where shared memory is too small."""
    capacity = next(c for c in _CAPACITIES if c >= tokens)
    config = StreamConfig(
        tactic.rows, tactic.phases, _MOST_BLOCKS * BLOCK_ROWS // tactic.rows, tactic.slots, capacity, problem.experts,
        problem.intermediate // CHUNK, dtype_name(problem.out_dtype), problem.a_layout == "128x4", tactic.cluster,
    )  # fmt: skip
    while config.offsets()["end"] > SMEM_BYTES:
        if config.stages == _MIN_STAGES:
            return None
        config = replace(config, stages=config.stages - 1)
    return config


def passes(problem: Fc2Problem) -> list[int]:
    """The different numbers of tokens of the passes that make up a call."""
    last = problem.m % PASS_TOKENS
    return [PASS_TOKENS] * (problem.m >= PASS_TOKENS) + [last] * (last > 0)


@functools.lru_cache(maxsize=4096)  # every call asks
def specialization(problem: Fc2Problem, tactic: HopperTactic) -> tuple:
    """Everything that selects compiled kernels. Token counts that need the same kernels give equal values."""
    swizzled = problem.a_layout == "128x4"
    configs: set[KernelConfig | None] = {ListConfig(swizzled)}
    for tokens in passes(problem):
        configs.add(stream_config(problem, tactic, tokens))
        if tokens > STREAM_TOKENS:
            configs.add(kernel_tile(tokens, dtype_name(problem.out_dtype), swizzled))
    return (problem.k, problem.experts, problem.a_layout, frozenset(configs))


def default_tactic(problem: Fc2Problem) -> HopperTactic:
    """What was best for top-8 of 128 or 256 experts (H100, 2026-11-26): 32 rows a CTA where one or two tokens leave it little
    to do, else 64, which copy activations half as often; one item in work fewer where every call is streamed; all slots where
    an expert has so many tokens that they are waited for (M = 512: 112.9 us from 114.5, H200 109.6 from 111.9, 2026-11-27)."""
    if problem.n <= 66 * 64 and problem.m <= 2:
        return HopperTactic(rows=32, phases=8)
    most = HopperTactic(phases=7, slots=16)
    if problem.m > _CAPACITIES[-2] and can_implement(problem, most):
        return most
    return HopperTactic(phases=6 if problem.m <= STREAM_TOKENS else 7, slots=14)


def tactics(problem: Fc2Problem) -> list[HopperTactic]:
    """The default and its neighbours, those that can be implemented, without repetition."""
    base = default_tactic(problem)
    grid = [
        base,
        HopperTactic(64, 5, 12),
        HopperTactic(64, 5, 12, 2),
        HopperTactic(64, 6, 12),
        HopperTactic(64, 7, 14),
        HopperTactic(64, 7, 16),
        HopperTactic(64, 7, 14, 2),
        HopperTactic(32, 8, 12),
        HopperTactic(64, 6, 14, helpers=True),
        HopperTactic(64, 7, 14, helpers=True),
        HopperTactic(64, 7, 16, helpers=True),
    ]
    return [t for t in dict.fromkeys(grid) if can_implement(problem, t)]
