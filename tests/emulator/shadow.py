"""Shadow memories and vector-clock helpers of the checker: who wrote and read each word last."""

from __future__ import annotations

import numpy as np

SHIFT = 40  # an epoch is agent << SHIFT | clock; 0 is "never"
MASK = (1 << SHIFT) - 1
GPU_SCOPES = ("gpu", "sys")


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

    def scan(self, at, clock: np.ndarray) -> tuple[int, bool]:
        """(`write_conflict`, whether some word was never written), for a read."""
        epochs = self.writes[at]
        if epochs.size == 0:
            return 0, False
        first = int(epochs.flat[0])
        if (epochs == first).all():
            return (first if clock[first >> SHIFT] < first & MASK else 0), first == 0
        bad = clock[epochs >> SHIFT] < (epochs & MASK)
        return (int(epochs[bad].flat[0]) if bad.any() else 0), not epochs.all()

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
    """Word shadow of one CTA's shared memory, and a byte shadow once something narrower than a word is
    accessed."""

    __slots__ = ("words", "bytes", "size")

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
        self.view, self.agent, self.clock, self.warp, self.full, self.foreign = (
            view,
            agent,
            clock,
            warp,
            full,
            foreign,
        )


def join(into, other) -> None:
    np.maximum(into, other, out=into)


def merge_foreign(into: dict, other: dict) -> None:
    for number, clock in other.items():
        mine = into.get(number)
        into[number] = clock.copy() if mine is None else np.maximum(mine, clock)


def words(offsets: np.ndarray, size: int) -> np.ndarray:
    """Word numbers covered by `size` bytes from each offset."""
    if size <= 4:
        return offsets >> 2
    return ((offsets >> 2)[:, None] + np.arange(size // 4)).ravel()
