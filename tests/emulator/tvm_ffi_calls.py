"""Call functions written for `--enable-tvm-ffi` (torch tensors as arguments) without the tvm_ffi package.

Such a function is compiled from fake tensors; here it is compiled for the native entry instead, and torch
arguments are
packed as that entry takes a tensor: {address, dynamic extents, dynamic strides}.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from typing import Any, Iterator
from unittest import mock

import torch

_FLAG = "--enable-tvm-ffi"


class PackedTensor:
    """A torch tensor as the compiled host function's tensor argument; `like` is the compile-time tensor."""

    def __init__(self, tensor: torch.Tensor, like: Any) -> None:
        fields: list[tuple[str, type]] = [("address", ctypes.c_void_p)]
        values: list[int] = [tensor.data_ptr()]
        packed = tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None)
        shape = list(tensor.shape)
        stride = list(tensor.stride())
        if packed:
            inner = stride.index(1)
            shape[inner] *= 2
            stride = [s if i == inner else 2 * s for i, s in enumerate(stride)]
        default = {"shape": 32, "stride": 32 if getattr(like, "_use_32bit_stride", False) else 64}
        for kind, numbers, mask in (
            ("shape", shape, like.dynamic_shapes_mask),
            ("stride", stride, like.dynamic_strides_mask),
        ):
            symbols = getattr(like, kind)
            for i, dynamic in enumerate(mask):
                if dynamic:
                    width = getattr(symbols[i], "width", default[kind])
                    fields.append((f"{kind}{i}", ctypes.c_int64 if width == 64 else ctypes.c_int32))
                    values.append(numbers[i])
        struct = type("Descriptor", (ctypes.Structure,), {"_fields_": fields})
        self._descriptor, self._owner = struct(*values), tensor

    def __c_pointers__(self) -> list[int]:
        return [ctypes.addressof(self._descriptor)]


class _Address:
    def __init__(self, value: int) -> None:
        self._value = ctypes.c_void_p(value)

    def __c_pointers__(self) -> list[int]:
        return [ctypes.addressof(self._value)]


class Caller:
    """A compiled function that accepts torch tensors."""

    def __init__(self, compiled: Any, args: tuple, kwargs: dict) -> None:
        self._compiled = compiled
        names = list(compiled.execution_args.signature.parameters)
        original = compiled.execution_args.original_signature
        parameters = [p for n, p in original.parameters.items() if n != "self" or "self" in names]
        bound = inspect.Signature(parameters).bind_partial(
            *args, **{k: v for k, v in kwargs.items() if k in original.parameters}
        )
        bound.apply_defaults()
        self._like = [bound.arguments.get(n) for n in names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passed, given = [], iter(args)
        for like in self._like:
            if getattr(like, "use_tvm_ffi_env_stream", False):
                passed.append(0)
            else:
                value = next(given, None)
                passed.append(self._convert(value, like))
        return self._compiled(*passed, *given, **kwargs)

    def _convert(self, value: Any, like: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                PackedTensor(value, like)
                if hasattr(like, "dynamic_shapes_mask")
                else _Address(value.data_ptr())
            )
        if isinstance(value, (list, tuple)) and isinstance(like, (list, tuple)):
            return type(value)(self._convert(v, x) for v, x in zip(value, like))
        return value


@contextlib.contextmanager
def native_calls() -> Iterator[None]:
    """Inside, `cute.compile(..., options="--enable-tvm-ffi")` returns a function that needs no tvm_ffi."""
    import cutlass.cute.runtime as runtime
    from cutlass.base_dsl.compiler import CompileCallable

    make, from_dlpack = CompileCallable.__call__, runtime.from_dlpack

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("options")
        if not isinstance(options, str) or _FLAG not in options:
            return make(self, *args, **kwargs)
        kwargs["options"] = options.replace(_FLAG, "").strip(" ,")
        compiled = make(self, *args, **kwargs)
        return Caller(compiled, args[1:], {k: v for k, v in kwargs.items() if k != "options"})

    def plain(*args: Any, enable_tvm_ffi: bool = False, **kwargs: Any) -> Any:
        return from_dlpack(*args, **kwargs)

    with (
        mock.patch.object(CompileCallable, "__call__", call),
        mock.patch.object(runtime, "from_dlpack", plain),
    ):
        yield
