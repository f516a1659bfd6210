"""Asynchronous copies: cp.async, cp.async.bulk, TMA tensor copies, their groups, tensor-map edits (PTX ISA 9.7.9.25 on)."""

from __future__ import annotations

import numpy as np

from . import tma
from .memory import OFFSET_MASK, PARAM_WINDOW, RANK_SHIFT, SHARED_WINDOW, space_of
from .ptx import Instr, Mem, Vec
from .report import Fault, PtxError
from .translate import modifiers, op, runtime
from .values import LANES, _ndarray, spread, uniform

_HINT = {"L2::cache_hint"}


def e_mask(e) -> str:
    return getattr(e, "mask", "m")


def _one(value, mask, what: str) -> int:
    out = uniform(value, mask)
    if out is None:
        raise Fault(f"{what} differs between the lanes of the warp")
    return int(out)


def _signed(value, mask) -> int:
    v = _one(value, mask, "TMA coordinate")
    return v - (1 << 32) if v >> 31 else v


def _shared(address: int) -> tuple[int, int]:
    """(rank, offset) of a shared address, generic or not."""
    address = address - SHARED_WINDOW if address >= SHARED_WINDOW else address
    return address >> RANK_SHIFT, address & OFFSET_MASK


def tensor_map(w, address: int) -> tma.TensorMap:
    space, at = space_of(address)
    if at % 64:
        raise Fault(f"tensor map at {address:#x} is not 64-byte aligned")
    if space == "param" or address >= PARAM_WINDOW and space != "shared":
        at = address - PARAM_WINDOW
        return tma.TensorMap.decode(w.machine.params[at:at + 64])
    if space == "shared":
        rank, offset = _shared(at)
        return tma.TensorMap.decode(w.cta.cluster.smem(rank).bytes[offset:offset + 64].tobytes())
    buffer = w.machine.memory.find(at, 128, "tensor map read")
    return tma.TensorMap.decode(buffer.bytes[at - buffer.base:][:64].tobytes())


class BulkOp:
    """One member of a bulk group: done when its source has been read and its destination written."""

    __slots__ = ("done", "warp", "clock")

    def __init__(self, warp) -> None:
        self.done, self.warp, self.clock = False, warp, None

    def finish(self) -> None:
        self.done = True
        self.warp.machine.wake_one(self.warp)


def _land(w, cluster, barriers: list, size: int, copy) -> None:
    """Submit a copy that signals mbarriers: `copy()` moves the data, then each barrier is credited `size` bytes."""
    check = w.check
    for barrier in barriers:
        barrier.in_flight += 1
    phases = [barrier.phase for barrier in barriers]

    def run() -> None:
        copy()
        for barrier, phase in zip(barriers, phases):
            barrier.in_flight -= 1
            if barrier.phase != phase and w.machine.checks:
                raise Fault(f"{barrier}: phase {phase} completed before the bulk copy issued for it had landed: "
                            "its expect-tx bytes do not match the copies (transaction-count mismatch)")
            if check:
                check.copy_arrive(barrier)
            barrier.complete_tx(size)

    w.machine.submit(cluster, run)


def _barrier_of(w, address, mask):
    rank, offset = _shared(_one(address, mask, "mbarrier address"))
    return rank, offset


@runtime
def tma_load(w, destination, tensor, coords, barrier, multicast, group, mask):
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    coords = tuple(_signed(c, mask) for c in coords)
    tm = tensor_map(w, _one(tensor, mask, "tensor map address"))
    rank, offset = _shared(_one(destination, mask, "TMA destination"))
    brank, boffset = _barrier_of(w, barrier, mask)
    if offset % 128:
        raise Fault(f"TMA load to shared offset {offset:#x}, which is not 128-byte aligned")
    ranks = [rank]
    if multicast is not None:
        bits = _one(multicast, mask, "multicast mask")
        if bits >> len(cluster.ctas):
            raise Fault(f"multicast mask {bits:#x} names CTAs outside the cluster of {len(cluster.ctas)}")
        ranks = [r for r in range(len(cluster.ctas)) if bits >> r & 1]
    for _ in range(w.active_count(mask)):
        machine.counters["TMA loads"] += 1
        machine.counters["TMA load bytes"] += tm.packed_bytes * (1 if multicast is None else len(ranks))
        if multicast is not None:
            machine.counters["TMA multicast loads"] += 1
        targets = []
        for r in ranks:
            where = brank if multicast is None else r
            if group == 2:
                # the pair of the destination, on the side of the pair that the mbarrier operand names
                where = (r & ~1) | (brank & 1)
            targets.append((cluster.smem(r), cluster.mbarrier(where << RANK_SHIFT | boffset, "TMA load")))
        ticket = check.issue_copy(w) if check else None
        if check:
            for smem, bar in targets:
                check.async_smem_write(ticket, smem.rank, offset, tm.smem_bytes, bar)

        def copy(targets=targets, ticket=ticket) -> None:
            data, buffer = tma.read_box(machine.memory, tm, coords, check, ticket)
            name = buffer.name if buffer else "outside"
            machine.counters[f"TMA bytes from {name}"] += tm.packed_bytes
            for smem, _bar in targets:
                tma.scatter_smem(smem, offset, tm, data)

        _land(w, cluster, [bar for _smem, bar in targets], tm.packed_bytes, copy)


@runtime
def tma_store(w, tensor, coords, source, reduce, mask):
    """Stores by several lanes are identical (CuTe DSL issues them without elect.sync): done once. Reductions are not."""
    machine, check = w.machine, w.check
    coords = tuple(_signed(c, mask) for c in coords)
    tm = tensor_map(w, _one(tensor, mask, "tensor map address"))
    rank, offset = _shared(_one(source, mask, "TMA source"))
    if rank != w.cta.rank:
        raise Fault("TMA store from another CTA's shared memory")
    if offset % 128:
        raise Fault(f"TMA store from shared offset {offset:#x}, which is not 128-byte aligned")
    for _ in range(1 if reduce is None else w.active_count(mask)):
        machine.counters["TMA stores"] += 1
        machine.counters["TMA store bytes"] += tm.packed_bytes
        group_op = BulkOp(w)
        w.bulk_open.append(group_op)
        smem = w.cta.smem
        ticket = check.issue_store(w, group_op) if check else None
        if check:
            check.store_reads(ticket, rank, offset, tm.smem_bytes)

        def run(group_op=group_op, ticket=ticket) -> None:
            tma.write_box(machine.memory, tm, coords, tma.gather_smem(smem, offset, tm), reduce, check, ticket)
            group_op.finish()

        machine.submit(w.cta.cluster, run)


@op("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
def bulk_tensor(e, instr: Instr) -> None:
    reducing = instr.parts[1] == "reduce"
    dims = {f"{d}d" for d in range(1, 6)}
    mods = modifiers(instr, 5 if reducing else 4, dims | _HINT | {
        "shared::cluster", "shared::cta", "global", "tile", "mbarrier::complete_tx::bytes", "multicast::cluster", "bulk_group",
        "cta_group::1", "cta_group::2", "add", "min", "max", "and", "or", "xor"})
    operands = list(instr.operands)
    e.line(f"w.line = {instr.line}")
    first = operands[0]
    if first.coords:  # store: [tensor map, {coords}], [source]
        coords = ", ".join(e.read(c, "i") for c in first.coords)
        reduce = next(iter(mods & {"add", "min", "max", "and", "or", "xor"}), None) if reducing else None
        e.line(f"tma_store(w, {e.address(Mem(first.base, first.offset))}, ({coords},), {e.address(operands[1])}, {reduce!r}, "
               f"{e_mask(e)})")
        return
    source, barrier, *rest = operands[1:]
    coords = ", ".join(e.read(c, "i") for c in source.coords)
    multicast = e.read(rest[0], "i", 16) if "multicast::cluster" in mods else None
    group = 2 if "cta_group::2" in mods else 1
    e.line(f"tma_load(w, {e.address(first)}, {e.address(Mem(source.base, source.offset))}, ({coords},), {e.address(barrier)}, "
           f"{multicast}, {group}, {e_mask(e)})")


@op("cp.async.bulk.prefetch", "cp.async.bulk.prefetch.tensor")
def bulk_prefetch(e, instr: Instr) -> None:
    """No effect on values."""


@runtime
def bulk_copy(w, kind, destination, source, size, barrier, multicast, reduce, dtype, mask):
    """Untensored bulk copies: each active lane issues one."""
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    lanes_ = LANES.tolist() if mask is None else np.flatnonzero(mask).tolist()
    columns = [spread(x, np.uint64).tolist() for x in (destination, source, size)]
    bars = spread(barrier, np.uint64).tolist() if barrier is not None else None
    for lane in lanes_:
        to, start, count = (c[lane] for c in columns)
        if count % 16 or to % 16 or start % 16:
            raise Fault(f"bulk copy of {count} bytes from {start:#x} to {to:#x}: all must be multiples of 16")
        machine.counters["bulk copies"] += 1
        machine.counters["bulk copy bytes"] += count
        if kind == "to_shared":
            _bulk_to_shared(w, to, start, count, bars[lane], None if multicast is None else _one(multicast, mask, "mask"),
                            reduce, dtype)
        else:
            rank, offset = _shared(start)
            smem = cluster.smem(rank)
            smem.check(offset, offset + count, "bulk copy read")
            buffer = machine.memory.find(to, count, "bulk copy store")
            group_op = BulkOp(w)
            w.bulk_open.append(group_op)
            ticket = check.issue_store(w, group_op) if check else None
            if check:
                check.store_reads(ticket, rank, offset, count)

            def run(smem=smem, offset=offset, buffer=buffer, at=to - buffer.base, count=count, op_=group_op,
                    ticket=ticket) -> None:
                data = smem.bytes[offset:offset + count]
                if check:
                    check.async_global_span(ticket, buffer, at, count, True, reduce is not None)
                target = buffer.bytes[at:at + count]
                target[:] = data if reduce is None else tma.combine(target.copy(), data.copy(), dtype, reduce)
                op_.finish()

            machine.submit(cluster, run)


def _bulk_to_shared(w, to: int, start: int, count: int, barrier: int, multicast: int | None, reduce, dtype) -> None:
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    rank, offset = _shared(to)
    brank, boffset = _shared(barrier)
    ranks = [rank] if multicast is None else [r for r in range(len(cluster.ctas)) if multicast >> r & 1]
    targets = []
    for r in ranks:
        smem = cluster.smem(r)
        smem.check(offset, offset + count, "bulk copy write")
        where = brank if multicast is None else r
        targets.append((smem, cluster.mbarrier(where << RANK_SHIFT | boffset, "bulk copy")))
    from_shared = start >= SHARED_WINDOW or start < 1 << 32
    if from_shared:
        srank, soffset = _shared(start)
        origin = cluster.smem(srank)
        origin.check(soffset, soffset + count, "bulk copy read")
    else:
        buffer = machine.memory.find(start, count, "bulk copy load")
    ticket = check.issue_copy(w) if check else None
    if check:
        if from_shared:
            check.copy_reads(ticket, srank, soffset, count, targets[0][1])
        for smem, bar in targets:
            check.async_smem_write(ticket, smem.rank, offset, count, bar)

    def copy() -> None:
        if from_shared:
            data = origin.bytes[soffset:soffset + count].copy()
        else:
            data = buffer.bytes[start - buffer.base:start - buffer.base + count]
            if check:
                check.async_global_span(ticket, buffer, start - buffer.base, count, False, False)
        for smem, _bar in targets:
            view = smem.bytes[offset:offset + count]
            view[:] = data if reduce is None else tma.combine(view.copy(), data, dtype, reduce)

    _land(w, cluster, [bar for _smem, bar in targets], count, copy)


@op("cp.async.bulk", "cp.reduce.async.bulk")
def bulk(e, instr: Instr) -> None:
    reducing = instr.parts[1] == "reduce"
    types = {"f16", "bf16", "f32", "f64", "b32", "b64", "u32", "s32", "u64", "s64", "noftz"}
    ops = {"add", "min", "max", "and", "or", "xor", "inc", "dec"}
    mods = modifiers(instr, 4 if reducing else 3, _HINT | types | ops | {
        "shared::cluster", "shared::cta", "global", "mbarrier::complete_tx::bytes", "multicast::cluster", "bulk_group"})
    destination, source, size, *rest = instr.operands
    reduce = next((p for p in instr.parts if p in ops), None) if reducing else None
    dtype = instr.parts[-1] if reducing else None
    barrier = multicast = None
    to_shared = instr.parts[4 if reducing else 3].startswith("shared")
    if to_shared:
        barrier = e.address(rest[0])
        if "multicast::cluster" in mods:
            multicast = e.read(rest[1], "i", 16)
    e.line(f"w.line = {instr.line}")
    e.line(f"bulk_copy(w, {'to_shared' if to_shared else 'to_global'!r}, {e.address(destination)}, {e.address(source)}, "
           f"{e.read(size, 'i')}, {barrier}, {multicast}, {reduce!r}, {dtype!r}, {e_mask(e)})")


# -- groups --------------------------------------------------------------------------------------------------------------
@runtime
def bulk_commit(w):
    w.bulk_groups.append(w.bulk_open)
    w.bulk_open = []
    if w.check:
        w.check.group_committed(w)


@runtime
def bulk_wait(w, keep, read_only):
    """Every group older than the `keep` newest must be complete (groups may finish in any order)."""
    groups = w.bulk_groups
    older = groups[:len(groups) - keep] if keep else groups
    if all(op_.done for group in older for op_ in group):
        if w.check:
            w.check.group_waited(w, older, read_only)
        del groups[:max(0, len(older) - 64)]
        return True
    w.wait(lambda: f"bulk groups older than the {keep} newest ({sum(not o.done for g in older for o in g)} copies pending)")
    return False


@op("cp.async.bulk.commit_group")
def commit_group(e, instr: Instr) -> None:
    e.line("bulk_commit(w)")


@op("cp.async.bulk.wait_group", starts_block=True)
def wait_group(e, instr: Instr) -> None:
    mods = modifiers(instr, 4, {"read"})
    e.line(f"w.line = {instr.line}")
    e.line(f"if not bulk_wait(w, {e.read(instr.operands[0], 'i')}, {'read' in mods}): return BLOCKED")


# -- cp.async ------------------------------------------------------------------------------------------------------------
@runtime
def cp_async(w, destination, source, size, source_size, mask):
    """Per-thread copies of 4, 8 or 16 bytes, the rest of the destination zero-filled."""
    machine, smem_of = w.machine, w.cta.cluster.smem
    lanes_ = LANES.tolist() if mask is None else np.flatnonzero(mask).tolist()
    to, start = spread(destination, np.uint64).tolist(), spread(source, np.uint64).tolist()
    sizes = spread(size if source_size is None else source_size).tolist()
    work = []
    for lane in lanes_:
        rank, offset = _shared(to[lane])
        if offset % size or start[lane] % size:
            raise Fault(f"misaligned cp.async of {size} bytes from {start[lane]:#x} to shared offset {offset:#x}")
        smem = smem_of(rank)
        smem.check(offset, offset + size, "cp.async write")
        count = min(sizes[lane], size)
        buffer = machine.memory.find(start[lane], count, "cp.async load") if count else None
        work.append((smem, offset, buffer, start[lane] - buffer.base if buffer else 0, count))
    op_ = BulkOp(w)
    w.async_open.append(op_)
    machine.counters["cp.async"] += 1
    ticket = w.check.issue_cp_async(w, op_, [(s.rank, o) for s, o, *_ in work], size) if w.check else None

    def run() -> None:
        for smem, offset, buffer, at, count in work:
            if count:
                smem.bytes[offset:offset + count] = buffer.bytes[at:at + count]
            smem.bytes[offset + count:offset + size] = 0
        op_.finish()

    machine.submit(w.cta.cluster, run)
    return ticket


@op("cp.async")
def cp_async_(e, instr: Instr) -> None:
    modifiers(instr, 2, _HINT | {"ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"})
    destination, source, size, *rest = instr.operands
    source_size = e.read(rest[0], "i") if rest else None
    e.line(f"w.line = {instr.line}")
    e.line(f"cp_async(w, {e.address(destination)}, {e.address(source)}, {e.read(size, 'i')}, {source_size}, {e_mask(e)})")


@runtime
def async_wait(w, keep):
    groups = w.async_groups
    older = groups[:len(groups) - keep] if keep else groups
    if all(op_.done for group in older for op_ in group):
        if w.check:
            w.check.cp_async_waited(w, older)
        return True
    w.wait(lambda: "cp.async groups")
    return False


@runtime
def async_commit(w):
    w.async_groups.append(w.async_open)
    w.async_open = []


@op("cp.async.commit_group")
def async_commit_group(e, instr: Instr) -> None:
    e.line("async_commit(w)")


@op("cp.async.wait_group", "cp.async.wait_all", starts_block=True)
def async_wait_group(e, instr: Instr) -> None:
    e.line(f"w.line = {instr.line}")
    if instr.parts[2] == "wait_all":
        e.line("if w.async_open: async_commit(w)")
        e.line("if not async_wait(w, 0): return BLOCKED")
    else:
        e.line(f"if not async_wait(w, {e.read(instr.operands[0], 'i')}): return BLOCKED")


@runtime
def cp_async_arrive(w, address, noinc, mask):
    """Arrive on an mbarrier, once per active lane, when the lane's earlier cp.async are complete."""
    rank, offset = _shared(_one(address, mask, "mbarrier address"))
    barrier = w.cta.cluster.mbarrier(rank << RANK_SHIFT | offset, "cp.async.mbarrier.arrive")
    count, check = w.active_count(mask), w.check
    earlier = [o for g in (*w.async_groups, w.async_open) for o in g if not o.done]
    if not noinc:
        barrier.pending += count
    ticket = check.issue_commit(w) if check else None
    if check:
        check.cp_async_ticket(w, ticket)

    def run() -> None:
        if not all(o.done for o in earlier):
            w.machine.submit(w.cta.cluster, run)
            return
        if check:
            check.commit_arrive(ticket, barrier)
        barrier.arrive(count)

    w.machine.submit(w.cta.cluster, run)


@op("cp.async.mbarrier.arrive")
def cp_async_mbarrier(e, instr: Instr) -> None:
    mods = modifiers(instr, 4, {"noinc", "shared", "shared::cta", "b64"})
    e.line(f"w.line = {instr.line}")
    e.line(f"cp_async_arrive(w, {e.address(instr.operands[0])}, {'noinc' in mods}, {e_mask(e)})")


# -- tensor maps in memory -------------------------------------------------------------------------------------------------
_FIELDS = {"global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype", "interleave_layout",
           "swizzle_mode", "swizzle_atomicity", "fill_mode"}


@runtime
def tensormap_replace(w, address, field, ordinal, value, mask):
    """Edit a 128-byte tensor map in shared or global memory: extents are stored minus one, strides divided by 16."""
    space, at = space_of(_one(address, mask, "tensor map address"))
    if space == "shared":
        rank, offset = _shared(at)
        view = w.cta.cluster.smem(rank).bytes[offset:offset + 128]
    else:
        buffer = w.machine.memory.find(at, 128, "tensor map")
        view = buffer.bytes[at - buffer.base:][:128]
    words, value = view.view(np.uint32), _one(value, mask, "tensor map field")
    if field == "global_address":
        words[0], words[1] = value & 0xFFFFFFFF, value >> 32
    elif field == "global_dim":
        words[8 + ordinal] = value - 1
    elif field == "global_stride":
        words[3 + ordinal] = value >> 4 & 0xFFFFFFFF
        high = int(words[7]) & ~(15 << 4 * ordinal) | (value >> 36 & 15) << 4 * ordinal
        words[7] = high
    else:
        raise Fault(f"tensormap.replace of {field} is not modelled")


@op("tensormap.replace")
def replace(e, instr: Instr) -> None:
    mods = modifiers(instr, 2, _FIELDS | {"tile", "shared::cta", "global", "b1024", "b32", "b64"})
    field = next(iter(mods & _FIELDS))
    mem, *rest = instr.operands
    ordinal = rest.pop(0).value if len(rest) > 1 else 0
    e.line(f"w.line = {instr.line}")
    wide = instr.parts[-1] == "b64"
    value = e.read(rest[0], "q" if wide else "i")
    e.line(f"tensormap_replace(w, {e.address(mem)} + {'SHARED_WINDOW' if 'shared::cta' in mods else 0}, {field!r}, {ordinal}, "
           f"{value}, {e_mask(e)})")


@runtime
def tensormap_copy(w, destination, source, size, mask):
    rank, offset = _shared(_one(source, mask, "source"))
    to = _one(destination, mask, "destination")
    buffer = w.machine.memory.find(to, size, "tensormap.cp_fenceproxy")
    buffer.bytes[to - buffer.base:][:size] = w.cta.cluster.smem(rank).bytes[offset:offset + size]


@op("tensormap.cp_fenceproxy", starts_block=True)
def copy_fence(e, instr: Instr) -> None:
    modifiers(instr, 2, {"global", "shared::cta", "tensormap::generic", "release", "acquire", "gpu", "cta", "sys", "cluster",
                         "sync", "aligned"})
    destination, source, size = instr.operands
    e.line(f"w.line = {instr.line}")
    e.line(f"tensormap_copy(w, {e.address(destination)}, {e.address(source)}, {e.read(size, 'i')}, {e_mask(e)})")


@op("clusterlaunchcontrol")
def cluster_launch_control(e, instr: Instr) -> None:
    raise PtxError(f"line {instr.line}: unsupported: {instr.text}")


_ = (Vec, _ndarray)
