"""From a configuration to a callable: compile with the CuTe DSL, or load an object file."""
from __future__ import annotations

import platform

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_ptr

from backends.cute.launcher import HOST_TARGETS
from backends.hopper.stream import OUT_TYPES, StreamKernel
from backends.hopper.stream_plan import StreamConfig

ARCH = "sm_90a"
#: Prefix of the symbols in an object file.
SYMBOL = "fc2"


def pointers(config: StreamConfig) -> list[tuple[type, int]]:
    """Type and alignment in bytes of each pointer of `StreamKernel.__call__`."""
    byte, word, real = (cutlass.Uint8, 16), (cutlass.Int32, 4), (cutlass.Float32, 4)
    return [byte, byte, byte, byte, real, byte, word, (cutlass.Int32, 16), (cutlass.Float32, 16), (OUT_TYPES[config.out_dtype], 2)]


def compile_kernel(config: StreamConfig, machine: str = platform.machine(), options: str = ""):
    """The DSL's compiled function; needs no GPU and takes about a second."""
    arguments = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=align) for t, align in pointers(config)]
    options = f"--gpu-arch {ARCH} --host-target {HOST_TARGETS[machine]} {options}"
    sizes = [cutlass.Int32(0)] * 2
    return cute.compile(StreamKernel(config), *arguments, *sizes, make_fake_stream(), options=options)
