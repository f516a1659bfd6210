"""Checks of what users pass to `fc2`. Each message names the argument, what it got, what it takes and what to do."""
from __future__ import annotations

from typing import Optional

import torch

from backends.operand import BLOCK, Nvfp4Tensor, PreparedOperand
from backends.interface import Operand
from backends.problem import OUT_DTYPES, dtype_name
from dispatch.errors import ArgumentError, ArgumentTypeError


def check_operands(a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor) -> None:
    """Raise unless a [M, K], b [N, K] and alpha [M, E] make an FC2 problem on one device."""
    if not isinstance(a, Nvfp4Tensor):
        raise ArgumentTypeError(f"a is {type(a).__name__}; it takes an Nvfp4Tensor [M, K] (see quantize_nvfp4)")
    if not isinstance(b, (Nvfp4Tensor, PreparedOperand)):
        raise ArgumentTypeError(
            f"b is {type(b).__name__}; it takes an Nvfp4Tensor [N, K] (see pack_experts) or what prepare(b) returned"
        )
    if not isinstance(alpha, torch.Tensor) or alpha.dtype != torch.float32:
        got = dtype_name(alpha.dtype) if isinstance(alpha, torch.Tensor) else type(alpha).__name__
        raise ArgumentTypeError(f"alpha is {got}; it takes a float32 tensor [M, E]")
    m, k = a.shape
    if alpha.dim() != 2 or alpha.shape[0] != m or alpha.shape[1] == 0:
        raise ArgumentError(f"alpha has shape {list(alpha.shape)}; a has {m} rows, so alpha takes [{m}, E] with E >= 1")
    if not alpha.is_contiguous():
        raise ArgumentError(
            f"alpha is not contiguous (strides {list(alpha.stride())}); pass alpha.contiguous(): "
            "fc2 never copies it behind your back"
        )
    if b.shape[1] != k:
        raise ArgumentError(f"b has K = {b.shape[1]} and a has K = {k}; both take [rows, K] with the same K")
    if b.shape[0] == 0:
        raise ArgumentError("b has no rows; if it was prepared in place, pass what prepare(b, experts) returned")
    experts = alpha.shape[1]
    if k % experts:
        raise ArgumentError(f"K = {k} is not divisible by E = {experts} (alpha has {experts} columns, one per expert)")
    if (k // experts) % BLOCK:
        raise ArgumentError(
            f"K / E = {k} / {experts} = {k // experts} weights per expert is not a multiple of {BLOCK}: a block of "
            "scale factors may not span two experts"
        )
    if not a.device == b.device == alpha.device:
        raise ArgumentError(f"a is on {a.device}, b on {b.device}, alpha on {alpha.device}; move all to one device")
    if alpha.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("alpha requires grad and fc2 has no backward; call it under torch.no_grad() or detach alpha")
    _check_scale_count("a", a, (1,))
    _check_scale_count("b", b, (1, experts))


def check_out(out: Optional[torch.Tensor], out_dtype: torch.dtype, a: Nvfp4Tensor, b: Operand) -> None:
    """Raise unless `out_dtype` is offered and `out`, if given, has the form of the result."""
    if out_dtype not in OUT_DTYPES.values():
        got = dtype_name(out_dtype) if isinstance(out_dtype, torch.dtype) else repr(out_dtype)
        raise ArgumentError(f"out_dtype is {got}; accepted: {', '.join(OUT_DTYPES)}")
    if out is None:
        return
    if not isinstance(out, torch.Tensor):
        raise ArgumentTypeError(f"out is {type(out).__name__}; it takes a tensor or None")
    shape = (a.shape[0], b.shape[0])
    if tuple(out.shape) != shape:
        raise ArgumentError(f"out has shape {list(out.shape)}; a and b make it {list(shape)}")
    if out.dtype != out_dtype:
        raise ArgumentError(
            f"out has dtype {dtype_name(out.dtype)} and out_dtype is {dtype_name(out_dtype)}; make them equal"
        )
    if out.device != a.device:
        raise ArgumentError(f"out is on {out.device} and a on {a.device}; move both to one device")
    if not out.is_contiguous():
        raise ArgumentError(f"out is not contiguous (strides {list(out.stride())}); it takes a row-major tensor")


def _check_scale_count(name: str, operand: Operand, counts: tuple[int, ...]) -> None:
    scale = operand.global_scale
    if isinstance(scale, torch.Tensor) and scale.numel() not in counts:
        accepted = " or ".join(str(count) for count in counts)
        raise ArgumentError(f"{name}.global_scale has {scale.numel()} elements; it takes {accepted}")


def check_overlap(out: torch.Tensor, a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor) -> None:
    """Raise if `out` shares memory with an input. All are contiguous, so the ranges of their bytes decide."""
    first = out.data_ptr()
    last = first + out.nbytes
    for name, tensor in (("a", a.data), ("a", a.scale), ("b", b.data), ("b", b.scale), ("alpha", alpha)):
        start = tensor.data_ptr()
        if start < last and first < start + tensor.nbytes:
            raise ArgumentError(f"out overlaps the memory of {name}; fc2 reads its inputs while it writes out")
