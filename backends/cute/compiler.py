"""From a tactic to a callable: compile with the CuTe DSL, load an object file, launch with little host time.

Imported only where a kernel is compiled or run; everything the decisions need is in `budget`.
"""
from __future__ import annotations

import ctypes
import platform
import threading
from pathlib import Path

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import load_module, make_fake_stream, make_ptr

from backends.cute.budget import CuteTactic
from backends.cute.kernel import OPERAND, SCALE, Fc2Kernel

#: Arguments of `Fc2Kernel.__call__`: pointers, integers and the stream.
_POINTERS, _INTEGERS = 8, 8
_ARGUMENTS = _POINTERS + _INTEGERS + 1
#: Prefix of the symbols in an object file.
SYMBOL = "fc2"
# Host code for any CPU of the kind: by default the DSL compiles for the CPU at hand, and an object made on a machine
# with AVX-512 would not run on one without.
_HOST_TARGETS = {
    "x86_64": "'llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64'",
    "aarch64": "linux-aarch64",
}
def compile_kernel(tactic: CuteTactic, out_dtype: str, arch: str, machine: str = platform.machine(), options: str = ""):
    """The DSL's compiled function, for "sm_100a" or "sm_103a"; needs no GPU and takes one to three seconds."""
    kernel = Fc2Kernel(tactic, out_dtype)
    # Alignment in bytes: TMA needs 16; alpha and the counters are read word by word.
    types = (
        (OPERAND, 16), (SCALE, 16), (OPERAND, 16), (SCALE, 16), (cutlass.Float32, 4), (kernel.out_type, 16),
        (cutlass.Float32, 16), (cutlass.Int32, 4),
    )
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=align) for t, align in types]
    integers = [cutlass.Int32(0)] * _INTEGERS
    options = f"--gpu-arch {arch} --host-target {_HOST_TARGETS[machine]} {options}"
    return cute.compile(kernel, *pointers, *integers, make_fake_stream(), options=options)


def compile_object(tactic: CuteTactic, out_dtype: str, arch: str, machine: str = platform.machine()) -> bytes:
    """An ELF object with the kernel's cubin and its host code."""
    return compile_kernel(tactic, out_dtype, arch, machine).dump_to_object(SYMBOL)


class Launcher:
    """Calls a compiled kernel's host function in the order of `Fc2Kernel.__call__`'s arguments.

    The DSL's own call converts each argument through Python objects, 19 us for these (2026-11, one x86 core).
    The host function takes an array of pointers to its arguments, so a call here stores integers into a fixed array.
    """

    def __init__(self, function) -> None:
        executor = function.to()
        # The executor owns the loaded code.
        self._executor = executor
        self._function = executor.capi_func
        self._values = (ctypes.c_int64 * _ARGUMENTS)()
        self._status = ctypes.c_int32()
        address = ctypes.addressof(self._values)
        self._arguments = (ctypes.c_void_p * (_ARGUMENTS + 1))(
            *(address + 8 * i for i in range(_ARGUMENTS)), ctypes.addressof(self._status)
        )
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: Path) -> Launcher:
        """From an object file; about 3 ms, without the GPU's part of loading."""
        return cls(getattr(load_module(str(path)), SYMBOL))

    def __call__(self, *values: int) -> None:
        """The device addresses, the sizes and the stream's handle, as integers.

        Raises:
            RuntimeError: the launch failed, with the CUDA error's number.
        """
        with self._lock:
            self._values[:] = values
            self._function(self._arguments)
            status = self._status.value
        if status:
            raise RuntimeError(f"launch of the CuTe FC2 kernel failed with CUDA error {status}")
