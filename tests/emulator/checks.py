"""Happens-before checking with vector clocks: races are found on any schedule, not only when they strike.

Agents of a cluster are its warps and everything that works beside them: a warp's cp.async, bulk-store and tcgen05.ld/st
engines, each CTA's tensor pipe, each mbarrier (bulk copies that signal it). An access leaves an epoch (agent, clock) in a
shadow of the memory; a later access by someone whose vector clock does not cover that epoch is a race. Shared memory and
global memory are shadowed per 4-byte word (per byte where narrower accesses occur), TMEM per column and 16 lanes.

Checks are made when an operation is issued, with the issuer's clock, so that they do not depend on when it completes.
A bulk copy's write carries the epoch (its mbarrier, the phase it belongs to), which only a wait for that phase covers.

A vector clock has a second part, the proxy clock: how far each warp's generic writes are known to be visible to the async
proxy. `fence.proxy.async` copies the first part into the second; async-proxy accesses are judged by the second.
"""

from __future__ import annotations

import numpy as np

from .report import EmulatorError, Fault, Race

SHIFT = 40
MASK = (1 << SHIFT) - 1
_BARRIERS_PER_CTA = 96
_GPU_SCOPES = ("gpu", "sys")


class Shadow:
    """Last write and last reads of every word of a memory."""

    __slots__ = ("writes", "reads", "shape")

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.writes = np.zeros(shape, np.int64)
        self.reads: dict[int, np.ndarray] = {}

    def write_conflict(self, at, clock: np.ndarray) -> int:
        """Epoch of a write at `at` that `clock` does not cover, or 0."""
        epochs = self.writes[at]
        if epochs.size == 0:
            return 0
        first = int(epochs.flat[0])
        if (epochs == first).all():
            return first if clock[first >> SHIFT] < first & MASK else 0
        bad = clock[epochs >> SHIFT] < (epochs & MASK)
        return int(epochs[bad].flat[0]) if bad.any() else 0

    def read_conflict(self, at, clock: np.ndarray) -> int:
        for agent, clocks in self.reads.items():
            worst = int(clocks[at].max())
            if worst > clock[agent]:
                return agent << SHIFT | worst
        return 0

    def record_read(self, at, agent: int, clock: int) -> None:
        clocks = self.reads.get(agent)
        if clocks is None:
            clocks = self.reads[agent] = np.zeros(self.shape, np.int64)
        clocks[at] = clock


class SmemShadow:
    """Word shadow of one CTA's shared memory, and a byte shadow once something narrower than a word is accessed."""

    __slots__ = ("words", "chunks", "bytes", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.words = Shadow(size // 4)
        self.bytes: Shadow | None = None

    def narrow(self) -> Shadow:
        if self.bytes is None:
            self.bytes = Shadow(self.size)
        return self.bytes


class Ticket:
    """The issuer's view when an asynchronous operation was issued."""

    __slots__ = ("view", "agent", "clock", "full", "foreign", "warp")

    def __init__(self, view, agent: int, clock: int, warp, full=None, foreign=None) -> None:
        self.view, self.agent, self.clock, self.warp, self.full, self.foreign = view, agent, clock, warp, full, foreign


def join(into, other) -> None:
    np.maximum(into, other, out=into)


class Checker:
    """Clocks and shadows of one cluster."""

    def __init__(self, cluster) -> None:
        self.cluster, self.machine = cluster, cluster.machine
        cx, cy, cz = self.machine.launch.cluster
        bx, by, bz = self.machine.launch.block
        self.ranks = cx * cy * cz
        self.warps_per_cta = -(-bx * by * bz // 32)
        n = self.ranks * self.warps_per_cta
        # Agents: 0 nobody; 1..n warps; then cp.async engines (both write through the generic proxy); then the rest.
        self.cp_base, self.generic = 1 + n, 1 + 2 * n
        self.store_base = self.generic
        self.global_base = self.store_base + n
        self.ld_base = self.global_base + n
        self.st_base = self.ld_base + n
        self.pipe_base = self.st_base + n
        self.barrier_base = self.pipe_base + self.ranks
        self.size = self.barrier_base + self.ranks * _BARRIERS_PER_CTA
        self.barrier_agents: dict[tuple[int, int], int] = {}
        self.pipe_clock = [0] * self.ranks
        self.smem = [SmemShadow(-(-self.machine.smem_end // 16) * 16) for _ in range(self.ranks)]
        self.tmem = [Shadow(8, 512) for _ in range(self.ranks)]
        self.tmem_ready = [np.zeros((8, 512), bool) for _ in range(self.ranks)]
        self.lines: dict[int, int] = {}  # epoch -> PTX line of its last access
        self.signals = [np.zeros(self.size, np.int64) for _ in range(self.ranks)]
        self.final = [np.zeros(self.size, np.int64) for _ in range(self.ranks)]

    # -- clocks --------------------------------------------------------------------------------------------------
    def start_warp(self, w) -> None:
        w.slot = w.cta.rank * self.warps_per_cta + w.index
        w.agent = 1 + w.slot
        w.clock = np.zeros(self.size + self.generic, np.int64)
        w.clock[w.agent] = 1
        w.fences: dict[str, np.ndarray] = {}
        w.foreign: dict[int, np.ndarray] = {}
        w.fenced_foreign: dict[int, np.ndarray] = {}
        w.unacquired: list = []
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
        view = w.clock[:self.size].copy()
        view[:self.generic] = w.clock[self.size:]
        return view

    # -- reports -------------------------------------------------------------------------------------------------
    def agent_name(self, agent: int) -> str:
        n = self.ranks * self.warps_per_cta

        def warp(slot: int) -> str:
            return f"warp {slot % self.warps_per_cta} of CTA rank {slot // self.warps_per_cta}"

        for base, text in ((self.barrier_base, None), (self.pipe_base, "the tensor pipe of CTA rank {}"),
                           (self.st_base, "tcgen05.st of {}"), (self.ld_base, "tcgen05.ld of {}"),
                           (self.global_base, "bulk stores of {}"), (self.store_base, "bulk stores of {}"),
                           (self.cp_base, "cp.async of {}"), (1, "{}")):
            if agent >= base:
                if text is None:
                    rank, offset = next(k for k, v in self.barrier_agents.items() if v == agent)
                    return f"a bulk copy that signals the mbarrier at {offset:#x} of CTA rank {rank}"
                return text.format(agent - base if base == self.pipe_base else warp((agent - base) % n))
        return "nobody"

    def _race(self, what: str, where: str, epoch: int, did: str, hint: str = "") -> None:
        agent, clock = epoch >> SHIFT, epoch & MASK
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
            return ": its result may still be in flight (no tcgen05.wait::ld and no use of it before the release)"
        return ""

    # -- shared memory, generic proxy ------------------------------------------------------------------------------
    def shared_read(self, w, rank: int, offset: int, size: int) -> None:
        if size < 4:
            self._narrow_access(w, rank, np.arange(offset, offset + size), False, None)
        else:
            self._read_words(w, rank, slice(offset >> 2, offset + size >> 2), f"shared offset {offset:#x}")

    def shared_read_lanes(self, w, rank: int, offsets: np.ndarray, size: int) -> None:
        if size < 4:
            self._narrow_access(w, rank, (offsets[:, None] + np.arange(size)).ravel(), False, None)
        else:
            self._read_words(w, rank, _words(offsets, size), f"shared offset {int(offsets[0]):#x} (first lane)")

    def _read_words(self, w, rank: int, at, where: str) -> None:
        shadow = self.smem[rank]
        epoch = shadow.words.write_conflict(at, w.clock)
        if epoch:
            self._race("load of", f"{where} of CTA rank {rank}", epoch, "write")
        if shadow.bytes is not None:
            self._mixed(w, shadow, at, "load", where, rank)
        elif not shadow.words.writes[at].all():
            raise Fault(f"load of {where} of CTA rank {rank}, which nothing has written")
        clock = int(w.clock[w.agent])
        self.lines[w.agent << SHIFT | clock] = w.line
        shadow.words.record_read(at, w.agent, clock)
        if rank != w.cta.rank:
            self._signal(rank, w.agent, clock)

    def _mixed(self, w, shadow: SmemShadow, at, did: str, where: str, rank: int) -> None:
        """A word access where bytes may have been written separately."""
        index = np.arange(at.start, at.stop) if isinstance(at, slice) else at
        parts = (index.ravel()[:, None] * 4 + np.arange(4))
        epoch = shadow.bytes.write_conflict(parts, w.clock)
        if not epoch and did == "store to":
            epoch = shadow.bytes.read_conflict(parts, w.clock)
        if epoch:
            self._race(f"{did} of", f"{where} of CTA rank {rank}", epoch, "access")
        if did == "load" and ((shadow.words.writes[index.ravel()] == 0) & (shadow.bytes.writes[parts] == 0).any(1)).any():
            raise Fault(f"load of {where} of CTA rank {rank}, which nothing has written")

    def shared_write(self, w, rank: int, offset: int, size: int, same: bool) -> None:
        if size < 4:
            self._narrow_access(w, rank, np.arange(offset, offset + size), True, same)
        else:
            self._write_words(w, rank, slice(offset >> 2, offset + size >> 2), f"shared offset {offset:#x}", lambda: same)

    def shared_write_lanes(self, w, rank: int, offsets: np.ndarray, size: int, same) -> None:
        if size < 4:
            index = (offsets[:, None] + np.arange(size)).ravel()
            self._narrow_access(w, rank, index, True, None)
        else:
            self._write_words(w, rank, _words(offsets, size), f"shared offset {int(offsets[0]):#x} (first lane)",
                              lambda: bool(np.all(same())))

    def _write_words(self, w, rank: int, at, where: str, same) -> None:
        shadow = self.smem[rank]
        epoch = shadow.words.write_conflict(at, w.clock)
        if epoch and not (epoch >> SHIFT < self.generic and same()):  # writing what is already there is harmless
            self._race("store to", f"{where} of CTA rank {rank}", epoch, "write")
        epoch = shadow.words.read_conflict(at, w.clock)
        if epoch and not same():
            self._race("store to", f"{where} of CTA rank {rank}", epoch, "read", self._hint(w, epoch))
        if shadow.bytes is not None:
            self._mixed(w, shadow, at, "store to", where, rank)
        clock = int(w.clock[w.agent])
        self.lines[w.agent << SHIFT | clock] = w.line
        shadow.words.writes[at] = w.agent << SHIFT | clock
        if rank != w.cta.rank:
            self._signal(rank, w.agent, clock)

    def _narrow_access(self, w, rank: int, index: np.ndarray, write: bool, same) -> None:
        shadow = self.smem[rank]
        narrow, did = shadow.narrow(), "store to" if write else "load of"
        where = f"shared offset {int(index[0]):#x} of CTA rank {rank}"
        epoch = shadow.words.write_conflict(index >> 2, w.clock) or narrow.write_conflict(index, w.clock)
        if epoch and not same:
            self._race(did, where, epoch, "write")
        if write:
            epoch = shadow.words.read_conflict(index >> 2, w.clock) or narrow.read_conflict(index, w.clock)
            if epoch and not same:
                self._race(did, where, epoch, "read", self._hint(w, epoch))
        elif ((shadow.words.writes[index >> 2] == 0) & (narrow.writes[index] == 0)).any():
            raise Fault(f"load of {where}, which nothing has written")
        clock = int(w.clock[w.agent])
        self.lines[w.agent << SHIFT | clock] = w.line
        if write:
            narrow.writes[index] = w.agent << SHIFT | clock
        else:
            narrow.record_read(index, w.agent, clock)

    def _signal(self, rank: int, agent: int, clock: int) -> None:
        """Someone outside CTA `rank` touches its shared memory or barriers at (agent, clock): it must outlive that."""
        known = self.signals[rank]
        if known[agent] < clock:
            known[agent] = clock

    # -- shared memory, async proxy ----------------------------------------------------------------------------------
    def async_smem_read(self, ticket: Ticket, cta, offsets: np.ndarray, what: str) -> None:
        """A read of 16-byte chunks by the tensor pipe."""
        self._async_read(ticket, cta.rank, _words(offsets.ravel(), 16), what)

    def _async_read(self, ticket: Ticket, rank: int, at, what: str) -> None:
        shadow = self.smem[rank]
        epoch = shadow.words.write_conflict(at, ticket.view)
        if not epoch and shadow.bytes is not None:
            index = np.arange(at.start, at.stop) if isinstance(at, slice) else at
            parts = index.ravel()[:, None] * 4 + np.arange(4)
            epoch = shadow.bytes.write_conflict(parts, ticket.view)
            empty = ((shadow.words.writes[index.ravel()] == 0) & (shadow.bytes.writes[parts] == 0).any(1)).any()
        else:
            empty = not shadow.words.writes[at].all()
        first = (at.start if isinstance(at, slice) else int(at.min())) * 4
        if epoch:
            self._race(f"{what} read of shared memory", f"from offset {first:#x} of CTA rank {rank}", epoch, "write",
                       self._hint(ticket.warp, epoch))
        if empty:
            raise Fault(f"{what} reads shared memory (from offset {first:#x} of CTA rank {rank}) that nothing has written")
        self.lines[ticket.agent << SHIFT | ticket.clock] = ticket.warp.line
        shadow.words.record_read(at, ticket.agent, ticket.clock)

    def store_reads(self, ticket: Ticket, rank: int, offset: int, size: int) -> None:
        self._async_read(ticket, rank, slice(offset >> 2, offset + size >> 2), "bulk store")

    def copy_reads(self, ticket: Ticket, rank: int, offset: int, size: int, barrier) -> None:
        """The source of a shared-to-shared bulk copy; the copy's mbarrier tells when it has been read."""
        source = Ticket(ticket.view, barrier.agent, barrier.phase + 1, ticket.warp)
        self._async_read(source, rank, slice(offset >> 2, offset + size >> 2), "bulk copy")

    def async_smem_write(self, ticket: Ticket, rank: int, offset: int, size: int, barrier) -> None:
        shadow = self.smem[rank]
        if offset + size > shadow.size:
            raise Fault(f"bulk copy to shared offset {offset:#x}..{offset + size:#x} of CTA rank {rank} is out of bounds: "
                        f"the CTA ends at {self.machine.smem_end:#x}")
        self._barrier_visible(ticket.warp, barrier, "a bulk copy")
        agent, clock = barrier.agent, barrier.phase + 1
        at = slice(offset >> 2, offset + size >> 2)
        view = ticket.view
        before, view[agent] = view[agent], max(view[agent], clock)  # copies of one phase write apart; see _overlap
        epoch = shadow.words.write_conflict(at, view) or shadow.words.read_conflict(at, ticket.full)
        if not epoch and shadow.bytes is not None:
            parts = slice(at.start * 4, at.stop * 4)
            epoch = shadow.bytes.write_conflict(parts, view) or shadow.bytes.read_conflict(parts, ticket.full)
        view[agent] = before
        if not epoch and (shadow.words.writes[at] == (agent << SHIFT | clock)).any():
            raise Race(f"race: two bulk copies of one phase of the {barrier} write the same shared memory "
                       f"(offset {offset:#x} of CTA rank {rank})")
        if epoch:
            hint = self._hint(ticket.warp, epoch)
            self._race("bulk copy into shared memory", f"at offset {offset:#x} of CTA rank {rank}", epoch, "access", hint)
        epoch = agent << SHIFT | clock
        self.lines[epoch] = ticket.warp.line
        shadow.words.writes[at] = epoch
        self._signal(rank, agent, clock)

    def issue_copy(self, w) -> Ticket:
        return Ticket(self._view(w), 0, 0, w, w.clock[:self.size].copy(), w.foreign)

    def copy_arrive(self, barrier) -> None:
        """Landing is known to whoever waits for the phase: `phase_complete` publishes it."""

    def issue_store(self, w, op) -> Ticket:
        op.clock = w.groups_committed + 1
        return Ticket(self._view(w), self.store_base + w.slot, op.clock, w, foreign=w.foreign)

    def group_committed(self, w) -> None:
        w.groups_committed += 1

    def group_waited(self, w, older: list, read_only: bool) -> None:
        done = w.groups_committed - (len(w.bulk_groups) - len(older))
        for base in (self.store_base,) if read_only else (self.store_base, self.global_base):
            w.clock[base + w.slot] = max(w.clock[base + w.slot], done)

    def issue_cp_async(self, w, op, places: list[tuple[int, int]], size: int) -> None:
        w.cp_clock += 1
        op.clock = w.cp_clock
        agent = self.cp_base + w.slot
        for rank in {r for r, _ in places}:
            at = _words(np.array([o for r, o in places if r == rank]), max(size, 4))
            words = self.smem[rank].words
            view = w.clock.copy()
            view[agent] = op.clock
            epoch = words.write_conflict(at, view) or words.read_conflict(at, view)
            if epoch:
                self._race("cp.async to shared memory", f"of CTA rank {rank}", epoch, "access", self._hint(w, epoch))
            self.lines[agent << SHIFT | op.clock] = w.line
            words.writes[at] = agent << SHIFT | op.clock

    def cp_async_waited(self, w, older: list) -> None:
        agent = self.cp_base + w.slot
        done = max((op.clock for group in older for op in group), default=0)
        w.clock[agent] = max(w.clock[agent], done)

    def cp_async_ticket(self, w, ticket: Ticket) -> None:
        ticket.full[self.cp_base + w.slot] = w.cp_clock

    # -- tensor pipe and TMEM ------------------------------------------------------------------------------------------
    def issue_tensor(self, w) -> Ticket:
        rank = w.cta.rank
        self.pipe_clock[rank] += 1
        clock, agent = self.pipe_clock[rank], self.pipe_base + rank
        view = self._view(w)
        view[agent] = clock  # operations of one pipe run in order
        return Ticket(view, agent, clock, w)

    def issue_commit(self, w) -> Ticket:
        self._settle_loads(w)
        full = w.clock.copy()
        agent = self.pipe_base + w.cta.rank
        full[agent] = self.pipe_clock[w.cta.rank]
        self._tick(w)
        return Ticket(None, agent, self.pipe_clock[w.cta.rank], w, full)

    def commit_arrive(self, ticket: Ticket, barrier) -> None:
        self._barrier_visible(ticket.warp, barrier, "a commit", ticket.full)
        barrier.clock = ticket.full.copy() if barrier.clock is None else np.maximum(barrier.clock, ticket.full)

    def commit_signals(self, ticket: Ticket, rank: int) -> None:
        self.lines[ticket.agent << SHIFT | ticket.clock] = ticket.warp.line
        self._signal(rank, ticket.agent, ticket.clock)

    def async_tmem_read(self, ticket: Ticket, tmem, groups, column: int, count: int, what: str) -> None:
        rank, at = tmem.cta.rank, (groups, slice(column, column + count))
        shadow = self.tmem[rank]
        epoch = shadow.write_conflict(at, ticket.view)
        if epoch:
            self._race(f"{what} read of TMEM columns", f"{column}..{column + count} of CTA rank {rank}", epoch, "write",
                       self._hint(ticket.warp, epoch))
        if not self.tmem_ready[rank][at].all():
            raise Fault(f"{what} reads TMEM columns {column}..{column + count} of CTA rank {rank}, which nothing has written")
        self.lines[ticket.agent << SHIFT | ticket.clock] = ticket.warp.line
        shadow.record_read(at, ticket.agent, ticket.clock)

    def async_tmem_write(self, ticket: Ticket, tmem, groups, column: int, count: int, accumulate: bool) -> None:
        rank, at = tmem.cta.rank, (groups, slice(column, column + count))
        shadow, ready = self.tmem[rank], self.tmem_ready[rank]
        epoch = shadow.write_conflict(at, ticket.view)
        if epoch:
            self._race("tensor-core write of TMEM columns", f"{column}..{column + count} of CTA rank {rank}", epoch, "write",
                       self._hint(ticket.warp, epoch))
        epoch = shadow.read_conflict(at, ticket.view)
        if epoch:
            self._race("tensor-core write of TMEM columns", f"{column}..{column + count} of CTA rank {rank}", epoch, "read",
                       self._hint(ticket.warp, epoch))
        if accumulate and not ready[at].all():
            raise Fault(f"MMA accumulates onto TMEM columns {column}..{column + count} of CTA rank {rank}, which nothing has "
                        "written (accumulate must be off for the first MMA)")
        epoch = ticket.agent << SHIFT | ticket.clock
        self.lines[epoch] = ticket.warp.line
        shadow.writes[at] = epoch
        ready[at] = True
        if rank != ticket.warp.cta.rank:
            self._signal(rank, ticket.agent, ticket.clock)

    def tmem_read(self, w, tmem, lane: int, rows: int, column: int, count: int) -> None:
        rank, at = w.cta.rank, (slice(lane // 16, (lane + rows) // 16), slice(column, column + count))
        shadow = self.tmem[rank]
        epoch = shadow.write_conflict(at, w.clock)
        if epoch:
            self._race("tcgen05.ld of TMEM columns", f"{column}..{column + count} of CTA rank {rank}", epoch, "write",
                       " (no wait for the commit, or for tcgen05.wait::st, comes between)")
        if not self.tmem_ready[rank][at].all():
            raise Fault(f"tcgen05.ld of TMEM columns {column}..{column + count} of CTA rank {rank}, which nothing has written")
        w.ld_clock += 1
        agent = self.ld_base + w.slot
        w.ld_open[w.line] = w.ld_clock
        self.lines[agent << SHIFT | w.ld_clock] = w.line
        shadow.record_read(at, agent, w.ld_clock)

    def tmem_write(self, w, tmem, lane: int, rows: int, column: int, count: int) -> None:
        rank, at = w.cta.rank, (slice(lane // 16, (lane + rows) // 16), slice(column, column + count))
        shadow = self.tmem[rank]
        self._settle_loads(w)
        agent = self.st_base + w.slot
        w.st_clock += 1
        view = w.clock.copy()
        view[agent] = w.st_clock  # stores of one warp are in order
        epoch = shadow.write_conflict(at, view) or shadow.read_conflict(at, view)
        if epoch:
            self._race("tcgen05.st to TMEM columns", f"{column}..{column + count} of CTA rank {rank}", epoch, "access",
                       self._hint(w, epoch))
        self.lines[agent << SHIFT | w.st_clock] = w.line
        shadow.writes[at] = agent << SHIFT | w.st_clock
        self.tmem_ready[rank][at] = True

    def tmem_wait(self, w, load: bool) -> None:
        if load:
            w.ld_open.clear()
            self._settle_loads(w)
        else:
            w.clock[self.st_base + w.slot] = w.st_clock

    def tmem_allocated(self, w, tmem, start: int, columns: int) -> None:
        """An allocation counts as an instantly complete tcgen05.st: later users of the columns must be ordered after it."""
        at, rank = (slice(None), slice(start, start + columns)), tmem.cta.rank
        w.st_clock += 1
        w.clock[self.st_base + w.slot] = w.st_clock
        epoch = self.st_base + w.slot << SHIFT | w.st_clock
        self.lines[epoch] = w.line
        shadow = self.tmem[rank]
        shadow.writes[at] = epoch
        for clocks in shadow.reads.values():
            clocks[at] = 0
        self.tmem_ready[rank][at] = False
        tmem.claim = (self.st_base + w.slot, w.st_clock)

    def met(self, w, peer: tuple[int, int]) -> None:
        """A paired tcgen05.alloc has passed: the peer's columns are allocated. It orders nothing else."""
        agent, clock = peer
        w.clock[agent] = max(w.clock[agent], clock)

    def tmem_freed(self, w, tmem, start: int, columns: int) -> None:
        rank, at = tmem.cta.rank, (slice(None), slice(start, start + columns))
        self._settle_loads(w)
        epoch = self.tmem[rank].write_conflict(at, w.clock) or self.tmem[rank].read_conflict(at, w.clock)
        if epoch:
            self._race("tcgen05.dealloc of TMEM columns", f"{start}..{start + columns} of CTA rank {rank}", epoch, "last use",
                       self._hint(w, epoch))

    # -- barriers ------------------------------------------------------------------------------------------------------
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
        self._write_words(w, barrier.rank, slice(barrier.offset >> 2, (barrier.offset >> 2) + 2),
                          f"shared offset {barrier.offset:#x}", lambda: False)
        barrier.arrivals = 0
        barrier.init_epoch = (w.agent, int(w.clock[w.agent]))

    def barrier_inval(self, w, barrier) -> None:
        self._barrier_visible(w, barrier, "mbarrier.inval")

    def _barrier_visible(self, w, barrier, what: str, clock=None) -> None:
        agent, at = barrier.init_epoch
        if (w.clock if clock is None else clock)[agent] < at:
            raise Race(f"race: {what} uses the {barrier} before its mbarrier.init by {self.agent_name(agent)} is visible "
                       "(no fence and barrier between)")

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
        if not relaxed and barrier.done_clock is not None:
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

    # -- fences --------------------------------------------------------------------------------------------------------
    def proxy_fence(self, w, spaces: list[str]) -> None:
        w.clock[self.size:] = w.clock[:self.generic]
        self._tick(w)

    def init_fence(self, w) -> None:
        self._settle_loads(w)
        w.fences["cluster"] = w.clock.copy()
        self._tick(w)

    def fence(self, w, scope: str) -> None:
        self._settle_loads(w)
        for found in w.unacquired:  # relaxed atomics before an acquire fence
            self._acquire(w, found)
        w.unacquired.clear()
        snapshot = w.clock.copy()
        if scope != "cta":
            w.fences["cluster"] = snapshot
        if scope in _GPU_SCOPES:
            w.fences["gpu"] = snapshot
            w.fenced_foreign = dict(w.foreign)
        self._tick(w)

    # -- warps and CTAs ------------------------------------------------------------------------------------------------
    def exit_warp(self, w) -> None:
        self._settle_loads(w)
        if w.bulk_open or w.clock[self.store_base + w.slot] < w.groups_committed:
            raise Fault(f"warp {w.index} exits without waiting for its bulk stores (cp.async.bulk.wait_group): their source in "
                        "shared memory may be gone before it is read")
        join(self.final[w.cta.rank], w.clock[:self.size])

    def cluster_end(self) -> None:
        """A CTA's shared memory must outlive every remote access: some warp of it must have known of each."""
        for rank, (signals, final) in enumerate(zip(self.signals, self.final)):
            late = np.flatnonzero(signals > final)
            if len(late):
                agent = int(late[0])
                line = self.lines.get(agent << SHIFT | int(signals[agent]))
                raise Race(f"CTA rank {rank} may exit while {self.agent_name(agent)}"
                           f"{f' (PTX line {line})' if line else ''} still accesses its shared memory or signals its barriers: "
                           "no warp of the CTA has waited for that when it exits")

    # -- global memory: epochs carry the cluster's number, and knowledge crosses clusters only through atomics -----------
    def _global_shadow(self, buffer) -> Shadow:
        if buffer.shadow is None:
            buffer.shadow = Shadow(-(-buffer.size // 4))
            buffer.readers = np.zeros(-(-buffer.size // 4), np.int64)
        return buffer.shadow

    def _stamp(self, agent: int, clock: int) -> int:
        return self.cluster.number + 1 << 44 | agent << 28 | clock

    def _unordered(self, epochs: np.ndarray, clock: np.ndarray, foreign: dict) -> int:
        """A global epoch that neither the own clock nor knowledge of other clusters covers, or 0."""
        for epoch in np.unique(epochs).tolist():
            if not epoch:
                continue
            number, agent, at = epoch >> 44, epoch >> 28 & 0xFFFF, epoch & 0xFFFFFFF
            known = clock if number == self.cluster.number + 1 else foreign.get(number)
            if known is None or known[agent] < at:
                return epoch
        return 0

    def _global_access(self, buffer, index, agent: int, clock: int, view, foreign: dict, write: bool, line: int, same=None,
                       what: str = "") -> None:
        shadow = self._global_shadow(buffer)
        bad = self._unordered(shadow.writes[index], view, foreign)
        did = "write"
        if not bad and write:
            bad, did = self._unordered(buffer.readers[index], view, foreign), "read"
        if bad and not (same is not None and bool(np.all(same()))):
            number, who = bad >> 44, bad >> 28 & 0xFFFF
            where = f"{int(np.min(index)) * 4} bytes into buffer '{buffer.name}'"
            seen = self.machine.global_lines.get(bad)
            raise Race(f"race: {what or ('global store' if write else 'global load')} {where} is not ordered after its {did} by "
                       f"{self.agent_name(who)} of cluster {number - 1}{f' (PTX line {seen})' if seen else ''}")
        stamp = self._stamp(agent, clock)
        self.machine.global_lines[stamp] = line
        if write:
            shadow.writes[index] = stamp
        else:
            buffer.readers[index] = stamp

    def global_read(self, w, buffer, at: int, size: int) -> None:
        self._global_access(buffer, np.arange(at >> 2, -(-(at + size) // 4)), w.agent, int(w.clock[w.agent]), w.clock, w.foreign,
                            False, w.line)

    def global_read_lanes(self, w, buffer, at: np.ndarray, size: int) -> None:
        self._global_access(buffer, np.unique(_words(at, size)), w.agent, int(w.clock[w.agent]), w.clock, w.foreign, False, w.line)

    def global_write_lanes(self, w, buffer, at: np.ndarray, size: int, same) -> None:
        if size < 4:  # neighbouring elements of a word may belong to different warps
            self._global_shadow(buffer)
            return
        self._global_access(buffer, np.unique(_words(at, size)), w.agent, int(w.clock[w.agent]), w.clock, w.foreign, True, w.line,
                            same)

    def async_global_read(self, ticket: Ticket, box) -> None:
        self._box_access(ticket, box, False, "TMA load")

    def async_global_write(self, ticket: Ticket, box, reduce: bool, same) -> None:
        if reduce:
            self._global_shadow(box.buffer)
        else:
            self._box_access(ticket, box, True, "TMA store", same)

    def _box_access(self, ticket: Ticket, box, write: bool, what: str, same=None) -> None:
        w = ticket.warp
        index = np.zeros(1, np.int64) + (box.offset >> 2)
        for n, stride in zip(box.shape[:-1], box.strides[:-1]):
            index = (index[:, None] + np.arange(n) * (stride >> 2)).ravel()
        index = (index[:, None] + np.arange(-(-box.shape[-1] // 4))).ravel()
        agent = self.global_base + w.slot if write else 0
        self._global_access(box.buffer, index, agent, ticket.clock, ticket.view, ticket.foreign, write, w.line, same,
                            what)

    def async_global_span(self, ticket: Ticket, buffer, at: int, size: int, write: bool, reduce: bool) -> None:
        if reduce or not write and buffer.shadow is None:
            return
        w = ticket.warp
        agent = self.global_base + w.slot if write else 0
        self._global_access(buffer, np.arange(at >> 2, at + size >> 2), agent, ticket.clock, ticket.view, ticket.foreign, write,
                            w.line, what="bulk copy")

    def atomic(self, w, space: str, address: int, size: int, scope: str, order: str) -> None:
        if order in ("release", "acq_rel"):
            self._publish(w, space, address, scope, w.clock, w.foreign)
        elif "gpu" in w.fences:
            self._publish(w, space, address, scope, w.fences["gpu"], w.fenced_foreign)
        found = self.machine.atomics.get((space, address))
        if found:
            if order in ("acquire", "acq_rel"):
                self._acquire(w, found)
            else:
                w.unacquired.append({k: v.copy() for k, v in found.items()})
        if order in ("release", "acq_rel"):
            self._tick(w)

    def _publish(self, w, space: str, address: int, scope: str, clock, foreign: dict) -> None:
        if space == "global" and scope not in _GPU_SCOPES:
            return
        self._settle_loads(w)
        known = self.machine.atomics.setdefault((space, address), {})
        merge_foreign(known, foreign)
        merge_foreign(known, {self.cluster.number + 1: clock})

    def _acquire(self, w, found: dict) -> None:
        own = self.cluster.number + 1
        if own in found:
            join(w.clock, found[own])
        merge_foreign(w.foreign, {k: v for k, v in found.items() if k != own})

    def acquire_load(self, w, space: str, address: int, scope: str) -> None:
        found = self.machine.atomics.get((space, address))
        if found and (space != "global" or scope in _GPU_SCOPES):
            self._acquire(w, found)

    def release_store(self, w, space: str, address: int, scope: str) -> None:
        self._publish(w, space, address, scope, w.clock, w.foreign)
        self._tick(w)


def merge_foreign(into: dict, other: dict) -> None:
    for number, clock in other.items():
        mine = into.get(number)
        into[number] = clock.copy() if mine is None else np.maximum(mine, clock)


def _words(offsets: np.ndarray, size: int) -> np.ndarray:
    """Word numbers covered by `size` bytes from each offset."""
    if size <= 4:
        return offsets >> 2
    return ((offsets >> 2)[:, None] + np.arange(size // 4)).ravel()
