"""TMA: the 128-byte tensor map and box copies between global and shared memory (PTX ISA 5.5, "Tensors";
9.7.9.27).

The tensor map's bit layout is not documented; `TensorMap.decode` states what was derived from the descriptors
that CuTe DSL host code writes for varied tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .numerics import bf16_bits, bf16_value
from .report import Fault

# Hardware element codes: (name, bits in global memory). 12 and 13 land in shared memory padded to 16 bytes
# per 16 elements.
_TYPES = {
    0: ("u8", 8),
    1: ("u16", 16),
    2: ("u32", 32),
    4: ("u64", 64),
    6: ("f16", 16),
    7: ("f32", 32),
    9: ("f64", 64),
    10: ("bf16", 16),
    11: ("b4x16", 4),
    12: ("b4x16_p64", 4),
    13: ("b6x16_p32", 6),
}
_SWIZZLE_XOR = {0: 0, 1: 1, 2: 3, 3: 7}


@dataclass(frozen=True)
class TensorMap:
    base: int
    rank: int
    type: str
    bits: int
    swizzle: int  # 0 none, 1 32B, 2 64B, 3 128B
    atom: int  # 0 16 B, 1 32 B, 3 64 B
    tf32: bool
    strides: tuple[int, ...]  # bytes, of dims 1..rank-1
    extents: tuple[int, ...]  # elements
    box: tuple[int, ...]

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def decode(data: bytes) -> TensorMap:
        """First 64 bytes as 8 little-endian words w0..w7:

        w0 base; w1 bits 3:0 version 2, 6:4 rank-1, 10:7 element code, 12:11 interleave, 14:13 swizzle, 16
        tf32 rounding, 18:17 L2 promotion, 20:19 swizzle atom, 63:32 stride of dim 1 / 16; w2 strides of dims
        2 and 3 / 16; w3 bits 31:0 stride of dim 4 / 16, 47:32 bits 39:36 of the four strides; w4, w5, w6 low
        half: extents - 1; w6 bits 55:32 element strides - 1 (3 bits each), 63:56 box[0]-1; w7 bytes 0..3
        box[1..4]-1.
        """
        w = [int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(8)]
        if w[1] & 15 != 2:
            raise Fault(f"not a tiled tensor map: version field {w[1] & 15}")
        rank, code = (w[1] >> 4 & 7) + 1, w[1] >> 7 & 15
        if code not in _TYPES:
            raise Fault(f"tensor map: unknown element code {code}")
        if w[1] >> 11 & 3 or w[6] >> 32 & 0xFFFFFF:
            raise Fault("tensor map: interleave and element strides other than 1 are not modelled")
        low = [w[1] >> 32, w[2] & 0xFFFFFFFF, w[2] >> 32, w[3] & 0xFFFFFFFF]
        strides = tuple((low[i] | (w[3] >> 32 + 4 * i & 15) << 32) * 16 for i in range(rank - 1))
        extents = [w[4] & 0xFFFFFFFF, w[4] >> 32, w[5] & 0xFFFFFFFF, w[5] >> 32, w[6] & 0xFFFFFFFF]
        box = [w[6] >> 56] + [w[7] >> 8 * i & 255 for i in range(4)]
        return TensorMap(
            w[0] & ~15,
            rank,
            *_TYPES[code],
            w[1] >> 13 & 3,
            w[1] >> 19 & 3,
            bool(w[1] >> 16 & 1),
            strides,
            tuple(e + 1 for e in extents[:rank]),
            tuple(b + 1 for b in box[:rank]),
        )

    @property
    def inner_bytes(self) -> int:
        """Packed bytes of one box row."""
        return self.box[0] * self.bits // 8

    @property
    def packed_bytes(self) -> int:
        """Bytes credited to the mbarrier: the whole box, out-of-bounds elements included."""
        return self.inner_bytes * int(np.prod(self.box[1:], dtype=np.int64))

    @property
    def smem_bytes(self) -> int:
        return (
            self.packed_bytes
            if self.type not in ("b4x16_p64", "b6x16_p32")
            else int(np.prod(self.box, dtype=np.int64))
        )


def encode_driver_descriptor(
    dtype: int,
    base: int,
    dims: list[int],
    strides: list[int],
    box: list[int],
    element_strides: list[int],
    swizzle: int,
    fill: int,
) -> bytes:
    """`cuTensorMapEncodeTiled` arguments (driver enum values) to the layout `TensorMap.decode` reads."""
    codes = {
        0: 0,
        1: 1,
        2: 2,
        3: 2,
        4: 4,
        5: 4,
        6: 6,
        7: 7,
        8: 9,
        9: 10,
        10: 7,
        11: 7,
        12: 7,
        13: 11,
        14: 12,
        15: 13,
    }
    modes = {0: (0, 0), 1: (1, 0), 2: (2, 0), 3: (3, 0), 4: (3, 1), 6: (3, 3)}
    if swizzle not in modes or fill or any(s != 1 for s in element_strides):
        raise Fault(
            f"cuTensorMapEncodeTiled: swizzle {swizzle}, fill {fill}, element strides {element_strides} "
            f"not modelled"
        )
    rank = len(dims)
    words = [0] * 16
    words[0] = base
    words[1] = (
        2
        | rank - 1 << 4
        | codes[dtype] << 7
        | modes[swizzle][0] << 13
        | (dtype in (11, 12)) << 16
        | modes[swizzle][1] << 19
    )
    padded = [s // 16 for s in strides] + [0] * (5 - rank)
    words[1] |= (padded[0] & 0xFFFFFFFF) << 32
    words[2] = padded[1] & 0xFFFFFFFF | (padded[2] & 0xFFFFFFFF) << 32
    words[3] = padded[3] & 0xFFFFFFFF
    for i in range(4):
        words[3] |= (padded[i] >> 32 & 15) << 32 + 4 * i
    extents = [d - 1 for d in dims] + [0] * (5 - rank)
    boxes = [b - 1 for b in box] + [0] * (5 - rank)
    words[4], words[5] = extents[0] | extents[1] << 32, extents[2] | extents[3] << 32
    words[6] = extents[4] | boxes[0] << 56
    words[7] = sum(b << 8 * i for i, b in enumerate(boxes[1:]))
    return b"".join(word.to_bytes(8, "little") for word in words)


@functools.lru_cache(maxsize=4096)
def swizzled_chunks(start: int, count: int, swizzle: int, atom: int) -> np.ndarray:
    """16-byte chunk numbers of `count` dense chunks from byte `start`: an XOR on absolute shared-memory
    address bits.

    16-byte atoms: bits 4.. ^= (address >> 7) & {1, 3, 7} for 32, 64, 128 B; 32-byte atoms: bits 5, 6 ^= bits
    7, 8;
    64-byte atoms: bit 6 ^= bit 7.
    """
    address = start + 16 * np.arange(count)
    if atom == 0:
        address = address ^ (address >> 7 & _SWIZZLE_XOR[swizzle]) << 4
    elif atom == 1:
        address = address ^ (address >> 7 & 3) << 5
    elif atom == 3:
        address = address ^ (address >> 7 & 1) << 6
    else:
        raise Fault(f"tensor map: unknown swizzle atom {atom}")
    return address >> 4


@dataclass
class Box:
    """The part of a box that is in bounds: a strided window of a buffer, and where it sits in the dense
    box."""

    buffer: object
    offset: int  # bytes into the buffer
    shape: tuple[int, ...]  # outermost first; the last dimension in bytes
    strides: tuple[int, ...]
    where: tuple[slice, ...]
    full: bool

    def window(self) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(self.buffer.bytes[self.offset :], self.shape, self.strides)


def clip(memory, tm: TensorMap, coords: tuple[int, ...], what: str) -> tuple[Box | None, tuple[int, ...]]:
    """(in-bounds part, dense box shape in bytes). Element i of dimension d is in bounds iff 0 <= coord + i <
    extent."""
    if len(coords) != tm.rank:
        raise Fault(f"{what}: {len(coords)} coordinates for a tensor map of rank {tm.rank}")
    dense = tuple(reversed(tm.box[1:])) + (tm.inner_bytes,)
    first = [max(0, -c) for c in coords]
    last = [min(b, e - c) for b, e, c in zip(tm.box, tm.extents, coords)]
    if any(a >= b for a, b in zip(first, last)):
        return None, dense
    unit = lambda elements: elements * tm.bits // 8  # noqa: E731
    if tm.bits < 8 and (coords[0] * tm.bits % 8 or last[0] * tm.bits % 8):
        raise Fault(f"{what}: coordinate or extent {coords[0]} splits a byte of {tm.bits}-bit elements")
    start = (
        tm.base
        + unit(coords[0] + first[0])
        + sum((c + f) * s for c, f, s in zip(coords[1:], first[1:], tm.strides))
    )
    counts = [b - a for a, b in zip(first, last)]
    inner = unit(counts[0])
    span = inner + sum((n - 1) * s for n, s in zip(counts[1:], tm.strides))
    buffer = memory.find(start, span, what)
    shape = tuple(reversed(counts[1:])) + (inner,)
    strides = tuple(reversed(tm.strides)) + (1,)
    where = tuple(slice(a, b) for a, b in zip(reversed(first[1:]), reversed(last[1:])))
    where += (slice(unit(first[0]), unit(last[0])),)
    return Box(buffer, start - buffer.base, shape, strides, where, shape == dense), dense


def read_box(
    memory, tm: TensorMap, coords: tuple[int, ...], check=None, ticket=None
) -> tuple[np.ndarray, object]:
    """(dense bytes of the box as they lie in shared memory before swizzling, the buffer read or None)."""
    box, dense = clip(memory, tm, coords, "TMA load")
    if box is not None and check is not None and box.buffer.shadow is not None:
        check.async_global_read(ticket, box)
    if box is None:
        data = np.zeros(dense, np.uint8)
    elif box.full:
        data = np.ascontiguousarray(box.window())
    else:
        data = np.zeros(dense, np.uint8)
        data[box.where] = box.window()
    if tm.tf32:
        bits = data.reshape(-1).view(np.uint32)
        data = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.uint8)
    data = data.reshape(-1)
    if tm.type == "b4x16_p64":
        data = np.pad(data.reshape(-1, 8), ((0, 0), (0, 8))).reshape(-1)
    elif tm.type == "b6x16_p32":
        data = np.pad(data.reshape(-1, 12), ((0, 0), (0, 4))).reshape(-1)
    return data, box.buffer if box is not None else None


def write_box(
    memory,
    tm: TensorMap,
    coords: tuple[int, ...],
    data: np.ndarray,
    reduce: str | None,
    check=None,
    ticket=None,
) -> object:
    """Store (or reduce) dense box bytes; out-of-bounds elements are dropped. Returns the buffer written or
    None."""
    box, dense = clip(memory, tm, coords, "TMA store")
    if box is None:
        return None
    window, values = box.window(), data.reshape(dense)[box.where]
    if check is not None:
        check.async_global_write(ticket, box, reduce is not None, lambda: bool((window == values).all()))
    if reduce is None:
        window[...] = values
    else:
        window[...] = combine(np.ascontiguousarray(window), np.ascontiguousarray(values), tm.type, reduce)
    return box.buffer


def combine(old: np.ndarray, new: np.ndarray, dtype: str, reduce: str) -> np.ndarray:
    """Elementwise reduction of byte arrays; `dtype` names the element."""
    if dtype == "bf16":
        a, b = bf16_value(old.view(np.uint16)), bf16_value(new.view(np.uint16))
        return bf16_bits(_REDUCE[reduce](a, b)).astype(np.uint16).view(np.uint8)
    numpy = {
        "f16": np.float16,
        "f32": np.float32,
        "f64": np.float64,
        "u8": np.uint8,
        "u16": np.uint16,
        "u32": np.uint32,
        "s32": np.int32,
        "u64": np.uint64,
        "s64": np.int64,
        "b32": np.uint32,
        "b64": np.uint64,
    }[dtype]
    a, b = old.view(numpy), new.view(numpy)
    if reduce in ("inc", "dec"):
        raise Fault(f"bulk reduction .{reduce} is not modelled")
    return np.ascontiguousarray(_REDUCE[reduce](a, b).astype(numpy)).view(np.uint8)


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def gather_smem(smem, start: int, tm: TensorMap) -> np.ndarray:
    """Dense box bytes of a swizzled box in shared memory."""
    smem.check(start, start + tm.smem_bytes, "TMA store read")
    chunks = swizzled_chunks(start, tm.smem_bytes // 16, tm.swizzle, tm.atom)
    return smem.bytes.reshape(-1, 16)[chunks].reshape(-1)


def scatter_smem(smem, start: int, tm: TensorMap, data: np.ndarray) -> None:
    smem.check(start, start + tm.smem_bytes, "TMA load write")
    if tm.swizzle == 0:
        smem.bytes[start : start + len(data)] = data
    else:
        chunks = swizzled_chunks(start, len(data) // 16, tm.swizzle, tm.atom)
        smem.bytes.reshape(-1, 16)[chunks] = data.reshape(-1, 16)
