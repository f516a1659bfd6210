"""Barrier objects: mbarriers, named (CTA) barriers and the cluster barrier. State only; `isa_sync` decodes
opcodes.

An mbarrier's phase completes when no arrival is pending and its transaction count is zero; then the phase bit
flips and the pending count is reloaded (PTX ISA 9.7.13.15). The transaction count may go below zero: bytes
may land before the expect-tx that announces them.
"""

from __future__ import annotations

from .report import Fault


class Mbarrier:
    __slots__ = (
        "offset",
        "rank",
        "count",
        "pending",
        "tx",
        "phase",
        "waiters",
        "owner",
        "clock",
        "done_clock",
        "agent",
        "in_flight",
        "arrivals",
        "init_epoch",
    )

    def __init__(self, owner, rank: int, offset: int, count: int) -> None:
        self.owner, self.rank, self.offset = owner, rank, offset
        self.count = self.pending = count
        self.tx = self.phase = 0
        self.waiters: list = []
        self.clock = self.done_clock = None  # vector clocks, see checks
        self.agent = -1
        self.in_flight = 0  # bulk copies issued against this phase and not yet landed
        self.arrivals = 0

    def __str__(self) -> str:
        return f"mbarrier at shared offset {self.offset:#x} of CTA {self.rank}"

    def state(self) -> str:
        return (
            f"phase {self.phase} (parity {self.phase & 1}) not complete: {self.pending} of {self.count} "
            f"arrivals "
            f"and {self.tx} transaction bytes outstanding"
        )

    def untouched(self, count: int) -> bool:
        """Whether the state is that of a fresh initialization with `count`."""
        fresh = self.count == self.pending == count and self.tx == self.phase == self.arrivals == 0
        return fresh and not self.waiters and not self.in_flight

    def expect(self, amount: int) -> None:
        self.tx += amount
        if abs(self.tx) > (1 << 20) - 1:
            raise Fault(f"{self}: transaction count {self.tx} is outside its 20-bit range")

    def arrive(self, count: int = 1) -> None:
        if count > self.pending:
            raise Fault(
                f"{self}: {count} arrivals but only {self.pending} of {self.count} are pending in phase "
                f"{self.phase}"
            )
        self.pending -= count
        self.arrivals += count
        self.settle()

    def complete_tx(self, amount: int) -> None:
        self.tx -= amount
        if abs(self.tx) > (1 << 20) - 1:
            raise Fault(f"{self}: transaction count {self.tx} is outside its 20-bit range")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.tx == 0:
            cluster = self.owner.cluster
            if cluster.check:
                cluster.check.phase_complete(self)
            self.phase += 1
            self.pending = self.count
            if self.count == 0:
                raise Fault(f"{self}: completed a phase with an arrival count of zero")
            cluster.machine.wake(self.waiters)


class NamedBarrier:
    """`barrier.sync id, n`: releases when n threads (whole warps) have arrived; n = 0 means all live
    threads."""

    def __init__(self, cta, number: int) -> None:
        self.cta, self.number = cta, number
        self.generation = self.arrived = self.expected = 0
        self.everyone = False
        self.waiters: list = []
        self.values: list[bool] = []
        self.result: dict[int, list[bool]] = {}
        self.clock = self.done_clock = None

    def arrive(self, w, threads: int, lanes: int, value=None) -> None:
        if self.arrived == 0:
            self.everyone, self.expected = threads == 0, threads
        elif threads != self.expected:
            raise Fault(
                f"named barrier {self.number}: {threads or 'all'} threads expected here but "
                f"{self.expected or 'all'} by an earlier arrival"
            )
        if threads % 32:
            raise Fault(
                f"named barrier {self.number}: thread count {threads} is not a multiple of the warp size"
            )
        self.arrived += 32 if threads else lanes
        if value is not None:
            self.values += value
        if w.check:
            w.check.barrier_arrive(w, self)
        if not self.everyone and self.arrived > self.expected:
            raise Fault(
                f"named barrier {self.number}: {self.arrived} threads arrived, {self.expected} expected"
            )
        self.settle()

    def settle(self) -> None:
        if self.arrived and self.arrived >= (self.cta.live_threads() if self.everyone else self.expected):
            self.result = {self.generation: self.values}
            self.generation += 1
            self.arrived, self.values = 0, []
            self.done_clock, self.clock = self.clock, None
            self.cta.cluster.machine.wake(self.waiters)


class ClusterBarrier:
    """`barrier.cluster`: a phase ends when every live thread of the cluster has arrived."""

    def __init__(self, cluster) -> None:
        self.cluster = cluster
        self.generation = self.arrived = 0
        self.waiters: list = []
        self.clock = self.done_clock = None

    def arrive(self, lanes: int) -> None:
        self.arrived += lanes
        self.settle()

    def settle(self) -> None:
        live = sum(cta.live_threads() for cta in self.cluster.ctas)
        if self.arrived and self.arrived >= live:
            if self.arrived > live and live:
                raise Fault(f"barrier.cluster: {self.arrived} threads arrived in one phase, {live} are live")
            self.generation += 1
            self.arrived = 0
            self.done_clock, self.clock = self.clock, None
            self.cluster.machine.wake(self.waiters)
