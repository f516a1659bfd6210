"""The portable Triton kernel against the float64 reference: under the interpreter on a CPU, and on CUDA where there is one."""
from __future__ import annotations

import pytest
import torch

from backends import DeviceInfo, Fc2Problem
from backends.triton.backend import TritonBackend, triton_support
from backends.triton.tactic import TritonTactic
from tests.reference import ALPHA_KINDS, assert_meets_bar, make_alpha, make_operands, reference

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("triton")
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def _run(device, tactic, a, b, alpha, out_dtype=torch.bfloat16):
    m, n, k, experts = a.shape[0], b.shape[0], a.shape[1], alpha.shape[1]
    problem = Fc2Problem(m, n, k, experts, out_dtype, a.layout, b.layout, device, DeviceInfo.of(device).capability)
    backend = TritonBackend()
    tactic = tactic or backend.default_tactic(problem)
    assert backend.can_implement(problem, tactic), backend.can_implement(problem, tactic).reason
    out = torch.full((m, n), float("nan"), dtype=out_dtype, device=device)
    backend.run(problem, tactic, a.to(device), b.to(device), alpha.to(device), out)
    return out.cpu()


# (m, n, experts, inner): ragged in every direction, one expert, an odd number of experts, several steps per expert.
SHAPES = [
    (1, 64, 2, 256),
    (7, 72, 3, 48),
    (8, 40, 5, 16),
    (9, 192, 3, 128),
    (17, 65, 1, 64),
    (70, 48, 4, 32),
    (129, 24, 2, 16),
]


@pytest.mark.parametrize("layouts", [("128x4", "128x4"), ("linear", "128x4"), ("128x4", "linear"), ("linear", "linear")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(device, shape, layouts):
    m, n, experts, inner = shape
    a, _ = make_operands(m, 1, experts * inner, 1, layouts[0])
    _, b = make_operands(1, n, experts * inner, 2, layouts[1])
    alpha = make_alpha("dense", m, experts, torch.Generator().manual_seed(3))
    assert_meets_bar(_run(device, None, a, b, alpha), *reference(a, b, alpha))


@pytest.mark.parametrize("kind", ALPHA_KINDS)
@pytest.mark.parametrize("split", [1, 3, 7])
def test_every_alpha_and_split(device, kind, split):
    m, n, experts, inner = 9, 80, 7, 32
    a, b = make_operands(m, n, experts * inner, 4)
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(5))
    out = _run(device, TritonTactic(block_k=32, split=split), a, b, alpha)
    assert_meets_bar(out, *reference(a, b, alpha))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("split", [1, 2])
def test_output_types(device, out_dtype, split):
    a, b = make_operands(5, 48, 64, 6)
    alpha = make_alpha("dense", 5, 2, torch.Generator().manual_seed(7)) / 64
    out = _run(device, TritonTactic(block_k=32, split=split), a, b, alpha, out_dtype)
    assert out.dtype == out_dtype
    assert_meets_bar(out, *reference(a, b, alpha))


def test_many_experts_that_do_not_divide(device):
    m, n, experts, inner = 3, 16, 257, 16
    a, b = make_operands(m, n, experts * inner, 8)
    alpha = make_alpha("top_k", m, experts, torch.Generator().manual_seed(9))
    out = _run(device, TritonTactic(block_k=32, split=4), a, b, alpha)
    assert_meets_bar(out, *reference(a, b, alpha))


def test_every_tactic(device):
    a, b = make_operands(5, 144, 96, 10)
    alpha = make_alpha("ragged", 5, 3, torch.Generator().manual_seed(11))
    expected = reference(a, b, alpha)
    problem = Fc2Problem(5, 144, 96, 3)
    tactics = TritonBackend().tactics(problem)
    assert TritonBackend().default_tactic(problem) in tactics
    for tactic in tactics:
        assert_meets_bar(_run(device, tactic, a, b, alpha), *expected)


def test_runs_are_bitwise_equal(device):
    a, b = make_operands(6, 80, 128, 12)
    alpha = make_alpha("dense", 6, 4, torch.Generator().manual_seed(13))
    tactic = TritonTactic(block_k=32, split=4)
    first = _run(device, tactic, a, b, alpha, torch.float32)
    for _ in range(3):
        assert torch.equal(first, _run(device, tactic, a, b, alpha, torch.float32))


def test_nan_scale_reaches_only_its_outputs(device):
    """A NaN scale factor inside the operand is NaN in its row of B, and nowhere else."""
    a, b = make_operands(3, 32, 32, 14, "linear")
    b.scale[5, 1] = 0x7F
    alpha = torch.ones((3, 2))
    out = _run(device, TritonTactic(block_k=32), a, b, alpha)
    assert out[:, 5].isnan().all()
    assert out.isnan().sum() == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"form": "fast"}, "form is 'fast'"),
        ({"block_n": 48}, "block_n is 48"),
        ({"block_m": 8}, "block_m is 8"),
        ({"block_k": 16}, "block_k is 16"),
        ({"split": 0}, "split is 0; it takes 1 to 4"),
        ({"split": 5}, "split is 5; it takes 1 to 4"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"num_stages": 0}, "num_stages is 0"),
    ],
    ids=str,
)
def test_rejected_tactics_say_why(changes, reason):
    support = TritonBackend().can_implement(Fc2Problem(4, 64, 128, 4), TritonTactic(**changes))
    assert not support and reason in support.reason


def test_rejected_problems_say_why():
    backend = TritonBackend()
    assert "not a multiple of 16" in backend.can_implement(Fc2Problem(4, 64, 96, 4), TritonTactic()).reason
    other = backend.can_implement(Fc2Problem(4, 64, 128, 4, b_layout="cute/tiles"), TritonTactic())
    assert "prepared for backend 'cute'" in other.reason


def test_supported_devices(monkeypatch):
    backend = TritonBackend()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.is_supported(DeviceInfo("cuda", "NVIDIA A100", (8, 0), 108))
    assert backend.is_supported(DeviceInfo("cuda", "NVIDIA B200", (10, 0), 148))
    old = backend.is_supported(DeviceInfo("cuda", "Tesla T4", (7, 5), 40))
    assert not old and "SM 7.5" in old.reason and "SM 8.0" in old.reason
    assert "TRITON_INTERPRET" in backend.is_supported(DeviceInfo("cpu", "cpu")).reason
    assert "NVIDIA" in backend.is_supported(DeviceInfo("cuda", "AMD MI300X")).reason
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.is_supported(DeviceInfo("cpu", "cpu"))
    assert not backend.is_automatic(DeviceInfo("cpu", "cpu"))


def test_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    triton_support.cache_clear()
    try:
        support = TritonBackend().is_supported(DeviceInfo("cuda", "NVIDIA H200", (9, 0), 132))
        assert not support and "not installed" in support.reason
    finally:
        triton_support.cache_clear()


def test_tactic_round_trips_through_json():
    tactic = TritonTactic(block_n=128, split=3)
    assert TritonTactic.from_json(tactic.to_json()) == tactic
