"""`TritonBackend`: launches; the kernels are in the other modules of this package."""
from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from backends.device import DeviceInfo
from backends.interface import SUPPORTED, Operand, Support
from backends.operand import Nvfp4Tensor, scale_shape
from backends.problem import Fc2Problem
from backends.triton import layout
from backends.triton import tactic as rules
from backends.triton.tactic import PREPARED, TritonTactic

_SUM_BLOCK = 1024


@functools.lru_cache(maxsize=None)  # 0.1 ms until triton is imported
def triton_support() -> Support:
    """Whether triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return Support(False, "triton is not installed; pip install 'triton>=3.6' (Linux only)")
    return SUPPORTED


class TritonBackend(layout.ReadsFragments):
    """FC2 by Triton kernels, on SM 8.0 and up; on a CPU under Triton's interpreter, for tests only."""

    name = "triton"
    tactic_type = TritonTactic

    def __init__(self) -> None:
        # What has run at least once per device: (device, tactic and everything else that selects a compiled kernel).
        self._compiled: set[tuple] = set()

    def is_supported(self, device: DeviceInfo) -> Support:
        installed = triton_support()
        if not installed:
            return installed
        if device.type == "cpu":
            if _interpreting():
                return SUPPORTED
            return Support(False, "triton needs a CUDA device; on a CPU it runs only under TRITON_INTERPRET=1, for tests")
        if device.type != "cuda" or device.capability is None:
            return Support(False, f"triton kernels of this package need an NVIDIA GPU, not {device.type!r}")
        if device.capability < (8, 0):
            return Support(False, f"{device.name} is {device.arch}; the kernels need SM 8.0 or newer")
        return SUPPORTED

    def is_automatic(self, device: DeviceInfo) -> Support:
        if device.type == "cpu":
            return Support(False, "triton's interpreter is for tests; name backend='triton' to use it")
        return self.is_supported(device)

    def can_implement(self, problem: Fc2Problem, tactic: TritonTactic) -> Support:
        return rules.can_implement(problem, tactic)

    def tactics(self, problem: Fc2Problem) -> list[TritonTactic]:
        return rules.tactics(problem)

    def default_tactic(self, problem: Fc2Problem) -> TritonTactic:
        return rules.default_tactic(problem)

    def is_compiled(self, problem: Fc2Problem, tactic: TritonTactic) -> bool:
        return problem.device_type == "cpu" or _kernel_key(problem, tactic) in self._compiled

    def compile(self, problem: Fc2Problem, tactic: TritonTactic) -> None:
        """Compile by running the problem once on operands of zeros: Triton's cache key is made at a launch."""
        device = torch.device(problem.device_type)
        a = Nvfp4Tensor(*_zeros(problem.m, problem.k, problem.a_layout, device))
        if problem.b_layout == PREPARED:
            b = layout.zeros(problem.n, problem.k, device)
        else:
            b = Nvfp4Tensor(*_zeros(problem.n, problem.k, problem.b_layout, device))
        alpha = torch.zeros((problem.m, problem.experts), dtype=torch.float32, device=device)
        self.run(problem, tactic, a, b, alpha, torch.empty((problem.m, problem.n), dtype=problem.out_dtype, device=device))

    def run(
        self,
        problem: Fc2Problem,
        tactic: TritonTactic,
        a: Nvfp4Tensor,
        b: Operand,
        alpha: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if tactic.form == "tiled":
            _run_tiled(problem, tactic, a, b, alpha, out)
        else:
            from backends.triton import prepared  # needs a Triton with Gluon, which the tiled form does not

            prepared.run(problem, tactic, a, b, alpha, out)
        self._compiled.add(_kernel_key(problem, tactic))


def _run_tiled(
    problem: Fc2Problem, tactic: TritonTactic, a: Nvfp4Tensor, b: Nvfp4Tensor, alpha: torch.Tensor, out: torch.Tensor
) -> None:
    kernels = _kernels(interpreted=not out.is_cuda)
    if not out.is_cuda and out.dtype != torch.float32:
        # The interpreter of Triton 3.6 truncates float32 to bfloat16; the conversion of torch rounds to nearest.
        wide = torch.empty_like(out, dtype=torch.float32)
        _run_tiled(problem, tactic, a, b, alpha, wide)
        out.copy_(wide)
        return
    m, n, experts, split = problem.m, problem.n, problem.experts, tactic.split
    sums = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=out.device)
    kernels.fc2_tiled[(-(-n // tactic.block_n), -(-m // tactic.block_m), split)](
        a.data, a.scale, b.data, b.scale, alpha, sums,
        m, n, EXPERTS=experts, INNER=problem.intermediate,
        A_SWIZZLED=a.layout == "128x4", B_SWIZZLED=b.layout == "128x4",
        BLOCK_N=tactic.block_n, BLOCK_M=tactic.block_m, BLOCK_K=tactic.block_k, SPLIT=split,
        num_warps=tactic.num_warps, num_stages=tactic.num_stages,
    )  # fmt: skip
    if split > 1:
        kernels.sum_parts[(-(-m * n // _SUM_BLOCK),)](sums, out, m * n, SPLIT=split, BLOCK=_SUM_BLOCK)


@functools.lru_cache(maxsize=None)
def _kernels(interpreted: bool) -> ModuleType:
    """The module of the portable kernels. Triton decides at decoration whether a function is interpreted, so the
    interpreter gets a copy of its own and both can serve in one process."""
    if not interpreted:
        from backends.triton import tiled

        return tiled
    spec = importlib.util.find_spec("backends.triton.tiled")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _kernel_key(problem: Fc2Problem, tactic: TritonTactic) -> tuple:
    device = torch.cuda.current_device() if problem.device_type == "cuda" else None
    return (device, *rules.specialization(problem, tactic))


def _zeros(rows: int, k: int, layout: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, str]:
    data = torch.zeros((rows, k // 2), dtype=torch.uint8, device=device)
    return data, torch.zeros(scale_shape(rows, k, layout), dtype=torch.uint8, device=device), layout
