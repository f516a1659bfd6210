"""`emulate`: run a compiled CuTe DSL function with its launches executed by the emulator."""

from __future__ import annotations

import ctypes
import time
from typing import Any, Iterable, Literal, Mapping

from .interception import Launch, host_session
from .machine import Machine
from .memory import GlobalMemory
from .ptx import TARGETS
from .report import LaunchReport, Report
from .translate import Program, program

_DLPACK_CUDA = 2


def device_tensor(tensor: Any, assumed_align: int | None = None) -> Any:
    """A CPU tensor as a CuTe tensor in global memory, as `from_dlpack` makes of a CUDA tensor.

    From a CPU tensor, `from_dlpack` makes a generic-address-space tensor, which compiles to different code.
    """
    from cutlass.cute.runtime import from_dlpack

    class Exporter:
        def __dlpack_device__(self) -> tuple[int, int]:
            return _DLPACK_CUDA, 0

        def __dlpack__(self, **_kwargs: Any) -> Any:
            return mark_as_cuda(tensor.__dlpack__())

    return from_dlpack(Exporter(), assumed_align=assumed_align)


def mark_as_cuda(capsule: Any) -> Any:
    """Rewrite DLTensor.device.device_type (at byte 8) of a DLPack capsule."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = _DLPACK_CUDA
    return capsule


def _extent(tensor: Any) -> tuple[int, int]:
    """(address, bytes) of the memory a torch tensor spans."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), span * tensor.element_size()


def _is_torch(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "data_ptr")


def emulate(
    compiled: Any,
    *args: Any,
    buffers: Iterable[Any] | Mapping[str, Any] = (),
    schedule: Literal["eager", "lazy", "random"] = "eager",
    seed: int = 0,
    num_sms: int | None = None,
    checks: bool = True,
    concurrent: int | None = None,
) -> Report:
    """Call `compiled(*args)` and execute every kernel it launches; results are written into the tensors'
    memory.

    compiled: what `cute.compile` returned inside `compile_target()`.
    args: the arguments of the compiled function. A torch CPU tensor is passed as a CuTe tensor in global
        memory.
    buffers: torch CPU tensors (or a dict of names to them) whose memory the kernel may touch, with exact
        extents; torch
        tensors among `args` are added. Any access outside is a Fault.
    schedule: "eager" (asynchronous work completes at issue), "lazy" (only when nothing else can run) or
        "random".
    seed: of the random schedule; the same seed gives the same run.
    num_sms: SM count the device reports; also bounds the clusters resident at once. Default: 148 for sm_100a,
        132 for sm_90a.
    checks: happens-before, proxy, initialization and lifetime checks.
    concurrent: clusters run at the same time (default 1, or 4 for "random"); raise it for kernels whose
        clusters wait for
        each other.
    Raises Fault (Race, Deadlock) for what the kernel does wrong, PtxError for PTX that is not modelled.
    """
    if schedule not in ("eager", "lazy", "random"):
        raise ValueError(f"schedule {schedule!r}: must be 'eager', 'lazy' or 'random'")
    memory = GlobalMemory()
    named = (
        dict(buffers) if isinstance(buffers, Mapping) else {f"buffer{i}": b for i, b in enumerate(buffers)}
    )
    passed = []
    for i, arg in enumerate(args):
        if _is_torch(arg):
            if not any(other is arg for other in named.values()):
                named[f"arg{i}"] = arg
            arg = device_tensor(arg, assumed_align=16)
        passed.append(arg)
    for name, tensor in named.items():
        if not _is_torch(tensor):
            raise TypeError(f"buffers[{name!r}] is a {type(tensor).__name__}; pass torch CPU tensors")
        address, size = _extent(tensor)
        if size:
            memory.register(name, address, size, tensor)
    report = Report(schedule, seed)

    def on_launch(ptx: str, launch: Launch) -> None:
        report.launches.append(run_launch(ptx, launch, memory, schedule, seed, num_sms, checks, concurrent))

    with host_session(num_sms, on_launch):
        compiled(*passed)
    return report


def emulate_ptx(
    ptx: str,
    kernel: str,
    args: Iterable[Any],
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    cluster: tuple[int, int, int] = (1, 1, 1),
    smem: int = 0,
    buffers: Mapping[str, Any] | None = None,
    registers: int | None = None,
    schedule: str = "eager",
    seed: int = 0,
    num_sms: int | None = None,
    checks: bool = True,
    concurrent: int | None = None,
) -> LaunchReport:
    """Run one kernel of a PTX text. A torch tensor argument passes its address, an int itself, bytes go by
    value. `registers` per thread at the start, when given, bound what setmaxnreg can hand out."""
    memory = GlobalMemory()
    prog = program(ptx, kernel)
    params = bytearray(prog.kernel.param_bytes)
    for i, (param, value) in enumerate(zip(prog.kernel.params, args, strict=True)):
        if _is_torch(value):
            address, size = _extent(value)
            memory.register(f"arg{i}", address, size, value)
            value = address
        data = (
            value
            if isinstance(value, bytes)
            else (value % (1 << 8 * param.size)).to_bytes(param.size, "little")
        )
        params[param.offset : param.offset + param.size] = data
    for name, tensor in (buffers or {}).items():
        memory.register(name, *_extent(tensor), tensor)
    launch = Launch(kernel, grid, block, cluster, smem, 0, registers)
    return _run(prog, bytes(params), launch, memory, schedule, seed, num_sms, checks, concurrent)


def run_launch(
    ptx: str,
    launch: Launch,
    memory: GlobalMemory,
    schedule: str,
    seed: int,
    num_sms: int | None,
    checks: bool,
    concurrent: int | None,
) -> LaunchReport:
    """Run an intercepted launch; its parameters are read from the addresses the host passed."""
    prog = program(ptx, launch.kernel)
    params = bytearray(prog.kernel.param_bytes)
    for i, param in enumerate(prog.kernel.params):
        address = ctypes.c_void_p.from_address(launch.params + 8 * i).value
        params[param.offset : param.offset + param.size] = ctypes.string_at(address, param.size)
    return _run(prog, bytes(params), launch, memory, schedule, seed, num_sms, checks, concurrent)


def _run(
    prog: Program,
    params: bytes,
    launch: Launch,
    memory: GlobalMemory,
    schedule: str,
    seed: int,
    num_sms: int | None,
    checks: bool,
    concurrent: int | None,
) -> LaunchReport:
    start = time.perf_counter()
    machine = Machine(
        launch,
        prog,
        params,
        memory,
        schedule=schedule,
        seed=seed,
        num_sms=num_sms or TARGETS[prog.kernel.target][1],
        checks=checks,
        concurrent=concurrent,
    )
    for buffer in memory.buffers:
        buffer.loads = buffer.stores = 0
    machine.run()
    return LaunchReport(
        launch.kernel,
        launch.grid,
        launch.block,
        launch.cluster,
        launch.dynamic_smem,
        dict(machine.counters),
        dict(machine.high_water),
        dict(sorted(machine.warp_instructions.items())),
        {b.name: b.loads for b in memory.buffers if b.loads},
        {b.name: b.stores for b in memory.buffers if b.stores},
        time.perf_counter() - start,
    )
