"""Checks of global memory. Epochs carry the cluster's number; knowledge crosses clusters only through
atomics."""

from __future__ import annotations

import numpy as np

from .report import Race
from .shadow import GPU_SCOPES, Shadow, Ticket, join, merge_foreign, words


class GlobalChecks:
    """Part of `checks.Checker`."""

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

    def _global_access(
        self,
        buffer,
        index,
        agent: int,
        clock: int,
        view,
        foreign: dict,
        write: bool,
        line: int,
        same=None,
        what: str = "",
    ) -> None:
        shadow = self._global_shadow(buffer)
        bad = self._unordered(shadow.writes[index], view, foreign)
        did = "write"
        if not bad and write:
            bad, did = self._unordered(buffer.readers[index], view, foreign), "read"
        if bad and not (same is not None and bool(np.all(same()))):
            number, who = bad >> 44, bad >> 28 & 0xFFFF
            where = f"{int(np.min(index)) * 4} bytes into buffer '{buffer.name}'"
            seen = self.machine.global_lines.get(bad)
            raise Race(
                f"race: {what or ('global store' if write else 'global load')} {where} is not ordered "
                f"after its {did} by "
                f"{self.agent_name(who)} of cluster {number - 1}{f' (PTX line {seen})' if seen else ''}"
            )
        stamp = self._stamp(agent, clock)
        self.machine.global_lines[stamp] = line
        if write:
            shadow.writes[index] = stamp
        else:
            buffer.readers[index] = stamp

    def global_read(self, w, buffer, at: int, size: int) -> None:
        self._global_access(
            buffer,
            np.arange(at >> 2, -(-(at + size) // 4)),
            w.agent,
            int(w.clock[w.agent]),
            w.clock,
            w.foreign,
            False,
            w.line,
        )

    def global_read_lanes(self, w, buffer, at: np.ndarray, size: int) -> None:
        self._global_access(
            buffer,
            np.unique(words(at, size)),
            w.agent,
            int(w.clock[w.agent]),
            w.clock,
            w.foreign,
            False,
            w.line,
        )

    def global_write_lanes(self, w, buffer, at: np.ndarray, size: int, same) -> None:
        if size < 4:  # neighbouring elements of a word may belong to different warps
            self._global_shadow(buffer)
            return
        self._global_access(
            buffer,
            np.unique(words(at, size)),
            w.agent,
            int(w.clock[w.agent]),
            w.clock,
            w.foreign,
            True,
            w.line,
            same,
        )

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
        self._global_access(
            box.buffer, index, agent, ticket.clock, ticket.view, ticket.foreign, write, w.line, same, what
        )

    def async_global_span(
        self, ticket: Ticket, buffer, at: int, size: int, write: bool, reduce: bool
    ) -> None:
        if reduce or not write and buffer.shadow is None:
            return
        w = ticket.warp
        agent = self.global_base + w.slot if write else 0
        self._global_access(
            buffer,
            np.arange(at >> 2, at + size >> 2),
            agent,
            ticket.clock,
            ticket.view,
            ticket.foreign,
            write,
            w.line,
            what="bulk copy",
        )

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
        if space == "global" and scope not in GPU_SCOPES:
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
        if found and (space != "global" or scope in GPU_SCOPES):
            self._acquire(w, found)

    def release_store(self, w, space: str, address: int, scope: str) -> None:
        self._publish(w, space, address, scope, w.clock, w.foreign)
        self._tick(w)
