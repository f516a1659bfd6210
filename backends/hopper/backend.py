"""`HopperBackend`: launches on SM 9.0; the kernels are in the other modules of this package."""

from __future__ import annotations

import threading

import torch

from backends.cute.backend import dsl_support
from backends.device import DeviceInfo
from backends.hopper import launch
from backends.hopper import tactic as rules
from backends.hopper.tactic import CAPABILITY, PASS_TOKENS, HopperTactic, KernelConfig
from backends.interface import Support
from backends.operand import Nvfp4Tensor, PreparedOperand, scale_shape
from backends.problem import Fc2Problem
from backends.triton import layout


class HopperBackend(layout.ReadsFragments):
    """CuTe DSL kernels for SM 9.0, on weights that the "triton" backend's order suits as well.

    A call that uses at most a quarter of alpha goes to the streaming kernel (`stream.py`), any other to the dense one
    (`dense.py`); both are launched, look at alpha (`form.py`), and the one whose turn it is not returns at once, so that alpha
    never travels to the host. Up to 16 tokens all are streamed. A small kernel (`lists.py`) lists the tokens of each expert and
    gathers their activations first.
    """

    name = "hopper"
    tactic_type = HopperTactic

    def __init__(self) -> None:
        self._launchers: dict[KernelConfig, object] = {}
        self._loading = threading.Lock()
        # What has run at least once: (device, everything that selects a compiled kernel).
        self._compiled: set[tuple] = set()

    def is_supported(self, device: DeviceInfo) -> Support:
        if device.type != "cuda" or device.capability != CAPABILITY:
            return Support(False, f"the kernels use the warpgroup MMA of SM 9.0; this device is {device.arch}")
        return dsl_support()

    def can_implement(self, problem: Fc2Problem, tactic: HopperTactic) -> Support:
        return rules.can_implement(problem, tactic)

    def tactics(self, problem: Fc2Problem) -> list[HopperTactic]:
        return rules.tactics(problem)

    def default_tactic(self, problem: Fc2Problem) -> HopperTactic:
        return rules.default_tactic(problem)

    def is_compiled(self, problem: Fc2Problem, tactic: HopperTactic) -> bool:
        return _kernel_key(problem, tactic) in self._compiled

    def compile(self, problem: Fc2Problem, tactic: HopperTactic) -> None:
        """Load or compile the kernels, by running the problem once on operands of zeros."""
        device = torch.device(problem.device_type)
        data = torch.zeros((problem.m, problem.k // 2), dtype=torch.uint8, device=device)
        scale = torch.zeros(scale_shape(problem.m, problem.k, problem.a_layout), dtype=torch.uint8, device=device)
        alpha = torch.zeros((problem.m, problem.experts), dtype=torch.float32, device=device)
        out = torch.empty((problem.m, problem.n), dtype=problem.out_dtype, device=device)
        b = layout.zeros(problem.n, problem.k, device)
        self.run(problem, tactic, Nvfp4Tensor(data, scale, problem.a_layout), b, alpha, out)

    def run(
        self,
        problem: Fc2Problem,
        tactic: HopperTactic,
        a: Nvfp4Tensor,
        b: PreparedOperand,
        alpha: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        with torch.cuda.device(out.device):
            for first in range(0, problem.m, PASS_TOKENS):
                # A multiple of 128, where the swizzled scale factors can be split.
                rows = slice(first, first + PASS_TOKENS)
                launch.run(problem, tactic, self._launcher, a.data[rows], a.scale[rows], b, alpha[rows], out[rows])
            self._compiled.add(_kernel_key(problem, tactic))

    def _launcher(self, config: KernelConfig):
        """The kernel, from memory, from disk, or compiled and kept there."""
        if config not in self._launchers:
            from backends.hopper import compiler

            with self._loading:
                if config not in self._launchers:
                    self._launchers[config] = compiler.load(config)
        return self._launchers[config]


def _kernel_key(problem: Fc2Problem, tactic: HopperTactic) -> tuple:
    return (torch.cuda.current_device(), *rules.specialization(problem, tactic))
