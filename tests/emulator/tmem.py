"""Tensor memory: allocation, bounds, and the lane/column map of tcgen05.ld and tcgen05.st.

TMEM of a CTA is 128 lanes x 512 columns of 32 bits; an address is lane << 16 | column (PTX ISA 9.7.16.1,
"Tensor Memory Addressing"). A warp reaches only lanes 32*(warp % 4) .. +31 (9.7.16.2.3, "Access
restrictions").
"""

from __future__ import annotations

import functools

import numpy as np

from .report import Fault

LANES, COLUMNS = 128, 512
POISON = 0x7FFFDEAD  # a quiet NaN


class TensorMemory:
    def __init__(self, cta) -> None:
        self.cta = cta
        self.words = np.full((LANES, COLUMNS), POISON, np.uint32)
        self.floats = self.words.view(np.float32)
        self.allocations: dict[int, int] = {}  # first column -> columns
        self.allocated = np.zeros(COLUMNS, bool)
        self.permit = True
        self.waiters: list = []
        self.requests = 0  # tcgen05.alloc.cta_group::2 this CTA has begun
        self.claim = None  # epoch of the latest allocation, see checks

    def allocate(self, columns: int) -> int | None:
        """First fit of a power of two >= 32 columns, aligned to its size; None when there is no room now."""
        if columns < 32 or columns > COLUMNS or columns & columns - 1:
            raise Fault(f"tcgen05.alloc of {columns} columns: must be a power of two from 32 to 512")
        if not self.permit:
            raise Fault("tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        for start in range(0, COLUMNS, columns):
            if not self.allocated[start : start + columns].any():
                self.allocated[start : start + columns] = True
                self.allocations[start] = columns
                self.words[:, start : start + columns] = POISON
                high = self.cta.cluster.machine.high_water
                high["TMEM columns"] = max(high["TMEM columns"], int(self.allocated.sum()))
                return start
        return None

    def free(self, address: int, columns: int) -> None:
        start = address & 0xFFFF
        if self.allocations.get(start) != columns:
            raise Fault(
                f"tcgen05.dealloc of {columns} columns at column {start}, which is not an allocation "
                f"(live: {self.allocations or 'none'})"
            )
        del self.allocations[start]
        self.allocated[start : start + columns] = False
        self.cta.cluster.machine.wake(self.waiters)

    def check_columns(self, start: int, count: int, what: str) -> None:
        if start < 0 or start + count > COLUMNS or not self.allocated[start : start + count].all():
            raise Fault(
                f"{what} of TMEM columns {start}..{start + count} of CTA {self.cta.rank} reaches outside "
                f"the live "
                f"allocations ({ {s: s + n for s, n in self.allocations.items()} or 'none'}: first..end)"
            )

    def check_released(self) -> None:
        if self.allocations:
            raise Fault(
                f"CTA {self.cta.ctaid} exits with TMEM still allocated: "
                f"{', '.join(f'{n} columns at {s}' for s, n in self.allocations.items())}"
            )


@functools.lru_cache(maxsize=None)
def register_map(shape: str, repeat: int) -> tuple[np.ndarray, np.ndarray]:
    """(lane, column) of each [register, thread], lane relative to the warp's 32 (PTX ISA 9.7.16.2.3, "Data
    movement shape").

    32x32b:  register j of thread t -> lane t, column j
    16x64b:  register j             -> lane t/4 + 8(t&1), column (t>>1 & 1) + 2j
    16x128b: register 2j+h          -> lane t/4 + 8h, column t%4 + 4j
    16x256b: register 4j+2h+c       -> lane t/4 + 8h, column 2(t%4) + c + 8j
    """
    t = np.arange(32)[None, :]
    per_repeat = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4}[shape]
    r = np.arange(repeat * per_repeat)[:, None]
    if shape == "32x32b":
        lane, column = t + 0 * r, r + 0 * t
    elif shape == "16x64b":
        lane, column = t // 4 + 8 * (t & 1) + 0 * r, (t >> 1 & 1) + 2 * r
    elif shape == "16x128b":
        lane, column = t // 4 + 8 * (r % 2), t % 4 + 4 * (r // 2)
    else:
        lane, column = t // 4 + 8 * (r // 2 % 2), 2 * (t % 4) + r % 2 + 8 * (r // 4)
    return lane, column


def columns_of(shape: str, repeat: int) -> int:
    return repeat * {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8}[shape]


def warp_lanes(w, address: int, shape: str) -> int:
    """First TMEM lane a warp's access touches; lane field 0 names the warp's own sub-partition."""
    lane, own = address >> 16, 32 * (w.index % 4)
    base = lane & ~31
    if base not in (0, own):
        raise Fault(f"warp {w.index} accesses TMEM lane {lane}: it may only reach lanes {own}..{own + 31}")
    inside = lane & 31
    if inside and (shape == "32x32b" or inside != 16):
        raise Fault(f"TMEM lane {lane} is not aligned for shape {shape}")
    return own + inside


def load(w, address: int, shape: str, repeat: int, cls: str) -> np.ndarray:
    """Register values of tcgen05.ld, one row per register."""
    tmem, columns = w.cta.tmem, columns_of(shape, repeat)
    lane, column = warp_lanes(w, address, shape), address & 0xFFFF
    tmem.check_columns(column, columns, "tcgen05.ld")
    rows = 32 if shape == "32x32b" else 16
    if w.check:
        w.check.tmem_read(w, tmem, lane, rows, column, columns)
    if shape == "32x32b":
        block = np.ascontiguousarray(tmem.words[lane : lane + 32, column : column + columns].T)
    else:
        lanes, cols = register_map(shape, repeat)
        block = tmem.words[lanes + lane, cols + column]
    return block.view(np.float32) if cls == "f" else block.astype(np.int64)


def store(w, address: int, shape: str, repeat: int, values: list) -> None:
    tmem, columns = w.cta.tmem, columns_of(shape, repeat)
    lane, column = warp_lanes(w, address, shape), address & 0xFFFF
    tmem.check_columns(column, columns, "tcgen05.st")
    lanes, cols = register_map(shape, repeat)
    block = np.empty(lanes.shape, np.uint32)
    for i, v in enumerate(values):
        block[i] = v
    if w.check:
        w.check.tmem_write(w, tmem, lane, 32 if shape == "32x32b" else 16, column, columns)
    tmem.words[lanes + lane, cols + column] = block
