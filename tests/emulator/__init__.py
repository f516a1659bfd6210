"""A functional emulator of SM 10.0 (Blackwell) and SM 9.0 (Hopper) for CuTe DSL kernels: executes their PTX on
the CPU and checks it.

    with compile_target():
        compiled = cute.compile(host_function, ...)
    report = emulate(compiled, *arguments, buffers=[...], schedule="random", seed=3)

See README.md.
"""

from __future__ import annotations

from .api import device_tensor, emulate, emulate_ptx
from .interception import compile_target
from .report import Deadlock, EmulatorError, Fault, LaunchReport, PtxError, Race, Report

__all__ = [
    "Deadlock",
    "EmulatorError",
    "Fault",
    "LaunchReport",
    "PtxError",
    "Race",
    "Report",
    "compile_target",
    "device_tensor",
    "emulate",
    "emulate_ptx",
]
