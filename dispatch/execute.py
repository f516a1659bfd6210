"""One eager call of fc2: check, decide (once per kind of problem), compile if need be, run."""
from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Fc2Backend, Operand
from backends.operand import Nvfp4Tensor
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.arguments import check_operands, check_out
from dispatch.choice import Decision, choose
from dispatch.errors import NotCompiledError


class _Plan(NamedTuple):
    problem: Fc2Problem
    backend: Fc2Backend
    tactic: Tactic


# Decisions by everything they depend on. A tuple of plain values, since building and hashing an Fc2Problem would cost
# more than the look-up.
_plans: dict[tuple, _Plan] = {}


def run_fc2(
    a: Nvfp4Tensor,
    b: Operand,
    alpha: torch.Tensor,
    backend: str,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor],
    tactic: Optional[Tactic],
) -> torch.Tensor:
    """`dispatch.fc2` outside of `torch.compile`; see there."""
    check_operands(a, b, alpha)
    check_out(out, out_dtype, a, b, alpha)
    if out is None:
        out = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=alpha.device)
    if out.numel() == 0:
        return out
    plan = _plan(a, b, alpha, backend, out_dtype, tactic)
    if not plan.backend.is_compiled(plan.problem, plan.tactic):
        _compile(plan, alpha.device)
    plan.backend.run(plan.problem, plan.tactic, a, b, fold_scales(alpha, a, b), out)
    return out


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


def decide(
    a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor, backend: str, out_dtype: torch.dtype, tactic: Optional[Tactic]
) -> Decision:
    """The decision for these arguments, which have been checked."""
    device = DeviceInfo.of(alpha.device)
    problem = Fc2Problem(
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
    return choose(problem, device, backend, tactic)


def _plan(
    a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor, backend: str, out_dtype: torch.dtype, tactic: Optional[Tactic]
) -> _Plan:
    key = (a.data.shape, a.layout, b.shape, b.layout, alpha.shape, alpha.device, backend, out_dtype, tactic)
    plan = _plans.get(key)
    if plan is None:
        decision = decide(a, b, alpha, backend, out_dtype, tactic)
        plan = _plans[key] = _Plan(decision.problem, registry.get(decision.backend), decision.tactic)
    return plan


def _compile(plan: _Plan, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotCompiledError(
            f"{plan.tactic} is not compiled for this problem, and a CUDA graph is being captured: "
            "call fc2 once with the same shapes before the capture"
        )
    plan.backend.compile(plan.problem, plan.tactic)
