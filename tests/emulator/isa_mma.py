"""Warp-level matrix multiply: mma.sync (PTX ISA 9.7.14, "Matrix multiply-accumulate operation using mma
instruction").

Arithmetic: operand products are exact, one instruction's terms and C are summed in float64 and rounded once
to float32. The order of the hardware's additions, and what it truncates inside an instruction, are not
specified.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from .numerics import bf16_value, decode_table
from .opcodes import modifiers, op, runtime
from .ptx import Instr
from .report import PtxError
from .values import LANES, M32, _ndarray, f2i

_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}
_SHAPES = {
    "m16n8k8": {"f16", "bf16", "tf32"},
    "m16n8k16": {"f16", "bf16"},
    "m16n8k32": {"e4m3", "e5m2", "s8", "u8"},
}


def fragment_values(registers: list, kind: str) -> np.ndarray:
    """float64[registers, 32, elements]: the elements packed in each lane's 32-bit registers, lowest bits
    first."""
    words = np.empty((len(registers), 32), np.uint32)
    for i, r in enumerate(registers):
        if type(r) is _ndarray:
            words[i] = r.view(np.uint32) if r.dtype == np.float32 else r
        else:
            words[i] = f2i(r) if isinstance(r, np.floating) else r
    return element_values(words[:, :, None], kind)


def element_values(words: np.ndarray, kind: str) -> np.ndarray:
    """float64 elements of contiguous data (its last axis is unpacked) in an operand format."""
    if kind == "tf32":
        return (words.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return bf16_value(words.view(np.uint16)).astype(np.float64)
    if kind in ("s8", "u8"):
        return words.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return decode_table(kind).astype(np.float64)[words.view(np.uint8)]


@functools.lru_cache(maxsize=None)
def a_fragment_index(bits: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of element [register, lane, i] of the 16 x k matrix A ("Matrix fragments for
    mma.m16n8k16"): row lane/4 + 8*(register%2), column p*(lane%4) + 4*p*(register/2) + i, p elements a
    register."""
    p = 32 // bits
    r, t, i = np.arange(k // (2 * p))[:, None, None], LANES[None, :, None], np.arange(p)[None, None, :]
    return t // 4 + 8 * (r % 2) + 0 * i, p * (t % 4) + 4 * p * (r // 2) + i


@functools.lru_cache(maxsize=None)
def _b_fragment_index(bits: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, column) of element [register, lane, i] of the k x 8 matrix B: k as A's column, column lane/4."""
    p = 32 // bits
    r, t, i = np.arange(k // (4 * p))[:, None, None], LANES[None, :, None], np.arange(p)[None, None, :]
    return p * (t % 4) + 4 * p * r + i, t // 4 + 0 * r + 0 * i


_C_ROW = np.stack([LANES // 4 + 8 * (r // 2) for r in range(4)])
_C_COLUMN = np.stack([2 * (LANES % 4) + r % 2 for r in range(4)])


@runtime
def mma_sync(w, k, a_kind, b_kind, a, b, c):
    """D fragments (class f, or i for integer accumulation)."""
    bits = _BITS[a_kind]
    left, right = np.zeros((16, k)), np.zeros((k, 8))
    left[a_fragment_index(bits, k)] = fragment_values(a, a_kind)
    right[_b_fragment_index(bits, k)] = fragment_values(b, b_kind)
    product = (left @ right)[_C_ROW, _C_COLUMN]
    w.machine.counters["mma.sync"] += 1
    if a_kind in ("s8", "u8"):
        total = [product[i].astype(np.int64) + c[i] & M32 for i in range(4)]
        return total
    for i in range(4):
        product[i] += c[i]
    return list(product.astype(np.float32))


@op("mma", starts_block=True)
def mma(e, instr: Instr) -> None:
    shape = next((p for p in instr.parts if re.fullmatch(r"m\d+n\d+k\d+", p)), "")
    mods = modifiers(instr, 1, {"sync", "aligned", "row", "col", "f32", "s32", *_BITS, *_SHAPES})
    d_kind, a_kind, b_kind, c_kind = instr.parts[-4:]
    integer = a_kind in ("s8", "u8")
    accumulator = "s32" if integer else "f32"
    fits = (
        {a_kind, b_kind} <= _SHAPES.get(shape, set())
        and d_kind == c_kind == accumulator
        and (a_kind == b_kind or _BITS[a_kind] == 8 and integer == (b_kind in ("s8", "u8")))
        and {"sync", "aligned", "row", "col"} <= mods
    )
    if not fits:
        raise PtxError(f"line {instr.line}: unsupported shape or types: {instr.text}")
    d, a, b, c = (o.items for o in instr.operands)
    k = int(shape.split("k")[1])
    a_count = k * _BITS[a_kind] // 64
    if (len(d), len(a), len(b), len(c)) != (4, a_count, a_count // 2, 4):
        raise PtxError(f"line {instr.line}: wrong number of registers: {instr.text}")
    cls = "i" if integer else "f"
    a_code, b_code = (", ".join(e.read(r, "i") for r in regs) for regs in (a, b))
    c_code = ", ".join(e.read(r, cls) for r in c)
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    t = e.temp()
    e.line(f"{t} = mma_sync(w, {k}, {a_kind!r}, {b_kind!r}, [{a_code}], [{b_code}], [{c_code}])")
    for i, item in enumerate(d):
        e.write(item, f"{t}[{i}]", cls)
