"""Timing launches as they are deployed: inside CUDA graphs, with a cold L2, competitors interleaved.

The tuner and the shoot-out both measure with this. Times are seconds per call, whole span: everything a call
launches.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Callable, Mapping, Optional, Sequence

import torch

Launch = Callable[[], None]

#: A cold L2 needs this many times its size read between two uses of the same bytes.
COLD_FACTOR = 3


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one call.

    Attributes:
        samples: seconds per call, one for each repetition, in the order taken.
        method: "graph" (CUDA events around the replay of a captured graph), "events" (CUDA events around one
            call) or "host" (the host's clock, for devices without streams).
        cache: "cold" or "warm": whether the L2 cache could hold what the call reads.
    """

    samples: tuple[float, ...]
    method: str
    cache: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median; 0 for fewer than four samples."""
        if len(self.samples) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / self.median


def l2_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; 0 where there is none to flush."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def cold_sets(device: torch.device, bytes_touched: float, most: int = 32) -> int:
    """How many input sets to rotate through so that a call finds none of its bytes in the L2 cache.

    Args:
        bytes_touched: what one call reads that no other set shares.
        most: upper limit of the answer.
    """
    return max(1, min(most, -(-COLD_FACTOR * l2_bytes(device) // max(1, int(bytes_touched)))))


class Flush:
    """Calling it evicts the L2 cache by reading a buffer of `COLD_FACTOR` times its size.

    It does not write: the lines it would leave dirty are written back during the call that is timed next.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.zeros(max(1, COLD_FACTOR * l2_bytes(device) // 4), device=device)
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


class GraphRunner:
    """Launches captured into one CUDA graph, timed by events around its replay.

    Args:
        launches: calls to capture one after the other; give one per input set and the rotation makes the
            cache cold. They must have run before (compiled, workspaces allocated).
        device: a CUDA device.
        pool: memory of `torch.cuda.graph_pool_handle` to share with other runners, which may then not run at the
            same time; default its own.
    """

    method = "graph"

    def __init__(
        self, launches: Sequence[Launch], device: torch.device, pool: Optional[tuple[int, int]] = None
    ) -> None:
        self._calls = len(launches)
        self._graph = torch.cuda.CUDAGraph()
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool):
            for launch in launches:
                launch()

    def __call__(self) -> float:
        """Seconds per call of one replay; returns when it has finished."""
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / self._calls


class EventRunner:
    """Single calls timed by events, cycling through the launches.

    The events also see the host's launch latency where the call is shorter than that; `before` (such as
    `Flush`) keeps the device busy meanwhile, outside the measured time.
    """

    method = "events"

    def __init__(self, launches: Sequence[Launch], before: Optional[Launch] = None) -> None:
        self._launches, self._before, self._next = launches, before, 0
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        """Seconds of one call; returns when it has finished."""
        launch = self._launches[self._next % len(self._launches)]
        self._next += 1
        if self._before is not None:
            self._before()
        self._start.record()
        launch()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3


class HostRunner:
    """Single calls on the CPU timed by the host's clock, cycling through the launches."""

    method = "host"

    def __init__(self, launches: Sequence[Launch]) -> None:
        self._launches, self._next = launches, 0

    def __call__(self) -> float:
        launch = self._launches[self._next % len(self._launches)]
        self._next += 1
        start = time.perf_counter()
        launch()
        return time.perf_counter() - start


Runner = Callable[[], float]


def interleave(
    runners: Mapping[str, Runner],
    rounds: int,
    *,
    warmup: int = 1,
    before: Optional[Callable[[str], None]] = None,
    after: Optional[Callable[[str, float], None]] = None,
) -> dict[str, list[float]]:
    """Repeat all competitors in turn, every second round in reversed order, so that drift hits all of them
    alike.

    Args:
        runners: by name; each call returns one sample in seconds.
        rounds: samples per competitor.
        warmup: calls of each whose samples are dropped.
        before, after: told the name before each call, and the name and sample after it.

    Returns:
        samples by name, `rounds` of each, in the order taken.
    """
    samples: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for index in range(-warmup, rounds):
        for name in names if index % 2 == 0 else reversed(names):
            if before is not None:
                before(name)
            sample = runners[name]()
            if index < 0:
                continue
            samples[name].append(sample)
            if after is not None:
                after(name, sample)
    return samples
