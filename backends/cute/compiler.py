"""From a tactic to an object file: compile with the CuTe DSL.

Imported only where a kernel is compiled or run; everything the decisions need is in `budget`.
"""
from __future__ import annotations

import platform

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_ptr

from backends.cute.budget import CuteTactic
from backends.cute.kernel import OPERAND, SCALE, Fc2Kernel
from backends.cute.launcher import HOST_TARGETS, SYMBOL

#: Arguments of `Fc2Kernel.__call__`: pointers, integers and the stream.
_POINTERS, _INTEGERS = 8, 8
ARGUMENTS = _POINTERS + _INTEGERS + 1


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
    options = f"--gpu-arch {arch} --host-target {HOST_TARGETS[machine]} {options}"
    return cute.compile(kernel, *pointers, *integers, make_fake_stream(), options=options)


def compile_object(tactic: CuteTactic, out_dtype: str, arch: str, machine: str = platform.machine()) -> bytes:
    """An ELF object with the kernel's cubin and its host code."""
    return compile_kernel(tactic, out_dtype, arch, machine).dump_to_object(SYMBOL)
