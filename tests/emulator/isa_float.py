"""Floating-point opcodes: f32, f64, f32x2, f16/bf16 (x2), comparisons and conversions (PTX ISA 9.7.3 to
9.7.5, 9.7.9)."""

from __future__ import annotations

import numpy as np

from . import numerics as N
from .ptx import Instr
from .report import PtxError
from .opcodes import modifiers, op, runtime
from .values import f2i, i2f

_ROUND = {"rn", "rz", "rm", "rp"}
_TYPES = {"f32", "f64", "f16", "f16x2", "bf16", "bf16x2", "f32x2"}
_HALF = {"f16": ("f16_value", "f16_bits"), "bf16": ("bf16_value", "bf16_bits")}


@runtime
def half_op(function, kind, packed, *operands):
    """Apply a float32 function to f16/bf16 values (one or two per 32 bits) and round the result to the
    format."""
    value, bits = (getattr(N, n) for n in _HALF[kind])
    results = []
    for h in range(2 if packed else 1):
        args = [value(np.asarray(x) >> 16 * h & 0xFFFF) for x in operands]
        results.append(np.asarray(bits(np.asarray(function(*args), np.float32))))
    out = results[0] | results[1] << 16 if packed else results[0]
    return out.astype(np.int64) if out.ndim else int(out)


@runtime
def half_compare(function, kind, a, b):
    value = getattr(N, _HALF[kind][0])
    out = function(value(np.asarray(a) & 0xFFFF), value(np.asarray(b) & 0xFFFF))
    return out if np.ndim(out) else bool(out)


@runtime
def widen(kind, x):
    """f16/bf16 bits to an f value."""
    out = getattr(N, _HALF[kind][0])(np.asarray(x) & 0xFFFF)
    return out if out.ndim else np.float32(out)


_HALF_ARITHMETIC = {
    "add": N.sum_to_odd,
    "sub": lambda a, b: N.sum_to_odd(a, -b),
    "mul": np.multiply,  # exact in float64, as is the product of fma
    "fma": lambda a, b, c: N.sum_to_odd(a * b, c),
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}


@runtime
def half_arithmetic(name, kind, packed, limit, *operands):
    """f16/bf16 arithmetic, one or two values per register, each rounded once; `limit` is .relu or .sat."""
    out = _HALF_ARITHMETIC[name](*(N.half_values(kind, x) for x in operands))
    if limit == "relu":
        out = np.maximum(out, 0)
    elif limit == "sat":
        out = np.where(np.isnan(out), 0, np.clip(out, 0, 1))
    bits = N.half_pairs(kind, out)
    bits = bits if packed else bits & 0xFFFF
    return bits if len(bits) == 32 else int(bits[0])


def _check_rounding(instr: Instr, mods: set[str]) -> None:
    odd = mods & {"rz", "rm", "rp"}
    if odd:
        raise PtxError(f"line {instr.line}: rounding .{odd.pop()} is not modelled: {instr.text}")


def arithmetic(e, instr: Instr) -> None:
    name, kind = instr.parts[0], instr.parts[-1]
    extra = {
        "fma": {"relu", "sat"},
        "mad": {"sat"},
        "add": {"sat"},
        "sub": {"sat"},
        "mul": {"sat"},
        "min": {"NaN", "xorsign", "abs"},
        "max": {"NaN", "xorsign", "abs"},
        "div": {"approx", "full"},
    }.get(name, set())
    mods = modifiers(instr, 1, _ROUND | {"ftz"} | extra | _TYPES)
    if len(mods & _TYPES) > 1:
        return _mixed(e, instr, mods)
    if name in ("min", "max") and mods & {"xorsign", "abs"}:
        raise PtxError(f"line {instr.line}: unsupported modifier in: {instr.text}")
    if name == "mad":
        name = "fma"
    d, *sources = instr.operands
    counts = {"fma": {3}, "min": {2, 3}, "max": {2, 3}, "neg": {1}, "abs": {1}}.get(name, {2})
    if len(sources) not in counts or (len(sources) == 3 and name != "fma" and kind != "f32"):
        raise PtxError(f"line {instr.line}: unsupported number of operands: {instr.text}")
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        _check_rounding(instr, mods)
        if "ftz" in mods or name == "div":
            raise PtxError(f"line {instr.line}: not modelled for this type: {instr.text}")
        packed = kind.endswith("x2")
        args = ", ".join(e.read(s, "i", 32 if packed else 16) for s in sources)
        limit = next(iter(mods & {"relu", "sat"}), "")
        name += ".NaN" if "NaN" in mods else ""
        kind = kind.removesuffix("x2")
        e.write(d, f"half_arithmetic({name!r}, {kind!r}, {packed}, {limit!r}, {args})", "i")
        return
    cls = {"f32": "f", "f64": "d", "f32x2": "v"}[kind]
    args = [e.read(s, cls, 32) for s in sources]
    directed = mods & {"rz", "rm", "rp"}
    if directed:
        if kind == "f64":
            raise PtxError(f"line {instr.line}: directed rounding is not modelled: {instr.text}")
        e.write(d, f"directed({name!r}, {next(iter(directed))!r}, {', '.join(args)})", cls)
        return
    if name == "fma":
        expr = f"fma32({', '.join(args)})" if cls != "d" else "{} * {} + {}".format(*args)
    elif name in ("min", "max"):
        expr = args[0]
        for other in args[1:]:  # sm_100 has a form with three inputs
            expr = f"f{name}({expr}, {other}, {'NaN' in mods})"
    elif name in ("neg", "abs"):
        expr = f"-{args[0]}" if name == "neg" else f"abs({args[0]})"
    else:
        expr = f"{args[0]} {dict(add='+', sub='-', mul='*', div='/')[name]} {args[1]}"
    if "sat" in mods:
        expr = f"saturate({expr})"
    if "relu" in mods:
        expr = f"relu({expr})"
    e.write(d, expr, cls)


@runtime
def directed(name, rounding, *args):
    """An f32 operation with .rz/.rm/.rp: the f64 result (exact, or within its own rounding) moved to the
    wanted side."""
    a = [np.asarray(x, np.float64) for x in args]
    exact = {
        "add": lambda: a[0] + a[1],
        "sub": lambda: a[0] - a[1],
        "mul": lambda: a[0] * a[1],
        "fma": lambda: a[0] * a[1] + a[2],
        "div": lambda: a[0] / a[1],
    }[name]()
    return round_directed(exact, rounding)


@runtime
def round_directed(exact, rounding):
    near = exact.astype(np.float32)
    wide = near.astype(np.float64)
    if rounding == "rz":
        wrong, target = np.abs(wide) > np.abs(exact), np.float32(0)
    elif rounding == "rm":
        wrong, target = wide > exact, np.float32(-np.inf)
    else:
        wrong, target = wide < exact, np.float32(np.inf)
    out = np.where(wrong, np.nextafter(near, target), near).astype(np.float32)
    return out if out.ndim else np.float32(out)


def _mixed(e, instr: Instr, mods: set[str]) -> None:
    """`add.rn.f32.f16 d, a, c`: a is f16/bf16, the sum and c are f32 (PTX ISA "Mixed Precision FP
    Instructions")."""
    name, wide, narrow = instr.parts[0], instr.parts[-2], instr.parts[-1]
    _check_rounding(instr, mods)
    if wide != "f32" or narrow not in _HALF or name not in ("add", "sub", "fma"):
        raise PtxError(f"line {instr.line}: unsupported type combination: {instr.text}")
    d, *sources = instr.operands
    narrow_count = 2 if name == "fma" else 1
    args = [
        f"widen({narrow!r}, {e.read(s, 'i', 16)})" if i < narrow_count else e.read(s, "f")
        for i, s in enumerate(sources)
    ]
    e.write(
        d,
        (
            f"fma32({', '.join(args)})"
            if name == "fma"
            else f"{args[0]} {'+' if name == 'add' else '-'} {args[1]}"
        ),
        "f",
    )


@op("fma")
def fma(e, instr: Instr) -> None:
    arithmetic(e, instr)


@op("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def unary_function(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, _ROUND | {"approx", "ftz", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2"})
    _check_rounding(instr, mods)
    d, a = instr.operands
    name, kind = instr.parts[0], instr.parts[-1]
    if kind == "f32":
        e.write(d, f"funary({name!r}, {e.read(a, 'f')})", "f")
    elif kind == "f64":
        e.write(d, f"funary64({name!r}, {e.read(a, 'd')})", "d")
    else:
        e.write(
            d,
            f"half_op(lambda a: funary({name!r}, a), {kind.removesuffix('x2')!r}, {kind.endswith('x2')}, "
            f"{e.read(a, 'i')})",
            "i",
        )


@op("copysign")
def copysign(e, instr: Instr) -> None:
    modifiers(instr, 1, {"f32"})
    d, a, b = instr.operands
    e.write(d, f"({e.read(b, 'i')} & 0x7fffffff) | ({e.read(a, 'i')} & 0x80000000)", "i")


@op("testp")
def testp(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {"f32", "finite", "infinite", "number", "notanumber"})
    d, a = instr.operands
    kind = next(m for m in mods if m != "f32")
    body = {
        "finite": "np.isfinite({})",
        "infinite": "np.isinf({})",
        "number": "~np.isnan({})",
        "notanumber": "np.isnan({})",
    }[kind].format(e.read(a, "f"))
    e.write(d, f"as_pred({body})", "p")


_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def comparison(e, instr: Instr, compare: str, a, b) -> str:
    """Ordered comparisons are false for NaN, `...u` ones true; num/nan test for it."""
    kind = instr.parts[-1]
    modifiers(
        instr,
        1,
        {
            *_COMPARE,
            *(c + "u" for c in _COMPARE),
            "num",
            "nan",
            "ftz",
            "and",
            "or",
            "xor",
            "f32",
            "f64",
            "f16",
            "bf16",
        },
    )
    if kind in _HALF:
        x, y = (f"widen({kind!r}, {e.read(s, 'i', 16)})" for s in (a, b))
    else:
        cls = {"f32": "f", "f64": "d"}[kind]
        x, y = e.read(a, cls), e.read(b, cls)
    unordered = f"(np.isnan({x}) | np.isnan({y}))"
    if compare in ("num", "nan"):
        return f"as_pred({unordered if compare == 'nan' else '~' + unordered})"
    if compare in _COMPARE:
        body = f"{x} {_COMPARE[compare]} {y}"
        if compare == "ne":  # NumPy's != is true for NaN
            body = f"({body}) & ~{unordered}"
        return f"as_pred({body})"
    return f"as_pred(({x} {_COMPARE[compare[:-1]]} {y}) | {unordered})"


# Conversions.
@runtime
def pack_half(kind, rounding, relu, high, low):
    """cvt.{f16x2,bf16x2}.f32 d, a, b: a in the upper half."""
    if (
        kind == "bf16"
        and rounding == "rn"
        and not relu
        and isinstance(high, np.ndarray)
        and isinstance(low, np.ndarray)
    ):
        return N.pack_bf16(high, low)
    function = getattr(N, _HALF[kind][1])
    if relu:
        high, low = np.where(high < 0, np.float32(0), high), np.where(low < 0, np.float32(0), low)
    out = function(high, rounding) << 16 | function(low, rounding)
    return out.astype(np.int64) if np.ndim(out) else int(out)


@runtime
def to_half(kind, rounding, relu, x):
    if relu:
        x = np.where(x < 0, np.float32(0), x)
    out = getattr(N, _HALF[kind][1])(x, rounding)
    return np.asarray(out, np.int64) if np.ndim(out) else int(out)


@runtime
def pack_narrow(kind, relu, high, low):
    """Two f32 to a pair of narrow codes: fp4 in one byte, fp6/fp8 in two."""
    shift = 4 if kind == "e2m1" else 8
    out = N.encode(kind, high, relu) << shift | N.encode(kind, low, relu)
    return out if np.ndim(out) else int(out)


@runtime
def pack_ue8m0(rounding, high, low):
    out = N.ue8m0_bits(high, rounding) << 8 | N.ue8m0_bits(low, rounding)
    return out if np.ndim(out) else int(out)


@runtime
def unpack_narrow(kind, half, relu, x):
    """A pair of narrow codes to f16x2 or bf16x2."""
    x = np.asarray(x)
    shift, mask = (4, 15) if kind == "e2m1" else (8, 255)
    table = N.decode_table(kind)
    function = getattr(N, _HALF[half][1])
    low, high = (table[(x >> s & mask) & len(table) - 1] for s in (0, shift))
    if relu:
        low, high = np.maximum(low, 0), np.maximum(high, 0)
    out = np.asarray(function(high)) << 16 | np.asarray(function(low))
    return out.astype(np.int64) if out.ndim else int(out)


_NARROW = {"e2m1x2": "e2m1", "e2m3x2": "e2m3", "e3m2x2": "e3m2", "e4m3x2": "e4m3", "e5m2x2": "e5m2"}
_INTS = {"s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"}


def convert(e, instr: Instr) -> None:
    """cvt with at least one floating-point side: .{rounding}.dtype.atype."""
    target, source = instr.parts[-2], instr.parts[-1]
    integer_rounding = {"rni", "rzi", "rmi", "rpi"}
    mods = set(instr.parts[1:-2])
    unknown = mods - _ROUND - integer_rounding - {"ftz", "sat", "satfinite", "relu", "approx"}
    if unknown:
        raise PtxError(f"line {instr.line}: unknown modifier .{sorted(unknown)[0]} in: {instr.text}")
    d, *sources = instr.operands
    rounding = next(iter(mods & _ROUND), "rn")
    relu = "relu" in mods
    result = None
    if target in ("f16x2", "bf16x2") and source == "f32" and len(sources) == 2:
        result = (
            f"pack_half({target[:-2]!r}, {rounding!r}, {relu}, {e.read(sources[0], 'f')}, "
            f"{e.read(sources[1], 'f')})",
            "i",
        )
    elif target in _NARROW and source == "f32":
        result = (
            f"pack_narrow({_NARROW[target]!r}, {relu}, {e.read(sources[0], 'f')}, {e.read(sources[1], 'f')})",
            "i",
        )
    elif target == "ue8m0x2" and source == "f32":
        result = f"pack_ue8m0({rounding!r}, {e.read(sources[0], 'f')}, {e.read(sources[1], 'f')})", "i"
    elif target in ("f16x2", "bf16x2") and source in _NARROW:
        result = (
            f"unpack_narrow({_NARROW[source]!r}, {target[:-2]!r}, {relu}, {e.read(sources[0], 'i')})",
            "i",
        )
    elif target == "bf16x2" and source == "ue8m0x2":
        result = f"unpack_narrow('ue8m0', 'bf16', False, {e.read(sources[0], 'i')})", "i"
    elif target in _HALF and source == "f32":
        result = f"to_half({target!r}, {rounding!r}, {relu}, {e.read(sources[0], 'f')})", "i"
    elif target == "f32" and source in _HALF:
        result = f"widen({source!r}, {e.read(sources[0], 'i', 16)})", "f"
    elif target == "f64" and source in _HALF:
        result = f"np.float64(widen({source!r}, {e.read(sources[0], 'i', 16)}))", "d"
    elif target in _HALF and source == "f64":
        result = f"to_half({target!r}, {rounding!r}, {relu}, np.float32({e.read(sources[0], 'd')}))", "i"
    elif target == "f32" and source == "f32":
        x = e.read(sources[0], "f")
        if mods & integer_rounding:
            x = f"round_int({x}, {(mods & integer_rounding).pop()!r})"
        result = (f"saturate({x})" if "sat" in mods else f"relu({x})" if relu else x), "f"
    elif target == "f64" and source == "f32":
        x = e.read(sources[0], "f")
        result = f"np.float64({x})" if e.emitting else "", "d"
    elif target == "f32" and source == "f64":
        result = f"np.float32({e.read(sources[0], 'd')})", "f"
    elif target == "tf32" and source == "f32":
        result = f"round_tf32({e.read(sources[0], 'f')})", "f"
    elif target in _INTS and source in ("f32", "f64", "f16", "bf16"):
        bits = int(target[1:])
        x = (
            f"widen({source!r}, {e.read(sources[0], 'i', 16)})"
            if source in _HALF
            else e.read(sources[0], "f" if source == "f32" else "d")
        )
        how = (mods & integer_rounding).pop()
        result = f"float_to_int({x}, {bits}, {target[0] == 's'}, {how!r})", "q" if bits == 64 else "i"
    elif source in _INTS and target in ("f32", "f64", "f16", "bf16"):
        bits = int(source[1:])
        x = e.read(sources[0], "q" if bits == 64 else "i", bits)
        if rounding != "rn":
            raise PtxError(f"line {instr.line}: rounding .{rounding} is not modelled: {instr.text}")
        x = (
            f"int_to_float({x}{' & ' + str((1 << bits) - 1) if bits < 32 else ''}, {bits}, "
            f"{source[0] == 's'}, {target == 'f64'})"
        )
        result = (
            (f"to_half({target!r}, 'rn', False, {x})", "i")
            if target in _HALF
            else (x, "d" if target == "f64" else "f")
        )
    elif target in _HALF and source in _HALF:
        result = (
            f"to_half({target!r}, {rounding!r}, {relu}, widen({source!r}, {e.read(sources[0], 'i', 16)}))",
            "i",
        )
    if result is None:
        raise PtxError(f"line {instr.line}: unsupported conversion: {instr.text}")
    e.write(d, *result)


@runtime
def round_tf32(x):
    """f32 to tf32: ties away from zero at bit 13 (`.rna`, and `.rn` to the same precision)."""
    bits = f2i(x)
    return i2f((bits + 0x1000) & 0xFFFFE000)
