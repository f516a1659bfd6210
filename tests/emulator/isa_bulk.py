"""Bulk copies: TMA tensor copies, cp.async.bulk and their groups (PTX ISA 9.7.9.25 to 9.7.9.27)."""

from __future__ import annotations

import numpy as np

from . import tma
from .memory import RANK_SHIFT, SHARED_WINDOW
from .opcodes import modifiers, op, runtime
from .operands import one, shared_place, signed_coordinate, tensor_map
from .ptx import Instr, Mem, Vec
from .report import Fault, PtxError
from .values import LANES, spread

_HINT = {"L2::cache_hint"}


class BulkOp:
    """One member of a bulk group: done when its source has been read and its destination written."""

    __slots__ = ("done", "warp", "clock")

    def __init__(self, warp) -> None:
        self.done, self.warp, self.clock = False, warp, None

    def finish(self) -> None:
        self.done = True
        self.warp.machine.wake_one(self.warp)


def land(w, cluster, barriers: list, size: int, copy) -> None:
    """Submit a copy that signals mbarriers: `copy()` moves the data, then each barrier is credited `size`
    bytes."""
    for barrier in barriers:
        barrier.in_flight += 1
    phases = [barrier.phase for barrier in barriers]

    def run() -> None:
        copy()
        for barrier, phase in zip(barriers, phases):
            barrier.in_flight -= 1
            if barrier.phase != phase and w.machine.checks:
                raise Fault(
                    f"{barrier}: phase {phase} completed before the bulk copy issued for it had landed: "
                    "its expect-tx bytes do not match the copies (transaction-count mismatch)"
                )
            barrier.complete_tx(size)

    w.machine.submit(cluster, run)


def _barrier_of(w, address, mask):
    rank, offset = shared_place(one(address, mask, "mbarrier address"))
    return rank, offset


@runtime
def tma_load(w, destination, tensor, coords, barrier, multicast, group, mask):
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    coords = tuple(signed_coordinate(c, mask) for c in coords)
    tm = tensor_map(w, one(tensor, mask, "tensor map address"))
    rank, offset = shared_place(one(destination, mask, "TMA destination"))
    brank, boffset = _barrier_of(w, barrier, mask)
    if offset % 128:
        raise Fault(f"TMA load to shared offset {offset:#x}, which is not 128-byte aligned")
    ranks = [rank]
    if multicast is not None:
        bits = one(multicast, mask, "multicast mask")
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

        land(w, cluster, [bar for _smem, bar in targets], tm.packed_bytes, copy)


@runtime
def tma_store(w, tensor, coords, source, reduce, mask):
    """Stores by several lanes are identical (CuTe DSL issues them without elect.sync): done once. Reductions
    are not."""
    machine, check = w.machine, w.check
    coords = tuple(signed_coordinate(c, mask) for c in coords)
    tm = tensor_map(w, one(tensor, mask, "tensor map address"))
    rank, offset = shared_place(one(source, mask, "TMA source"))
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
            tma.write_box(
                machine.memory, tm, coords, tma.gather_smem(smem, offset, tm), reduce, check, ticket
            )
            group_op.finish()

        machine.submit(w.cta.cluster, run)


@op("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")
def bulk_tensor(e, instr: Instr) -> None:
    reducing = instr.parts[1] == "reduce"
    dims = {f"{d}d" for d in range(1, 6)}
    mods = modifiers(
        instr,
        5 if reducing else 4,
        dims
        | _HINT
        | {
            "shared::cluster",
            "shared::cta",
            "global",
            "tile",
            "mbarrier::complete_tx::bytes",
            "multicast::cluster",
            "bulk_group",
            "cta_group::1",
            "cta_group::2",
            "add",
            "min",
            "max",
            "and",
            "or",
            "xor",
        },
    )
    operands = list(instr.operands)
    e.line(f"w.line = {instr.line}")
    first = operands[0]
    if first.coords:  # store: [tensor map, {coords}], [source]
        coords = ", ".join(e.read(c, "i") for c in first.coords)
        reduce = next(iter(mods & {"add", "min", "max", "and", "or", "xor"}), None) if reducing else None
        e.line(
            f"tma_store(w, {e.address(Mem(first.base, first.offset))}, ({coords},), "
            f"{e.address(operands[1])}, {reduce!r}, "
            f"{e.mask})"
        )
        return
    source, barrier, *rest = operands[1:]
    coords = ", ".join(e.read(c, "i") for c in source.coords)
    multicast = e.read(rest[0], "i", 16) if "multicast::cluster" in mods else None
    group = 2 if "cta_group::2" in mods else 1
    e.line(
        f"tma_load(w, {e.address(first)}, {e.address(Mem(source.base, source.offset))}, ({coords},), "
        f"{e.address(barrier)}, "
        f"{multicast}, {group}, {e.mask})"
    )


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
            _bulk_to_shared(
                w,
                to,
                start,
                count,
                bars[lane],
                None if multicast is None else one(multicast, mask, "mask"),
                reduce,
                dtype,
            )
        else:
            rank, offset = shared_place(start)
            smem = cluster.smem(rank)
            smem.check(offset, offset + count, "bulk copy read")
            buffer = machine.memory.find(to, count, "bulk copy store")
            group_op = BulkOp(w)
            w.bulk_open.append(group_op)
            ticket = check.issue_store(w, group_op) if check else None
            if check:
                check.store_reads(ticket, rank, offset, count)

            def run(
                smem=smem,
                offset=offset,
                buffer=buffer,
                at=to - buffer.base,
                count=count,
                op_=group_op,
                ticket=ticket,
            ) -> None:
                data = smem.bytes[offset : offset + count]
                if check:
                    check.async_global_span(ticket, buffer, at, count, True, reduce is not None)
                target = buffer.bytes[at : at + count]
                target[:] = data if reduce is None else tma.combine(target.copy(), data.copy(), dtype, reduce)
                op_.finish()

            machine.submit(cluster, run)


def _bulk_to_shared(
    w, to: int, start: int, count: int, barrier: int, multicast: int | None, reduce, dtype
) -> None:
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    rank, offset = shared_place(to)
    brank, boffset = shared_place(barrier)
    ranks = [rank] if multicast is None else [r for r in range(len(cluster.ctas)) if multicast >> r & 1]
    targets = []
    for r in ranks:
        smem = cluster.smem(r)
        smem.check(offset, offset + count, "bulk copy write")
        where = brank if multicast is None else r
        targets.append((smem, cluster.mbarrier(where << RANK_SHIFT | boffset, "bulk copy")))
    from_shared = start >= SHARED_WINDOW or start < 1 << 32
    if from_shared:
        srank, soffset = shared_place(start)
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
            data = origin.bytes[soffset : soffset + count].copy()
        else:
            data = buffer.bytes[start - buffer.base : start - buffer.base + count]
            if check:
                check.async_global_span(ticket, buffer, start - buffer.base, count, False, False)
        for smem, _bar in targets:
            view = smem.bytes[offset : offset + count]
            view[:] = data if reduce is None else tma.combine(view.copy(), data, dtype, reduce)

    land(w, cluster, [bar for _smem, bar in targets], count, copy)


@op("cp.async.bulk", "cp.reduce.async.bulk")
def bulk(e, instr: Instr) -> None:
    reducing = instr.parts[1] == "reduce"
    types = {"f16", "bf16", "f32", "f64", "b32", "b64", "u32", "s32", "u64", "s64", "noftz"}
    ops = {"add", "min", "max", "and", "or", "xor", "inc", "dec"}
    mods = modifiers(
        instr,
        4 if reducing else 3,
        _HINT
        | types
        | ops
        | {
            "shared::cluster",
            "shared::cta",
            "global",
            "mbarrier::complete_tx::bytes",
            "multicast::cluster",
            "bulk_group",
        },
    )
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
    e.line(
        f"bulk_copy(w, {'to_shared' if to_shared else 'to_global'!r}, {e.address(destination)}, "
        f"{e.address(source)}, "
        f"{e.read(size, 'i')}, {barrier}, {multicast}, {reduce!r}, {dtype!r}, {e.mask})"
    )


@runtime
def store_async(w, address, values, size, barrier, mask):
    """st.async: each lane stores into a CTA of the cluster and credits the bytes to an mbarrier there."""
    cluster, check, step = w.cta.cluster, w.check, size * len(values)
    lanes_ = LANES.tolist() if mask is None else np.flatnonzero(mask).tolist()
    to, bars = spread(address).tolist(), spread(barrier).tolist()
    columns = [spread(v, np.uint64).tolist() for v in values]
    for lane in lanes_:
        (rank, offset), (brank, boffset) = shared_place(to[lane]), shared_place(bars[lane])
        if offset % step:
            raise Fault(f"misaligned st.async of {step} bytes to shared offset {offset:#x}")
        if rank != brank:
            raise Fault(f"st.async to CTA rank {rank} signals an mbarrier of CTA rank {brank}, not the same")
        smem = cluster.smem(rank)
        smem.check(offset, offset + step, "st.async")
        target = cluster.mbarrier(brank << RANK_SHIFT | boffset, "st.async")
        if check:
            check.async_smem_write(check.issue_store_async(w), rank, offset, step, target)
        data = b"".join(int(c[lane]).to_bytes(size, "little") for c in columns)

        def copy(smem=smem, offset=offset, data=np.frombuffer(data, np.uint8)) -> None:
            smem.bytes[offset : offset + step] = data

        land(w, cluster, [target], step, copy)
    w.machine.counters["st.async"] += 1


@op("st.async")
def st_async(e, instr: Instr) -> None:
    sizes = {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}
    mods = modifiers(
        instr, 2, {*sizes, "weak", "shared::cluster", "mbarrier::complete_tx::bytes", "v2", "v4"}
    )
    if "mbarrier::complete_tx::bytes" not in mods:
        raise PtxError(f"line {instr.line}: unsupported: {instr.text}")
    mem, source, barrier = instr.operands
    size = sizes[instr.parts[-1]]
    items = source.items if isinstance(source, Vec) else (source,)
    values = ", ".join(e.read(x, "q" if size == 8 else "i", 8 * size) for x in items)
    e.line(f"w.line = {instr.line}")
    e.line(f"store_async(w, {e.address(mem)}, [{values}], {size}, {e.address(barrier)}, {e.mask})")


# -- groups ------------------------------------------------------------------------------------------------
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
    older = groups[: len(groups) - keep] if keep else groups
    if all(op_.done for group in older for op_ in group):
        if w.check:
            w.check.group_waited(w, older, read_only)
        del groups[: max(0, len(older) - 64)]
        return True
    w.wait(
        lambda: f"bulk groups older than the {keep} newest ({sum(not o.done for g in older for o in g)} "
        f"copies pending)"
    )
    return False


@op("cp.async.bulk.commit_group")
def commit_group(e, instr: Instr) -> None:
    e.line("bulk_commit(w)")


@op("cp.async.bulk.wait_group", starts_block=True)
def wait_group(e, instr: Instr) -> None:
    mods = modifiers(instr, 4, {"read"})
    e.line(f"w.line = {instr.line}")
    e.line(f"if not bulk_wait(w, {e.read(instr.operands[0], 'i')}, {'read' in mods}): return BLOCKED")
