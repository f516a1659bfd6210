"""Values of one warp's registers, and the arithmetic on them that generated code calls.

A value is either uniform (one Python or NumPy scalar for the 32 lanes) or a NumPy array with one element per
lane:

    class  holds                     uniform        per lane
    p      a predicate               bool           bool[32]
    i      16/32 bits as an integer  int            int64[32], always 0 <= v < 2**32
    q      64 bits as an integer     int            uint64[32]
    f      32 bits as a float        np.float32     float32[32]
    v      two f32 lanes (f32x2)     float32[2, 1]  float32[2, 32]
    t      two 32-bit halves kept apart, a tuple of i or f values

Operators of Python ints and NumPy arrays agree, so most PTX arithmetic is one expression for both forms.
"""

from __future__ import annotations

import functools

import numpy as np

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
S32, S64 = 1 << 31, 1 << 63
_ndarray = np.ndarray
_f32, _f64, _u32, _u64, _i64 = np.float32, np.float64, np.uint32, np.uint64, np.int64
LANES = np.arange(32, dtype=np.int64)


# Conversions between classes: bits are kept, never values.
def i2f(x):
    if type(x) is _ndarray:
        return x.astype(_u32).view(_f32)
    return _u32(x).view(_f32)


def f2i(x):
    if type(x) is _ndarray:
        return x.view(_u32).astype(_i64)
    return int(_f32(x).view(_u32))


def q2t(x):
    """(low, high) halves, class i."""
    if type(x) is _ndarray:
        return (x & M32).astype(_i64), (x >> 32).astype(_i64)
    return x & M32, x >> 32


def t2q(low, high):
    if type(low) is _ndarray or type(high) is _ndarray:
        return as_q(low) | (as_q(high) << 32)
    return low | high << 32


def as_q(x):
    return x.astype(_u64) if type(x) is _ndarray else _u64(x)


def ff2v(low, high):
    """Two f values to a v value."""
    if type(low) is _ndarray or type(high) is _ndarray:
        out = np.empty((2, 32), _f32)
        out[0] = low
        out[1] = high
        return out
    return np.array([[low], [high]], _f32)


def v2q(x):
    bits = x.view(_u32).astype(_u64)
    out = bits[0] | bits[1] << 32
    return out if x.shape[1] == 32 else int(out[0])


def q2v(x):
    low, high = q2t(x)
    return ff2v(i2f(low), i2f(high))


def v_half(x, half):
    row = x[half]
    return row if len(row) == 32 else row[0]


def q2d(x):
    return x.view(_f64) if type(x) is _ndarray else _u64(x).view(_f64)


def d2q(x):
    return x.view(_u64) if type(x) is _ndarray else int(_f64(x).view(_u64))


def sext(x, bits):
    """Signed value of a `bits`-wide field; 64-bit arrays become int64."""
    if bits == 64 and type(x) is _ndarray:
        return x.view(_i64)
    sign = 1 << bits - 1
    if type(x) is _ndarray and x.dtype == _u64:
        x = x.view(_i64)
    return ((x & 2 * sign - 1) ^ sign) - sign


def wrap64(x):
    """Any integer value to class q."""
    if type(x) is _ndarray:
        return x.view(_u64) if x.dtype == _i64 else x.astype(_u64)
    return int(x) & M64


def wrap32(x):
    return (x & M32).astype(_i64) if type(x) is _ndarray else int(x) & M32


# Masks and selection.
def select(a, b, p):
    """a where p, else b."""
    if p is True:
        return a
    if p is False:
        return b
    return np.where(p, a, b)


def select_q(a, b, p):
    if p is True:
        return a
    if p is False:
        return b
    return np.where(p, as_q(a), as_q(b))


def select_t(a, b, p):
    return select(a[0], b[0], p), select(a[1], b[1], p)


def merge(mask, new, old):
    if mask is None or new is old:
        return new
    if type(new) is tuple:
        return merge(mask, new[0], old[0]), merge(mask, new[1], old[1])
    return np.where(mask, new, old)


def merge_q(mask, new, old):
    if mask is None or new is old:
        return new
    return np.where(mask, as_q(new), as_q(old))


def guard(mask, p):
    """Active lanes of a predicated instruction: None = all, False = none."""
    if p is True:
        return mask
    if p is False:
        return False
    active = p if mask is None else p & mask
    return active if active.any() else False


def pnot(p):
    return (not p) if type(p) is bool else ~p


def as_pred(x):
    return x if type(x) is _ndarray else bool(x)


def lanes(x):
    """A value as a per-lane array."""
    return x if type(x) is _ndarray and x.ndim else np.full(32, x)


def spread(x, dtype=_i64):
    return x if type(x) is _ndarray else np.full(32, x, dtype)


def uniform(x, mask):
    """The one value of the active lanes, or None when they differ."""
    if type(x) is not _ndarray:
        return x
    active = x if mask is None else x[mask]
    first = active[0]
    return first.item() if (active == first).all() else None


# Integer arithmetic that needs more than an expression.
def _per_lane(function, dtype=_i64):
    def call(*args):
        if any(type(a) is _ndarray for a in args):
            columns = [a.tolist() if type(a) is _ndarray else [a] * 32 for a in args]
            return np.array([function(*row) for row in zip(*columns)], dtype)
        return function(*args)

    return call


def mulhi_u32(a, b):
    if type(a) is _ndarray or type(b) is _ndarray:
        return ((as_q(a) * as_q(b)) >> 32).astype(_i64)
    return a * b >> 32


mulhi_u64 = _per_lane(lambda a, b: a * b >> 64, _u64)
mulhi_s64 = _per_lane(lambda a, b: (sext(a, 64) * sext(b, 64) >> 64) & M64, _u64)


def mulwide(a, b, signed, bits):
    if signed:
        return wrap64(sext(a, bits) * sext(b, bits))
    if type(a) is _ndarray or type(b) is _ndarray:
        return as_q(a) * as_q(b)
    return a * b


def shl(a, n, bits):
    mask = (1 << bits) - 1
    if type(a) is _ndarray or type(n) is _ndarray:
        a, n = (as_q(a), as_q(n)) if bits == 64 else (a, n)
        clamp = np.minimum(n, bits - 1)
        return np.where(n < bits, (a << clamp) & mask, 0 if bits < 64 else _u64(0))
    return (a << n) & mask if n < bits else 0


def shr(a, n, bits, signed):
    mask = (1 << bits) - 1
    if type(n) is _ndarray:
        clamp = np.minimum(n, bits - 1).astype(_i64)
        if signed:
            return wrap64(sext(a, bits) >> clamp) & mask if bits == 64 else (sext(a, bits) >> clamp) & mask
        out = (as_q(a) >> clamp.astype(_u64)) if bits == 64 else a >> clamp
        return np.where(n < bits, out, out.dtype.type(0))
    if signed:
        out = sext(a, bits) >> min(n, bits - 1)
        return wrap64(out) if bits == 64 else out & mask
    return a >> n if n < bits else a * 0


def divide(a, b, bits, signed, remainder):
    def one(x, y):
        if signed:
            x, y = sext(x, bits), sext(y, bits)
        if y == 0:
            return (1 << bits) - 1
        q = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        return (x - q * y if remainder else q) & ((1 << bits) - 1)

    return _per_lane(one, _u64 if bits == 64 else _i64)(a, b)


def minmax(a, b, bits, signed, largest):
    if signed:
        sign = 1 << bits - 1
        pick = (a ^ sign) > (b ^ sign) if largest else (a ^ sign) < (b ^ sign)
    else:
        pick = a > b if largest else a < b
    return (select_q if bits == 64 else select)(a, b, pick)


def iabs(a, bits):
    return wrap64(abs(sext(a, bits))) & ((1 << bits) - 1) if bits == 64 else abs(sext(a, bits))


popc = _per_lane(lambda a: a.bit_count())
clz32 = _per_lane(lambda a: 32 - a.bit_length())
clz64 = _per_lane(lambda a: 64 - a.bit_length())
brev32 = _per_lane(lambda a: int(f"{a:032b}"[::-1], 2))
brev64 = _per_lane(lambda a: int(f"{a:064b}"[::-1], 2), _u64)


def bfind(a, bits, signed, shift):
    def one(x):
        if signed and x >> bits - 1:
            x ^= (1 << bits) - 1
        position = x.bit_length() - 1
        return M32 if position < 0 else (bits - 1 - position if shift else position)

    return _per_lane(one)(a)


def bfe(a, start, length, bits, signed):
    if type(start) is int and type(length) is int and not signed:
        n = min(length & 255, max(0, bits - (start & 255)))
        return a >> (start & 255) & (1 << n) - 1 if n else a & 0

    def one(x, s, n):
        s, n = s & 255, n & 255
        if n == 0 or (s >= bits and not signed):
            return 0
        if signed:
            sign = x >> min(s + n - 1, bits - 1) & 1
            field = x >> s & (1 << n) - 1
            present = max(0, min(n, bits - s))
            return (field | ((M64 << present) if sign else 0)) & (1 << bits) - 1
        return x >> s & (1 << n) - 1

    return _per_lane(one, _u64 if bits == 64 else _i64)(a, start, length)


def bfi(a, b, start, length, bits):
    if type(start) is int and type(length) is int:
        field = ((1 << (length & 255)) - 1 << (start & 255)) & (1 << bits) - 1
        return b & ((1 << bits) - 1 ^ field) | a << (start & 255) & field if field else b

    def one(x, y, s, n):
        s, n = s & 255, n & 255
        field = ((1 << n) - 1 << s) & (1 << bits) - 1
        return y & ~field | x << s & field

    return _per_lane(one, _u64 if bits == 64 else _i64)(a, b, start, length)


def prmt(a, b, selector):
    """Byte i of the result is byte (nibble i of the selector & 7) of b:a; nibble bit 3 spreads its sign."""
    out = 0
    if type(selector) is int:
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = (b if nibble & 4 else a) >> 8 * (nibble & 3) & 255
            out = out | ((byte >> 7) * 255 if nibble & 8 else byte) << 8 * i
        return out
    both = as_q(t2q(a, b))
    signs = bool((selector & 0x8888).any())
    for i in range(4):
        nibble = selector >> 4 * i
        byte = (both >> ((nibble & 7) << 3).astype(_u64)).astype(_i64) & 255
        if signs:
            byte = np.where(nibble & 8, (byte >> 7) * 255, byte)
        out = out | byte << 8 * i
    return out


@functools.lru_cache(maxsize=1)
def lop3_expressions() -> dict[int, str]:
    """A shortest expression of a, b, c in &, |, ^ and complement for each of the 256 tables of lop3."""
    found = {0xF0: (0, "a"), 0xCC: (0, "b"), 0xAA: (0, "c"), 0: (0, "0"), 0xFF: (0, "M32")}
    cost = 0
    while len(found) < 256:
        cost += 1
        known = list(found.items())
        for table, (price, text) in known:
            if price == cost - 1:
                found.setdefault(table ^ 0xFF, (cost, f"({text} ^ M32)"))
        for x, (price_x, text_x) in known:
            for y, (price_y, text_y) in known:
                if x < y and price_x + price_y == cost - 1:
                    for table, sign in ((x & y, "&"), (x | y, "|"), (x ^ y, "^")):
                        if table not in found:
                            found[table] = (cost, f"({text_x} {sign} {text_y})")
    return {table: text for table, (_cost, text) in found.items()}


def funnel(low, high, n, left, wrap):
    """shf: 32 bits of high:low shifted by n, the upper ones when left."""
    n = n & 31 if wrap else np.minimum(n, 32) if type(n) is _ndarray else min(n, 32)
    both = t2q(low, high)
    if type(both) is not _ndarray and type(n) is not _ndarray:
        return both << n >> 32 & M32 if left else both >> n & M32
    both, n = as_q(both), as_q(n)
    return (both << n >> 32 if left else both >> n & M32).astype(_i64)


# Floating point. Each f32 operation is one IEEE rounding; fma rounds its exact product and sum to f64 first,
# so it can differ from hardware by one unit in the last place when the f64 result is a tie (about one
# operation in 2**29).
def fma32(a, b, c):
    product = np.multiply(a, b, dtype=_f64)
    return (product + c).astype(_f32)


def fmin(a, b, nan=False):
    return _f32_like((np.minimum if nan else np.fmin)(a, b))


def fmax(a, b, nan=False):
    return _f32_like((np.maximum if nan else np.fmax)(a, b))


def _f32_like(x):
    return x if type(x) is _ndarray else _f32(x)


def relu(x):
    return (
        _f32_like(np.where(np.isnan(x), x, np.maximum(x, _f32(0))))
        if type(x) is _ndarray
        else _f32(max(x, 0))
    )


def saturate(x):
    return _f32_like(np.fmin(np.fmax(x, _f32(0)), _f32(1)))


def funary(name, x):
    """MUFU-style functions, evaluated in f64 and rounded once (hardware's approximations differ in the last
    bits)."""
    y = np.asarray(x, _f64)
    with np.errstate(all="ignore"):
        result = {
            "rcp": lambda: 1.0 / y,
            "sqrt": lambda: np.sqrt(y),
            "rsqrt": lambda: 1.0 / np.sqrt(y),
            "ex2": lambda: np.exp2(y),
            "lg2": lambda: np.log2(y),
            "sin": lambda: np.sin(y),
            "cos": lambda: np.cos(y),
            "tanh": lambda: np.tanh(y),
        }[name]()
    return result.astype(_f32) if type(x) is _ndarray else _f32(result)


def funary64(name, x):
    with np.errstate(all="ignore"):
        result = {"rcp": lambda y: 1.0 / y, "sqrt": np.sqrt}[name](np.asarray(x, _f64))
    return result if type(x) is _ndarray else _f64(result)


def float_to_int(x, bits, signed, rounding):
    """cvt.r?i: NaN gives 0, out of range saturates."""
    y = np.asarray(x, _f64)
    y = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](y)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def one(v):
        if v != v:
            return 0
        return (low if v <= low else high if v >= high else int(v)) & ((1 << bits) - 1)

    if type(x) is _ndarray:
        return np.array([one(v) for v in y.tolist()], _u64 if bits == 64 else _i64)
    return one(float(y))


def int_to_float(x, bits, signed, double=False):
    dtype = _f64 if double else _f32
    value = sext(x, bits) if signed else x
    if type(value) is _ndarray:
        return value.astype(dtype)
    if double:
        return _f64(value)
    if -(1 << 53) <= value <= 1 << 53:
        return _f32(value)
    return np.array([value]).astype(_f32)[0]


def round_int(x, rounding):
    function = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    return _f32_like(function(x))
