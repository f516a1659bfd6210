"""What a tactic costs and whether the SM100 can pay it: shared memory, tensor memory, registers, shapes.

Pure arithmetic, importable without the CuTe DSL. The kernel takes its stage counts and column offsets from here.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
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

TILES = ((128, 64), (128, 128), (128, 256), (256, 128), (256, 256))
TILE_KS = (128, 256)
CLUSTERS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))


@dataclass(frozen=True)
class CuteTactic(Tactic):
    """How the SM100 kernel divides the work.

    Attributes:
        tile_m: MMA tile rows; 256 is one tile of a CTA pair (2-CTA MMA).
        tile_n: MMA tile columns.
        tile_k: K elements per shared memory stage.
        cluster_m, cluster_n: CTAs of a cluster along M and N; those along one dimension share the other operand.
        split_k: parts into which the experts of an output tile are divided.
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
            ab_stages=(SMEM_BYTES - SMEM_RESERVED_BYTES - STORE_BYTES) // stage,
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
