"""`CuteBackend`: the SM100 kernel behind the backend interface."""
from __future__ import annotations

import functools
import importlib.util
import threading
from dataclasses import replace
from importlib import metadata

import torch

from backends.cute import budget, cache
from backends.cute.budget import CuteTactic
from backends.device import DeviceInfo
from backends.interface import SUPPORTED, Fc2Backend, Support
from backends.operand import Nvfp4Tensor
from backends.problem import Fc2Problem, dtype_name

#: The oldest DSL the kernel was compiled and emulated with.
MINIMUM_DSL = (4, 8)
# Counters for CUDA graphs, per device: each captured call with split_k > 1 keeps one per output tile.
_GRAPH_COUNTERS = 1 << 18


class CuteBackend(Fc2Backend):
    """NVFP4 block-scaled MMA on SM 10.0 and 10.3.

    Split reductions need one zeroed counter per output tile, and the kernel leaves them zero. Calls on one stream run
    one after the other and share their counters; a captured call has counters of its own, since its graph may be
    replayed on any stream. The fp32 partials lie in memory from torch's allocator, which is safe in both.
    """

    name = "cute"
    tactic_type = CuteTactic

    def __init__(self) -> None:
        self._launchers: dict[tuple, object] = {}
        self._calls: dict[tuple, tuple] = {}
        self._compiling = threading.Lock()
        self._stream_counters: dict[tuple[int, int], torch.Tensor] = {}
        self._graph_counters: dict[int, tuple[torch.Tensor, int]] = {}

    def is_supported(self, device: DeviceInfo) -> Support:
        if device.type != "cuda" or device.capability not in budget.ARCHS:
            return Support(
                False, f"the kernel uses block-scaled tcgen05 MMA of SM 10.0 and 10.3; this device is {device.arch}"
            )
        return dsl_support()

    def can_implement(self, problem: Fc2Problem, tactic: CuteTactic) -> Support:
        return budget.check_problem(problem, tactic)

    def tactics(self, problem: Fc2Problem) -> list[CuteTactic]:
        return budget.tactics(problem)

    def default_tactic(self, problem: Fc2Problem) -> CuteTactic:
        return budget.default_tactic(problem)

    def is_compiled(self, problem: Fc2Problem, tactic: CuteTactic) -> bool:
        return _kernel_id(problem, tactic) in self._launchers

    def compile(self, problem: Fc2Problem, tactic: CuteTactic) -> None:
        """Load the kernel from disk, or compile it and keep it there."""
        from backends.cute.compiler import ARGUMENTS, compile_object
        from backends.cute.launcher import Launcher

        identity = _kernel_id(problem, tactic)
        with self._compiling:
            if identity in self._launchers:
                return
            kernel, out_dtype, arch = identity
            path = cache.KernelCache(cache.default_directory()).find_or_make(
                cache.kernel_key(kernel, out_dtype, arch), lambda: compile_object(kernel, out_dtype, arch)
            )
            self._reserve_graph_counters()
            self._launchers[identity] = Launcher.load(path, ARGUMENTS)

    def run(
        self, problem: Fc2Problem, tactic: CuteTactic, a: Nvfp4Tensor, b: Nvfp4Tensor, alpha: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        device = out.device
        # One look-up: hashing the problem and the tactic costs about a microsecond.
        call = self._calls.get((problem, tactic, device))
        if call is None:
            call = self._calls[problem, tactic, device] = self._prepare_call(problem, tactic, device)
        launcher, sizes, tiles, floats = call
        stream = torch.cuda.current_stream(device).cuda_stream
        workspace = counters = 0
        if floats:
            partials = torch.empty(floats, dtype=torch.float32, device=device)
            workspace, counters = partials.data_ptr(), self._counters(device, stream, tiles).data_ptr()
        by_tma = (a.data.data_ptr(), a.scale.data_ptr(), b.data.data_ptr(), b.scale.data_ptr(), out.data_ptr())
        if (by_tma[0] | by_tma[1] | by_tma[2] | by_tma[3] | by_tma[4]) % 16:
            raise ValueError(_misaligned(by_tma))
        arguments = (*by_tma[:4], alpha.data_ptr(), by_tma[4], workspace, counters, *sizes, stream)
        if device.index == torch.cuda.current_device():
            launcher(*arguments)
        else:
            with torch.cuda.device(device):
                launcher(*arguments)

    def _prepare_call(self, problem: Fc2Problem, tactic: CuteTactic, device: torch.device) -> tuple:
        """(launcher, integer arguments, output tiles, float32 elements of workspace)."""
        self.compile(problem, tactic)
        clusters = DeviceInfo.of(device).sm_count // (tactic.cluster_m * tactic.cluster_n)
        division = budget.Division.of(problem, tactic, clusters)
        sizes = (
            problem.m, problem.n, problem.k, problem.experts, division.group, division.splits, division.slots, clusters
        )
        floats = division.workspace_floats(problem, tactic)
        return self._launchers[_kernel_id(problem, tactic)], sizes, budget.output_tiles(problem, tactic), floats

    def prepare(self, b: Nvfp4Tensor, in_place: bool = False) -> Nvfp4Tensor:
        """B with "128x4" scale factors, the plain layout that TMA loads; b itself where it has them."""
        return b.to_layout("128x4")

    def prepared_layout(self, problem: Fc2Problem) -> str:
        return "128x4" if problem.b_layout == "linear" else ""

    def _counters(self, device: torch.device, stream: int, tiles: int) -> torch.Tensor:
        """Zeroed int32 counters that no call running at the same time uses."""
        if torch.cuda.is_current_stream_capturing():
            pool, used = self._graph_counters[device.index]
            if used + tiles <= pool.numel():
                self._graph_counters[device.index] = (pool, used + tiles)
                return pool[used : used + tiles]
            # Thousands of captured calls later: zeroed by the graph itself, at the price of one more node.
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        held = self._stream_counters.get((device.index, stream))
        if held is None or held.numel() < tiles:
            held = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device)
            self._stream_counters[device.index, stream] = held
        return held

    def _reserve_graph_counters(self) -> None:
        for index in range(torch.cuda.device_count()):
            if index not in self._graph_counters:
                zeros = torch.zeros(_GRAPH_COUNTERS, dtype=torch.int32, device=torch.device("cuda", index))
                torch.cuda.synchronize(index)
                self._graph_counters[index] = (zeros, 0)


@functools.lru_cache(maxsize=None)
def dsl_support() -> Support:
    """Whether the CuTe DSL is installed, and new enough."""
    needed = ".".join(map(str, MINIMUM_DSL))
    advice = f"install it with: pip install 'nvidia-cutlass-dsl>={needed}'"
    if importlib.util.find_spec("cutlass") is None:
        return Support(False, f"the CuTe DSL is not installed; {advice}")
    try:
        version = metadata.version("nvidia-cutlass-dsl")
    except metadata.PackageNotFoundError:
        return Support(False, f"a package named cutlass is installed, but not the CuTe DSL; {advice}")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_DSL:
        return Support(False, f"the CuTe DSL is {version}; the kernel needs {needed} or newer; {advice}")
    return SUPPORTED


def _misaligned(addresses: tuple[int, ...]) -> str:
    # The compiled code would round the address down and read what lies before it.
    names = ("a.data", "a.scale", "b.data", "b.scale", "out")
    name, address = next((n, p) for n, p in zip(names, addresses) if p % 16)
    return (
        f"{name} starts {address % 16} bytes past a multiple of 16; TMA addresses memory in units of 16 bytes: "
        f"pass a tensor that owns its memory, such as a clone"
    )


def _kernel_id(problem: Fc2Problem, tactic: CuteTactic) -> tuple[CuteTactic, str, str]:
    """What a compiled kernel depends on: M, N, K, E and the division of the work are run-time arguments."""
    return replace(tactic, split_k=1), dtype_name(problem.out_dtype), budget.ARCHS[problem.capability]
