"""cp.async and its groups, edits of tensor maps in memory (PTX ISA 9.7.9.25, 9.7.9.28)."""

from __future__ import annotations

import numpy as np

from .isa_bulk import BulkOp
from .memory import RANK_SHIFT, space_of
from .opcodes import modifiers, op, runtime
from .operands import one, shared_place
from .ptx import Instr
from .report import Fault
from .values import LANES, spread

_HINT = {"L2::cache_hint"}


# -- cp.async ----------------------------------------------------------------------------------------------
@runtime
def cp_async(w, destination, source, size, source_size, mask):
    """Per-thread copies of 4, 8 or 16 bytes, the rest of the destination zero-filled."""
    machine, smem_of = w.machine, w.cta.cluster.smem
    lanes_ = LANES.tolist() if mask is None else np.flatnonzero(mask).tolist()
    to, start = spread(destination, np.uint64).tolist(), spread(source, np.uint64).tolist()
    sizes = spread(size if source_size is None else source_size).tolist()
    work = []
    for lane in lanes_:
        rank, offset = shared_place(to[lane])
        if offset % size or start[lane] % size:
            raise Fault(
                f"misaligned cp.async of {size} bytes from {start[lane]:#x} to shared offset {offset:#x}"
            )
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
                smem.bytes[offset : offset + count] = buffer.bytes[at : at + count]
            smem.bytes[offset + count : offset + size] = 0
        op_.finish()

    machine.submit(w.cta.cluster, run)
    return ticket


@op("cp.async")
def cp_async_(e, instr: Instr) -> None:
    modifiers(
        instr, 2, _HINT | {"ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"}
    )
    destination, source, size, *rest = instr.operands
    source_size = e.read(rest[0], "i") if rest else None
    e.line(f"w.line = {instr.line}")
    e.line(
        f"cp_async(w, {e.address(destination)}, {e.address(source)}, {e.read(size, 'i')}, {source_size}, "
        f"{e.mask})"
    )


@runtime
def async_wait(w, keep):
    groups = w.async_groups
    older = groups[: len(groups) - keep] if keep else groups
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
    rank, offset = shared_place(one(address, mask, "mbarrier address"))
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
    e.line(f"cp_async_arrive(w, {e.address(instr.operands[0])}, {'noinc' in mods}, {e.mask})")


# -- tensor maps in memory ---------------------------------------------------------------------------------
_FIELDS = {
    "global_address",
    "rank",
    "box_dim",
    "global_dim",
    "global_stride",
    "element_stride",
    "elemtype",
    "interleave_layout",
    "swizzle_mode",
    "swizzle_atomicity",
    "fill_mode",
}


@runtime
def tensormap_replace(w, address, field, ordinal, value, mask):
    """Edit a 128-byte tensor map in shared or global memory: extents are stored minus one, strides divided by
    16."""
    space, at = space_of(one(address, mask, "tensor map address"))
    if space == "shared":
        rank, offset = shared_place(at)
        view = w.cta.cluster.smem(rank).bytes[offset : offset + 128]
    else:
        buffer = w.machine.memory.find(at, 128, "tensor map")
        view = buffer.bytes[at - buffer.base :][:128]
    words, value = view.view(np.uint32), one(value, mask, "tensor map field")
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
    e.line(
        f"tensormap_replace(w, {e.address(mem)} + {'SHARED_WINDOW' if 'shared::cta' in mods else 0}, "
        f"{field!r}, {ordinal}, "
        f"{value}, {e.mask})"
    )


@runtime
def tensormap_copy(w, destination, source, size, mask):
    rank, offset = shared_place(one(source, mask, "source"))
    to = one(destination, mask, "destination")
    buffer = w.machine.memory.find(to, size, "tensormap.cp_fenceproxy")
    buffer.bytes[to - buffer.base :][:size] = w.cta.cluster.smem(rank).bytes[offset : offset + size]


@op("tensormap.cp_fenceproxy", starts_block=True)
def copy_fence(e, instr: Instr) -> None:
    modifiers(
        instr,
        2,
        {
            "global",
            "shared::cta",
            "tensormap::generic",
            "release",
            "acquire",
            "gpu",
            "cta",
            "sys",
            "cluster",
            "sync",
            "aligned",
        },
    )
    destination, source, size = instr.operands
    e.line(f"w.line = {instr.line}")
    e.line(f"tensormap_copy(w, {e.address(destination)}, {e.address(source)}, {e.read(size, 'i')}, {e.mask})")
