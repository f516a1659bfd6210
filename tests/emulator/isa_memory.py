"""Loads, stores, atomics, matrix moves and cp.async (PTX ISA 9.7.9)."""

from __future__ import annotations

import numpy as np

from .memory import OFFSET_MASK, RANK_SHIFT, load, space_of, store
from .ptx import SINK, Instr, Mem, Reg, Vec
from .report import Fault, PtxError
from .opcodes import modifiers, op, runtime
from .values import _f32, f2i, i2f, sext, spread

_SIZES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}
_SPACES = {
    "global": "global",
    "shared": "shared",
    "shared::cta": "shared",
    "shared::cluster": "shared",
    "local": "local",
    "param": "param",
    "const": "global",
    "param::entry": "param",
}
_HINTS = {
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L1::evict_first",
    "L1::evict_last",
    "L1::no_allocate",
    "L2::cache_hint",
    "L2::64B",
    "L2::128B",
    "L2::256B",
    "L2::evict_last",
    "L2::evict_normal",
    "L2::evict_first",
}
_ORDERS = {
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "cta",
    "cluster",
    "gpu",
    "sys",
    "mmio",
}


def _space(mods: set[str]) -> str:
    return next((_SPACES[m] for m in mods if m in _SPACES), "generic")


def _scope(mods: set[str]) -> str:
    return next((m for m in ("sys", "gpu", "cluster", "cta") if m in mods), "sys")


@op("ld")
def ld(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {*_SIZES, *_SPACES, *_HINTS, *_ORDERS, "v2", "v4", "v8"})
    d, mem, *_policy = instr.operands
    kind, space = instr.parts[-1], _space(mods)
    size, signed = _SIZES[kind], kind[0] == "s" and _SIZES[kind] < 4
    items = d.items if isinstance(d, Vec) else (d,)
    if size == 16:
        t = _load(e, instr, space, mem, 4, 4 * len(items), False, "i")
        for i, item in enumerate(items):
            e.write(item, f"{t}[{4 * i}:{4 * i + 4}]", "o")
        return
    if size == 8:
        cls = "q"
    else:
        cls = (
            "f"
            if all(isinstance(r, Reg) and e.storage(r) == "f" for r in items if r is not SINK) and size == 4
            else "i"
        )
    t = _load(e, instr, space, mem, size, len(items), signed, cls)
    for i, item in enumerate(items):
        if item is SINK:
            continue
        if not e.emitting:
            e.write(item, "", "n")  # a load has no opinion on the class
        elif signed and isinstance(item, Reg) and item.width == 64:
            e.write(item, f"wrap64(sext({t}[{i}], 32))", "q")
        else:
            e.write(
                item,
                f"wrap64({t}[{i}])" if item.width == 64 and size < 8 else f"{t}[{i}]",
                "q" if item.width == 64 else cls,
            )
    if mods & {"acquire"}:
        e.line(f"w.acquire_load({space!r}, {e.address(mem)}, {_scope(mods)!r}, {e.mask})")


def _load(e, instr: Instr, space: str, mem: Mem, size: int, count: int, signed: bool, cls: str) -> str:
    t = e.temp()
    address = e.address(mem)
    if space in ("shared", "global", "param"):
        call = f"{space}_load(w, {address}, "
    else:
        call = f"load(w, {space!r}, {address}, "
    e.line(f"w.line = {instr.line}")
    e.line(f"{t} = {call}{size}, {count}, {signed}, {cls!r}, {e.mask})")
    return t


@op("st")
def st(e, instr: Instr) -> None:
    mods = modifiers(
        instr,
        1,
        {
            *_SIZES,
            *_SPACES,
            *_HINTS,
            *_ORDERS,
            "v2",
            "v4",
            "v8",
            "async",
            "bulk",
            "mbarrier::complete_tx::bytes",
        }
        - {"async", "bulk", "mbarrier::complete_tx::bytes"},
    )
    mem, source, *_policy = instr.operands
    kind, space = instr.parts[-1], _space(mods)
    size = _SIZES[kind]
    items = source.items if isinstance(source, Vec) else (source,)
    values = []
    for item in items:
        if size == 16:
            values.append(f"*{e.read(item, 'o')}")
        elif size == 8 and e.emitting:
            values.append(e.read(item, "q"))
        elif e.emitting:
            cls = e.storage(item) if isinstance(item, Reg) else "i"
            values.append(e.read(item, cls if cls in ("i", "f") else "q", size * 8))
        else:
            e.read(item, "n")
    size = min(size, 8) if size != 16 else 4
    e.line(f"w.line = {instr.line}")
    if "release" in mods:
        e.line(f"w.release_store({space!r}, {e.address(mem)}, {_scope(mods)!r}, {e.mask})")
    call = f"{space}_store(w, " if space in ("shared", "global") else f"store(w, {space!r}, "
    e.line(f"{call}{e.address(mem)}, [{', '.join(values)}], {size}, {e.mask})")


# Atomics: lanes act one after another, in lane order.
def _atomic_function(name: str, kind: str):
    bits = _SIZES.get(kind, 4) * 8
    mask = (1 << bits) - 1
    signed = kind[0] == "s"

    def number(x: int) -> int:
        return sext(x, bits) if signed else x

    if kind == "f32":
        table = {"add": lambda a, b: f2i(_f32(i2f(a) + i2f(b))), "exch": lambda a, b: b}
    elif kind == "f64":

        def add64(a: int, b: int) -> int:
            return int(
                np.float64(np.uint64(a).view(np.float64) + np.uint64(b).view(np.float64)).view(np.uint64)
            )

        table = {"add": add64}
    else:
        table = {
            "add": lambda a, b: a + b & mask,
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
            "xor": lambda a, b: a ^ b,
            "exch": lambda a, b: b,
            "min": lambda a, b: a if number(a) < number(b) else b,
            "max": lambda a, b: a if number(a) > number(b) else b,
            "inc": lambda a, b: 0 if a >= b else a + 1,
            "dec": lambda a, b: b if a == 0 or a > b else a - 1,
            "cas": lambda a, b, c: c if a == b else a,
        }
    return table.get(name)


@runtime
def atomic(w, space, name, kind, scope, order, address, operands, mask, returns):
    """atom/red: returns the old values."""
    function = _atomic_function(name, kind)
    size = _SIZES[kind]
    lanes = range(32) if mask is None else np.flatnonzero(mask).tolist()
    address = spread(address, np.uint64)
    if space == "generic":
        space, address = space_of(
            address.copy() if mask is None else np.where(mask, address, address[lanes[0]])
        )
    columns = [
        spread(
            f2i(o) if isinstance(o, (np.floating,)) or getattr(o, "dtype", None) == np.float32 else o,
            np.uint64 if size == 8 else np.int64,
        ).tolist()
        for o in operands
    ]
    old = np.zeros(32, np.uint64 if size == 8 else np.int64)
    for lane in lanes:
        a = int(address[lane])
        if a % size:
            raise Fault(f"misaligned atomic of {size} bytes at address {a:#x}")
        if space == "global":
            buffer = w.machine.memory.find(a, size, "atomic")
            view, at = buffer.bytes, a - buffer.base
        else:
            smem = w.cta.cluster.smem(a >> RANK_SHIFT)
            view, at = smem.bytes, a & OFFSET_MASK
            smem.check(at, at + size, "atomic")
        if w.check:
            w.check.atomic(w, space, a, size, scope, order)
        before = int.from_bytes(view[at : at + size].tobytes(), "little")
        after = function(before, *(c[lane] for c in columns))
        view[at : at + size] = np.frombuffer(int(after).to_bytes(size, "little"), np.uint8)
        old[lane] = before
    w.machine.counters["atomics"] += 1
    return old if len(lanes) > 1 else int(old[lanes[0]])


@op("atom", "red")
def atom(e, instr: Instr) -> None:
    if "async" in instr.parts:
        raise PtxError(f"line {instr.line}: unsupported: {instr.text}")
    names = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}
    mods = modifiers(instr, 1, {*names, *_SIZES, *_SPACES, *_ORDERS, "L2::cache_hint", "noftz"})
    kind = instr.parts[-1]
    name = next(n for n in instr.parts if n in names)
    returns = instr.parts[0] == "atom"
    d = instr.operands[0] if returns else SINK
    mem, *sources = instr.operands[1:] if returns else instr.operands
    if _atomic_function(name, kind) is None:
        raise PtxError(f"line {instr.line}: unsupported atomic: {instr.text}")
    sources = sources[: 2 if name == "cas" else 1]
    wide = _SIZES[kind] == 8
    cls = "q" if wide else "f" if kind == "f32" else "i"
    order = next((m for m in ("acq_rel", "acquire", "release") if m in mods), "relaxed")
    operands = ", ".join(e.read(s, cls) for s in sources)
    e.line(f"w.line = {instr.line}")
    call = (
        f"atomic(w, {_space(mods)!r}, {name!r}, {kind!r}, {_scope(mods)!r}, {order!r}, {e.address(mem)}, "
        f"({operands},), {e.mask}, {returns})"
    )
    if d is SINK:
        e.line(call)
    else:
        e.write(d, call if wide or cls == "i" else f"i2f({call})", cls)


# ldmatrix / stmatrix.
@runtime
def ldmatrix(w, address, count, trans, mask):
    """m8n8.b16: matrix k's row i is the 16 bytes at the address of lane 8k+i; thread t gets row t//4, columns
    2(t%4)+{0,1}."""
    address = spread(address)
    out = []
    t = np.arange(32)
    for k in range(count):
        rows = load(w, "shared", np.repeat(address[8 * k : 8 * k + 8], 4), 4, 4, False, "i", None)
        matrix = np.stack([r[::4] for r in rows], 1).astype(np.uint32).view(np.uint16)  # [8, 8]
        if trans:
            matrix = np.ascontiguousarray(matrix.T)
        out.append(matrix.view(np.uint32)[t // 4, t % 4].astype(np.int64))
    return out


@runtime
def stmatrix(w, address, values, trans, kind, mask):
    """Inverse of ldmatrix; .m16n8.trans.b8: byte k of thread t is row t//4 + 8(k//2), column 2(t%4) + k%2,
    and column c is the 16 bytes at the address of lane c (+8 per matrix)."""
    address = spread(address)
    t = np.arange(32)
    for k, v in enumerate(values):
        words = spread(v).astype(np.uint32)
        if kind == "m8n8":
            matrix = np.zeros((8, 4), np.uint32)
            matrix[t // 4, t % 4] = words
            halves = matrix.view(np.uint16)
            if trans:
                halves = np.ascontiguousarray(halves.T)
            rows = halves.view(np.uint32)
        else:
            data = words.view(np.uint8).reshape(32, 4)
            columns = np.zeros((8, 16), np.uint8)
            for byte in range(4):
                columns[2 * (t % 4) + byte % 2, t // 4 + 8 * (byte // 2)] = data[:, byte]
            rows = columns.view(np.uint32)
        lanes = np.zeros(32, bool)
        lanes[:8] = True
        pad = [np.concatenate([rows[:, i], np.zeros(24, np.uint32)]).astype(np.int64) for i in range(4)]
        where = np.concatenate([address[8 * k : 8 * k + 8], np.zeros(24, np.int64)])
        store(w, "shared", where, pad, 4, lanes)


@op("ldmatrix", "stmatrix", starts_block=True)
def matrix_move(e, instr: Instr) -> None:
    mods = modifiers(
        instr,
        1,
        {"sync", "aligned", "m8n8", "m16n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16", "b8"},
    )
    loading = instr.parts[0] == "ldmatrix"
    kind = "m8n8" if "m8n8" in mods else "m16n8"
    if loading and kind != "m8n8" or kind == "m16n8" and "trans" not in mods:
        raise PtxError(f"line {instr.line}: unsupported: {instr.text}")
    regs, mem = instr.operands if loading else reversed(instr.operands)
    items = regs.items if isinstance(regs, Vec) else (regs,)
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    if loading:
        t = e.temp()
        e.line(f"{t} = ldmatrix(w, {e.address(mem)}, {len(items)}, {'trans' in mods}, m)")
        for i, item in enumerate(items):
            e.write(item, f"{t}[{i}]", "i")
    else:
        values = ", ".join(e.read(r, "i") for r in items)
        e.line(f"stmatrix(w, {e.address(mem)}, [{values}], {'trans' in mods}, {kind!r}, m)")


@op("prefetch", "prefetchu", "applypriority", "discard", "createpolicy")
def hints(e, instr: Instr) -> None:
    if instr.parts[0] == "createpolicy":
        e.write(instr.operands[0], "0", "q")
        return
    e.line("pass")  # with a predicate, a block of its own
    for operand in instr.operands:
        if isinstance(operand, Mem):
            e.address(operand)
