"""Calls a compiled DSL kernel with little host time. Knows no particular kernel."""
from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from cutlass.cute.runtime import load_module

#: Prefix of the symbols in an object file.
SYMBOL = "fc2"
#: Host code for any CPU of the kind: by default the DSL compiles for the CPU at hand, and an object made on a machine
#: with AVX-512 would not run on one without.
HOST_TARGETS = {
    "x86_64": "'llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64'",
    "aarch64": "linux-aarch64",
}


class Launcher:
    """Calls a compiled kernel's host function with integers in the order of its arguments.

    The DSL's own call converts each argument through Python objects, 19 us for 17 of them (2026-11, one x86 core).
    The host function takes an array of pointers to its arguments, so a call here stores integers into a fixed array.

    Args:
        function: of the DSL, compiled or loaded.
        arguments: how many the host function takes, the stream included.
    """

    def __init__(self, function, arguments: int) -> None:
        executor = function.to()
        # The executor owns the loaded code.
        self._executor = executor
        self._function = executor.capi_func
        self._values = (ctypes.c_int64 * arguments)()
        self._status = ctypes.c_int32()
        address = ctypes.addressof(self._values)
        self._arguments = (ctypes.c_void_p * (arguments + 1))(
            *(address + 8 * i for i in range(arguments)), ctypes.addressof(self._status)
        )
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: Path, arguments: int) -> Launcher:
        """From an object file; about 3 ms, without the GPU's part of loading."""
        return cls(getattr(load_module(str(path)), SYMBOL), arguments)

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
