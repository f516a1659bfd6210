"""What a tactic costs and whether the SM100 can pay it: shared memory, tensor memory, registers, shapes.

Pure arithmetic, importable without the CuTe DSL. The kernel takes its stage counts and column offsets from here.
"""
from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

from backends.interface import SUPPORTED, Support
from backends.problem import Fc2Problem, dtype_name
from backends.tactic import Tactic

#: Shared memory a CTA can use on SM 10.x, bytes (227 KiB; CUDA C++ programming guide, compute capability table).
SMEM_BYTES = 232_448
#: Kept for barriers and alignment, bytes.
SMEM_RESERVED_BYTES = 1_024
#: Warps 0-3, one per tensor memory sub-partition of 32 lanes.
EPILOGUE_WARPS = 4
#: Bytes of one output row in a TMA store: one row of the 128-byte swizzle.
STORE_ROW_BYTES = 128
#: Output staging: 32 rows of `STORE_ROW_BYTES` per epilogue warp.
STORE_BYTES = EPILOGUE_WARPS * 32 * STORE_ROW_BYTES
#: Tensor memory columns of 128 lanes x 32 bit (PTX ISA, tensor memory).
TMEM_COLUMNS = 512
#: Accumulator rows of one CTA: tensor memory lanes.
CTA_ROWS = 128
#: The MMA runs at most this many experts ahead of the epilogue, plus one.
MAX_ACC_STAGES = 3
#: Columns an epilogue thread reads from tensor memory at a time; two such sub-tiles are in registers at once.
SUBTILE = 16

#: Output tiles (M, N) of the MMA; M = 256 is a CTA pair's.
TILES = ((128, 64), (128, 128), (128, 256), (256, 128), (256, 256))
TILE_KS = (128, 256)
#: Cluster shapes (M, N). Larger ones multicast scale factors in pieces too small for TMA.
CLUSTERS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))


#: Experts that fit the list of those to compute, in shared memory.
MAX_SKIP_EXPERTS = 512
#: The split_k that divides all work evenly.
STREAM_K = 0
#: SM 10.x parts the kernel is compiled for, by compute capability.
ARCHS = {(10, 0): "sm_100a", (10, 3): "sm_103a"}


@dataclass(frozen=True)
class CuteTactic(Tactic):
    """How the SM100 kernel divides the work.

    Attributes:
        tile_m: MMA tile rows; 256 is one tile of a CTA pair (2-CTA MMA).
        tile_n: MMA tile columns.
        tile_k: K elements per shared memory stage.
        cluster_m, cluster_n: CTAs of a cluster along M and N; those along one dimension share the other operand.
        split_k: parts into which the experts of an output tile are divided; `STREAM_K` (0) divides the experts of all
            tiles evenly over the SMs instead, in which case the order of additions depends on the number of SMs.
        skip: list the experts that some row of alpha selects, and neither load nor multiply the others; for few tokens.
        pdl: programmatic dependent launch: start before the previous kernel of the stream has ended, and wait for
            its results on the device.
    """

    backend: ClassVar[str] = "cute"

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 256
    cluster_m: int = 1
    cluster_n: int = 1
    split_k: int = 1
    skip: bool = False
    pdl: bool = False


@dataclass(frozen=True)
class Budget:
    """Resources of one CTA.

    Attributes:
        stage_bytes: shared memory of one stage of A, B and their scale factors.
        ab_stages: stages that fit.
        acc_stages: accumulator stages in tensor memory, of tile_n columns each, from column 0.
        sfa_column, sfb_column: first column of the scale factors of the K tile being multiplied.
        sum_column: first column of the part of the running sum that does not fit the registers.
        tmem_columns: columns in use.
    """

    stage_bytes: int
    ab_stages: int
    acc_stages: int
    sfa_column: int
    sfb_column: int
    sum_column: int
    tmem_columns: int

    @staticmethod
    @functools.lru_cache(maxsize=None)
    def of(tactic: CuteTactic) -> Budget:
        stage = stage_bytes(tactic)
        # 32 rows a column and 4 scale factors (64 K elements) a 32-bit word.
        sfa = CTA_ROWS // 32 * (tactic.tile_k // 64)
        sfb = max(tactic.tile_n, 128) // 32 * (tactic.tile_k // 64)
        spilled_sum = tactic.tile_n - register_columns(tactic.tile_n)
        acc_stages = min((TMEM_COLUMNS - sfa - sfb - spilled_sum) // tactic.tile_n, MAX_ACC_STAGES)
        sfa_column = acc_stages * tactic.tile_n
        return Budget(
            stage_bytes=stage,
            ab_stages=(SMEM_BYTES - SMEM_RESERVED_BYTES - STORE_BYTES - 4 * MAX_SKIP_EXPERTS * tactic.skip) // stage,
            acc_stages=acc_stages,
            sfa_column=sfa_column,
            sfb_column=sfa_column + sfa,
            sum_column=sfa_column + sfa + sfb,
            tmem_columns=sfa_column + sfa + sfb + spilled_sum,
        )

    @property
    def tmem_allocation(self) -> int:
        """Columns to allocate: a power of two, at least 32 (PTX ISA, tcgen05.alloc)."""
        return max(32, 1 << (self.tmem_columns - 1).bit_length())

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA but for barriers: all stages and the output staging."""
        return self.ab_stages * self.stage_bytes + STORE_BYTES


def stage_bytes(tactic: CuteTactic) -> int:
    """Shared memory of one K tile of A, B and their scale factors in one CTA.

    A pair's CTAs hold their own 128 rows of A and half of the columns of B, but the scale factors of all columns.
    """
    b_rows = tactic.tile_n // (2 if tactic.tile_m == 256 else 1)
    scale_rows = CTA_ROWS + max(tactic.tile_n, 128)
    return (CTA_ROWS + b_rows) * tactic.tile_k // 2 + scale_rows * tactic.tile_k // 16


def register_columns(tile_n: int) -> int:
    """Columns of a row's running sum that an epilogue thread keeps in registers.

    A thread has 255 registers (PTX ISA), two sub-tiles of partials in flight take 64 and addressing about 40: 128
    columns fit. A 256-wide row also moves two sub-tiles of its own sum, another 64, which leaves 96.
    """
    return tile_n if tile_n <= 128 else 64


@functools.lru_cache(maxsize=4096)  # a list of tactics asks for hundreds
def check_tactic(tactic: CuteTactic) -> Support:
    """Whether the kernel exists for this tactic, whatever the problem."""
    tile, cluster = (tactic.tile_m, tactic.tile_n), (tactic.cluster_m, tactic.cluster_n)
    if tile not in TILES:
        return Support(False, f"tile_m x tile_n is {tile[0]}x{tile[1]}; the kernel has {_shapes(TILES)}")
    if tactic.tile_k not in TILE_KS:
        return Support(False, f"tile_k is {tactic.tile_k}; the kernel has {' and '.join(map(str, TILE_KS))}")
    if cluster not in CLUSTERS:
        return Support(False, f"cluster_m x cluster_n is {cluster[0]}x{cluster[1]}; the kernel has {_shapes(CLUSTERS)}")
    if tactic.tile_m == 256 and tactic.cluster_m % 2:
        return Support(False, f"cluster_m is {tactic.cluster_m}; tile_m 256 is shared by two CTAs and needs it even")
    if tactic.split_k < 0:
        return Support(
            False, f"split_k is {tactic.split_k}; it is a number of parts, or {STREAM_K} for an even division"
        )
    budget = Budget.of(tactic)
    if budget.ab_stages < 2:
        return Support(False, f"shared memory: {budget.stage_bytes} bytes a stage leave no second one in {SMEM_BYTES}")
    if budget.acc_stages < 1 or budget.tmem_columns > TMEM_COLUMNS:
        return Support(False, f"tensor memory: {budget.tmem_columns} columns are needed, {TMEM_COLUMNS} exist")
    return SUPPORTED


def check_problem(problem: Fc2Problem, tactic: CuteTactic) -> Support:
    """Whether the tactic computes the problem. Each rule has its own reason; the first broken one is reported."""
    ok = check_tactic(tactic)
    if not ok:
        return ok
    if problem.device_type != "cuda" or problem.capability not in ARCHS:
        where = problem.device_type if problem.capability is None else "SM %d.%d" % problem.capability
        return Support(False, f"the kernel uses block-scaled tcgen05 MMA of SM 10.0 and 10.3; this device is {where}")
    for name, layout in (("a", problem.a_layout), ("b", problem.b_layout)):
        if layout != "128x4":
            return Support(
                False, f"{name} has {layout!r} scale factors; TMA loads the '128x4' layout: {name}.to_layout('128x4')"
            )
    if problem.m < 1 or problem.n < 1:
        return Support(False, f"m and n are {problem.m} and {problem.n}; both must be at least 1")
    if problem.experts < 1 or problem.k != problem.experts * problem.intermediate:
        return Support(False, f"k = {problem.k} is not a multiple of the {problem.experts} experts")
    if problem.intermediate == 0 or problem.intermediate % tactic.tile_k:
        return Support(
            False, f"the experts' intermediate size {problem.intermediate} is not a multiple of tile_k {tactic.tile_k}"
        )
    if problem.n * problem.out_dtype.itemsize % 16:
        return Support(
            False,
            f"a row of out is {problem.n} x {dtype_name(problem.out_dtype)} = "
            f"{problem.n * problem.out_dtype.itemsize} bytes; TMA stores rows of a multiple of 16 bytes",
        )
    if tactic.split_k > problem.experts:
        return Support(
            False, f"split_k {tactic.split_k} exceeds the {problem.experts} experts, which are never divided"
        )
    if tactic.skip and problem.m > CTA_ROWS * tactic.cluster_m:
        return Support(
            False, f"skip makes one list of experts for all rows and takes m up to {CTA_ROWS * tactic.cluster_m} with "
            f"cluster_m {tactic.cluster_m}; m is {problem.m}"
        )
    if tactic.skip and problem.experts > MAX_SKIP_EXPERTS:
        return Support(False, f"skip lists up to {MAX_SKIP_EXPERTS} experts; this problem has {problem.experts}")
    if tactic.split_k == STREAM_K and not _streams(problem, tactic):
        return Support(
            False, f"stream-K counts in 32 bits and takes up to 2^22 pairs of output tile and expert; this problem has "
            f"{cluster_tiles(problem, tactic) * problem.experts}; use split_k 1"
        )
    return SUPPORTED


def all_kernels() -> list[CuteTactic]:
    """One tactic per kernel, PDL aside: every tile, K tile and cluster, with and without `skip`; the division of the
    work is a run-time argument."""
    shapes = itertools.product((False, True), TILES, TILE_KS, CLUSTERS)
    kernels = [CuteTactic(*tile, tile_k, *cluster, skip=skip) for skip, tile, tile_k, cluster in shapes]
    return [kernel for kernel in kernels if check_tactic(kernel)]


def tactics(problem: Fc2Problem) -> list[CuteTactic]:
    """The tactics worth timing: every kernel with split_k 1, 2, 4 and stream-K; with `skip`, 1 and stream-K."""
    return [tactic for tactic in _divided_kernels() if check_problem(problem, tactic)]


@functools.lru_cache(maxsize=None)
def _divided_kernels() -> tuple[CuteTactic, ...]:
    return tuple(
        replace(kernel, split_k=split_k)
        for kernel in all_kernels()
        for split_k in ((1, STREAM_K) if kernel.skip else (1, 2, 4, STREAM_K))
    )


def default_tactic(problem: Fc2Problem) -> CuteTactic:
    """What to run where nothing was measured: a rule from arithmetic for a B200, not from a measurement of this kernel.

    Stream-K gives the busiest of 148 SMs 97 experts of a 128-wide tile at N = 7168, E = 256, against 128 for two splits
    and 256 for none. Up to 32 tokens, top-8 routing leaves at least a third of 256 experts unselected: skip them. Up to
    128 tokens, pairs of CTAs along N share the tokens' loads; above, 2-CTA MMA shares the weights'.
    """
    tile_k = 256 if problem.intermediate % 256 == 0 else 128
    if problem.m <= 32 and problem.experts <= MAX_SKIP_EXPERTS:
        tactic = CuteTactic(128, 128, tile_k, 1, 1, split_k=STREAM_K, skip=True)
    elif problem.m <= CTA_ROWS:
        tactic = CuteTactic(128, 128, tile_k, 1, 2, split_k=STREAM_K)
    else:
        tactic = CuteTactic(256, 128, tile_k, 2, 1, split_k=STREAM_K)
    return tactic if _streams(problem, tactic) else replace(tactic, split_k=1)


def cluster_tiles(problem: Fc2Problem, tactic: CuteTactic) -> int:
    """Output tiles in units of clusters."""
    return -(-problem.m // (CTA_ROWS * tactic.cluster_m)) * -(-problem.n // (tactic.tile_n * tactic.cluster_n))


def output_tiles(problem: Fc2Problem, tactic: CuteTactic) -> int:
    """CTA tiles of the output, padded to whole clusters: the counters a divided tile's reduction needs."""
    return cluster_tiles(problem, tactic) * tactic.cluster_m * tactic.cluster_n


@dataclass(frozen=True)
class Division:
    """How the experts of the output tiles are divided into parts.

    Attributes:
        group: cluster tiles whose (tile, expert) units are divided together.
        splits: parts a group is divided into.
        slots: the most parts that can touch one tile.
    """

    group: int
    splits: int
    slots: int

    @staticmethod
    def of(problem: Fc2Problem, tactic: CuteTactic, clusters: int) -> Division:
        """`clusters` is how many run at the same time; only stream-K depends on it."""
        if tactic.split_k != STREAM_K:
            return Division(1, tactic.split_k, tactic.split_k)
        tiles = cluster_tiles(problem, tactic)
        units = tiles * problem.experts
        splits = min(clusters, units)
        # A tile is one of `tiles` equal shares of a group and its borders may cut a part each; with `skip` the device
        # lowers the units, and with them at most the splits.
        return Division(tiles, splits, -(-splits // tiles) + 1)

    def workspace_floats(self, problem: Fc2Problem, tactic: CuteTactic) -> int:
        """float32 elements of the partial sums: one CTA tile per output tile and slot."""
        if self.slots == 1:
            return 0
        return output_tiles(problem, tactic) * self.slots * CTA_ROWS * tactic.tile_n


def _streams(problem: Fc2Problem, tactic: CuteTactic) -> bool:
    """Whether stream-K's 32-bit products, units times clusters, cannot overflow."""
    return cluster_tiles(problem, tactic) * problem.experts < 1 << 22


def _shapes(shapes: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{a}x{b}" for a, b in shapes)
