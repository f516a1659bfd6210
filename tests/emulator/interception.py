"""Catch the CUDA calls of a CuTe DSL host function, without a GPU, a driver or a C compiler.

A compiled CuTe DSL function runs natively: an MLIR execution engine JIT-compiles its host code, which reaches
CUDA only through C wrappers named `_cuda*` and `_cu*`. The engine resolves a symbol from its own table before
it searches shared libraries, and `ExecutionEngine.raw_register_runtime` adds to that table. So a `ctypes`
callback for each wrapper, registered on every engine made inside `compile_target()`, turns a launch into a
Python call. Engines made outside that context are untouched.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Callable, Iterator

from .cubin import registers
from .ptx import TARGETS

_ptr, _i32, _i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64

# Device attributes the host code asks for (CUDA runtime enum cudaDeviceAttr).
_ATTR_SM_COUNT = 16
_ATTR_CC_MAJOR, _ATTR_CC_MINOR = 75, 76
_ATTR_SMEM_OPTIN = 97
SMEM_OPTIN_BYTES = 232448  # 227 KiB on both targets
# Launch attributes (CUDA runtime enum cudaLaunchAttributeID).
_LAUNCH_ATTR_CLUSTER = 4


class _LaunchConfig(ctypes.Structure):
    """`cudaLaunchConfig_t`."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_smem", ctypes.c_uint64),
        ("stream", _ptr),
        ("attrs", _ptr),
        ("num_attrs", ctypes.c_uint32),
    ]


class _LaunchAttribute(ctypes.Structure):
    """`cudaLaunchAttribute`: an id, padding and a 64-byte union."""

    _fields_ = [("id", _i32), ("pad", _i32), ("value", ctypes.c_int32 * 16)]


@dataclass
class Launch:
    """One intercepted kernel launch; `params` is the address of an array of parameter addresses."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    params: int
    registers: int | None = None  # per thread at the start; unknown for PTX that was not assembled


@dataclass
class _Session:
    """What the callbacks act on while an emulated host function runs."""

    num_sms: int | None
    on_launch: Callable[[str, Launch], None]
    error: BaseException | None = None
    launches: int = 0


_session: list[_Session] = []


@dataclass
class _HostApi:
    """The ctypes callbacks of one engine; they must outlive it, so the engine holds this object."""

    ptx: str | None = None
    arch: str = "sm_100a"
    registers: dict[str, int] = field(default_factory=dict)
    callbacks: list = field(default_factory=list)
    kernel_names: list = field(default_factory=list)

    def register(self, engine: object) -> None:
        table = {
            "_cudaLibraryLoadData": (self._load, [_ptr, _ptr, _ptr, _ptr, _i32, _ptr, _ptr, _i32]),
            "_cudaLibraryGetKernel": (self._get_kernel, [_ptr, _ptr, _ptr]),
            "_cudaFuncSetAttribute": (self._succeed, [_ptr, _i32, _i32]),
            "_cudaKernelSetAttributeForDevice": (self._succeed, [_ptr, _i32, _i32, _i32]),
            "_cuKernelGetAttribute": (self._kernel_attribute, [_ptr, _i32, _ptr, _i32]),
            "_cudaGetDevice": (self._get_device, [_ptr]),
            "_cudaDeviceGetAttribute": (self._device_attribute, [_ptr, _i32, _i32]),
            "_cudaOccupancyMaxActiveBlocksPerMultiprocessor": (self._occupancy, [_ptr, _ptr, _i32, _i64]),
            "_cudaLaunchKernelEx": (self._launch_ex, [_ptr, _ptr, _ptr]),
            "_cudaLaunchKernel": (self._launch, [_ptr] + [_i32] * 6 + [_ptr, _i64, _ptr]),
            "_cudaDeviceSynchronize": (self._succeed, []),
            "_cudaStreamSynchronize": (self._succeed, [_ptr]),
            "_cudaMemsetAsync": (self._memset, [_ptr, _i32, _i64, _ptr]),
            "_cudaMemset": (self._memset, [_ptr, _i32, _i64]),
            "_cudaMemcpyAsync": (self._memcpy, [_ptr, _ptr, _i64, _i32, _ptr]),
            "_cudaMemcpy": (self._memcpy, [_ptr, _ptr, _i64, _i32]),
            "_cuTensorMapEncodeTiled": (
                self._encode_tiled,
                [_ptr, _i32, _i32, _ptr, _ptr, _ptr, _ptr, _ptr, _i32, _i32, _i32, _i32],
            ),
        }
        for name, (method, argtypes) in table.items():
            callback = ctypes.CFUNCTYPE(_i32, *argtypes)(_guarded(method))
            self.callbacks.append(callback)
            engine.raw_register_runtime(name, ctypes.cast(callback, _ptr))

    def _succeed(self, *_args: object) -> int:
        return 0

    def _load(self, library: int, code: int, *_args: object) -> int:
        self.registers.update(registers(code))
        ctypes.c_void_p.from_address(library).value = 1
        return 0

    def _get_kernel(self, kernel: int, _library: int, name: int) -> int:
        handle = ctypes.create_string_buffer(ctypes.string_at(name))  # the caller's copy lives on its stack
        self.kernel_names.append(handle)
        ctypes.c_void_p.from_address(kernel).value = ctypes.addressof(handle)
        return 0

    def _kernel_attribute(self, value: int, _attribute: int, _kernel: int, _device: int) -> int:
        _i32.from_address(value).value = 0
        return 0

    def _get_device(self, device: int) -> int:
        _i32.from_address(device).value = 0
        return 0

    def _device_attribute(self, value: int, attribute: int, _device: int) -> int:
        (major, minor), sms = TARGETS[self.arch]
        known = {
            _ATTR_CC_MAJOR: major,
            _ATTR_CC_MINOR: minor,
            _ATTR_SMEM_OPTIN: SMEM_OPTIN_BYTES,
            _ATTR_SM_COUNT: _session[-1].num_sms if _session and _session[-1].num_sms else sms,
        }
        if attribute not in known:
            raise NotImplementedError(f"the host code asks for CUDA device attribute {attribute}")
        _i32.from_address(value).value = known[attribute]
        return 0

    def _occupancy(self, value: int, _kernel: int, _block: int, _smem: int) -> int:
        _i32.from_address(value).value = 1
        return 0

    def _memset(self, address: int, value: int, count: int, *_stream: object) -> int:
        ctypes.memset(address, value, count)
        return 0

    def _memcpy(self, destination: int, source: int, count: int, *_rest: object) -> int:
        ctypes.memmove(destination, source, count)
        return 0

    def _encode_tiled(
        self,
        out: int,
        dtype: int,
        rank: int,
        base: int,
        dims: int,
        strides: int,
        box: int,
        element_strides: int,
        _interleave: int,
        swizzle: int,
        _promotion: int,
        fill: int,
    ) -> int:
        from .tma import encode_driver_descriptor

        def words(address: int, ctype: type, count: int) -> list[int]:
            return list((ctype * count).from_address(address)) if count else []

        data = encode_driver_descriptor(
            dtype,
            base or 0,
            words(dims, ctypes.c_uint64, rank),
            words(strides, ctypes.c_uint64, rank - 1),
            words(box, ctypes.c_uint32, rank),
            words(element_strides, ctypes.c_uint32, rank),
            swizzle,
            fill,
        )
        ctypes.memmove(out, data, len(data))
        return 0

    def _launch(
        self,
        kernel: int,
        gx: int,
        gy: int,
        gz: int,
        bx: int,
        by: int,
        bz: int,
        _stream: int,
        smem: int,
        params: int,
    ) -> int:
        return self._run(Launch(_c_string(kernel), (gx, gy, gz), (bx, by, bz), (1, 1, 1), smem, params or 0))

    def _launch_ex(self, config_address: int, kernel: int, params: int) -> int:
        config = _LaunchConfig.from_address(config_address)
        cluster = (1, 1, 1)
        for i in range(config.num_attrs):
            attribute = _LaunchAttribute.from_address(config.attrs + i * ctypes.sizeof(_LaunchAttribute))
            if attribute.id == _LAUNCH_ATTR_CLUSTER:
                cluster = tuple(attribute.value[:3])
        return self._run(
            Launch(
                _c_string(kernel),
                tuple(config.grid),
                tuple(config.block),
                cluster,
                config.dynamic_smem,
                params or 0,
            )
        )

    def _run(self, launch: Launch) -> int:
        if not _session:
            raise RuntimeError("a function compiled in compile_target() was called outside emulate()")
        if not self.ptx:
            raise RuntimeError(f"no PTX was kept for kernel {launch.kernel}")
        launch.registers = self.registers.get(launch.kernel)
        _session[-1].launches += 1
        _session[-1].on_launch(self.ptx, launch)
        return 0


def _c_string(address: int) -> str:
    return ctypes.string_at(address).decode()


def _guarded(method: Callable[..., int]) -> Callable[..., int]:
    """An exception cannot cross native code: keep it in the session, answer cudaErrorUnknown."""

    def call(*args: object) -> int:
        try:
            return method(*args)
        except (
            BaseException
        ) as error:  # noqa: BLE001 - re-raised by `host_session` once native code has returned
            if _session:
                _session[-1].error = _session[-1].error or error
            return 999

    return call


@contextlib.contextmanager
def host_session(num_sms: int | None, on_launch: Callable[[str, Launch], None]) -> Iterator[None]:
    """Route launches to `on_launch(ptx, launch)`; an exception raised by it is raised on leaving the
    context."""
    session = _Session(num_sms, on_launch)
    _session.append(session)
    try:
        yield
    except BaseException as error:
        if session.error is not None:
            raise session.error from None
        raise error
    finally:
        _session.remove(session)
    if session.error is not None:
        raise session.error


@contextlib.contextmanager
def compile_target(arch: str = "sm_100a") -> Iterator[None]:
    """Inside: `cute.compile` builds for `arch` ("sm_100a" or "sm_90a") without a GPU, keeps the PTX and makes
    its launches emulable.

    Settings of the DSL are restored on leaving. The compiled functions remain valid afterwards.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch {arch!r}: the emulator models {' and '.join(TARGETS)}")
    from cutlass._mlir import execution_engine
    from cutlass.base_dsl.jit_executor import JitCompiledFunction
    from cutlass.cutlass_dsl import CuTeDSL
    from cutlass.cutlass_dsl.cutlass import CuteExperimentalDSL

    settings = [dsl._get_dsl().envar for dsl in (CuTeDSL, CuteExperimentalDSL)]
    engine_class = execution_engine.ExecutionEngine
    make_engine, make_function = engine_class.__init__, JitCompiledFunction.__init__
    dump_dir = tempfile.mkdtemp(prefix="emulator_ptx_")
    wanted = {
        "_arch": arch,
        "keep_ptx": True,
        "dump_dir": dump_dir,
        "no_cache": True,
        "disable_file_caching": True,
    }
    saved = [{name: getattr(env, name) for name in wanted} for env in settings]

    def engine_init(self: object, *args: object, **kwargs: object) -> None:
        make_engine(self, *args, **kwargs)
        api = _HostApi(arch=arch)
        api.register(self)
        self._emulator_api = api

    def function_init(self: object, *args: object, **kwargs: object) -> None:
        make_function(self, *args, **kwargs)
        api = getattr(self.engine, "_emulator_api", None)
        if api is not None:
            api.ptx = self.__ptx__
            self.__dict__["num_devices"] = 1  # else asked of the CUDA runtime

    for env in settings:
        for name, value in wanted.items():
            setattr(env, name, value)
    engine_class.__init__, JitCompiledFunction.__init__ = engine_init, function_init
    try:
        yield
    finally:
        engine_class.__init__, JitCompiledFunction.__init__ = make_engine, make_function
        for env, values in zip(settings, saved):
            for name, value in values.items():
                setattr(env, name, value)
        shutil.rmtree(dump_dir, ignore_errors=True)
