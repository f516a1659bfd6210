"""The SM100 kernel on a GPU that has it. Everything here skips elsewhere; nothing here has run yet, for want of one.

    pytest tests/test_cute_b200.py            every kernel once, graphs, streams, PDL
"""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backends import DeviceInfo, Fc2Problem, get
from backends.cute import budget
from backends.cute.budget import STREAM_K, CuteTactic
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
pytestmark = pytest.mark.skipif(CAPABILITY not in budget.ARCHS, reason="needs SM 10.0 or 10.3 (B200, GB200, B300)")


class Case:
    """Operands on the GPU and calls on them, straight to the backend."""

    def __init__(self, m: int, n: int, experts: int, kind: str = "top_k", out_dtype: torch.dtype = torch.bfloat16):
        self.problem = Fc2Problem(m, n, experts * 256, experts, out_dtype, capability=CAPABILITY)
        self.a, self.b = make_operands(m, n, experts * 256, seed=m + n, device="cuda")
        self.alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(m)).cuda()
        self.exact = reference(self.a, self.b, self.alpha)

    def run(self, tactic: CuteTactic) -> torch.Tensor:
        out = torch.full((self.problem.m, self.problem.n), torch.nan, dtype=self.problem.out_dtype, device="cuda")
        self.call(tactic, out)
        return out

    def call(self, tactic: CuteTactic, out: torch.Tensor) -> None:
        assert get("cute").can_implement(self.problem, tactic)
        get("cute").run(self.problem, tactic, self.a, self.b, self.alpha, out)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(200, 1000, 17)


def test_supported() -> None:
    assert get("cute").is_supported(DeviceInfo.of("cuda"))


@pytest.mark.parametrize("split_k", [1, 3, STREAM_K])
@pytest.mark.parametrize("kernel", budget.all_kernels(), ids=str)
def test_every_kernel(case, kernel, split_k) -> None:
    tactic = replace(kernel, split_k=split_k)
    if kernel.skip and case.problem.m > 128 * kernel.cluster_m:
        case = Case(8, 1000, 17)
    out = case.run(tactic)
    assert_meets_bar(out, *case.exact)
    for _ in range(20):
        assert torch.equal(out, case.run(tactic))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 8, 127, 128, 129, 160, 200, 255, 256, 257, 384])
def test_default_tactics_at_full_width(m, out_dtype) -> None:
    case = Case(m, 7168, 32, out_dtype=out_dtype)
    assert_meets_bar(case.run(get("cute").default_tactic(case.problem)), *case.exact)


def test_programmatic_dependent_launch(case) -> None:
    tactic = CuteTactic(256, 128, 256, 2, 1, STREAM_K, pdl=True)
    outs = [case.run(tactic) for _ in range(50)]
    assert_meets_bar(outs[0], *case.exact)
    assert all(torch.equal(outs[0], out) for out in outs)


def test_graphs_and_streams_keep_their_counters_apart(case) -> None:
    tactic = CuteTactic(128, 128, 256, 1, 1, split_k=4)
    expected = case.run(tactic)
    captured, eager = torch.empty_like(expected), torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(tactic, captured)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        captured.fill_(torch.nan)
        graph.replay()
        with torch.cuda.stream(side):
            eager.fill_(torch.nan)
            case.call(tactic, eager)
        torch.cuda.synchronize()
        assert torch.equal(captured, expected) and torch.equal(eager, expected)
