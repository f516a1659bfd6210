"""Checks of the tensor pipe, of wgmma and of tensor memory."""

from __future__ import annotations

import numpy as np

from .report import Fault
from .shadow import SHIFT, Ticket, join


class TensorChecks:
    """Part of `checks.Checker`."""

    def issue_tensor(self, w) -> Ticket:
        rank = w.cta.rank
        self.pipe_clock[rank] += 1
        clock, agent = self.pipe_clock[rank], self.pipe_base + rank
        view = self._view(w)
        view[agent] = clock  # operations of one pipe run in order
        return Ticket(view, agent, clock, w)

    def issue_wgmma(self, w, op) -> Ticket:
        """One warp's part of an operation. Its completion tells any warp of the warpgroup what all four had
        done when they issued it."""
        ticket = Ticket(self._view(w), self._wgmma_agent(w), op.number + 1, w)
        op.clock = self._release(w, op.clock, False)
        return ticket

    def wgmma_waited(self, w, op) -> None:
        agent = self._wgmma_agent(w)
        join(w.clock, op.clock)
        w.clock[agent] = max(w.clock[agent], op.number + 1)

    def _wgmma_agent(self, w) -> int:
        return self.wgmma_base + w.cta.rank * self.warpgroups + w.index // 4

    def issue_commit(self, w) -> Ticket:
        self._settle_loads(w)
        full = w.clock.copy()
        agent = self.pipe_base + w.cta.rank
        full[agent] = self.pipe_clock[w.cta.rank]
        self._tick(w)
        return Ticket(None, agent, self.pipe_clock[w.cta.rank], w, full)

    def commit_arrive(self, ticket: Ticket, barrier) -> None:
        self._barrier_visible(ticket.warp, barrier, "a commit", ticket.full)
        barrier.clock = (
            ticket.full.copy() if barrier.clock is None else np.maximum(barrier.clock, ticket.full)
        )

    def commit_signals(self, ticket: Ticket, rank: int) -> None:
        self.lines[ticket.agent << SHIFT | ticket.clock] = ticket.warp.line
        self._signal(rank, ticket.agent, ticket.clock)

    def async_tmem_read(self, ticket: Ticket, tmem, groups, column: int, count: int, what: str) -> None:
        rank, at = tmem.cta.rank, (groups, slice(column, column + count))
        shadow = self.tmem[rank]
        epoch = shadow.write_conflict(at, ticket.view)
        if epoch:
            self._race(
                f"{what} read of TMEM columns",
                f"{column}..{column + count} of CTA rank {rank}",
                epoch,
                "write",
                self._hint(ticket.warp, epoch),
            )
        if not self.tmem_ready[rank][at].all():
            raise Fault(
                f"{what} reads TMEM columns {column}..{column + count} of CTA rank {rank}, which nothing "
                f"has written"
            )
        self.lines[ticket.agent << SHIFT | ticket.clock] = ticket.warp.line
        shadow.record_read(at, ticket.agent, ticket.clock)

    def async_tmem_write(
        self, ticket: Ticket, tmem, groups, column: int, count: int, accumulate: bool
    ) -> None:
        rank, at = tmem.cta.rank, (groups, slice(column, column + count))
        shadow, ready = self.tmem[rank], self.tmem_ready[rank]
        epoch = shadow.write_conflict(at, ticket.view)
        if epoch:
            self._race(
                "tensor-core write of TMEM columns",
                f"{column}..{column + count} of CTA rank {rank}",
                epoch,
                "write",
                self._hint(ticket.warp, epoch),
            )
        epoch = shadow.read_conflict(at, ticket.view)
        if epoch:
            self._race(
                "tensor-core write of TMEM columns",
                f"{column}..{column + count} of CTA rank {rank}",
                epoch,
                "read",
                self._hint(ticket.warp, epoch),
            )
        if accumulate and not ready[at].all():
            raise Fault(
                f"MMA accumulates onto TMEM columns {column}..{column + count} of CTA rank {rank}, which "
                f"nothing has "
                "written (accumulate must be off for the first MMA)"
            )
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
            self._race(
                "tcgen05.ld of TMEM columns",
                f"{column}..{column + count} of CTA rank {rank}",
                epoch,
                "write",
                " (no wait for the commit, or for tcgen05.wait::st, comes between)",
            )
        if not self.tmem_ready[rank][at].all():
            raise Fault(
                f"tcgen05.ld of TMEM columns {column}..{column + count} of CTA rank {rank}, which nothing "
                f"has written"
            )
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
            self._race(
                "tcgen05.st to TMEM columns",
                f"{column}..{column + count} of CTA rank {rank}",
                epoch,
                "access",
                self._hint(w, epoch),
            )
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
        """An allocation counts as an instantly complete tcgen05.st: later users of the columns must be
        ordered after it."""
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
            self._race(
                "tcgen05.dealloc of TMEM columns",
                f"{start}..{start + columns} of CTA rank {rank}",
                epoch,
                "last use",
                self._hint(w, epoch),
            )
