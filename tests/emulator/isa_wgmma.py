"""wgmma opcodes (PTX ISA 9.7.15) and setmaxnreg."""

from __future__ import annotations

import re

from .opcodes import modifiers, op, runtime
from .operands import one
from .ptx import Imm, Instr, Vec
from .report import Fault, PtxError
from .wgmma import Form

_DEPTH = {"f16": 16, "bf16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32}


@runtime
def wgmma_mma(w, form, d, a, b, scale_d):
    """Issue one wgmma; returns what the accumulator registers hold until the wait."""
    registers = a if form.a_registers else []
    a_bits = None if form.a_registers else one(a, None, "matrix A descriptor")
    operands = (a_bits, one(b, None, "matrix B descriptor"), bool(one(scale_d, None, "scale-d")))
    return w.wgmma.start(form, d, registers, operands)


def _convergent(e, instr: Instr) -> None:
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    e.line(f"if {e.mask} is not None: w.needs_all_lanes()")


@op("wgmma.mma_async", starts_block=True)
def mma_async(e, instr: Instr) -> None:
    shape = next((p for p in instr.parts if re.fullmatch(r"m64n\d+k\d+", p)), "")
    modifiers(instr, 2, {"sync", "aligned", "f32", shape, *_DEPTH})
    d_kind, a_kind, b_kind = instr.parts[-3:]
    n, k = (int(x) for x in shape[4:].split("k")) if shape else (0, 0)
    depth = _DEPTH.get(a_kind)
    eight = {"e4m3", "e5m2"}
    fits = d_kind == "f32" and depth == k and (a_kind == b_kind or {a_kind, b_kind} <= eight)
    if not fits or n % 8 or not 8 <= n <= 256:
        raise PtxError(f"line {instr.line}: unsupported shape or types: {instr.text}")
    d, a, b, scale_d, *rest = instr.operands
    a_items = a.items if isinstance(a, Vec) else ()
    flags = [x.value for x in rest if isinstance(x, Imm)]
    transposes = 0 if depth != 16 else 1 if a_items else 2
    if len(d.items) != n // 2 or len(a_items) not in (0, 4) or not len(flags) == len(rest) == 2 + transposes:
        raise PtxError(f"line {instr.line}: wrong number of operands: {instr.text}")
    if not (set(flags[:2]) <= {1, -1} and set(flags[2:]) <= {0, 1}):
        raise PtxError(
            f"line {instr.line}: immediates are 1 or -1 to negate, 0 or 1 to transpose: {instr.text}"
        )
    form = Form(
        instr.line,
        n,
        k,
        a_kind,
        b_kind,
        tuple(r.index for r in d.items),
        tuple(r.index for r in a_items),
        flags[0] == -1,
        flags[1] == -1,
        transposes == 2 and flags[2] == 1,
        transposes > 0 and flags[-1] == 1,
    )
    e.tracked = frozenset()  # the registers' use by wgmma is checked at run time
    classes = [e.storage(r) if e.emitting else "f" for r in d.items]
    d_code = ", ".join(e.read(r, c) for r, c in zip(d.items, classes))
    a_code = f"[{', '.join(e.read(r, e.storage(r) if e.emitting else 'n') for r in a_items)}]"
    a_code = a_code if a_items else e.read(a, "q")
    b_code, scale = e.read(b, "q"), e.read(scale_d, "p")
    _convergent(e, instr)
    t = e.temp()
    e.line(f"{t} = wgmma_mma(w, {e.constant(form)}, [{d_code}], {a_code}, {b_code}, {scale})")
    for i, (r, c) in enumerate(zip(d.items, classes)):
        e.write(r, f"{t}[{i}]", c)


@op("wgmma.fence", starts_block=True)
def fence(e, instr: Instr) -> None:
    modifiers(instr, 2, {"sync", "aligned"})
    _convergent(e, instr)
    e.line("w.wgmma.fence()")


@op("wgmma.commit_group", starts_block=True)
def commit_group(e, instr: Instr) -> None:
    modifiers(instr, 2, {"sync", "aligned"})
    _convergent(e, instr)
    e.line("w.wgmma.commit()")


@op("wgmma.wait_group", starts_block=True, ends_block=True)
def wait_group(e, instr: Instr) -> None:
    """Ends its block: it changes registers behind the generated code's back."""
    modifiers(instr, 2, {"sync", "aligned"})
    _convergent(e, instr)
    e.line(f"if not w.wgmma.wait(R, {e.read(instr.operands[0], 'i')}): return BLOCKED")


@runtime
def set_registers(w, count, more):
    """Warps exchange registers through a pool of the CTA, which holds none at the start: an increase waits
    for decreases of other warps."""
    cta, have = w.cta, w.registers
    if have is None:
        return True
    if (count < have) if more else (count > have):
        raise Fault(f"setmaxnreg.{'inc' if more else 'dec'} to {count} registers from {have}")
    if more and cta.free_registers < count - have:
        cta.register_waiters.append(w)
        w.wait(
            lambda: (
                f"setmaxnreg.inc from {have} to {count} registers; {cta.free_registers} (per lane) are free"
            )
        )
        return False
    cta.free_registers += have - count
    w.registers = count
    if not more:
        w.machine.wake(cta.register_waiters)
    return True


@op("setmaxnreg", starts_block=True)
def setmaxnreg(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {"inc", "dec", "sync", "aligned", "u32"})
    count = instr.operands[0]
    legal = isinstance(count, Imm) and 24 <= count.value <= 256 and count.value % 8 == 0
    if not legal or len(mods & {"inc", "dec"}) != 1:
        raise PtxError(f"line {instr.line}: the register count must be 24 to 256 in steps of 8: {instr.text}")
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    e.line(f"if not set_registers(w, {count.value}, {'inc' in mods}): return BLOCKED")
