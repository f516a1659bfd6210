"""Cluster launch control: a running cluster takes over a pending one (PTX ISA 9.7.13.17).

The 16-byte response is opaque in PTX. Here it is {first ctaid x, y, z, 1 if a cluster was cancelled}.
"""

from __future__ import annotations

import numpy as np

from .isa_bulk import land
from .memory import RANK_SHIFT
from .opcodes import modifiers, op, runtime
from .operands import one, shared_place
from .ptx import SINK, Instr, Vec
from .report import Fault


@runtime
def try_cancel(w, destination, barrier, everyone, mask):
    machine, cluster, check = w.machine, w.cta.cluster, w.check
    rank, offset = shared_place(one(destination, mask, "response address"))
    brank, boffset = shared_place(one(barrier, mask, "mbarrier address"))
    if offset % 16:
        raise Fault(
            f"clusterlaunchcontrol response at shared offset {offset:#x}, which is not 16-byte aligned"
        )
    for _ in range(w.active_count(mask)):
        origin = machine.queue.popleft()[1] if machine.queue else None
        response = np.array([*(origin or (0, 0, 0)), origin is not None], np.uint32).view(np.uint8)
        ranks = range(len(cluster.ctas)) if everyone else [rank]
        targets = []
        for r in ranks:
            where = r if everyone else brank
            targets.append((cluster.smem(r), cluster.mbarrier(where << RANK_SHIFT | boffset, "try_cancel")))
        if check:
            ticket = check.issue_copy(w)
            for smem, bar in targets:
                check.async_smem_write(ticket, smem.rank, offset, 16, bar)

        def copy(targets=targets, response=response) -> None:
            for smem, _bar in targets:
                smem.bytes[offset : offset + 16] = response

        land(w, cluster, [bar for _smem, bar in targets], 16, copy)


@op("clusterlaunchcontrol.try_cancel")
def try_cancel_async(e, instr: Instr) -> None:
    mods = modifiers(
        instr, 2, {"async", "shared::cta", "mbarrier::complete_tx::bytes", "multicast::cluster::all", "b128"}
    )
    destination, barrier = instr.operands
    everyone = "multicast::cluster::all" in mods
    e.line(f"w.line = {instr.line}")
    e.line(f"try_cancel(w, {e.address(destination)}, {e.address(barrier)}, {everyone}, {e.mask})")


@op("clusterlaunchcontrol.query_cancel")
def query_cancel(e, instr: Instr) -> None:
    mods = modifiers(
        instr,
        2,
        {"is_canceled", "get_first_ctaid", "pred", "b128", "b32", "v4"}
        | {f"get_first_ctaid::{axis}" for axis in "xyz"},
    )
    d, handle = instr.operands
    t = e.temp()
    e.line(f"{t} = {e.read(handle, 'o')}")
    if "is_canceled" in mods:
        e.write(d, f"{t}[3] != 0", "p")
    elif isinstance(d, Vec):
        for i, item in enumerate(d.items[:3]):
            if item is not SINK:
                e.write(item, f"{t}[{i}]", "i")
    else:
        axis = next(m for m in mods if m.startswith("get_first_ctaid::"))[-1]
        e.write(d, f"{t}[{'xyz'.index(axis)}]", "i")
