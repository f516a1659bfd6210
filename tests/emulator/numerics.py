"""Narrow floating-point formats: decode tables and round-to-nearest-even encoders, by value.

Formats (PTX ISA, "Alternate Floating-Point Data Formats"; OCP MX specification):
e2m1 (fp4), e2m3 and e3m2 (fp6), e4m3 (no infinity, NaN = 0x7f), e5m2, ue8m0 (power of two, 0xff = NaN),
ue4m3, bf16.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=None)
def decode_table(name: str) -> np.ndarray:
    """float32 value of every code of `name` (an e4m3 NaN decodes to NaN)."""
    if name == "ue8m0":
        table = np.exp2(np.arange(256, dtype=np.float64) - 127)
        table[255] = np.nan
        return table.astype(np.float32)
    exponent_bits, mantissa_bits, bias = {
        "e2m1": (2, 1, 1),
        "e2m3": (2, 3, 1),
        "e3m2": (3, 2, 3),
        "e4m3": (4, 3, 7),
        "ue4m3": (4, 3, 7),
        "e5m2": (5, 2, 15),
    }[name]
    bits = 1 + exponent_bits + mantissa_bits
    code = np.arange(1 << bits)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    value = np.where(
        exponent == 0,
        mantissa * 2.0 ** (1 - bias - mantissa_bits),
        (1 + mantissa * 2.0**-mantissa_bits) * np.exp2(exponent.astype(np.float64) - bias),
    )
    if name in ("e4m3", "ue4m3"):
        value[code & 0x7F == 0x7F] = np.nan
    if name == "e5m2":
        value[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    sign = 1 if name == "ue4m3" else np.where(code >> bits - 1, -1, 1)
    return (value * sign).astype(np.float32)


@functools.lru_cache(maxsize=None)
def fp4_pair_table() -> np.ndarray:
    """float32[256, 2]: the two e2m1 values of a byte, low nibble first."""
    table = decode_table("e2m1")
    byte = np.arange(256)
    return np.stack([table[byte & 15], table[byte >> 4]], axis=1)


def encode(name: str, x: np.ndarray, relu: bool = False) -> np.ndarray:
    """Round float32 to the nearest code (ties to even), saturating to the largest finite value
    (`.satfinite`)."""
    x = np.asarray(x, np.float32)
    if relu:
        x = np.where(x < 0, np.float32(0), x)
    table = decode_table(name)
    half = len(table) // 2
    positive = table[:half].astype(np.float64)
    finite = np.flatnonzero(np.isfinite(positive))
    grid = positive[finite]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    upper = np.clip(np.searchsorted(grid, magnitude), 0, len(grid) - 1)
    lower = np.maximum(upper - 1, 0)
    to_lower, to_upper = magnitude - grid[lower], grid[upper] - magnitude
    pick = np.where(
        to_lower < to_upper,
        lower,
        np.where(to_upper < to_lower, upper, np.where(upper % 2 == 0, upper, lower)),
    )
    code = finite[pick] | np.where(np.signbit(x), half, 0)
    return np.where(np.isnan(x), {"e4m3": 0x7F, "e5m2": 0x7F}.get(name, half - 1), code).astype(np.int64)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, an inexact sum rounded to odd: rounding it again to a format of at most 51 bits gives
    the correctly rounded sum."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    fix = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    away = (error > 0) == (total > 0)
    return np.where(fix, bits + np.where(away, 1, -1), bits).view(np.float64)


def half_values(kind: str, x: object) -> np.ndarray:
    """float64[..., 2]: the two f16 or bf16 values of 32-bit registers, low half first."""
    words = np.atleast_1d(np.asarray(x).astype(np.uint32))[..., None]
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    return (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def half_pairs(kind: str, x: np.ndarray) -> np.ndarray:
    """Registers int64[...] of float64[..., 2] rounded to nearest even once; NaN is 0x7fff (PTX ISA 9.7.4)."""
    if kind == "f16":
        bits = x.astype(np.float16).view(np.uint16)
    else:
        near = x.astype(np.float32)  # to odd, for the second rounding
        wide = near.astype(np.float64)
        bits32 = near.view(np.int32)
        fix = (wide != x) & (bits32 & 1 == 0) & np.isfinite(near)
        odd = np.where(fix, bits32 + np.where(np.abs(x) > np.abs(wide), 1, -1), bits32) & 0xFFFFFFFF
        bits = (odd + 0x7FFF + (odd >> 16 & 1) >> 16).astype(np.uint16)
    nan = np.isnan(x)
    if nan.any():
        bits = np.where(nan, np.uint16(0x7FFF), bits)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0].astype(np.int64)


def bf16_bits(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """float32 to bf16 bits: nearest even (`rn`) or truncation (`rz`)."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.int64)
    rounded = bits >> 16 if rounding == "rz" else bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded & 0xFFFF)


def pack_bf16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """`bf16_bits(high) << 16 | bf16_bits(low)` for 32 lanes, in few NumPy calls: epilogues spend their time
    here."""
    both = np.empty((2, 32), np.float32)
    both[0], both[1] = low, high
    if np.isnan(both).any():
        return bf16_bits(both[1]) << 16 | bf16_bits(both[0])
    bits = both.view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1)
    return (bits[0] >> 16 | bits[1] & 0xFFFF0000).astype(np.int64)


def bf16_value(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).astype(np.uint32).view(np.float32)


def f16_bits(x: np.ndarray, rounding: str = "rn") -> np.ndarray:
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if rounding == "rz":
        too_far = np.abs(half.astype(np.float32)) > np.abs(x)
        half = np.where(too_far, np.nextafter(half, np.float16(0)), half).astype(np.float16)
    return half.view(np.uint16).astype(np.int64)


def f16_value(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits).astype(np.uint16).view(np.float16).astype(np.float32)


def ue8m0_bits(x: np.ndarray, rounding: str) -> np.ndarray:
    """float32 to ue8m0: `rz` keeps the exponent, `rp` rounds up to the next power of two."""
    bits = np.abs(np.asarray(x, np.float32)).view(np.uint32).astype(np.int64)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    if rounding == "rp":
        exponent = exponent + ((mantissa != 0) & ~((exponent == 0) & (mantissa <= 0x400000)))
    return np.where(np.isnan(x), 255, np.minimum(exponent, 254))
