"""tcgen05.mma and tcgen05.cp: descriptors, operand and accumulator layouts, arithmetic (PTX ISA 9.7.16).

Arithmetic: operand products are exact in float64, one instruction's K terms are summed in float64, and the
    sum with D is rounded once to D's format. For NVFP4 (e2m1 times ue4m3 scales) that sum is exact, so it has
    no order. The hardware's internal alignment and truncation are not modelled.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from .numerics import bf16_value, decode_table, fp4_pair_table
from .report import Fault
from .shadow import words


@dataclass(frozen=True)
class SmemDescriptor:
    """64-bit matrix descriptor (PTX ISA 9.7.16.5.1, "Shared memory descriptor").

    bits 13:0 start address >> 4; 29:16 leading-dimension byte offset >> 4; 45:32 stride-dimension byte offset
    >> 4; 47:46 version (1); 51:49 base offset; 52 leading-dimension mode; 63:61 swizzle: 0 none, 1 128B with
    32B atoms, 2 128B,
    4 64B, 6 32B. The start holds 18 address bits: it is always relative to the CTA that reads it.
    """

    start: int
    lbo: int
    sbo: int
    swizzle: int

    @staticmethod
    @functools.lru_cache(maxsize=1 << 14)
    def decode(bits: int) -> SmemDescriptor:
        version, base_offset, mode, swizzle = bits >> 46 & 3, bits >> 49 & 7, bits >> 52 & 1, bits >> 61 & 7
        if version != 1:
            raise Fault(f"matrix descriptor {bits:#018x} has version {version}; tcgen05 needs 1")
        if swizzle not in (0, 1, 2, 4, 6):
            raise Fault(f"matrix descriptor {bits:#018x} has unknown swizzle {swizzle}")
        if base_offset or mode:
            raise Fault(
                f"matrix descriptor {bits:#018x}: base offset {base_offset} and leading-dimension mode "
                f"{mode} "
                "are not modelled"
            )
        return SmemDescriptor(
            (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, swizzle
        )


_PITCH = {0: 16, 1: 128, 2: 128, 4: 64, 6: 32}
_XOR = {0: 0, 2: 7, 4: 3, 6: 1}


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """XOR of absolute shared-memory address bits (PTX ISA, "Swizzling modes"): 16-byte chunk bits ^= address
    bits 7.."""
    if swizzle == 1:  # 128B with 32-byte atoms: bits 5, 6 ^= bits 7, 8
        return address ^ (address >> 7 & 3) << 5
    return address ^ (address >> 7 & _XOR[swizzle]) << 4


@functools.lru_cache(maxsize=4096)
def k_major_chunks(desc: SmemDescriptor, rows: int, chunks: int) -> np.ndarray:
    """Byte offsets [rows, chunks] of the 16-byte chunks of a K-major operand (PTX ISA, "Canonical layouts").

    Chunk u of row r: no swizzle (r%8)*16 + (r/8)*SBO + u*LBO; with swizzle pitch P (r%8)*P + (r/8)*SBO +
    u*16; then XOR.
    """
    r, u = np.arange(rows)[:, None], np.arange(chunks)[None, :]
    if desc.swizzle == 0:
        address = (r % 8) * 16 + (r // 8) * desc.sbo + u * desc.lbo
    else:
        address = (r % 8) * _PITCH[desc.swizzle] + (r // 8) * desc.sbo + u * 16
    return swizzled(address + desc.start, desc.swizzle)


@functools.lru_cache(maxsize=1024)
def mn_major_elements(desc: SmemDescriptor, rows: int, depth: int, size: int) -> np.ndarray:
    """Byte offsets [rows, depth] of the elements (of `size` bytes) of an MN-major operand, T = 16/size, w =
    P/size:

    no swizzle (i%T)*size + (i/T)*SBO + (k%8)*16 + (k/8)*LBO; swizzled (i%w)*size + (i/w)*LBO + (k%8)*P +
    (k/8)*SBO; XOR.
    The 32-byte-atom form has groups of 4 in k: (k%4)*128 + (k/4)*SBO.
    """
    i, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if desc.swizzle == 0:
        t = 16 // size
        address = (i % t) * size + (i // t) * desc.sbo + (k % 8) * 16 + (k // 8) * desc.lbo
    else:
        w = _PITCH[desc.swizzle] // size
        group = 4 if desc.swizzle == 1 else 8
        address = (
            (i % w) * size
            + (i // w) * desc.lbo
            + (k % group) * _PITCH[desc.swizzle]
            + (k // group) * desc.sbo
        )
    return swizzled(address + desc.start, desc.swizzle)


@dataclass(frozen=True)
class InstructionDescriptor:
    """32-bit instruction descriptor (PTX ISA 9.7.16.4, "Instruction descriptor").

    5:4 D format (0 f16, 1 f32, 2 s32), or the SFB id for block-scaled kinds; 9:7 A format; 12:10 B format;
    13, 14 negate A, B; 15, 16 A, B MN-major; 22:17 N/8; 23 scale format (0 ue4m3, 1 ue8m0); 28:24 M/16; 30:29
    SFA id; 31 K = 96. Bit 2 is sparsity, bit 3 saturation, 31:30 the maximum shift of .ws for plain kinds.
    """

    d: str
    a: str
    b: str
    m: int
    n: int
    negate_a: bool
    negate_b: bool
    a_mn: bool
    b_mn: bool
    scale: str
    sfa_id: int
    sfb_id: int

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def decode(bits: int, kind: str) -> InstructionDescriptor:
        a, b = bits >> 7 & 7, bits >> 10 & 7
        eight = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
        names = {
            "f16": {0: "f16", 1: "bf16"},
            "tf32": {2: "tf32"},
            "f8f6f4": eight,
            "mxf8f6f4": eight,
            "mxf4": {1: "e2m1"},
            "mxf4nvf4": {1: "e2m1"},
            "i8": {0: "u8", 1: "s8"},
        }[kind]
        scaled = kind.startswith("mx")
        d = "f32" if scaled else {0: "f16", 1: "f32", 2: "s32"}.get(bits >> 4 & 3, "?")
        if a not in names or b not in names or d == "?":
            raise Fault(
                f"instruction descriptor {bits:#010x}: formats A {a}, B {b}, D {d} do not exist for "
                f"kind::{kind}"
            )
        if bits & 4 or (scaled and bits >> 31):
            raise Fault(f"instruction descriptor {bits:#010x}: sparsity and K = 96 are not modelled")
        m = (bits >> 24 & 31) * 16
        return InstructionDescriptor(
            d,
            names[a],
            names[b],
            m,
            (bits >> 17 & 63) * 8,
            bool(bits >> 13 & 1),
            bool(bits >> 14 & 1),
            bool(bits >> 15 & 1),
            bool(bits >> 16 & 1),
            "ue8m0" if bits >> 23 & 1 else "ue4m3",
            bits >> 29 & 3,
            bits >> 4 & 3,
        )


# K elements and 16-byte chunks per row of one instruction: 32 bytes of operand for every dense kind.
DEPTH = {"f16": 16, "tf32": 8, "f8f6f4": 32, "mxf8f6f4": 32, "i8": 32, "mxf4": 64, "mxf4nvf4": 64}
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4}


@functools.lru_cache(maxsize=None)
def _byte_table(fmt: str) -> np.ndarray:
    """float64[256]: value of an operand byte of an 8-bit kind; fp4 sits in bits 5:2 of its byte, fp6 in bits
    6:1."""
    byte = np.arange(256)
    if fmt == "e2m1":
        return decode_table(fmt)[byte >> 2 & 15].astype(np.float64)
    if fmt in ("e2m3", "e3m2"):
        return decode_table(fmt)[byte >> 1 & 63].astype(np.float64)
    if fmt == "u8":
        return byte.astype(np.float64)
    if fmt == "s8":
        return byte.astype(np.int8).astype(np.float64)
    return decode_table(fmt).astype(np.float64)


_FP4_PAIRS = fp4_pair_table().astype(np.float64)


def decode_rows(data: np.ndarray, fmt: str, packed_fp4: bool) -> np.ndarray:
    """Row bytes [rows, 32] to values float64[rows, K]."""
    if packed_fp4:
        return _FP4_PAIRS[data].reshape(data.shape[0], -1)
    if fmt == "f16":
        return data.view(np.float16).astype(np.float64)
    if fmt == "bf16":
        return bf16_value(data.view(np.uint16)).astype(np.float64)
    if fmt == "tf32":
        return (data.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    return _byte_table(fmt)[data]


@functools.lru_cache(maxsize=4096)
def operand_words(desc: SmemDescriptor, rows: int, fmt: str, mn_major: bool, kind: str) -> np.ndarray:
    """Numbers of the 4-byte words of the 16-byte chunks one instruction reads of an operand."""
    if mn_major:
        offsets = np.unique(mn_major_elements(desc, rows, DEPTH[kind], _ELEMENT_BYTES.get(fmt, 1)) >> 4) << 4
    else:
        offsets = k_major_chunks(desc, rows, 2)
    return words(offsets.ravel(), 16)


@functools.lru_cache(maxsize=4096)
def copy_words(desc: SmemDescriptor, rows: int, chunks: int) -> np.ndarray:
    return words(k_major_chunks(desc, rows, chunks).ravel(), 16)


def smem_operand(cta, desc: SmemDescriptor, rows: int, fmt: str, mn_major: bool, kind: str) -> np.ndarray:
    """float64[rows, K] values of an operand in one CTA's shared memory."""
    smem = cta.smem
    if mn_major:
        size = _ELEMENT_BYTES.get(fmt, 1)
        offsets = mn_major_elements(desc, rows, DEPTH[kind], size)
        _check_range(smem, offsets, size)
        data = smem.views[size][offsets // size]
        return decode_rows(np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1), fmt, False)
    offsets = k_major_chunks(desc, rows, 2)
    _check_range(smem, offsets, 16)
    chunks = smem.bytes.reshape(-1, 16)[offsets >> 4]
    packed = kind in ("mxf4", "mxf4nvf4")
    return decode_rows(chunks.reshape(rows, 32), fmt, packed)


def _check_range(smem, offsets: np.ndarray, size: int) -> None:
    low, high = int(offsets.min()), int(offsets.max()) + size
    if low < 1024 or high > smem.end:
        smem.check(low, high, "matrix operand read")


_LANE_GROUPS = {"direct": slice(0, 8), "halves": slice(0, 8), "ws32": slice(0, 8), "sixteens": slice(0, 8, 2)}


def accumulator_rows(m: int, cta_group: int, ws: bool) -> tuple[int, str]:
    """(rows each CTA holds, layout name) of D (PTX ISA, "Data path layout organization")."""
    if ws:
        return {32: (32, "ws32"), 64: (64, "halves"), 128: (128, "direct")}[m]
    if cta_group == 1:
        return {64: (64, "sixteens"), 128: (128, "direct")}[m]
    return {128: (64, "halves"), 256: (128, "direct")}[m]


@functools.lru_cache(maxsize=256)
def accumulator_index(layout: str, rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(TMEM lane, column) of element (i, j) of a CTA's part of D, one 32-bit column per element:

    direct:   lane i, column j
    sixteens: lane i%16 + 32*(i/16), column j                          (M = 64, cta_group::1)
    halves:   lane i + 64*(j / (N/2)), column j % (N/2)                (M = 128 cta_group::2; M = 64 .ws)
    ws32:     lane i + 32*(j / (N/4)), column j % (N/4)                (M = 32 .ws)
    """
    i, j = np.arange(rows)[:, None], np.arange(n)[None, :]
    if layout == "direct":
        return i + 0 * j, j + 0 * i
    if layout == "sixteens":
        return i % 16 + 32 * (i // 16) + 0 * j, j + 0 * i
    parts = 2 if layout == "halves" else 4
    width = n // parts
    return i + 128 // parts * (j // width), j % width + 0 * i


def scale_factors(
    tmem, address: int, sf_id: int, rows: int, count: int, fmt: str, halves: bool
) -> np.ndarray:
    """float64[rows, count] scale factors (PTX ISA, "Scale factor layout"): byte j of row r is at lane r%32
    (replicated to the other three sub-partitions), column base + r/32, byte sf_id + j. `halves` is SFB of
    cta_group::2 with M = 128: the second half of N is read at lanes 64.. with the column restarting."""
    base = address & 0xFFFF
    r = np.arange(rows)
    lane, column = r % 32, r // 32
    if halves:
        width = rows // 2
        lane, column = 64 * (r // width) + r % width % 32, r % width // 32
    words = tmem.words[lane, base + column]
    data = np.stack([words >> 8 * ((sf_id + j) % 4) & 0xFF for j in range(count)], 1)
    return decode_table(fmt).astype(np.float64)[data]


def scale_columns(rows: int) -> int:
    return -(-rows // 32)


def matrix_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b.T. torch, because its thread count can be set: with more threads than free cores a BLAS spins."""
    return torch.mm(torch.from_numpy(a), torch.from_numpy(b).T).numpy()


@dataclass
class Mma:
    """One tcgen05.mma, with its operands read at issue; `execute` runs when the tensor pipe reaches it."""

    kind: str
    ctas: list  # the CTA, or the even and odd CTA of the pair
    d: int
    a: int  # descriptor, or TMEM address when a_in_tmem
    b: int
    idesc: InstructionDescriptor
    accumulate: bool
    a_in_tmem: bool = False
    ws: bool = False
    scale_d: int = 0
    disabled: tuple[int, ...] = ()
    sfa: int = 0
    sfb: int = 0
    block: int = 0  # elements per scale factor, 0 when not block-scaled

    def check_accesses(self, check, ticket) -> None:
        """Tell the checker what this MMA reads and writes (at issue, with the issuer's clock)."""
        idesc, group = self.idesc, len(self.ctas)
        rows, layout = accumulator_rows(idesc.m, group, self.ws)
        for cta in self.ctas:
            check.async_smem_read(ticket, cta.rank, self._b_words(group), "matrix B")
            if self.a_in_tmem:
                check.async_tmem_read(ticket, cta.tmem, _LANE_GROUPS[layout], self.a & 0xFFFF, 8, "matrix A")
            else:
                at = operand_words(SmemDescriptor.decode(self.a), rows, idesc.a, idesc.a_mn, self.kind)
                check.async_smem_read(ticket, cta.rank, at, "matrix A")
            if self.block:
                halves = group == 2 and idesc.m == 128
                columns = scale_columns(idesc.n // 2 if halves else idesc.n)
                check.async_tmem_read(
                    ticket, cta.tmem, slice(0, 2), self.sfa & 0xFFFF, scale_columns(rows), "SFA"
                )
                for first in (0, 4) if halves else (0,):
                    check.async_tmem_read(
                        ticket, cta.tmem, slice(first, first + 2), self.sfb & 0xFFFF, columns, "SFB"
                    )
            check.async_tmem_write(
                ticket, cta.tmem, _LANE_GROUPS[layout], self.d & 0xFFFF, self._width(layout), self.accumulate
            )

    def _b_words(self, group: int) -> np.ndarray:
        idesc = self.idesc
        desc = SmemDescriptor.decode(self.b)
        return operand_words(desc, idesc.n // group, idesc.b, idesc.b_mn, self.kind)

    def _width(self, layout: str) -> int:
        return self.idesc.n // {"direct": 1, "sixteens": 1, "halves": 2, "ws32": 4}[layout]

    def execute(self) -> None:
        idesc, group = self.idesc, len(self.ctas)
        rows, layout = accumulator_rows(idesc.m, group, self.ws)
        b_desc, n = SmemDescriptor.decode(self.b), idesc.n
        parts = [smem_operand(cta, b_desc, n // group, idesc.b, idesc.b_mn, self.kind) for cta in self.ctas]
        b = np.concatenate(parts) if group > 1 else parts[0]
        b = -b if idesc.negate_b else b
        for index, cta in enumerate(self.ctas):
            a = self._a_values(cta, rows)
            scaled_b = b
            if self.block:
                a, scaled_b = self._apply_scales(cta, a, b, group)
            self._accumulate(cta, index, matrix_product(a, scaled_b), layout, rows)

    def _a_values(self, cta, rows: int) -> np.ndarray:
        idesc = self.idesc
        if not self.a_in_tmem:
            values = smem_operand(cta, SmemDescriptor.decode(self.a), rows, idesc.a, idesc.a_mn, self.kind)
        else:
            column = self.a & 0xFFFF
            cta.tmem.check_columns(column, 8, "matrix A read")
            lanes = np.arange(rows) if rows == 128 else np.arange(rows) % 16 + 32 * (np.arange(rows) // 16)
            data = np.ascontiguousarray(cta.tmem.words[lanes, column : column + 8]).view(np.uint8)
            values = decode_rows(data, idesc.a, self.kind in ("mxf4", "mxf4nvf4"))
        return -values if idesc.negate_a else values

    def _apply_scales(self, cta, a: np.ndarray, b: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
        idesc, count = self.idesc, DEPTH[self.kind] // self.block
        halves = group == 2 and idesc.m == 128
        out = []
        for name, values, address, sf_id in (
            ("SFA", a, self.sfa, idesc.sfa_id),
            ("SFB", b, self.sfb, idesc.sfb_id),
        ):
            split = halves and name == "SFB"
            rows = len(values)
            columns = scale_columns(rows // 2 if split else rows)
            cta.tmem.check_columns(address & 0xFFFF, columns, f"{name} read")
            scales = scale_factors(cta.tmem, address, sf_id, rows, count, idesc.scale, split)
            out.append((values.reshape(rows, count, self.block) * scales[:, :, None]).reshape(rows, -1))
        return out[0], out[1]

    def _accumulate(self, cta, index: int, product: np.ndarray, layout: str, rows: int) -> None:
        tmem, n, column = cta.tmem, self.idesc.n, self.d & 0xFFFF
        tmem.check_columns(column, self._width(layout), "accumulator")
        if layout == "direct" and rows == 128:
            where = (slice(0, 128), slice(column, column + n))
        else:
            lanes, columns = accumulator_index(layout, rows, n)
            where = (lanes, columns + column)
        if self.idesc.d == "s32":
            old = tmem.words[where].view(np.int32).astype(np.float64) if self.accumulate else 0
            new = np.clip(product + old, -(1 << 31), (1 << 31) - 1).astype(np.int32).view(np.uint32)
        elif self.idesc.d == "f16":
            old = (
                tmem.words[where].astype(np.uint16).view(np.float16).astype(np.float64)
                if self.accumulate
                else 0
            )
            new = (product + old * 2.0**-self.scale_d).astype(np.float16).view(np.uint16).astype(np.uint32)
        else:
            if self.accumulate:
                old = tmem.floats[where]
                product = product + (old if not self.scale_d else old.astype(np.float64) * 2.0**-self.scale_d)
            new = product.astype(np.float32).view(np.uint32)
        if any(self.disabled):
            keep = self._disabled_lanes(index)
            lanes = np.arange(128)[:, None] if isinstance(where[0], slice) else where[0]
            new = np.where(keep[lanes], tmem.words[where], new)
        tmem.words[where] = new

    def _disabled_lanes(self, index: int) -> np.ndarray:
        """bool[128]: lanes the disable-output-lane vector keeps; 4 words per CTA, CTA 0's first."""
        words = self.disabled[4 * index : 4 * index + 4] if len(self.disabled) == 8 else self.disabled
        return np.array([words[lane // 32] >> lane % 32 & 1 for lane in range(128)], bool)


@functools.lru_cache(maxsize=64)
def copy_lanes(shape: str) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    """(rows, 16-byte chunks per row, destination lanes of each row) of a tcgen05.cp shape (PTX ISA,
    "tcgen05.cp"):

    32x128b.warpx4: row r -> lanes r, r+32, r+64, r+96; 64x128b.warpx2::02_13: r, r+64;
    64x128b.warpx2::01_23: 64*(r/32) + r%32 and +32; 128x128b, 128x256b: lane r; 4x256b: 32*r.
    """
    if shape == "32x128b.warpx4":
        return 32, 1, tuple((r, r + 32, r + 64, r + 96) for r in range(32))
    if shape == "64x128b.warpx2::02_13":
        return 64, 1, tuple((r, r + 64) for r in range(64))
    if shape == "64x128b.warpx2::01_23":
        return 64, 1, tuple((64 * (r // 32) + r % 32, 64 * (r // 32) + r % 32 + 32) for r in range(64))
    if shape == "4x256b":
        return 4, 2, tuple((32 * r,) for r in range(4))
    return 128, {"128x128b": 1, "128x256b": 2}[shape], tuple((r,) for r in range(128))


def expand_narrow(data: np.ndarray, source: str) -> np.ndarray:
    """Packed rows to byte holders: b4x16_p64 (8 of 16 bytes used) to fp4 in bits 5:2, b6x16_p32 (12 of 16) to
    fp6 in 6:1."""
    rows = data.reshape(data.shape[0], -1, 16)
    if source == "b4x16_p64":
        used = rows[:, :, :8]
        out = np.stack([used & 15, used >> 4], -1).reshape(*rows.shape) << 2
    else:
        bits = np.unpackbits(rows[:, :, :12], axis=-1, bitorder="little").reshape(*rows.shape[:2], 16, 6)
        out = (bits * (1 << np.arange(6))).sum(-1) << 1
    return out.astype(np.uint8).reshape(data.shape)


def check_copy(ctas: list, address: int, desc_bits: int, shape: str, ticket, check) -> None:
    rows, chunks, _lanes = copy_lanes(shape)
    at = copy_words(SmemDescriptor.decode(desc_bits), rows, chunks)
    for cta in ctas:
        check.async_smem_read(ticket, cta.rank, at, "tcgen05.cp source")
        check.async_tmem_write(ticket, cta.tmem, slice(0, 8), address & 0xFFFF, chunks * 4, False)


def copy_to_tmem(ctas: list, address: int, desc_bits: int, shape: str, source: str) -> None:
    """tcgen05.cp: each CTA copies from its own shared memory into its own TMEM."""
    rows, chunks, lanes = copy_lanes(shape)
    desc = SmemDescriptor.decode(desc_bits)
    column, width = address & 0xFFFF, chunks * 4
    for cta in ctas:
        offsets = k_major_chunks(desc, rows, chunks)
        _check_range(cta.smem, offsets, 16)
        cta.tmem.check_columns(column, width, "tcgen05.cp")
        data = cta.smem.bytes.reshape(-1, 16)[offsets >> 4].reshape(rows, -1)
        if source:
            data = expand_narrow(data, source)
        values = np.ascontiguousarray(data).view(np.uint32)
        for copies in zip(*lanes):
            cta.tmem.words[np.array(copies), column : column + width] = values
