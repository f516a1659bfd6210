"""From a configuration to a callable: compile with the CuTe DSL, or load an object file."""

from __future__ import annotations

import platform
from pathlib import Path

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_ptr

from backends.cute import cache
from backends.cute.launcher import HOST_TARGETS, SYMBOL, Launcher
from backends.hopper.dense import DenseKernel
from backends.hopper.dense_plan import DenseKernelTile
from backends.hopper.lists import ListKernel
from backends.hopper.stream import StreamKernel
from backends.hopper.stream_plan import StreamConfig
from backends.hopper.tactic import KernelConfig, ListConfig

ARCH = "sm_90a"
_SOURCES = tuple(
    Path(__file__).parent / name
    for name in (
        "lists.py", "gather.py", "form.py", "stream.py", "stream_plan.py", "decode.py", "dense.py", "dense_plan.py", "work.py",
        "wgmma.py", "instructions.py", "compiler.py",
    )
)  # fmt: skip
#: The kernel that each kind of configuration selects.
KERNELS = {ListConfig: ListKernel, StreamConfig: StreamKernel, DenseKernelTile: DenseKernel}


def kernel_of(config: KernelConfig) -> ListKernel | StreamKernel | DenseKernel:
    return KERNELS[type(config)](config)


def compile_kernel(config: KernelConfig, machine: str = platform.machine(), options: str = ""):
    """The DSL's compiled function; needs no GPU and takes about a second."""
    kernel = kernel_of(config)
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=align) for t, align in kernel.pointers]
    sizes = [cutlass.Int32(0)] * kernel.INTEGERS
    options = f"--gpu-arch {ARCH} --host-target {HOST_TARGETS[machine]} {options}"
    return cute.compile(kernel, *pointers, *sizes, make_fake_stream(), options=options)


def load(config: KernelConfig) -> Launcher:
    """The kernel from disk, or compiled and kept there."""
    kernel = kernel_of(config)
    fields = {"kernel": type(kernel).__name__, "config": repr(config), "arch": ARCH, "machine": platform.machine()}
    key = cache.object_key(f"{ARCH}-{type(kernel).__name__}", fields, _SOURCES)
    path = cache.KernelCache(cache.default_directory()).find_or_make(
        key, lambda: compile_kernel(config).dump_to_object(SYMBOL)
    )
    return Launcher.load(path, len(kernel.pointers) + kernel.INTEGERS + 1)
