"""Warp collectives: elect, shuffle, vote, match, reduce (PTX ISA 9.7.9.6 to 9.7.9.8, 9.7.13)."""

from __future__ import annotations

import numpy as np

from .opcodes import modifiers, op, runtime
from .ptx import SINK, Instr, Not, Pair, Reg
from .values import LANES, _ndarray, lanes, sext, spread

ELECT_FIRST = LANES == 0


@runtime
def elect(mask):
    """(leader lane, predicate): the lowest active lane."""
    if mask is None:
        return 0, ELECT_FIRST
    lane = int(mask.argmax())
    return lane, LANES == lane


@op("elect", starts_block=True)
def elect_sync(e, instr: Instr) -> None:
    modifiers(instr, 1, {"sync"})
    d, membermask = instr.operands
    e.line(f"if m is not None and w.hold(m, {e.read(membermask, 'i')}): return HOLD")
    t = e.temp()
    e.line(f"{t} = elect(m)")
    lane, p = (d.first, d.second) if isinstance(d, Pair) else (SINK, d)
    if lane is not SINK:
        e.write(lane, f"{t}[0]", "i")
    e.write(p, f"{t}[1]", "p")


@runtime
def shuffle(mode, value, b, c):
    """(values, in-range predicate) of shfl.sync."""
    if mode == "idx" and type(b) is not _ndarray and c == 31:
        if type(value) is not _ndarray:
            return value, True
        out = value[b & 31]
        return (out if value.dtype == np.float32 else int(out)), True
    b, c = spread(b), spread(c)
    segment, clamp = c >> 8 & 31, c & 31
    low = LANES & segment
    high = low | clamp & ~segment
    if mode == "idx":
        source = low | b & 31 & ~segment
        ok = source <= high
    elif mode == "up":
        source = LANES - (b & 31)
        ok = source >= high
    elif mode == "down":
        source = LANES + (b & 31)
        ok = source <= high
    else:
        source = LANES ^ b & 31
        ok = source <= high
    source = np.where(ok, source, LANES)
    return (value[source] if type(value) is _ndarray else value), (True if ok.all() else ok)


@op("shfl", starts_block=True)
def shfl(e, instr: Instr) -> None:
    modifiers(instr, 1, {"sync", "idx", "up", "down", "bfly", "b32"})
    d, a, b, c, membermask = instr.operands
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, SINK)
    cls = e.storage(first) if isinstance(first, Reg) else "i"
    e.line(f"if m is not None and w.hold(m, {e.read(membermask, 'i')}): return HOLD")
    t = e.temp()
    e.line(f"{t} = shuffle({instr.parts[2]!r}, {e.read(a, cls)}, {e.read(b, 'i')}, {e.read(c, 'i')})")
    e.write(first, f"{t}[0]", cls)
    if second is not SINK:
        e.write(second, f"{t}[1]", "p")


@runtime
def transpose(value):
    """8 x 8 values of 16 bits, lane 4r + i holding values 2i and 2i + 1 of row r, transposed."""
    halves = spread(value).astype(np.uint32).view(np.uint16).reshape(8, 8)
    return np.ascontiguousarray(halves.T).reshape(-1).view(np.uint32).astype(np.int64)


@op("movmatrix", starts_block=True)
def movmatrix(e, instr: Instr) -> None:
    modifiers(instr, 1, {"sync", "aligned", "m8n8", "trans", "b16"})
    d, a = instr.operands
    e.line("if m is not None and w.hold(m): return HOLD")
    e.write(d, f"transpose({e.read(a, 'i')})", "i")


@runtime
def vote(how, p, mask):
    if type(p) is not _ndarray:
        if how != "ballot":
            return p if how != "uni" else True
        return (0xFFFFFFFF if mask is None else int((mask.astype(np.int64) << LANES).sum())) if p else 0
    active = p if mask is None else p[mask]
    if how == "ballot":
        chosen = p if mask is None else p & mask
        return int((chosen.astype(np.int64) << LANES).sum())
    return bool({"all": active.all, "any": active.any, "uni": lambda: (active == active[0]).all()}[how]())


@op("vote", starts_block=True)
def vote_sync(e, instr: Instr) -> None:
    modifiers(instr, 1, {"sync", "all", "any", "uni", "ballot", "pred", "b32"})
    d, p, membermask = instr.operands
    how = instr.parts[2]
    e.line(f"if m is not None and w.hold(m, {e.read(membermask, 'i')}): return HOLD")
    source = f"pnot({e.read(p.reg, 'p')})" if isinstance(p, Not) else e.read(p, "p")
    e.write(d, f"vote({how!r}, {source}, m)", "i" if how == "ballot" else "p")


@op("activemask")
def activemask(e, instr: Instr) -> None:
    e.write(instr.operands[0], "vote('ballot', True, m)", "i")


@runtime
def match(how, value, mask):
    v = spread(value)
    same = v[:, None] == v[None, :]
    if mask is not None:
        same &= mask[None, :]
    out = (same.astype(np.int64) << LANES).sum(1)
    if how == "any":
        return out, True
    active = np.ones(32, bool) if mask is None else mask
    full = int((active.astype(np.int64) << LANES).sum())
    ok = bool((v[active] == v[active][0]).all())
    return (full if ok else 0), ok


@op("match", starts_block=True)
def match_sync(e, instr: Instr) -> None:
    modifiers(instr, 1, {"any", "all", "sync", "b32", "b64"})
    d, a, membermask = instr.operands
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, SINK)
    e.line(f"if m is not None and w.hold(m, {e.read(membermask, 'i')}): return HOLD")
    t = e.temp()
    e.line(f"{t} = match({instr.parts[1]!r}, {e.read(a, 'q' if instr.parts[-1] == 'b64' else 'i')}, m)")
    e.write(first, f"{t}[0]", "i")
    if second is not SINK:
        e.write(second, f"{t}[1]", "p")


@runtime
def redux(how, kind, value, mask, membermask, absolute, nan):
    v = lanes(value)
    active = v if mask is None else v[mask]
    if type(membermask) is int and membermask not in (0xFFFFFFFF,):
        chosen = (membermask >> LANES & 1).astype(bool)
        active = v[chosen if mask is None else chosen & mask]
    if kind == "f32":
        active = abs(active) if absolute else active
        functions = (np.minimum, np.maximum) if nan else (np.fmin, np.fmax)
        return np.float32(functions[how == "max"].reduce(active))
    if kind == "s32":
        active = sext(active, 32)
    return (
        int(
            {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[how].reduce(active)
        )
        & 0xFFFFFFFF
    )


@op("redux", starts_block=True)
def redux_sync(e, instr: Instr) -> None:
    modifiers(
        instr, 1, {"sync", "add", "min", "max", "and", "or", "xor", "u32", "s32", "b32", "f32", "abs", "NaN"}
    )
    d, a, membermask = instr.operands
    kind = instr.parts[-1]
    cls = "f" if kind == "f32" else "i"
    members = e.read(membermask, "i")
    e.line(f"if m is not None and w.hold(m, {members}): return HOLD")
    e.write(
        d,
        f"redux({instr.parts[2]!r}, {kind!r}, {e.read(a, cls)}, m, {members}, {'abs' in instr.parts}, "
        f"{'NaN' in instr.parts})",
        cls,
    )
