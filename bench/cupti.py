"""Kernel start and end times from CUPTI's activity records, through NVIDIA's `cupti-python` (optional)."""
from __future__ import annotations

import functools
from collections import defaultdict
from typing import Iterable

_BUFFER_BYTES = 8 << 20


@functools.lru_cache(maxsize=1)
def cupti_unavailable() -> str:
    """Why CUPTI timing does not work here, "" where it does. Other profilers of the process exclude it."""
    try:
        from cupti import cupti
    except ImportError as error:
        return f"cupti-python does not import ({error}); pip install 'fc2-dispatch[bench]'"
    try:
        cupti.activity_enable(cupti.ActivityKind.CONCURRENT_KERNEL)
        cupti.activity_disable(cupti.ActivityKind.CONCURRENT_KERNEL)
    except Exception as error:  # its own exception type; whatever it says is the reason
        return f"CUPTI refuses to trace kernels: {error}"
    return ""


class KernelTrace:
    """Collects the device activity (kernels, copies, fills) of the process while it is entered."""

    def __init__(self) -> None:
        # (correlation id, graph id, start, end), times in nanoseconds
        self._records: list[tuple[int, int, int, int]] = []

    def __enter__(self) -> KernelTrace:
        from cupti import cupti

        kinds = cupti.ActivityKind
        self._cupti = cupti
        self._kinds = (kinds.CONCURRENT_KERNEL, kinds.MEMCPY, kinds.MEMSET)
        # Kept by reference: CUPTI calls them from a thread of its own.
        self._callbacks = (lambda: (_BUFFER_BYTES, 0), self._collect)
        cupti.activity_register_callbacks(*self._callbacks)
        for kind in self._kinds:
            cupti.activity_enable(kind)
        return self

    def __exit__(self, *exc: object) -> None:
        for kind in self._kinds:
            self._cupti.activity_disable(kind)
        self._cupti.activity_flush_all(1)

    def _collect(self, activities: list) -> None:
        self._records.extend((a.correlation_id, a.graph_id, a.start, a.end) for a in activities)

    def take_graph_launches(self) -> list[tuple[float, float]]:
        """(span, busy) in nanoseconds of every CUDA graph launch since the last call, in order of time.

        Call it when the device has finished. One launch gives all of its nodes one correlation id; work outside graphs,
        such as cache flushes, is left out.
        """
        self._cupti.activity_flush_all(1)
        records, self._records = self._records, []
        return graph_launches(records)


def graph_launches(records: Iterable[tuple[int, int, int, int]]) -> list[tuple[float, float]]:
    """(span, busy) of each launch, from (correlation id, graph id, start, end) of its nodes; see `KernelTrace`."""
    launches: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for correlation, graph, start, end in records:
        if graph:
            launches[correlation].append((start, end))
    ordered = sorted(launches.values(), key=min)
    return [(float(max(end for _, end in nodes) - min(nodes)[0]), _covered(nodes)) for nodes in ordered]


def _covered(intervals: Iterable[tuple[int, int]]) -> float:
    """Length of the union of intervals: concurrent kernels count once."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return float(total)
