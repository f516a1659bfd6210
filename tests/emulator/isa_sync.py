"""Synchronization opcodes: mbarrier, named and cluster barriers, warp collectives, fences (PTX ISA
9.7.13)."""

from __future__ import annotations

import numpy as np

from .barriers import Mbarrier
from .memory import OFFSET_MASK, RANK_SHIFT, SHARED_WINDOW
from .opcodes import modifiers, op, runtime
from .operands import one
from .ptx import SINK, Instr, Mem, Not
from .report import Fault, PtxError
from .values import LANES, _ndarray, spread, uniform

_SPACES = {"shared", "shared::cta", "shared::cluster"}
_ORDERS = {"release", "acquire", "relaxed", "cta", "cluster"}


# -- mbarrier ----------------------------------------------------------------------------------------------
def _targets(w, address, mask) -> list[tuple[int, int]]:
    """(address, number of lanes) for each distinct barrier the active lanes name."""
    if type(address) is not _ndarray:
        address = address - SHARED_WINDOW if address >= SHARED_WINDOW else address
        return [(address, 32 if mask is None else int(mask.sum()))]
    active = address if mask is None else address[mask]
    found, counts = np.unique(active, return_counts=True)
    return [(int(a) - SHARED_WINDOW if a >= SHARED_WINDOW else int(a), int(n)) for a, n in zip(found, counts)]


@runtime
def mbarrier_init(w, address, count, mask):
    count = one(count, mask, "mbarrier count")
    for a, _n in _targets(w, address, mask):
        rank, offset = a >> RANK_SHIFT, a & OFFSET_MASK
        smem = w.cta.cluster.smem(rank)
        smem.check(offset, offset + 8, "mbarrier.init")
        if offset % 8:
            raise Fault(f"mbarrier.init at shared offset {offset:#x}, which is not 8-byte aligned")
        if not 1 <= count < 1 << 20:
            raise Fault(f"mbarrier.init with count {count} (1..{(1 << 20) - 1})")
        cta = w.cta.cluster.ctas[rank]
        if offset in cta.mbarriers and cta.mbarriers[offset].untouched(count):
            continue  # several warps may initialize a barrier to the same state
        barrier = Mbarrier(cta, rank, offset, count)
        if w.check:
            w.check.barrier_init(w, barrier, cta.mbarriers.get(offset))
        cta.mbarriers[offset] = barrier


@op("mbarrier.init")
def init(e, instr: Instr) -> None:
    modifiers(instr, 2, _SPACES | {"b64"})
    mem, count = instr.operands
    e.line(f"w.line = {instr.line}")
    e.line(f"mbarrier_init(w, {e.address(mem)}, {e.read(count, 'i')}, {e.mask})")


@runtime
def mbarrier_inval(w, address, mask):
    for a, _n in _targets(w, address, mask):
        barrier = w.cta.cluster.mbarrier(a, "mbarrier.inval")
        if w.check:
            w.check.barrier_inval(w, barrier)
        del barrier.owner.mbarriers[barrier.offset]


@op("mbarrier.inval")
def inval(e, instr: Instr) -> None:
    modifiers(instr, 2, _SPACES | {"b64"})
    e.line(f"w.line = {instr.line}")
    e.line(f"mbarrier_inval(w, {e.address(instr.operands[0])}, {e.mask})")


@runtime
def mbarrier_arrive(w, address, count, expect, relaxed, drop, mask):
    """Every active lane arrives `count` times; returns the state (the phase number) before."""
    w.machine.counters["mbarrier arrivals"] += 1
    state = 0
    for a, n in _targets(w, address, mask):
        barrier = w.cta.cluster.mbarrier(a, "mbarrier.arrive")
        state = barrier.phase
        if w.check:
            w.check.barrier_arrive_mbar(w, barrier, relaxed)
        if expect is not None:
            barrier.expect(n * one(expect, mask, "expect-tx bytes"))
        if drop:
            barrier.count -= n * one(count, mask, "arrival count")
        barrier.arrive(n * one(count, mask, "arrival count"))
    return state


@op("mbarrier.arrive", "mbarrier.arrive_drop")
def arrive(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, _SPACES | _ORDERS | {"expect_tx", "noComplete", "b64"})
    if "noComplete" in mods:
        raise PtxError(f"line {instr.line}: unsupported: {instr.text}")
    operands = list(instr.operands)
    d = operands.pop(0) if not isinstance(operands[0], Mem) else SINK
    mem, *rest = operands
    count, expect = "1", "None"
    if "expect_tx" in mods:
        expect = e.read(rest[0], "i")
    elif rest:
        count = e.read(rest[0], "i")
    e.line(f"w.line = {instr.line}")
    e.write(
        d,
        f"mbarrier_arrive(w, {e.address(mem)}, {count}, {expect}, {'relaxed' in mods}, "
        f"{instr.parts[1] == 'arrive_drop'}, {e.mask})",
        "q",
    )
    if d is SINK and not e.emitting:
        return


@runtime
def mbarrier_tx(w, address, amount, expect, mask):
    amount = one(amount, mask, "transaction bytes")
    for a, n in _targets(w, address, mask):
        barrier = w.cta.cluster.mbarrier(a, "mbarrier.expect_tx" if expect else "mbarrier.complete_tx")
        if expect:
            barrier.expect(n * amount)
        else:
            barrier.complete_tx(n * amount)


@op("mbarrier.expect_tx", "mbarrier.complete_tx")
def expect_tx(e, instr: Instr) -> None:
    modifiers(instr, 2, _SPACES | _ORDERS | {"b64"})
    mem, amount = instr.operands
    e.line(f"w.line = {instr.line}")
    e.line(
        f"mbarrier_tx(w, {e.address(mem)}, {e.read(amount, 'i')}, {instr.parts[1] == 'expect_tx'}, {e.mask})"
    )


@runtime
def mbarrier_wait(w, address, phase, parity, may_block, relaxed, pc, mask):
    """True/False of test_wait or try_wait, or None when the warp must block.

    try_wait may time out: it answers False when the scheduler finds no other work, and, under the lazy and
    random schedules, also before it first blocks.
    """
    targets = _targets(w, address, mask)
    if len(targets) > 1 or type(phase) is _ndarray and uniform(phase, mask) is None:
        return _wait_per_lane(w, address, phase, parity, relaxed, mask)
    barrier = w.cta.cluster.mbarrier(targets[0][0], "mbarrier wait")
    wanted = one(phase, mask, "phase")
    if parity and wanted > 1:
        raise Fault(f"{barrier}: wait for parity {wanted}; it must be 0 or 1")
    done = barrier.phase & 1 != wanted if parity else barrier.phase != wanted
    if done:
        w.spin = -1
        if w.check:
            w.check.barrier_wait(w, barrier, relaxed)
        w.machine.counters["mbarrier waits"] += 1
        return True
    if not may_block:
        return False
    schedule = w.machine.schedule
    if w.timed_out:
        w.timed_out = False
        return False
    if w.spin != pc and (schedule == "lazy" or schedule == "random" and w.machine.rng.random() < 0.5):
        w.spin = pc
        return False
    barrier.waiters.append(w)
    w.wait(lambda: f"{barrier}, parity {wanted & 1} to complete; it is in {barrier.state()}", timed=True)
    return None


def _wait_per_lane(w, address, phase, parity, relaxed, mask):
    out = np.zeros(32, bool)
    a, p = spread(address), spread(phase)
    for lane in LANES.tolist() if mask is None else np.flatnonzero(mask).tolist():
        barrier = w.cta.cluster.mbarrier(int(a[lane]), "mbarrier wait")
        out[lane] = barrier.phase & 1 != p[lane] if parity else barrier.phase != p[lane]
        if out[lane] and w.check:
            w.check.barrier_wait(w, barrier, relaxed)
    return out


@op("mbarrier.try_wait", "mbarrier.test_wait", starts_block=True)
def try_wait(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, _SPACES | _ORDERS | {"parity", "b64"})
    d, mem, phase, *_hint = instr.operands
    parity = "parity" in mods
    e.line(f"w.line = {instr.line}")
    t = e.temp()
    e.line(
        f"{t} = mbarrier_wait(w, {e.address(mem)}, {e.read(phase, 'i' if parity else 'q')}, {parity}, "
        f"{instr.parts[1] == 'try_wait'}, {'relaxed' in mods}, w.pc, {e.mask})"
    )
    e.line(f"if {t} is None: return BLOCKED")
    e.write(d, t, "p")


# -- named barriers ----------------------------------------------------------------------------------------
@runtime
def named_barrier(w, number, threads, mask, sync, value=None):
    """True when passed (always for arrive), False when the warp must wait."""
    number = one(number, mask, "barrier number")
    barrier = w.cta.named_barrier(number)
    if w.arrived is None:
        threads = one(threads, mask, "barrier thread count")
        generation = barrier.generation
        barrier.arrive(w, threads, w.active_count(mask), value)
        if not sync:
            return True
        w.arrived = (barrier, generation)
        w.machine.counters["named barrier waits"] += 1
    barrier, generation = w.arrived
    if barrier.generation == generation:
        if w not in barrier.waiters:
            barrier.waiters.append(w)
        w.wait(
            lambda: f"named barrier {barrier.number}: {barrier.arrived} of "
            f"{barrier.expected or barrier.cta.live_threads()} threads have arrived"
        )
        return False
    w.arrived = None
    if w.check:
        w.check.barrier_pass(w, barrier)
    return True


@op("bar", "barrier", starts_block=True)
def bar(e, instr: Instr) -> None:
    parts = instr.parts
    if parts[1] == "warp":
        modifiers(instr, 2, {"sync"})
        return _warp_sync(e, instr)
    if parts[1] == "cluster":
        return _cluster_barrier(e, instr)
    mods = modifiers(
        instr,
        2,
        (
            {"cta", "sync", "arrive", "aligned", "red", "popc", "and", "or", "u32", "pred"}
            if parts[1] == "cta"
            else {"aligned", "popc", "and", "or", "u32", "pred"}
        ),
    )
    kind = parts[2] if parts[1] == "cta" else parts[1]
    operands = list(instr.operands)
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    if kind == "red":
        d, number, *threads, p = operands
        count = e.read(threads[0], "i") if threads else "0"
        p = f"pnot({e.read(p.reg, 'p')})" if isinstance(p, Not) else e.read(p, "p")
        e.line(
            f"if not named_barrier(w, {e.read(number, 'i')}, {count}, m, True, "
            f"spread({p}, bool)[slice(None) if m is None else m].tolist()): return BLOCKED"
        )
        e.line("t0 = w.cta.named_barrier(" + e.read(number, "i") + ").result")
        e.line("t0 = next(iter(t0.values()))")
        how = next(iter(mods & {"popc", "and", "or"}))
        e.write(d, {"popc": "sum(t0)", "and": "all(t0)", "or": "any(t0)"}[how], "i" if how == "popc" else "p")
        return
    number, *threads = operands
    count = e.read(threads[0], "i") if threads else "0"
    call = f"named_barrier(w, {e.read(number, 'i')}, {count}, m, {kind == 'sync'})"
    e.line(call if kind == "arrive" else f"if not {call}: return BLOCKED")


# -- cluster barrier ---------------------------------------------------------------------------------------
@runtime
def cluster_arrive(w, relaxed, mask):
    barrier = w.cta.cluster.barrier
    if w.check:
        w.check.cluster_arrive(w, barrier, relaxed)
    w.cluster_generation = barrier.generation + 1
    barrier.arrive(w.active_count(mask))


@runtime
def cluster_wait(w, mask):
    barrier = w.cta.cluster.barrier
    if barrier.generation < w.cluster_generation:
        barrier.waiters.append(w)
        w.wait(
            lambda: f"barrier.cluster: {barrier.arrived} of "
            f"{sum(c.live_threads() for c in barrier.cluster.ctas)} threads have arrived"
        )
        return False
    w.machine.counters["cluster barrier waits"] += 1
    if w.check:
        w.check.barrier_pass(w, barrier)
    return True


def _cluster_barrier(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, {"arrive", "wait", "aligned", "release", "acquire", "relaxed"})
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    if "arrive" in mods:
        e.line(f"cluster_arrive(w, {'relaxed' in mods}, m)")
    else:
        e.line("if not cluster_wait(w, m): return BLOCKED")


def _warp_sync(e, instr: Instr) -> None:
    e.line(f"if m is not None and w.hold(m, {e.read(instr.operands[0], 'i')}): return HOLD")


# -- fences and hints --------------------------------------------------------------------------------------
@op("fence")
def fence(e, instr: Instr) -> None:
    """fence.proxy.* and fence.{sc,acq_rel}: no effect on values (memory is coherent here), only on the
    checker."""
    parts = instr.parts
    if parts[1] == "proxy":
        mods = modifiers(
            instr,
            2,
            {
                "async",
                "async::generic",
                "alias",
                "tensormap::generic",
                "tensormap",
                "generic",
                "global",
                "shared::cta",
                "shared::cluster",
                "acquire",
                "release",
                "cta",
                "cluster",
                "gpu",
                "sys",
                "sync_restrict::shared::cta",
                "sync_restrict::shared::cluster",
            },
        )
        for operand in instr.operands:
            if isinstance(operand, Mem):
                e.address(operand)
        if "async" in mods or "async::generic" in mods:
            spaces = mods & {"global", "shared::cta", "shared::cluster"}
            e.line(f"if w.check: w.check.proxy_fence(w, {sorted(spaces)!r})")
    elif parts[1] == "mbarrier_init":
        modifiers(instr, 2, {"release", "cluster"})
        e.line("if w.check: w.check.init_fence(w)")
    else:
        mods = modifiers(
            instr,
            1,
            {
                "sc",
                "acq_rel",
                "acquire",
                "release",
                "cta",
                "cluster",
                "gpu",
                "sys",
                "sync_restrict::shared::cta",
                "sync_restrict::shared::cluster",
            },
        )
        scope = next((s for s in ("sys", "gpu", "cluster", "cta") if s in mods), "sys")
        e.line(f"if w.check: w.check.fence(w, {scope!r})")


@op("membar")
def membar(e, instr: Instr) -> None:
    modifiers(instr, 1, {"cta", "gl", "sys", "proxy", "alias"})
    scope = {"cta": "cta", "gl": "gpu", "sys": "sys"}.get(instr.parts[1], "gpu")
    e.line(f"if w.check: w.check.fence(w, {scope!r})")


@op("griddepcontrol", "nanosleep", "pmevent")
def no_effect(e, instr: Instr) -> None:
    """Timing hints; a grid is emulated after everything launched before it."""
    for operand in instr.operands:
        e.read(operand, "i")


@op("call")
def call(e, instr: Instr) -> None:
    names = {o.name for o in instr.operands}
    if "vprintf" not in names:
        raise PtxError(f"line {instr.line}: call of an unknown function: {instr.text}")
