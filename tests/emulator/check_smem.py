"""Checks of shared-memory accesses, by the generic and the async proxy."""

from __future__ import annotations

import numpy as np

from .report import Fault, Race
from .shadow import SHIFT, SmemShadow, Ticket, words


class SharedChecks:
    """Part of `checks.Checker`."""

    # -- shared memory, generic proxy ----------------------------------------------------------------------
    def shared_read(self, w, rank: int, offset: int, size: int) -> None:
        if size < 4:
            self._narrow_access(w, rank, np.arange(offset, offset + size), False, None)
        else:
            self._read_words(w, rank, slice(offset >> 2, offset + size >> 2), f"shared offset {offset:#x}")

    def shared_read_lanes(self, w, rank: int, offsets: np.ndarray, size: int) -> None:
        if size < 4:
            self._narrow_access(w, rank, (offsets[:, None] + np.arange(size)).ravel(), False, None)
        else:
            self._read_words(
                w, rank, words(offsets, size), f"shared offset {int(offsets[0]):#x} (first lane)"
            )

    def _read_words(self, w, rank: int, at, where: str) -> None:
        shadow = self.smem[rank]
        epoch, empty = shadow.words.scan(at, w.clock)
        if epoch:
            self._race("load of", f"{where} of CTA rank {rank}", epoch, "write")
        if shadow.bytes is not None:
            self._mixed(w, shadow, at, "load", where, rank)
        elif empty:
            raise Fault(f"load of {where} of CTA rank {rank}, which nothing has written")
        clock = int(w.clock[w.agent])
        self.lines[w.agent << SHIFT | clock] = w.line
        shadow.words.record_read(at, w.agent, clock)
        if rank != w.cta.rank:
            self._signal(rank, w.agent, clock)

    def _mixed(self, w, shadow: SmemShadow, at, did: str, where: str, rank: int) -> None:
        """A word access where bytes may have been written separately."""
        index = np.arange(at.start, at.stop) if isinstance(at, slice) else at
        parts = index.ravel()[:, None] * 4 + np.arange(4)
        epoch = shadow.bytes.write_conflict(parts, w.clock)
        if not epoch and did == "store to":
            epoch = shadow.bytes.read_conflict(parts, w.clock)
        if epoch:
            self._race(f"{did} of", f"{where} of CTA rank {rank}", epoch, "access")
        if (
            did == "load"
            and ((shadow.words.writes[index.ravel()] == 0) & (shadow.bytes.writes[parts] == 0).any(1)).any()
        ):
            raise Fault(f"load of {where} of CTA rank {rank}, which nothing has written")

    def shared_write(self, w, rank: int, offset: int, size: int, same: bool) -> None:
        if size < 4:
            self._narrow_access(w, rank, np.arange(offset, offset + size), True, same)
        else:
            self._write_words(
                w, rank, slice(offset >> 2, offset + size >> 2), f"shared offset {offset:#x}", lambda: same
            )

    def shared_write_lanes(self, w, rank: int, offsets: np.ndarray, size: int, same) -> None:
        if size < 4:
            index = (offsets[:, None] + np.arange(size)).ravel()
            self._narrow_access(w, rank, index, True, None)
        else:
            self._write_words(
                w,
                rank,
                words(offsets, size),
                f"shared offset {int(offsets[0]):#x} (first lane)",
                lambda: bool(np.all(same())),
            )

    def _write_words(self, w, rank: int, at, where: str, same) -> None:
        shadow = self.smem[rank]
        epoch = shadow.words.write_conflict(at, w.clock)
        if epoch and not (
            epoch >> SHIFT < self.generic and same()
        ):  # writing what is already there is harmless
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
        """Someone outside CTA `rank` touches its shared memory or barriers at (agent, clock): it must outlive
        that."""
        known = self.signals[rank]
        if known[agent] < clock:
            known[agent] = clock

    # -- shared memory, async proxy ------------------------------------------------------------------------
    def async_smem_read(self, ticket: Ticket, rank: int, at, what: str) -> None:
        """An async-proxy read of the words `at` (an index array or slice)."""
        shadow = self.smem[rank]
        try:
            epoch, empty = shadow.words.scan(at, ticket.view)
        except IndexError:
            end = int(at.max()) * 4 + 4
            raise Fault(
                f"{what} at shared offset {end - 4:#x} of CTA rank {rank} is out of bounds: the CTA ends at "
                f"{self.machine.smem_end:#x}"
            ) from None
        if shadow.bytes is not None and not epoch:
            index = np.arange(at.start, at.stop) if isinstance(at, slice) else at
            parts = index.ravel()[:, None] * 4 + np.arange(4)
            epoch = shadow.bytes.write_conflict(parts, ticket.view)
            unwritten = (shadow.bytes.writes[parts] == 0).any(1)
            empty = bool(((shadow.words.writes[index.ravel()] == 0) & unwritten).any())
        if epoch or empty:
            first = (at.start if isinstance(at, slice) else int(at.min())) * 4
        if epoch:
            self._race(
                f"{what} read of shared memory",
                f"from offset {first:#x} of CTA rank {rank}",
                epoch,
                "write",
                self._hint(ticket.warp, epoch),
            )
        if empty:
            raise Fault(
                f"{what} reads shared memory (from offset {first:#x} of CTA rank {rank}) that nothing has "
                f"written"
            )
        self.lines[ticket.agent << SHIFT | ticket.clock] = ticket.warp.line
        shadow.words.record_read(at, ticket.agent, ticket.clock)

    def store_reads(self, ticket: Ticket, rank: int, offset: int, size: int) -> None:
        self.async_smem_read(ticket, rank, slice(offset >> 2, offset + size >> 2), "bulk store")

    def copy_reads(self, ticket: Ticket, rank: int, offset: int, size: int, barrier) -> None:
        """The source of a shared-to-shared bulk copy; the copy's mbarrier tells when it has been read."""
        source = Ticket(ticket.view, barrier.agent, barrier.phase + 1, ticket.warp)
        self.async_smem_read(source, rank, slice(offset >> 2, offset + size >> 2), "bulk copy")

    def async_smem_write(self, ticket: Ticket, rank: int, offset: int, size: int, barrier) -> None:
        shadow = self.smem[rank]
        if offset + size > shadow.size:
            raise Fault(
                f"bulk copy to shared offset {offset:#x}..{offset + size:#x} of CTA rank {rank} is out of "
                f"bounds: "
                f"the CTA ends at {self.machine.smem_end:#x}"
            )
        self._barrier_visible(ticket.warp, barrier, "a bulk copy")
        agent, clock = barrier.agent, barrier.phase + 1
        at = slice(offset >> 2, offset + size >> 2)
        view = ticket.view
        before, view[agent] = view[agent], max(
            view[agent], clock
        )  # copies of one phase write apart; see _overlap
        epoch = shadow.words.write_conflict(at, view) or shadow.words.read_conflict(at, ticket.full)
        if not epoch and shadow.bytes is not None:
            parts = slice(at.start * 4, at.stop * 4)
            epoch = shadow.bytes.write_conflict(parts, view) or shadow.bytes.read_conflict(parts, ticket.full)
        view[agent] = before
        if not epoch and (shadow.words.writes[at] == (agent << SHIFT | clock)).any():
            raise Race(
                f"race: two bulk copies of one phase of the {barrier} write the same shared memory "
                f"(offset {offset:#x} of CTA rank {rank})"
            )
        if epoch:
            hint = self._hint(ticket.warp, epoch)
            self._race(
                "bulk copy into shared memory",
                f"at offset {offset:#x} of CTA rank {rank}",
                epoch,
                "access",
                hint,
            )
        epoch = agent << SHIFT | clock
        self.lines[epoch] = ticket.warp.line
        shadow.words.writes[at] = epoch
        self._signal(rank, agent, clock)

    def issue_copy(self, w) -> Ticket:
        return Ticket(self._view(w), 0, 0, w, w.clock[: self.size].copy(), w.foreign)

    def issue_store_async(self, w) -> Ticket:
        """st.async writes through the generic proxy: no proxy fence is needed before it."""
        clock = w.clock[: self.size].copy()
        return Ticket(clock, 0, 0, w, clock, w.foreign)

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
            at = words(np.array([o for r, o in places if r == rank]), max(size, 4))
            shadow = self.smem[rank].words
            view = w.clock.copy()
            view[agent] = op.clock
            epoch = shadow.write_conflict(at, view) or shadow.read_conflict(at, view)
            if epoch:
                self._race(
                    "cp.async to shared memory", f"of CTA rank {rank}", epoch, "access", self._hint(w, epoch)
                )
            self.lines[agent << SHIFT | op.clock] = w.line
            shadow.writes[at] = agent << SHIFT | op.clock

    def cp_async_waited(self, w, older: list) -> None:
        agent = self.cp_base + w.slot
        done = max((op.clock for group in older for op in group), default=0)
        w.clock[agent] = max(w.clock[agent], done)

    def cp_async_ticket(self, w, ticket: Ticket) -> None:
        ticket.full[self.cp_base + w.slot] = w.cp_clock
