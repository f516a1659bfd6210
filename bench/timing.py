"""How long a call takes: the methods, and the choice among them. The runners but CUPTI's are `dispatch.timing`'s.

| method | a sample is | it includes |
|---|---|---|
| cupti  | one call, replayed as a CUDA graph | first kernel's start to last one's end (span); kernels alone (busy) |
| graph  | a CUDA graph of many calls in a row, over the calls | everything on the GPU, with the gaps between calls |
| events | one eager call between two events | also the host, where it launches more slowly than the GPU runs |
| host   | one call on a CPU | everything |
"""
from __future__ import annotations

from typing import Callable, Optional, Sequence

import torch

from bench.cupti import KernelTrace, cupti_unavailable
from dispatch.timing import EventRunner, Flush, GraphRunner, HostRunner, Launch

METHODS = ("cupti", "graph", "events", "host")
#: Calls in a graph, at least: a shorter chain would measure the launch of its graph as much as the calls.
GRAPH_CALLS = 16
#: A call this long gains at most 2% from an L2 of 60 MB being warm (14 us of reading), and hides its graph's launch.
LONG_CALL_SECONDS = 1e-3

Runner = Callable[[], float]


class UnavailableMethod(ValueError):
    """A timing method that does not work on the device; the message says why."""


def available_methods(device: torch.device) -> dict[str, str]:
    """Every method, best first, with the reason why it does not work on the device, "" where it does."""
    if device.type == "cuda":
        return {"cupti": cupti_unavailable(), "graph": "", "events": "", "host": "it is for CPUs"}
    return {"host": "", **{method: f"it needs a CUDA device, and this is {device.type}" for method in METHODS[:3]}}


def choose_method(wanted: str, device: torch.device) -> str:
    """The wanted method, or the best available for "auto". Raises UnavailableMethod with the reason."""
    methods = available_methods(device)
    if wanted == "auto":
        return next(method for method, reason in methods.items() if not reason)
    if methods[wanted]:
        raise UnavailableMethod(f"--timer {wanted} is not available: {methods[wanted]}")
    return wanted


class CuptiRunner:
    """Single calls, each a CUDA graph of its own, timed by the GPU's own record of its kernels.

    Args:
        launches: calls to cycle through; they must have run before.
        trace: an entered `KernelTrace`.
        before: run before each call, outside the measured time.
    """

    method = "cupti"

    def __init__(self, launches: Sequence[Launch], trace: KernelTrace, before: Optional[Launch] = None) -> None:
        # One pool for all: they run one after the other, and what a call allocates is dead when it ends.
        pool = torch.cuda.graph_pool_handle()
        self._graphs = [_capture(launch, pool) for launch in launches]
        self._trace, self._before, self._next = trace, before, 0
        #: Seconds in which a kernel was running, for every sample so far, warm-up included.
        self.busy: list[float] = []

    def __call__(self) -> float:
        """Seconds from the first kernel's start to the last one's end; returns when it has finished."""
        graph = self._graphs[self._next % len(self._graphs)]
        self._next += 1
        if self._before is not None:
            self._before()
        graph.replay()
        torch.cuda.synchronize()
        launches = self._trace.take_graph_launches()
        if len(launches) != 1:
            raise RuntimeError(f"CUPTI recorded {len(launches)} graph launches of 1; use --timer graph")
        span, busy = launches[0]
        self.busy.append(busy * 1e-9)
        return span * 1e-9


def _capture(launch: Launch, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        launch()
    return graph


def make_runner(
    method: str,
    launches: Sequence[Launch],
    device: torch.device,
    estimate: float,
    flush: Optional[Flush],
    trace: Optional[KernelTrace],
) -> tuple[Runner, int]:
    """A runner of the method, and the calls in one of its samples.

    Calls that a CUDA graph cannot capture are timed with events instead.

    Args:
        launches: the same work on different memory, taken in turn; each has run before.
        estimate: seconds a call takes, about.
        flush: run before each sample of the methods that time single calls.
        trace: the entered trace that method "cupti" needs.
    """
    if method == "host":
        return HostRunner(launches), 1
    if method == "events":
        return EventRunner(launches, flush), 1
    try:
        if method == "cupti":
            return CuptiRunner(launches, trace, flush), 1
        rounds = 1 if estimate > LONG_CALL_SECONDS else -(-GRAPH_CALLS // len(launches))
        return GraphRunner(list(launches) * rounds, device), rounds * len(launches)
    except (RuntimeError, torch.AcceleratorError):  # it synchronizes or copies from pageable memory
        torch.cuda.synchronize()
        return EventRunner(launches, flush), 1
