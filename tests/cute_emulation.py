"""Runs the SM100 kernel on the emulator and holds its result to the accuracy bar. Shared by the test_cute_* files."""
from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_ptr

from backends import Fc2Problem
from backends.cute import budget, compiler
from backends.cute.budget import CuteTactic
from backends.cute.kernel import OPERAND, OUT_TYPES, SCALE
from backends.problem import OUT_DTYPES
from tests.emulator import Report, compile_target, emulate
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference


@functools.lru_cache(maxsize=None)
def compiled(tactic: CuteTactic, out_dtype: str):
    """The DSL's function for a tactic with split_k 1: the division of the work is a run-time argument."""
    with compile_target():
        return compiler.compile_kernel(tactic, out_dtype, "sm_100a")


def problem_of(m: int, n: int, intermediate: int, experts: int, out_dtype: str = "bfloat16") -> Fc2Problem:
    return Fc2Problem(m, n, intermediate * experts, experts, OUT_DTYPES[out_dtype], capability=(10, 0))


def launch(tactic: CuteTactic, problem: Fc2Problem, a, b, alpha, out, *, sms: int = 148, **options) -> Report:
    """One emulated call as `CuteBackend.run` makes it. Checks that the counters are left at zero."""
    assert budget.check_problem(problem, tactic)
    clusters = sms // (tactic.cluster_m * tactic.cluster_n)
    division = budget.Division.of(problem, tactic, clusters)
    workspace = torch.full((max(division.workspace_floats(problem, tactic), 4),), float("nan"))
    counters = torch.zeros(budget.output_tiles(problem, tactic), dtype=torch.int32)
    buffers = dict(
        a=a.data, sfa=a.scale, b=b.data, sfb=b.scale, alpha=alpha, out=out, workspace=workspace, counters=counters
    )
    types = (
        (OPERAND, 16), (SCALE, 16), (OPERAND, 16), (SCALE, 16), (cutlass.Float32, 4), (OUT_TYPES[_name(out)], 16),
        (cutlass.Float32, 16), (cutlass.Int32, 4),
    )
    pointers = [
        make_ptr(t, tensor.data_ptr(), cute.AddressSpace.gmem, assumed_align=align)
        for (t, align), tensor in zip(types, buffers.values())
    ]
    sizes = (problem.m, problem.n, problem.k, problem.experts)
    sizes += (division.group, division.splits, division.slots, clusters)
    function = compiled(CuteTactic(**{**tactic.__dict__, "split_k": 1}), _name(out))
    report = emulate(function, *pointers, *map(cutlass.Int32, sizes), 0, buffers=buffers, num_sms=sms, **options)
    assert not counters.any(), "the kernel must leave its counters at zero"
    return report


def run(
    tactic: CuteTactic, m: int, n: int, intermediate: int, experts: int, *, alpha_kind: str = "dense",
    out_dtype: str = "bfloat16", seed: int = 0, **options,
) -> tuple[torch.Tensor, Report]:
    """Fresh operands through the emulator into a poisoned output, checked against the float64 reference."""
    problem = problem_of(m, n, intermediate, experts, out_dtype)
    a, b = make_operands(m, n, problem.k, seed)
    alpha = make_alpha(alpha_kind, m, experts, torch.Generator().manual_seed(seed + 1))
    out = torch.full((m, n), float("nan"), dtype=problem.out_dtype)
    report = launch(tactic, problem, a, b, alpha, out, **options)
    assert_meets_bar(out, *reference(a, b, alpha))
    return out, report


def _name(out: torch.Tensor) -> str:
    return str(out.dtype).removeprefix("torch.")
