"""Make a script that expects a CUDA GPU run on this machine: torch's "cuda" device becomes the CPU, CuTe DSL
launches go to the emulator. For running example files unchanged; the tests use `emulate` itself."""

from __future__ import annotations

import contextlib
import gc
import types
from typing import Any, Callable, Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from .api import run_launch
from .interception import Launch, compile_target, host_session
from .memory import GlobalMemory
from .numerics import decode_table
from .ptx import TARGETS
from .report import Report
from .tvm_ffi_calls import native_calls


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return value


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {k: _to_cpu(v) for k, v in (kwargs or {}).items() if k != "pin_memory"}
        if function is torch._scaled_mm and args[0].dtype == torch.float4_e2m1fn_x2:
            return _scaled_mm_fp4(*args, **kwargs)
        return function(*(_to_cpu(a) for a in args), **kwargs)


def _scaled_mm_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: Any = None,
    out_dtype: torch.dtype | None = None,
    **_kwargs: Any,
) -> torch.Tensor:
    """`torch._scaled_mm` for float4_e2m1fn_x2 operands with blocked 1x16 scales, which torch has only on
    CUDA."""
    table = torch.from_numpy(decode_table("e2m1").copy()).double()

    def values(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        data = packed.contiguous().view(torch.uint8)
        rows, k = data.shape[0], 2 * data.shape[1]
        flat = torch.stack([table[(data & 15).int()], table[(data >> 4).int()]], -1).reshape(rows, k)
        blocks = scales.reshape(-(-rows // 128), -1, 32, 4, 4).double().permute(0, 3, 2, 1, 4)
        linear = blocks.reshape(-(-rows // 128) * 128, -1)[:rows, : k // 16]
        return flat * linear.repeat_interleave(16, 1)

    return (values(a, scale_a) @ values(b.t(), scale_b).T).to(out_dtype)


def _benchmark(
    function: Callable, *, workspace_generator: Any = None, kernel_arguments: Any = None, **_kwargs: Any
) -> float:
    """Call once: some examples check the result of the timed calls."""
    arguments = kernel_arguments or (workspace_generator() if workspace_generator else None)
    if arguments is None:
        function()
    else:
        function(*arguments.args, **arguments.kwargs)
    return 1.0


def _live_tensors(memory: GlobalMemory) -> None:
    """Register every live torch allocation with its exact extent."""
    seen = set()
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                memory.register(f"tensor{len(seen)}", storage.data_ptr(), storage.nbytes(), storage)


@contextlib.contextmanager
def gpu_stand_in(
    schedule: str = "eager",
    seed: int = 0,
    num_sms: int | None = None,
    checks: bool = True,
    concurrent: int | None = None,
    arch: str = "sm_100a",
) -> Iterator[Report]:
    """Inside, "cuda" tensors are CPU tensors and every CuTe DSL launch is emulated; yields the report that
    collects them."""
    import cuda.bindings.driver as driver
    import cutlass.base_dsl.runtime.cuda as dsl_cuda
    import cutlass.cute.testing
    import cutlass.testing
    import cutlass
    from cutlass.utils import HardwareInfo

    report = Report(schedule, seed)
    (major, minor), default_sms = TARGETS[arch]
    num_sms = num_sms or default_sms

    def on_launch(ptx: str, launch: Launch) -> None:
        memory = GlobalMemory()
        _live_tensors(memory)
        report.launches.append(run_launch(ptx, launch, memory, schedule, seed, num_sms, checks, concurrent))

    success = driver.CUresult.CUDA_SUCCESS
    stream = types.SimpleNamespace(cuda_stream=0, synchronize=lambda: None, wait_stream=lambda _s: None)
    properties = types.SimpleNamespace(
        multi_processor_count=num_sms, major=major, minor=minor, name=f"emulated {arch}", total_memory=1 << 36
    )
    event = types.SimpleNamespace(
        record=lambda *_a: None, synchronize=lambda: None, elapsed_time=lambda _e: 1.0, wait=lambda *_a: None
    )
    patches = {
        torch.cuda: dict(
            is_available=lambda: True,
            synchronize=lambda *_a: None,
            current_stream=lambda *_a: stream,
            default_stream=lambda *_a: stream,
            Stream=lambda *_a, **_k: stream,
            Event=lambda *_a, **_k: event,
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=lambda *_a: None,
            init=lambda: None,
            get_device_capability=lambda *_a: (major, minor),
            get_device_name=lambda *_a: properties.name,
            get_device_properties=lambda *_a: properties,
            empty_cache=lambda: None,
        ),
        torch.Tensor: dict(
            cuda=lambda self, *_a, **_k: self, pin_memory=lambda self, *_a: self, is_cuda=True
        ),
        HardwareInfo: dict(
            __init__=lambda self, *_a, **_k: None,
            get_max_active_clusters=lambda self, size, *_a: num_sms // size,
            get_device_multiprocessor_count=lambda self: num_sms,
            get_l2_cache_size_in_bytes=lambda self: (126 if major == 10 else 50) << 20,
        ),
        driver: dict(
            cuInit=lambda _flags: (success,),
            cuDeviceGetCount=lambda: (success, 1),
            cuDeviceGet=lambda _i: (success, 0),
            cuCtxGetCurrent=lambda: (success, 1),
            cuDevicePrimaryCtxRetain=lambda _d: (success, 1),
            cuCtxSetCurrent=lambda _c: (success,),
            cuStreamCreate=lambda _f: (success, driver.CUstream(0)),
            cuStreamSynchronize=lambda _s: (success,),
            cuCtxSynchronize=lambda: (success,),
            cuStreamDestroy=lambda _s: (success,),
        ),
        dsl_cuda: dict(initialize_cuda_context=lambda *_a, **_k: None),
        cutlass.cuda: dict(initialize_cuda_context=lambda *_a, **_k: None),
        cutlass.testing: dict(benchmark=_benchmark),
        cutlass.cute.testing: dict(benchmark=_benchmark),
    }
    dlpack = torch.Tensor.__dlpack__

    def export(self: torch.Tensor, **_kwargs: Any) -> Any:
        from .api import mark_as_cuda

        return mark_as_cuda(dlpack(self.detach()))

    patches[torch.Tensor].update(__dlpack__=export, __dlpack_device__=lambda self: (2, 0))
    with contextlib.ExitStack() as stack:
        for owner, table in patches.items():
            stack.enter_context(mock.patch.multiple(owner, create=True, **table))
        stack.enter_context(_CudaIsCpu())
        stack.enter_context(compile_target(arch))
        stack.enter_context(native_calls())
        stack.enter_context(host_session(num_sms, on_launch))
        yield report
