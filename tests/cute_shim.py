"""A stand-in for the CuTe DSL's CUDA runtime library: object files load and launch without a GPU.

Kernels loaded from disk resolve the CUDA wrappers they call from a shared library. This one, compiled with the system's
C compiler, answers them as an SM100 would and hands launches to a Python callback, or drops them.

    python -m tests.cute_shim check PTX_FILE    a call of `CuteBackend`, its kernel from $FC2_CACHE_DIR, on the emulator
    python -m tests.cute_shim time              host microseconds of a call whose launch does nothing

Both must run in a process that has not compiled: compiling loads the real runtime library, which then comes first.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Iterator
from unittest import mock

import torch

from backends import DeviceInfo, Fc2Problem
from backends.cute import backend as cute_backend
from backends.cute.budget import CuteTactic
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference

PROBLEM = Fc2Problem(200, 264, 1024, 4, capability=(10, 0))
TACTIC = CuteTactic(256, 128, 256, 2, 1, split_k=0)
B200 = DeviceInfo("cuda", "NVIDIA B200", (10, 0), sm_count=148)

_SOURCE = r"""
#include <string.h>
typedef int (*hook_t)(void *config, const char *kernel, void **params);
static hook_t hook = 0;
static long launches = 0;
void shim_set_hook(hook_t h) { hook = h; }
long shim_launches(void) { return launches; }
int _cudaLibraryLoadData(void **library) { *library = (void *)1; return 0; }
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = strdup(name); return 0; }
int _cudaFuncSetAttribute(void *f, int a, int v) { return 0; }
int _cudaKernelSetAttributeForDevice(void *k, int a, int v, int d) { return 0; }
int _cuKernelGetAttribute(int *value, int a, void *k, int d) { *value = 0; return 0; }
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 75: *value = 10; return 0;      /* compute capability, major */
        case 76: *value = 0; return 0;       /* and minor */
        case 97: *value = 232448; return 0;  /* shared memory a block can opt in to */
        case 16: *value = 148; return 0;     /* SMs */
    }
    return 1;
}
int _cudaLaunchKernelEx(void *config, void *kernel, void **params) {
    launches++;
    return hook ? hook(config, (const char *)kernel, params) : 0;
}
"""
_HOOK = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


@functools.lru_cache(maxsize=None)
def library() -> ctypes.CDLL | None:
    """The compiled stand-in; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    directory = Path(tempfile.mkdtemp(prefix="fc2-shim-"))
    (directory / "shim.c").write_text(_SOURCE)
    path = directory / "libshim.so"
    subprocess.run([compiler, "-O2", "-w", "-shared", "-fPIC", "-o", path, directory / "shim.c"], check=True)
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def no_gpu(on_launch: Callable[[int, int, int], int] | None = None) -> Iterator[ctypes.CDLL]:
    """Inside: object files resolve CUDA from the stand-in, and one device is counted."""
    from cutlass.base_dsl.export import external_binary_module
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction

    shim = library()
    dsl = external_binary_module.ExternalBinaryModule.load_provider.dsl._get_dsl()
    saved, devices = dsl.get_shared_libs, CudaDialectJitCompiledFunction.num_devices
    hook = _HOOK(on_launch) if on_launch else ctypes.cast(None, _HOOK)
    shim.shim_set_hook(hook)
    dsl.get_shared_libs = lambda: [shim._name]
    CudaDialectJitCompiledFunction.num_devices = 1
    try:
        yield shim
    finally:
        dsl.get_shared_libs, CudaDialectJitCompiledFunction.num_devices = saved, devices
        shim.shim_set_hook(ctypes.cast(None, _HOOK))


@contextlib.contextmanager
def cuda_calls_of_torch() -> Iterator[None]:
    """Inside: the four things the backend asks of torch.cuda have answers, for tensors on the CPU."""
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
        mock.patch.object(torch.cuda, "current_device", lambda: None),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "device_count", lambda: 0),
        mock.patch.object(cute_backend, "DeviceInfo", SimpleNamespace(of=lambda device: B200)),
    ):
        yield


def operands() -> tuple:
    a, b = make_operands(PROBLEM.m, PROBLEM.n, PROBLEM.k, seed=5)
    alpha = make_alpha("dense", PROBLEM.m, PROBLEM.experts, torch.Generator().manual_seed(6))
    return a, b, alpha, torch.full((PROBLEM.m, PROBLEM.n), float("nan"), dtype=torch.bfloat16)


def check(ptx: str) -> None:
    """Run the backend's call with its kernel loaded from disk; the launch it makes is emulated."""
    from tests.emulator.api import run_launch
    from tests.emulator.interception import _HostApi, host_session
    from tests.emulator.memory import GlobalMemory

    a, b, alpha, out = operands()
    memory = GlobalMemory()

    def on_launch(text: str, launch) -> None:
        run_launch(text, launch, memory, "eager", 0, 148, True, None)

    def remember(name: str, tensor: torch.Tensor) -> torch.Tensor:
        memory.register(name, tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor)
        return tensor

    for name, tensor in dict(a=a.data, sfa=a.scale, b=b.data, sfb=b.scale, alpha=alpha, out=out).items():
        remember(name, tensor)
    empty, zeros = torch.empty, torch.zeros
    with no_gpu(_HostApi(ptx)._launch_ex), cuda_calls_of_torch():
        cute = cute_backend.CuteBackend()
        cute.compile(PROBLEM, TACTIC)
        with (
            host_session(148, on_launch),
            mock.patch.object(torch, "empty", lambda *a, **k: remember("workspace", empty(*a, **k))),
            mock.patch.object(torch, "zeros", lambda *a, **k: remember("counters", zeros(*a, **k))),
        ):
            cute.run(PROBLEM, TACTIC, a, b, alpha, out)
    assert_meets_bar(out, *reference(a, b, alpha))


def host_microseconds(tactic: CuteTactic, calls: int = 20_000) -> float:
    """Median CPU time of `CuteBackend.run` up to and including a driver call that does nothing."""
    a, b, alpha, out = operands()
    with no_gpu() as shim, cuda_calls_of_torch():
        cute = cute_backend.CuteBackend()
        cute.compile(PROBLEM, tactic)
        before = shim.shim_launches()
        samples = []
        for _ in range(9):
            begin = time.process_time()
            for _ in range(calls // 9):
                cute.run(PROBLEM, tactic, a, b, alpha, out)
            samples.append((time.process_time() - begin) / (calls // 9) * 1e6)
        assert shim.shim_launches() - before == calls // 9 * 9
    return sorted(samples)[4]


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(Path(sys.argv[2]).read_text())
    else:
        for tactic in (replace(TACTIC, split_k=1), TACTIC):
            print(f"split_k {tactic.split_k}: {host_microseconds(tactic):.2f} us a call")
