"""One eager call of fc2: check, decide (once per kind of problem), compile if need be, run."""
from __future__ import annotations

import warnings
from typing import NamedTuple, Optional

import torch

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Fc2Backend, Operand
from backends.operand import Nvfp4Tensor
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.arguments import check_operands, check_out, check_overlap
from dispatch.choice import choose
from dispatch.environment import log, settings
from dispatch.errors import Fc2Error, NotCompiledError, PerformanceWarning
from dispatch.pins import Pin, TacticLike
from dispatch.report import Decision
from dispatch.store import measured_for


class _Plan(NamedTuple):
    problem: Fc2Problem
    backend: Fc2Backend
    tactic: Tactic


# Checked and decided kinds of calls. The key holds everything that the checks and the decision look at, as plain
# values, so that a repeated call costs one look-up: building and hashing an Fc2Problem alone would cost more.
_plans: dict[tuple, _Plan] = {}
_warned: set[str] = set()


def forget_plans() -> None:
    """Decide anew at the next calls, since something that decisions depend on has changed."""
    _plans.clear()


def run_fc2(
    a: Nvfp4Tensor,
    b: Operand,
    alpha: torch.Tensor,
    backend: str,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor],
    tactic: TacticLike,
) -> torch.Tensor:
    """`dispatch.fc2` outside of `torch.compile`; see there."""
    try:
        key = _key(a, b, alpha, backend, out_dtype, out, tactic)
        plan = _plans.get(key)
        elsewhere = alpha.is_cuda and alpha.get_device() != torch.cuda.current_device()
    except (AttributeError, TypeError):  # an argument of a type that the checks below refuse by name
        key, plan, elsewhere = None, None, False
    if elsewhere:
        # What backends compile and allocate goes to the current device.
        with torch.cuda.device(alpha.device):
            return run_fc2(a, b, alpha, backend, out_dtype, out, tactic)
    if plan is None:
        check_operands(a, b, alpha)
        check_out(out, out_dtype, a, b)
        if a.shape[0] == 0 or b.shape[0] == 0:
            return torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=alpha.device) if out is None else out
        decision = decide(a, b, alpha, backend, out_dtype, tactic)
        _announce(decision)
        plan = _plans[key] = _Plan(decision.problem, registry.get(decision.backend), decision.tactic)
    problem, chosen, chosen_tactic = plan
    if out is None:
        out = torch.empty((problem.m, problem.n), dtype=out_dtype, device=alpha.device)
    else:
        check_overlap(out, a, b, alpha)
    if not chosen.is_compiled(problem, chosen_tactic):
        _compile(plan, alpha.device)
    chosen.run(problem, chosen_tactic, a, b, fold_scales(alpha, a, b), out)
    return out


def _key(
    a: Nvfp4Tensor,
    b: Operand,
    alpha: torch.Tensor,
    backend: str,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor],
    tactic: TacticLike,
) -> tuple:
    return (
        a.kind,
        b.kind,
        alpha.shape,
        alpha.stride(),
        alpha.dtype,
        alpha.device,
        alpha.requires_grad and torch.is_grad_enabled(),
        backend,
        tactic,
        out_dtype,
        registry.generation,
        None if out is None else (out.shape, out.stride(), out.dtype, out.device),
    )


def fold_scales(alpha: torch.Tensor, a: Nvfp4Tensor, b: Operand) -> torch.Tensor:
    """alpha times the global scales of a and b: what `fc2` multiplies the partial sums with.

    `fc2` does this on every call that has global scales, which costs one small kernel for each. A caller whose scales
    are fixed can fold them once and pass operands without them.

    Args:
        alpha: float32 [M, E].

    Returns:
        float32 [M, E]; alpha itself when neither operand has a global scale.
    """
    for operand in (a, b):
        if operand.global_scale is not None:
            alpha = alpha * operand.global_scale  # a scalar, or [E] for b
    return alpha


def problem_of(a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor, out_dtype: torch.dtype) -> Fc2Problem:
    """The problem that these operands make."""
    device = DeviceInfo.of(alpha.device)
    return Fc2Problem(
        m=a.shape[0],
        n=b.shape[0],
        k=a.shape[1],
        experts=alpha.shape[1],
        out_dtype=out_dtype,
        a_layout=a.layout,
        b_layout=b.layout,
        device_type=device.type,
        capability=device.capability,
    )


def decide(
    a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor, backend: str, out_dtype: torch.dtype, tactic: TacticLike
) -> Decision:
    """The decision for these arguments, which have been checked."""
    device = DeviceInfo.of(alpha.device)
    problem = problem_of(a, b, alpha, out_dtype)
    if backend != "auto" or tactic is not None:
        return choose(problem, device, measured_for(device), backend, tactic)
    wanted = settings()
    try:
        pin = Pin.parse(wanted.tactic) if wanted.tactic else None
        return choose(problem, device, measured_for(device), wanted.backend, pin)
    except Fc2Error as error:
        if wanted.backend == "auto" and not wanted.tactic:
            raise
        asked = f"FC2_BACKEND={wanted.backend}" + (f", FC2_TACTIC={wanted.tactic}" if wanted.tactic else "")
        raise type(error)(f"{error} (asked for by the environment: {asked})") from None


def _announce(decision: Decision) -> None:
    """Log a new decision if FC2_LOG asks for it; warn of a slow path, once per process and path."""
    if settings().log:
        log.info("%s", decision.line())
    if decision.warning and decision.warning not in _warned:
        _warned.add(decision.warning)
        warnings.warn(decision.warning, PerformanceWarning, stacklevel=4)


def _compile(plan: _Plan, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotCompiledError(
            f"{plan.tactic} is not compiled for this problem, and a CUDA graph is being captured: "
            "call fc2 once with the same shapes before the capture"
        )
    plan.backend.compile(plan.problem, plan.tactic)
