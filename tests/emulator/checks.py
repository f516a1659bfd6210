"""Happens-before checking with vector clocks: races are found on any schedule, not only when they strike.

Agents of a cluster are its warps and everything that works beside them: a warp's cp.async, bulk-store and
tcgen05.ld/st engines, each CTA's tensor pipe, each warpgroup's wgmmas, each mbarrier (bulk copies that signal
it). An access leaves an
epoch (agent, clock) in a shadow of the memory; a later access by someone whose vector clock does not cover
that epoch is a race. Shared memory and global memory are shadowed per 4-byte word (per byte where narrower
accesses occur), TMEM per column and 16 lanes.

Checks are made when an operation is issued, with the issuer's clock, so that they do not depend on when it
completes. A bulk copy's write carries the epoch (its mbarrier, the phase it belongs to), which only a wait
for that phase covers.

A vector clock has a second part, the proxy clock: how far each warp's generic writes are known to be visible
to the async proxy. `fence.proxy.async` copies the first part into the second; async-proxy accesses are judged
by the second.
"""

from __future__ import annotations

import numpy as np

from .check_global import GlobalChecks
from .check_smem import SharedChecks
from .check_tmem import TensorChecks
from .report import EmulatorError, Fault, Race
from .shadow import GPU_SCOPES, MASK, SHIFT, Shadow, SmemShadow, join, merge_foreign

_BARRIERS_PER_CTA = 256


class Checker(SharedChecks, TensorChecks, GlobalChecks):
    """Clocks and shadows of one cluster."""

    def __init__(self, cluster) -> None:
        self.cluster, self.machine = cluster, cluster.machine
        cx, cy, cz = self.machine.launch.cluster
        bx, by, bz = self.machine.launch.block
        self.ranks = cx * cy * cz
        self.warps_per_cta = -(-bx * by * bz // 32)
        self.warpgroups = -(-self.warps_per_cta // 4)
        n = self.ranks * self.warps_per_cta
        # Agents: 0 nobody; 1..n warps; then cp.async engines (both write through the generic proxy); then the
        # rest.
        self.cp_base, self.generic = 1 + n, 1 + 2 * n
        self.store_base = self.generic
        self.global_base = self.store_base + n
        self.ld_base = self.global_base + n
        self.st_base = self.ld_base + n
        self.pipe_base = self.st_base + n
        self.wgmma_base = self.pipe_base + self.ranks
        self.barrier_base = self.wgmma_base + self.ranks * self.warpgroups
        self.size = self.barrier_base + self.ranks * _BARRIERS_PER_CTA
        self.barrier_agents: dict[tuple[int, int], int] = {}
        self.pipe_clock = [0] * self.ranks
        self.smem = [SmemShadow(-(-self.machine.smem_end // 16) * 16) for _ in range(self.ranks)]
        self.tmem = [Shadow(8, 512) for _ in range(self.ranks)]
        self.tmem_ready = [np.zeros((8, 512), bool) for _ in range(self.ranks)]
        self.lines: dict[int, int] = {}  # epoch -> PTX line of its last access
        self.signals = [np.zeros(self.size, np.int64) for _ in range(self.ranks)]
        self.final = [np.zeros(self.size, np.int64) for _ in range(self.ranks)]

    # -- clocks --------------------------------------------------------------------------------------------
    def start_warp(self, w) -> None:
        w.slot = w.cta.rank * self.warps_per_cta + w.index
        w.agent = 1 + w.slot
        w.clock = np.zeros(self.size + self.generic, np.int64)
        w.clock[w.agent] = 1
        w.fences: dict[str, np.ndarray] = {}
        w.foreign: dict[int, np.ndarray] = {}
        w.fenced_foreign: dict[int, np.ndarray] = {}
        w.unacquired: list = []
        w.relaxed_waits: list[np.ndarray] = []
        w.ld_clock = w.st_clock = w.cp_clock = 0
        w.ld_open: dict[int, int] = {}
        w.groups_committed = 0

    def _tick(self, w) -> None:
        w.clock[w.agent] += 1

    def _settle_loads(self, w) -> None:
        """Before a release: tcgen05.ld counts as done unless its result may still be in flight here."""
        if not w.ld_clock:
            return
        done = w.ld_clock
        if w.ld_open:
            pending = self.machine.program.pending_loads.get(w.line, ())
            for line in list(w.ld_open):
                if line in pending:
                    done = min(done, w.ld_open[line] - 1)
                else:
                    del w.ld_open[line]
        at = self.ld_base + w.slot
        w.clock[at] = max(w.clock[at], done)

    def _release(self, w, clock, relaxed: bool):
        """`clock` joined with what `w` publishes; the clock may be None."""
        self._settle_loads(w)
        source = w.fences.get("cluster") if relaxed else w.clock
        if source is not None:
            clock = source.copy() if clock is None else np.maximum(clock, source, out=clock)
        self._tick(w)
        return clock

    def _publish_foreign(self, w, barrier) -> None:
        if w.foreign:
            known = self.machine.foreign.setdefault(id(barrier), {})
            merge_foreign(known, w.foreign)

    def _learn_foreign(self, w, barrier) -> None:
        known = self.machine.foreign.get(id(barrier))
        if known:
            merge_foreign(w.foreign, known)

    def _view(self, w) -> np.ndarray:
        """What an async-proxy operation issued by `w` may rely on."""
        view = w.clock[: self.size].copy()
        view[: self.generic] = w.clock[self.size :]
        return view

    # -- reports -------------------------------------------------------------------------------------------
    def agent_name(self, agent: int) -> str:
        n = self.ranks * self.warps_per_cta

        def warp(slot: int) -> str:
            return f"warp {slot % self.warps_per_cta} of CTA rank {slot // self.warps_per_cta}"

        for base, text in (
            (self.barrier_base, None),
            (self.wgmma_base, "a wgmma of warpgroup {} of CTA rank {}"),
            (self.pipe_base, "the tensor pipe of CTA rank {}"),
            (self.st_base, "tcgen05.st of {}"),
            (self.ld_base, "tcgen05.ld of {}"),
            (self.global_base, "bulk stores of {}"),
            (self.store_base, "bulk stores of {}"),
            (self.cp_base, "cp.async of {}"),
            (1, "{}"),
        ):
            if agent >= base:
                if text is None:
                    rank, offset = next(k for k, v in self.barrier_agents.items() if v == agent)
                    return f"a bulk copy that signals the mbarrier at {offset:#x} of CTA rank {rank}"
                if base == self.wgmma_base:
                    return text.format((agent - base) % self.warpgroups, (agent - base) // self.warpgroups)
                return text.format(agent - base if base == self.pipe_base else warp((agent - base) % n))
        return "nobody"

    def _race(self, what: str, where: str, epoch: int, did: str, hint: str = "") -> None:
        agent = epoch >> SHIFT
        line = self.lines.get(epoch)
        by = self.agent_name(agent) + (f" (PTX line {line})" if line else "")
        raise Race(f"race: {what} {where} is not ordered after its {did} by {by}{hint}")

    def _hint(self, w, epoch: int) -> str:
        agent = epoch >> SHIFT
        if agent < self.generic and w.clock[agent] >= epoch & MASK:
            return ": ordered, but no fence.proxy.async makes the generic write visible to the async proxy"
        if self.store_base <= agent < self.global_base:
            return ": the bulk group was not waited for"
        if self.ld_base <= agent < self.st_base:
            return (
                ": its result may still be in flight (no tcgen05.wait::ld and no use of it before the "
                "release)"
            )
        if self.wgmma_base <= agent < self.barrier_base:
            return ": no wgmma.wait_group is known to cover it"
        return ""

    # -- barriers ------------------------------------------------------------------------------------------
    def barrier_init(self, w, barrier, old) -> None:
        key = (barrier.rank, barrier.offset)
        agent = self.barrier_agents.get(key)
        if agent is None:
            if len(self.barrier_agents) >= self.ranks * _BARRIERS_PER_CTA:
                raise EmulatorError("more mbarriers than the checker has room for")
            agent = self.barrier_agents[key] = self.barrier_base + len(self.barrier_agents)
        barrier.agent = agent
        if old is not None:
            if old.waiters or old.in_flight:
                raise Fault(f"{old} is initialized again while it is in use")
            barrier.phase = 0
        self._write_words(
            w,
            barrier.rank,
            slice(barrier.offset >> 2, (barrier.offset >> 2) + 2),
            f"shared offset {barrier.offset:#x}",
            lambda: False,
        )
        barrier.arrivals = 0
        barrier.init_epoch = (w.agent, int(w.clock[w.agent]))

    def barrier_inval(self, w, barrier) -> None:
        self._barrier_visible(w, barrier, "mbarrier.inval")

    def _barrier_visible(self, w, barrier, what: str, clock=None) -> None:
        agent, at = barrier.init_epoch
        if (w.clock if clock is None else clock)[agent] < at:
            raise Race(
                f"race: {what} uses the {barrier} before its mbarrier.init by {self.agent_name(agent)} is "
                f"visible "
                "(no fence and barrier between)"
            )

    def barrier_arrive_mbar(self, w, barrier, relaxed: bool) -> None:
        self._barrier_visible(w, barrier, "mbarrier.arrive")
        if barrier.rank != w.cta.rank:
            self._signal(barrier.rank, w.agent, int(w.clock[w.agent]))
        barrier.clock = self._release(w, barrier.clock, relaxed)
        self._publish_foreign(w, barrier)

    def phase_complete(self, barrier) -> None:
        clock = barrier.clock if barrier.clock is not None else np.zeros(self.size + self.generic, np.int64)
        clock[barrier.agent] = barrier.phase + 1
        barrier.clock, barrier.done_clock = clock, clock.copy()

    def barrier_wait(self, w, barrier, relaxed: bool) -> None:
        self._barrier_visible(w, barrier, "mbarrier wait")
        if barrier.done_clock is None:
            return
        if relaxed:  # takes effect with the next fence
            w.relaxed_waits.append(barrier.done_clock)
            return
        join(w.clock, barrier.done_clock)
        self._learn_foreign(w, barrier)

    def barrier_arrive(self, w, barrier) -> None:
        barrier.clock = self._release(w, barrier.clock, False)
        self._publish_foreign(w, barrier)

    def barrier_pass(self, w, barrier) -> None:
        if barrier.done_clock is not None:
            join(w.clock, barrier.done_clock)
        self._learn_foreign(w, barrier)

    def cluster_arrive(self, w, barrier, relaxed: bool) -> None:
        barrier.clock = self._release(w, barrier.clock, relaxed)
        self._publish_foreign(w, barrier)

    # -- fences --------------------------------------------------------------------------------------------
    def proxy_fence(self, w, spaces: list[str]) -> None:
        w.clock[self.size :] = w.clock[: self.generic]
        self._tick(w)

    def init_fence(self, w) -> None:
        self._settle_loads(w)
        w.fences["cluster"] = w.clock.copy()
        self._tick(w)

    def thread_sync(self, w, before: bool) -> None:
        """tcgen05.fence::before_thread_sync and ::after_thread_sync: with them, relaxed arrivals and waits
        order tcgen05 operations (here: everything)."""
        if before:
            self._settle_loads(w)
            w.fences["cluster"] = w.clock.copy()
            self._tick(w)
        for clock in w.relaxed_waits:
            join(w.clock, clock)
        w.relaxed_waits.clear()

    def fence(self, w, scope: str) -> None:
        self._settle_loads(w)
        self.thread_sync(w, False)
        for found in w.unacquired:  # relaxed atomics before an acquire fence
            self._acquire(w, found)
        w.unacquired.clear()
        snapshot = w.clock.copy()
        if scope != "cta":
            w.fences["cluster"] = snapshot
        if scope in GPU_SCOPES:
            w.fences["gpu"] = snapshot
            w.fenced_foreign = dict(w.foreign)
        self._tick(w)

    # -- warps and CTAs ------------------------------------------------------------------------------------
    def exit_warp(self, w) -> None:
        self._settle_loads(w)
        if w.bulk_open or w.clock[self.store_base + w.slot] < w.groups_committed:
            raise Fault(
                f"warp {w.index} exits without waiting for its bulk stores (cp.async.bulk.wait_group): "
                f"their source in "
                "shared memory may be gone before it is read"
            )
        join(self.final[w.cta.rank], w.clock[: self.size])

    def cluster_end(self) -> None:
        """A CTA's shared memory must outlive every remote access: some warp of it must have known of each."""
        for rank, (signals, final) in enumerate(zip(self.signals, self.final)):
            late = np.flatnonzero(signals > final)
            if len(late):
                agent = int(late[0])
                line = self.lines.get(agent << SHIFT | int(signals[agent]))
                raise Race(
                    f"CTA rank {rank} may exit while {self.agent_name(agent)}"
                    f"{f' (PTX line {line})' if line else ''} still accesses its shared memory or signals "
                    f"its barriers: "
                    "no warp of the CTA has waited for that when it exits"
                )
