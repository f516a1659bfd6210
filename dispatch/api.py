"""The public calls: `fc2` and what goes with it."""
from __future__ import annotations

from dataclasses import replace
from typing import Optional

import torch

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Fc2Backend, Operand, Support
from backends.operand import BLOCK, Nvfp4Tensor
from backends.problem import Fc2Problem
from dispatch.arguments import check_operands, check_out
from dispatch.choice import choose
from dispatch.errors import ArgumentError
from dispatch.execute import decide, run_fc2
from dispatch.pins import TacticLike
from dispatch.report import Decision

# `prepare` knows no token count: a backend that takes the weights at one of these will run them.
_SOME_TOKENS = (1, 128)


def fc2(
    a: Nvfp4Tensor,
    b: Operand,
    alpha: torch.Tensor,
    backend: str = "auto",
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Optional[torch.Tensor] = None,
    tactic: TacticLike = None,
) -> torch.Tensor:
    """The second projection of "mixture of experts as one dense GEMM", on NVFP4 operands.

        out[m, n] = sum_e alpha[m, e] * sum_{k in expert e} a[m, k] * b[n, k]        k in [e*I, (e+1)*I), I = K / E

    Sums are float32, alpha multiplies each expert's float32 partial sum, and there is one rounding, to the output type.
    The result is bitwise reproducible. `alpha[m, e] == 0` means that token m did not select expert e. Runs on the
    current stream without synchronizing with the host. The first call of a kernel compiles it; calls inside a CUDA
    graph capture need a warm-up call before it.

    Args:
        a: activations [M, K]; M may be 0.
        b: down-projection weights [N, K], as made by `pack_experts`, or the result of `prepare`.
        alpha: float32 [M, E], contiguous: routing weight times whatever else scales an expert.
        backend: "auto", or the name of one of `backends()`. A named backend runs or raises; it is never replaced.
        out_dtype: bfloat16, float16 or float32.
        out: optional [M, N] of `out_dtype`, contiguous; it is written and returned.
        tactic: a tactic of one backend, to run exactly that; or some of its fields, such as
            {"backend": "cute", "tile_n": 64}, to choose among the tactics that have these.

    Returns:
        [M, N] on the operands' device.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message says what does.
        UnavailableError: the backend or tactic asked for cannot run here, with the reason.
        NotCompiledError: called during a CUDA graph capture before the kernel was compiled.
    """
    if torch.compiler.is_compiling():
        from dispatch.tracing import traced_fc2

        return traced_fc2(a, b, alpha, backend, out_dtype, out, tactic)
    return run_fc2(a, b, alpha, backend, out_dtype, out, tactic)


def prepare(b: Nvfp4Tensor, experts: int, backend: str = "auto", *, in_place: bool = False) -> Operand:
    """Weights in the order the backend reads fastest; do it once, at load.

    Args:
        b: weights [N, K].
        experts: E, the columns of the alpha that will go with them.
        backend: the one that will run them; "auto" takes the first that can run on b's device.
        in_place: write the result into b's own memory, so that the weights are never held twice on the device. A b so
            overwritten is emptied: it has no rows from then on, and `fc2` refuses it. N must be a multiple of 128.

    Returns:
        An operand for `fc2`, or b itself where the backend has no better order. One that `b.layout` marks as
        "backend/form" can be read by the backends that know this form, whichever of them made it, and
        `backends.get(name).unprepare` is the exact inverse. Without `in_place` it holds copies: drop b to free its
        memory.

    Raises:
        ArgumentError: unknown backend, K is not a multiple of 16 * experts, or weights that the fast order cannot hold
            (negative scale factors; N with `in_place`).
        UnavailableError: the named backend cannot run these weights on this device.
    """
    if b.shape[1] % (BLOCK * experts):
        raise ArgumentError(f"b has K = {b.shape[1]}, which is not a multiple of {BLOCK} * experts = {BLOCK * experts}")
    device = DeviceInfo.of(b.device)
    plain = Fc2Problem(1, *b.shape, experts, b_layout=b.layout, device_type=device.type, capability=device.capability)
    if backend not in ("auto", *registry.names()):
        choose(plain, device, backend=backend)  # raises
    found = preparer(plain, device, backend)
    if found is None:
        choose(plain, device, backend=backend)  # raises with the reasons, unless the plain form runs
        return b
    chosen, layout = found
    try:
        return chosen.prepare(b, in_place) if layout != b.layout else b
    except ValueError as error:
        raise ArgumentError(str(error)) from error


def preparer(plain: Fc2Problem, device: DeviceInfo, backend: str = "auto") -> Optional[tuple[Fc2Backend, str]]:
    """The backend that `prepare` takes for these weights, and the layout it gives them; None if none runs them.

    Args:
        plain: the weights' problem, at any m.
    """
    for name in registry.names() if backend == "auto" else [backend]:
        chosen = registry.get(name)
        layout = chosen.prepared_layout(plain) or plain.b_layout
        support = chosen.is_automatic(device) if backend == "auto" else chosen.is_supported(device)
        calls = [replace(plain, b_layout=layout, m=m) for m in _SOME_TOKENS]
        if support and any(chosen.can_implement(call, chosen.default_tactic(call)) for call in calls):
            return chosen, layout
    return None


def backends(device: Optional[torch.device | str] = None) -> dict[str, Support]:
    """Every backend by name, with whether it runs on the device and if not why.

    Args:
        device: default the current CUDA device, or the CPU where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    info = DeviceInfo.of(device)
    return {name: registry.get(name).is_supported(info) for name in registry.names()}


def explain(
    a: Nvfp4Tensor,
    b: Operand,
    alpha: torch.Tensor,
    backend: str = "auto",
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    tactic: TacticLike = None,
) -> Decision:
    """What `fc2` would run for these arguments, and why; print it. Raises what `fc2` would raise."""
    check_operands(a, b, alpha)
    check_out(None, out_dtype, a, b)
    return decide(a, b, alpha, backend, out_dtype, tactic)
