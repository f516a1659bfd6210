"""tcgen05 opcodes: allocation, ld/st, cp, mma, commit, fences (PTX ISA 9.7.16)."""

from __future__ import annotations

from . import tmem
from .memory import OFFSET_MASK, RANK_SHIFT, SHARED_WINDOW, shared_store
from .operands import one
from .ptx import Imm, Instr, Mem, Vec
from .report import Fault, PtxError
from .opcodes import modifiers, op, runtime
from .umma import InstructionDescriptor, Mma, check_copy, copy_to_tmem
from .values import _ndarray

_GROUPS = {"cta_group::1", "cta_group::2"}


def _group(mods: set[str]) -> int:
    return 2 if "cta_group::2" in mods else 1


def pair_of(w, group: int) -> list:
    cta, cluster = w.cta, w.cta.cluster
    if group == 1:
        return [cta]
    if len(cluster.ctas) % 2:
        raise Fault("cta_group::2 in a cluster with an odd number of CTAs")
    return [cluster.ctas[cta.rank & ~1], cluster.ctas[cta.rank | 1]]


# -- allocation --------------------------------------------------------------------------------------------
def _peer_has_allocated(w) -> bool:
    """tcgen05.alloc.cta_group::2 is done by one warp of each CTA of the pair together: neither passes before
    the other."""
    mine = w.cta.tmem
    theirs = pair_of(w, 2)[1 - (w.cta.rank & 1)].tmem
    if theirs.requests < w.arrived[1]:
        mine.waiters.append(w)
        w.wait(lambda: f"the peer CTA's tcgen05.alloc.cta_group::2 (CTA rank {w.cta.rank ^ 1})")
        return False
    w.arrived = None
    if w.check:
        w.check.met(w, theirs.claim)
    return True


@runtime
def tmem_alloc(w, address, columns, group, mask):
    """True when done; False while the warp must wait for room or for the peer CTA."""
    cta, columns = w.cta, one(columns, mask, "tcgen05.alloc column count")
    tmem_ = cta.tmem
    if w.arrived is None:
        start = tmem_.allocate(columns)
        if start is None:
            tmem_.waiters.append(w)
            w.wait(lambda: f"{columns} free TMEM columns (tcgen05.alloc); allocated: {tmem_.allocations}")
            return False
        w.machine.counters["TMEM allocations"] += 1
        if w.check:
            w.check.tmem_allocated(w, tmem_, start, columns)
        address = one(address, mask, "tcgen05.alloc destination")
        shared_store(w, address - SHARED_WINDOW if address >= SHARED_WINDOW else address, [start], 4, mask)
        if group == 2:
            tmem_.requests += 1
            w.arrived = (tmem_, tmem_.requests)
            w.machine.wake(pair_of(w, 2)[1 - (cta.rank & 1)].tmem.waiters)
    return group == 1 or _peer_has_allocated(w)


@runtime
def tmem_dealloc(w, address, columns, mask):
    address, columns = one(address, mask, "tcgen05.dealloc address"), one(
        columns, mask, "tcgen05.dealloc column count"
    )
    if w.check:
        w.check.tmem_freed(w, w.cta.tmem, address & 0xFFFF, columns)
    w.cta.tmem.free(address, columns)


@op("tcgen05.alloc", starts_block=True)
def alloc(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, _GROUPS | {"sync", "aligned", "shared::cta", "b32"})
    mem, columns = instr.operands
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    e.line(
        f"if not tmem_alloc(w, {e.address(mem)}, {e.read(columns, 'i')}, {_group(mods)}, m): return BLOCKED"
    )


@op("tcgen05.dealloc", starts_block=True)
def dealloc(e, instr: Instr) -> None:
    modifiers(instr, 2, _GROUPS | {"sync", "aligned", "b32"})
    address, columns = instr.operands
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    e.line(f"tmem_dealloc(w, {e.read(address, 'i')}, {e.read(columns, 'i')}, m)")


@op("tcgen05.relinquish_alloc_permit")
def relinquish(e, instr: Instr) -> None:
    modifiers(instr, 2, _GROUPS | {"sync", "aligned"})
    e.line("w.cta.tmem.permit = False")


# -- registers <-> TMEM ------------------------------------------------------------------------------------
_SHAPES = {"32x32b", "16x64b", "16x128b", "16x256b"}
_REPEATS = {f"x{1 << i}" for i in range(8)}


def _shape(instr: Instr) -> tuple[str, int]:
    """(shape, repeat in columns' worth): 16-bit packing moves twice the columns through the same registers."""
    parts = set(instr.parts)
    shape = next(iter(parts & _SHAPES))
    packed = bool(parts & {"pack::16b", "unpack::16b"})
    if packed and shape != "32x32b":
        raise PtxError(f"line {instr.line}: packing of shape {shape} is not modelled: {instr.text}")
    return shape, int(next(iter(parts & _REPEATS))[1:]) * (2 if packed else 1)


@runtime
def tmem_load(w, address, shape, repeat, cls, mask):
    w.machine.counters["TMEM loads"] += 1
    return tmem.load(w, one(address, mask, "tcgen05.ld address"), shape, repeat, cls)


@runtime
def tmem_store(w, address, shape, repeat, values, mask):
    w.machine.counters["TMEM stores"] += 1
    tmem.store(
        w,
        one(address, mask, "tcgen05.st address"),
        shape,
        repeat,
        [v if type(v) is not _ndarray else v.view("u4") if v.dtype == "f4" else v for v in values],
    )


@runtime
def pack_16b(values):
    """tcgen05.ld .pack::16b: the low halves of two adjacent columns in one register."""
    return [low & 0xFFFF | (high & 0xFFFF) << 16 for low, high in zip(values[::2], values[1::2])]


@runtime
def unpack_16b(values):
    return [half for v in values for half in (v & 0xFFFF, v >> 16 & 0xFFFF)]


@op("tcgen05.ld", starts_block=True)
def ld(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, _SHAPES | _REPEATS | {"sync", "aligned", "pack::16b", "b32"})
    if len(mods & _SHAPES) != 1:
        raise PtxError(f"line {instr.line}: unsupported shape: {instr.text}")
    d, mem = instr.operands
    items = d.items if isinstance(d, Vec) else (d,)
    shape, repeat = _shape(instr)
    pack = "pack::16b" in mods
    cls = "f" if not pack and all(e.storage(r) == "f" for r in items) else "i"
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    t = e.temp()
    call = f"tmem_load(w, {e.address(mem)}, {shape!r}, {repeat}, {cls!r}, m)"
    e.line(f"{t} = pack_16b({call})" if pack else f"{t} = {call}")
    for i, item in enumerate(items):
        e.write(item, f"{t}[{i}]", cls if e.emitting else "n")
        if cls == "f" and e.emitting:
            e.origin[item.index] = (t, i)


@op("tcgen05.st", starts_block=True)
def st(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, _SHAPES | _REPEATS | {"sync", "aligned", "unpack::16b", "b32"})
    if len(mods & _SHAPES) != 1:
        raise PtxError(f"line {instr.line}: unsupported shape: {instr.text}")
    mem, source = instr.operands
    items = source.items if isinstance(source, Vec) else (source,)
    shape, repeat = _shape(instr)
    values = ", ".join(e.read(r, "i") for r in items)
    values = f"unpack_16b([{values}])" if "unpack::16b" in mods else f"[{values}]"
    e.line(f"w.line = {instr.line}")
    e.line("if m is not None and w.hold(m): return HOLD")
    e.line(f"tmem_store(w, {e.address(mem)}, {shape!r}, {repeat}, {values}, m)")


@op("tcgen05.wait::ld", "tcgen05.wait::st")
def wait(e, instr: Instr) -> None:
    mods = modifiers(instr, 1, {"wait::ld", "wait::st", "sync", "aligned"})
    e.line(f"if w.check: w.check.tmem_wait(w, {'wait::ld' in mods})")


@op("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync")
def fence(e, instr: Instr) -> None:
    modifiers(instr, 2, set())
    e.line(f"if w.check: w.check.thread_sync(w, {'before' in instr.parts[1]})")


# -- tensor pipe -------------------------------------------------------------------------------------------
def _repeat_for_lanes(w, mask) -> range:
    return range(w.active_count(mask))


@runtime
def tcgen05_mma(
    w, kind, group, d, a, b, idesc, enable, a_in_tmem, ws, scale_d, disabled, sfa, sfb, block, mask
):
    machine, cta = w.machine, w.cta
    d, a, b = one(d, mask, "accumulator address"), one(a, mask, "matrix A"), one(b, mask, "matrix B")
    bits = one(idesc, mask, "instruction descriptor")
    sfa, sfb = one(sfa, mask, "SFA address"), one(sfb, mask, "SFB address")
    desc = InstructionDescriptor.decode(bits, kind)
    for _ in _repeat_for_lanes(w, mask):
        work = Mma(
            kind,
            pair_of(w, group),
            d,
            a,
            b,
            desc,
            bool(one(enable, mask, "enable-input-d")),
            a_in_tmem,
            ws,
            one(scale_d, mask, "scale-input-d"),
            tuple(one(x, mask, "disable-output-lane") for x in disabled),
            sfa,
            sfb,
            block,
        )
        machine.counters["MMA instructions"] += 1
        if w.check:
            work.check_accesses(w.check, w.check.issue_tensor(w))
        machine.submit(cta.cluster, work.execute, cta.pipe)


@op("tcgen05.mma")
def mma(e, instr: Instr) -> None:
    collectors = {
        f"collector::{m}::{u}"
        for m in ("a", "b0", "b1", "b2", "b3")
        for u in ("fill", "use", "lastuse", "discard")
    }
    kinds = {
        "kind::f16",
        "kind::tf32",
        "kind::f8f6f4",
        "kind::i8",
        "kind::mxf8f6f4",
        "kind::mxf4",
        "kind::mxf4nvf4",
    }
    scaling = {"block_scale", "block16", "block32", "scale_vec::1X", "scale_vec::2X", "scale_vec::4X"}
    mods = modifiers(instr, 2, _GROUPS | collectors | kinds | scaling | {"ws"})
    kind = next(iter(mods & kinds))[6:]
    ws, scaled = "ws" in mods, "block_scale" in mods
    d, a, b, idesc, *rest = instr.operands
    a_code = e.address(a) if isinstance(a, Mem) else e.read(a, "q")
    sfa = sfb = "0"
    scale_d, disabled, block = "0", "()", 0
    if scaled:
        sfa, sfb = e.address(rest[0]), e.address(rest[1])
        rest = rest[2:]
        default = {"mxf8f6f4": 32, "mxf4": 32}.get(kind)
        block = (
            16
            if mods & {"block16", "scale_vec::4X"}
            else 32 if mods & {"block32", "scale_vec::1X", "scale_vec::2X"} else default
        )
        if block is None:
            raise PtxError(f"line {instr.line}: no scale block size in: {instr.text}")
    elif rest and isinstance(rest[0], Vec):
        disabled = f"({', '.join(e.read(r, 'i') for r in rest[0].items)},)"
        rest = rest[1:]
    enable = e.read(rest[0], "p")
    if len(rest) > 1:
        if ws:
            if not (isinstance(rest[1], Imm) and rest[1].value == 0):
                raise PtxError(f"line {instr.line}: zero-column mask is not modelled: {instr.text}")
        else:
            scale_d = e.read(rest[1], "i")
    e.line(f"w.line = {instr.line}")
    if scaled:
        t, u, v = e.temp(), e.temp(), e.temp()
        e.line(f"{t}, {u} = {sfa}, {sfb}")
        e.line(f"{v} = {e.read(idesc, 'i')}")
        sfa, sfb, idesc_code = t, u, v
    else:
        idesc_code = e.read(idesc, "i")
    e.line(
        f"tcgen05_mma(w, {kind!r}, {_group(mods)}, {e.address(d)}, {a_code}, {e.read(b, 'q')}, "
        f"{idesc_code}, {enable}, "
        f"{isinstance(a, Mem)}, {ws}, {scale_d}, {disabled}, {sfa}, {sfb}, {block}, {e.mask})"
    )


@runtime
def tcgen05_cp(w, group, address, desc, shape, source, mask):
    address, desc = one(address, mask, "tcgen05.cp destination"), one(desc, mask, "tcgen05.cp descriptor")
    machine, cta, check = w.machine, w.cta, w.check
    for _ in _repeat_for_lanes(w, mask):
        ctas = pair_of(w, group)
        if check:
            check_copy(ctas, address, desc, shape, check.issue_tensor(w), check)
        machine.counters["tcgen05.cp"] += 1
        machine.submit(cta.cluster, lambda: copy_to_tmem(ctas, address, desc, shape, source), cta.pipe)


@op("tcgen05.cp")
def cp(e, instr: Instr) -> None:
    shapes = {"32x128b", "64x128b", "128x128b", "128x256b", "4x256b"}
    casts = {"warpx4", "warpx2::02_13", "warpx2::01_23"}
    sources = {"b4x16_p64", "b6x16_p32"}
    mods = modifiers(instr, 2, _GROUPS | shapes | casts | sources | {"b8x16"})
    mem, desc = instr.operands
    shape = ".".join(next(iter(mods & s)) for s in (shapes, casts) if mods & s)
    source = next(iter(mods & sources), "")
    e.line(f"w.line = {instr.line}")
    e.line(
        f"tcgen05_cp(w, {_group(mods)}, {e.address(mem)}, {e.read(desc, 'q')}, {shape!r}, {source!r}, "
        f"{e.mask})"
    )


@runtime
def tcgen05_commit(w, address, multicast, mask):
    """Arrive once on an mbarrier (of each CTA in the mask, at the same offset) when the pipe has drained to
    here."""
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    address = one(address, mask, "tcgen05.commit mbarrier")
    address = address - SHARED_WINDOW if address >= SHARED_WINDOW else address
    rank, offset = address >> RANK_SHIFT, address & OFFSET_MASK
    if multicast is None:
        ranks = [rank]
    else:
        bits = one(multicast, mask, "multicast mask")
        ranks = [r for r in range(16) if bits >> r & 1]
        if bits >> len(cluster.ctas):
            raise Fault(f"multicast mask {bits:#x} names CTAs outside the cluster of {len(cluster.ctas)}")
    for _ in _repeat_for_lanes(w, mask):
        machine.counters["tcgen05.commit"] += 1
        ticket = check.issue_commit(w) if check else None
        if check:
            for r in ranks:
                check.commit_signals(ticket, r)

        def arrive(ticket=ticket) -> None:
            for r in ranks:
                barrier = cluster.mbarrier(r << RANK_SHIFT | offset, "tcgen05.commit")
                if check:
                    check.commit_arrive(ticket, barrier)
                barrier.arrive()

        machine.submit(cluster, arrive, w.cta.pipe)


@op("tcgen05.commit")
def commit(e, instr: Instr) -> None:
    mods = modifiers(
        instr, 2, _GROUPS | {"mbarrier::arrive::one", "shared::cluster", "multicast::cluster", "b64"}
    )
    mem, *rest = instr.operands
    multicast = e.read(rest[0], "i", 16) if "multicast::cluster" in mods else None
    e.line(f"w.line = {instr.line}")
    e.line(f"tcgen05_commit(w, {e.address(mem)}, {multicast}, {e.mask})")
