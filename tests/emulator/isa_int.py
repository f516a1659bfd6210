"""Integer, logic, comparison, selection and conversion opcodes (PTX ISA 9.7.1, 9.7.6 to 9.7.9)."""

from __future__ import annotations

import re

from .ptx import SINK, Imm, Instr, Pair, Reg, Special, Symbol, Vec
from .report import PtxError
from .opcodes import modifiers, op
from .values import lop3_expressions

_BITS = {
    "s8": 8,
    "u8": 8,
    "b8": 8,
    "s16": 16,
    "u16": 16,
    "b16": 16,
    "s32": 32,
    "u32": 32,
    "b32": 32,
    "s64": 64,
    "u64": 64,
    "b64": 64,
}


def _int_type(instr: Instr) -> tuple[int, bool, str, str]:
    """(bits, signed, class, mask literal) of the type suffix."""
    name = instr.parts[-1]
    if name not in _BITS:
        raise PtxError(f"line {instr.line}: unsupported type .{name} in: {instr.text}")
    bits = _BITS[name]
    return bits, name[0] == "s", "q" if bits == 64 else "i", hex((1 << bits) - 1)


def float_typed(instr: Instr) -> bool:
    return instr.parts[-1] in ("f32", "f64", "f16", "f16x2", "bf16", "bf16x2", "f32x2")


def binary(e, instr: Instr, template: str) -> None:
    bits, _signed, cls, mask = _int_type(instr)
    d, a, b = instr.operands
    e.write(d, template.format(a=e.read(a, cls, bits), b=e.read(b, cls, bits), mask=mask), cls)


@op("add", "sub")
def add_sub(e, instr: Instr) -> None:
    if float_typed(instr):
        from .isa_float import arithmetic

        return arithmetic(e, instr)
    modifiers(instr, 1, set(_BITS))
    binary(e, instr, "({a} + {b}) & {mask}" if instr.parts[0] == "add" else "({a} - {b}) & {mask}")


@op("mul")
def mul(e, instr: Instr) -> None:
    if float_typed(instr):
        from .isa_float import arithmetic

        return arithmetic(e, instr)
    bits, signed, cls, mask = _int_type(instr)
    mods = modifiers(instr, 1, {"lo", "hi", "wide", *_BITS})
    d, a, b = instr.operands
    x, y = e.read(a, cls, bits), e.read(b, cls, bits)
    e.write(d, *_product(x, y, mods, bits, signed, cls, mask))


def _product(x: str, y: str, mods: set[str], bits: int, signed: bool, cls: str, mask: str) -> tuple[str, str]:
    if "wide" in mods:
        if bits == 16:
            return (f"(sext({x}, 16) * sext({y}, 16)) & M32" if signed else f"{x} * {y}"), "i"
        return f"mulwide({x}, {y}, {signed}, {bits})", "q"
    if "lo" in mods:
        return f"({x} * {y}) & {mask}", cls
    if bits == 64:
        return f"mulhi_{'s' if signed else 'u'}64({x}, {y})", "q"
    if signed:
        return f"(sext({x}, {bits}) * sext({y}, {bits}) >> {bits}) & {mask}", "i"
    return (f"mulhi_u32({x}, {y})" if bits == 32 else f"{x} * {y} >> 16"), "i"


@op("mad")
def mad(e, instr: Instr) -> None:
    if float_typed(instr):
        from .isa_float import arithmetic

        return arithmetic(e, instr)
    bits, signed, cls, mask = _int_type(instr)
    mods = modifiers(instr, 1, {"lo", "hi", "wide", *_BITS})
    d, a, b, c = instr.operands
    product, result = _product(e.read(a, cls, bits), e.read(b, cls, bits), mods, bits, signed, cls, mask)
    wide = "M64" if result == "q" else "M32" if bits == 32 or "wide" in mods else mask
    e.write(d, f"(({product}) + {e.read(c, result, 64 if result == 'q' else 32)}) & {wide}", result)


@op("div", "rem")
def div_rem(e, instr: Instr) -> None:
    if float_typed(instr):
        from .isa_float import arithmetic

        return arithmetic(e, instr)
    modifiers(instr, 1, set(_BITS))
    bits, signed, _cls, _mask = _int_type(instr)
    binary(e, instr, f"divide({{a}}, {{b}}, {bits}, {signed}, {instr.parts[0] == 'rem'})")


@op("min", "max")
def min_max(e, instr: Instr) -> None:
    if float_typed(instr):
        from .isa_float import arithmetic

        return arithmetic(e, instr)
    mods = modifiers(instr, 1, {"relu", *_BITS})
    bits, signed, _cls, _mask = _int_type(instr)
    if "relu" in mods:
        raise PtxError(f"line {instr.line}: unsupported .relu in: {instr.text}")
    binary(e, instr, f"minmax({{a}}, {{b}}, {bits}, {signed}, {instr.parts[0] == 'max'})")


@op("neg", "abs")
def neg_abs(e, instr: Instr) -> None:
    if float_typed(instr):
        from .isa_float import arithmetic

        return arithmetic(e, instr)
    modifiers(instr, 1, set(_BITS))
    bits, _signed, cls, mask = _int_type(instr)
    d, a = instr.operands
    x = e.read(a, cls, bits)
    e.write(d, f"(0 - {x}) & {mask}" if instr.parts[0] == "neg" else f"iabs({x}, {bits})", cls)


@op("and", "or", "xor")
def logic(e, instr: Instr) -> None:
    modifiers(instr, 1, {"pred", "b16", "b32", "b64"})
    sign = {"and": "&", "or": "|", "xor": "^"}[instr.parts[0]]
    d, a, b = instr.operands
    if instr.parts[1] == "pred":
        e.write(d, f"{e.read(a, 'p')} {sign} {e.read(b, 'p')}", "p")
    else:
        binary(e, instr, f"{{a}} {sign} {{b}}")


@op("not")
def not_(e, instr: Instr) -> None:
    modifiers(instr, 1, {"pred", "b16", "b32", "b64"})
    d, a = instr.operands
    if instr.parts[1] == "pred":
        e.write(d, f"pnot({e.read(a, 'p')})", "p")
    else:
        bits, _signed, cls, mask = _int_type(instr)
        e.write(d, f"{e.read(a, cls, bits)} ^ {mask}", cls)


@op("shl", "shr")
def shift(e, instr: Instr) -> None:
    modifiers(instr, 1, set(_BITS))
    bits, signed, cls, mask = _int_type(instr)
    d, a, n = instr.operands
    x, left = e.read(a, cls, bits), instr.parts[0] == "shl"
    if isinstance(n, Imm) and 0 <= n.value < bits:
        if left:
            expr = f"({x} << {n.value}) & {mask}"
        elif signed:
            expr = (
                f"shr({x}, {n.value}, 64, True)"
                if bits == 64
                else f"(sext({x}, {bits}) >> {n.value}) & {mask}"
            )
        else:
            expr = f"{x} >> {n.value}"
    else:
        count = e.read(n, "i", 32)
        expr = f"shl({x}, {count}, {bits})" if left else f"shr({x}, {count}, {bits}, {signed})"
    e.write(d, expr, cls)


@op("shf")
def shf(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {"l", "r", "wrap", "clamp", "b32"})
    d, a, b, c = instr.operands
    e.write(
        d,
        f"funnel({e.read(a, 'i')}, {e.read(b, 'i')}, {e.read(c, 'i')}, {'l' in mods}, {'wrap' in mods})",
        "i",
    )


_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


@op("setp")
def setp(e, instr: Instr) -> None:
    compare = instr.parts[1]
    boolean = instr.parts[2] if instr.parts[2] in ("and", "or", "xor") else None
    d, a, b, *rest = instr.operands
    if float_typed(instr):
        from .isa_float import comparison

        expr = comparison(e, instr, compare, a, b)
    else:
        modifiers(instr, 1, {*_COMPARE, *_BITS, "and", "or", "xor"})
        bits, signed, cls, _mask = _int_type(instr)
        x, y = e.read(a, cls, bits), e.read(b, cls, bits)
        if signed and compare not in ("eq", "ne"):
            sign = hex(1 << bits - 1)
            y = str((b.value & (1 << bits) - 1) ^ 1 << bits - 1) if isinstance(b, Imm) else f"({y} ^ {sign})"
            x = f"({x} ^ {sign})"
        expr = f"{x} {_COMPARE[compare]} {y}"
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, SINK)
    sign = {"and": "&", "or": "|", "xor": "^"}.get(boolean)
    t = e.temp()
    e.line(f"{t} = {expr}")
    extra = e.read(rest[0], "p") if rest else None
    e.write(first, f"({t}) {sign} {extra}" if sign else t, "p")
    if second is not SINK:
        e.write(second, f"pnot({t}) {sign} {extra}" if sign else f"pnot({t})", "p")


@op("selp")
def selp(e, instr: Instr) -> None:
    modifiers(instr, 1, {*_BITS, "f32", "f64"})
    d, a, b, p = instr.operands
    cls = e.storage(d) if isinstance(d, Reg) else "i"
    if isinstance(cls, tuple):
        cls = "q"
    if cls == "n":  # recording: selection changes no bits, so it has no opinion on the class
        e.copy(d, a)
        e.copy(d, b)
        e.read(p, "p")
        return
    function = "select_q" if cls == "q" else "select"
    bits = 16 if instr.parts[1][1:] == "16" else 32
    e.write(d, f"{function}({e.read(a, cls, bits)}, {e.read(b, cls, bits)}, {e.read(p, 'p')})", cls)


@op("mov")
def mov(e, instr: Instr) -> None:
    modifiers(instr, 1, {*_BITS, "pred", "f32", "f64", "b128"})
    d, a = instr.operands
    kind = instr.parts[1]
    if kind == "pred":
        e.write(d, e.read(a, "p"), "p")
    elif kind == "b128":
        _mov128(e, d, a)
    elif isinstance(d, Vec):
        _unpack(e, d, a, _BITS[kind])
    elif isinstance(a, Vec):
        _pack(e, d, a, _BITS[kind])
    elif isinstance(a, (Special, Symbol)):
        wide = kind in ("b64", "u64", "s64")
        e.write(d, e.read(a, "q" if wide else "i"), "q" if wide else "i")
    else:
        e.copy(d, a, 16 if kind.endswith("16") else 32)


def _pack(e, d, vec: Vec, bits: int) -> None:
    items = vec.items
    if bits == 64 and len(items) == 2:
        e.pack(d, items)
        return
    each = bits // len(items)
    parts = [
        f"({e.read(item, 'i', each)} << {i * each})" if i else e.read(item, "i", each)
        for i, item in enumerate(items)
    ]
    if bits == 64:
        parts = [f"(wrap64({e.read(item, 'i', each)}) << {i * each})" for i, item in enumerate(items)]
    e.write(d, " | ".join(parts), "q" if bits == 64 else "i")


def _unpack(e, vec: Vec, a, bits: int) -> None:
    items = vec.items
    if bits == 64 and len(items) == 2:
        e.unpack(items, a)
        return
    each = bits // len(items)
    t = e.temp()
    e.line(f"{t} = {e.read(a, 'q' if bits == 64 else 'i', bits)}")
    for i, item in enumerate(items):
        if item is not SINK:
            field = f"({t} >> {i * each}) & {(1 << each) - 1}"
            e.write(item, f"wrap32({field})" if bits == 64 else field, "i")


def _mov128(e, d, a) -> None:
    if isinstance(d, Vec):
        t = e.temp()
        e.line(f"{t} = {e.read(a, 'o')}")
        for i, item in enumerate(d.items):
            if item is not SINK:
                e.write(item, f"t2q({t}[{2 * i}], {t}[{2 * i + 1}])", "q")
    elif isinstance(a, Vec):
        low, high = (f"*q2t({e.read(item, 'q')})" for item in a.items)
        e.write(d, f"[{low}, {high}]", "o")
    else:
        e.write(d, e.read(a, "o"), "o")


@op("cvta")
def cvta(e, instr: Instr) -> None:
    mods = modifiers(
        instr,
        1,
        {"to", "global", "shared", "shared::cta", "shared::cluster", "local", "param", "const", "u64", "u32"},
    )
    d, a = instr.operands
    space = next(m for m in mods if m not in ("to", "u64", "u32")).split("::")[0]
    window = {"shared": "SHARED_WINDOW", "local": "LOCAL_WINDOW"}.get(space)
    x = e.read(a, "q")
    if window is None:
        e.write(d, x, "q")
    else:
        e.write(d, f"{x} - {window}" if "to" in mods else f"{x} + {window}", "q")


@op("mapa")
def mapa(e, instr: Instr) -> None:
    modifiers(instr, 1, {"shared::cluster", "u32", "u64"})
    d, a, rank = instr.operands
    wide = instr.parts[-1] == "u64"
    cls = "q" if wide else "i"
    space = "shared::cluster" in instr.parts
    e.write(d, f"w.mapa({e.read(a, cls)}, {e.read(rank, 'i')}, {not space})", cls)


@op("getctarank")
def getctarank(e, instr: Instr) -> None:
    modifiers(instr, 1, {"shared::cluster", "u32", "u64"})
    d, a = instr.operands
    x = e.read(a, "q" if instr.parts[-1] == "u64" else "i")
    e.write(d, f"wrap32({x} >> 24 & 255)", "i")


@op("isspacep")
def isspacep(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {"shared", "global", "local", "const", "shared::cta", "shared::cluster"})
    d, a = instr.operands
    e.write(d, f"w.is_space({e.read(a, 'q')}, {next(iter(mods))!r})", "p")


_SIMPLE = {
    "popc": {"b32": "popc({0})", "b64": "popc({0})"},
    "clz": {"b32": "clz32({0})", "b64": "clz64({0})"},
    "brev": {"b32": "brev32({0})", "b64": "brev64({0})"},
}


@op("popc", "clz", "brev")
def bit_counts(e, instr: Instr) -> None:
    d, a = instr.operands
    kind = instr.parts[1]
    x = e.read(a, "q" if kind == "b64" else "i")
    e.write(d, _SIMPLE[instr.parts[0]][kind].format(x), "q" if instr.opcode == "brev.b64" else "i")


@op("bfind")
def bfind_(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {"shiftamt", "u32", "s32", "u64", "s64"})
    bits, signed, cls, _mask = _int_type(instr)
    d, a = instr.operands
    e.write(d, f"bfind({e.read(a, cls)}, {bits}, {signed}, {'shiftamt' in mods})", "i")


@op("bfe")
def bfe_(e, instr: Instr) -> None:
    modifiers(instr, 1, {"u32", "s32", "u64", "s64"})
    bits, signed, cls, _mask = _int_type(instr)
    d, a, s, n = instr.operands
    e.write(d, f"bfe({e.read(a, cls)}, {e.read(s, 'i')}, {e.read(n, 'i')}, {bits}, {signed})", cls)


@op("bfi")
def bfi_(e, instr: Instr) -> None:
    modifiers(instr, 1, {"b32", "b64"})
    bits, _signed, cls, _mask = _int_type(instr)
    d, a, b, s, n = instr.operands
    e.write(d, f"bfi({e.read(a, cls)}, {e.read(b, cls)}, {e.read(s, 'i')}, {e.read(n, 'i')}, {bits})", cls)


@op("prmt")
def prmt_(e, instr: Instr) -> None:
    modifiers(instr, 1, {"b32"})
    d, a, b, c = instr.operands
    e.write(d, f"prmt({e.read(a, 'i')}, {e.read(b, 'i')}, {e.read(c, 'i')})", "i")


@op("lop3")
def lop3_(e, instr: Instr) -> None:
    modifiers(instr, 1, {"b32"})
    d, a, b, c, table = instr.operands
    names = {name: e.read(x, "i") for name, x in zip("abc", (a, b, c))}
    text = lop3_expressions()[table.value & 255]
    e.write(d, re.sub(r"[abc]", lambda m: f"({names[m.group()]})", text), "i")


@op("cvt")
def cvt(e, instr: Instr) -> None:
    source, target = instr.parts[-1], instr.parts[-2]
    if source not in _BITS or target not in _BITS:
        from .isa_float import convert

        return convert(e, instr)
    mods = modifiers(instr, 1, {"sat", *_BITS})
    d, a = instr.operands
    sb, tb = _BITS[source], _BITS[target]
    x = e.read(a, "q" if sb == 64 else "i", sb)
    if "sat" in mods:
        raise PtxError(f"line {instr.line}: unsupported .sat in: {instr.text}")
    if source[0] == "s" and tb > sb:
        x = f"sext({x}, {sb})"
        e.write(d, f"wrap64({x})" if tb == 64 else f"{x} & {(1 << tb) - 1}", "q" if tb == 64 else "i")
        return
    narrow = min(sb, tb)
    if sb == 64 and tb < 64:
        e.write(d, f"wrap32({x} & {(1 << narrow) - 1})", "i")
    elif tb == 64:
        e.write(d, f"wrap64({x})" if sb < 64 else x, "q")
    else:
        register_bits = a.width if isinstance(a, Reg) else 32
        e.write(d, f"{x} & {(1 << narrow) - 1}" if narrow < register_bits else x, "i")
