"""`dispatch.fc2` against the float64 reference, over every backend that runs here, and its decisions and errors."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
import dispatch
from backends import DeviceInfo, Fc2Backend, Fc2Problem, Nvfp4Tensor, PreparedOperand, Support, Tactic, quantize_nvfp4
from backends.interface import SUPPORTED
from backends.torch_baseline import TorchTactic
from tests.reference import ALPHA_KINDS, assert_meets_bar, make_alpha, make_operands, reference

# The list of fc2-operation's known defects, scaled to a CPU: ragged M against every tile height, N no multiple of a
# tile, an odd number of experts, experts of several scale blocks.
M_VALUES = (1, 8, 127, 128, 129, 160, 192, 200, 255, 256, 257, 384)
SHAPES = [(m, 64, 4, 32) for m in M_VALUES] + [(5, 192, 17, 16), (3, 1000, 3, 48), (129, 72, 1, 128), (2, 8, 257, 16)]


@pytest.mark.parametrize("m, n, experts, inner", SHAPES)
def test_torch_meets_the_bar(m, n, experts, inner):
    a, b = make_operands(m, n, experts * inner, seed=m * n, layout="linear" if m % 2 else "128x4")
    alpha = make_alpha("ragged", m, experts, torch.Generator().manual_seed(m))
    exact, magnitude = reference(a, b, alpha)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.full((m, n), torch.nan, dtype=dtype)
        assert dispatch.fc2(a, b, alpha, backend="torch", out_dtype=dtype, out=out) is out
        assert_meets_bar(out, exact, magnitude)
        assert torch.equal(out, dispatch.fc2(a, b, alpha, backend="torch", out_dtype=dtype))


@pytest.mark.parametrize("kind", ALPHA_KINDS)
def test_torch_for_every_alpha(kind):
    a, b = make_operands(33, 80, 9 * 48, seed=5)
    alpha = make_alpha(kind, 33, 9, torch.Generator().manual_seed(6))
    out = dispatch.fc2(a, b, alpha, backend="torch", out_dtype=torch.float32)
    assert_meets_bar(out, *reference(a, b, alpha))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 150),
    experts=st.integers(1, 12),
    inner=st.integers(1, 5).map(lambda blocks: blocks * 16),
    kind=st.sampled_from(ALPHA_KINDS),
    layout=st.sampled_from(["128x4", "linear"]),
)
def test_torch_for_random_shapes(m, n, experts, inner, kind, layout):
    a, b = make_operands(m, n, experts * inner, seed=m + n, layout=layout)
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(experts))
    out = dispatch.fc2(a, b, alpha, backend="torch", out_dtype=torch.float32)
    assert_meets_bar(out, *reference(a, b, alpha))


def test_chunks_of_the_torch_baseline_do_not_show(monkeypatch):
    a, b = make_operands(20, 300, 7 * 32, seed=2)
    alpha = make_alpha("dense", 20, 7, torch.Generator().manual_seed(2))
    exact, magnitude = reference(a, b, alpha)
    monkeypatch.setattr("backends.torch_baseline._CHUNK_VALUES", 2 * 32 * 128)
    assert_meets_bar(dispatch.fc2(a, b, alpha, "torch", out_dtype=torch.float32), exact, magnitude)


def test_cached_weight_follows_the_operand_and_is_never_automatic():
    a, b = make_operands(16, 128, 4 * 64, seed=8)
    alpha = make_alpha("dense", 16, 4, torch.Generator().manual_seed(8))
    exact, magnitude = reference(a, b, alpha)
    cached = TorchTactic("cached_weight")
    out = dispatch.fc2(a, b, alpha, tactic=cached, out_dtype=torch.float32)
    error = ((out.double() - exact).abs() / magnitude).max()
    # alpha * a is rounded to bfloat16 once: half an ulp of each term.
    assert 2.0**-18 < error <= 2.0**-9
    assert dispatch.explain(a, b, alpha, "torch").tactic == TorchTactic("experts")
    b.data.zero_()
    assert not dispatch.fc2(a, b, alpha, tactic=cached).any()


def test_global_scales_fold_into_alpha():
    a, b = make_operands(9, 72, 3 * 32, seed=1)
    alpha = make_alpha("dense", 9, 3, torch.Generator().manual_seed(1))
    scaled_a = Nvfp4Tensor(a.data, a.scale, a.layout, 0.25)
    scaled_b = Nvfp4Tensor(b.data, b.scale, b.layout, torch.tensor([2.0, -3.0, 0.5]))
    out = dispatch.fc2(scaled_a, scaled_b, alpha, "torch", out_dtype=torch.float32)
    assert_meets_bar(out, *reference(scaled_a, scaled_b, alpha))
    folded = dispatch.fold_scales(alpha, scaled_a, scaled_b)
    assert torch.equal(out, dispatch.fc2(a, b, folded, "torch", out_dtype=torch.float32))
    assert dispatch.fold_scales(alpha, a, b) is alpha


def test_no_tokens():
    a, b = quantize_nvfp4(torch.empty(0, 64)), quantize_nvfp4(torch.randn(24, 64))
    out = dispatch.fc2(a, b, torch.empty(0, 2), out_dtype=torch.float16)
    assert out.shape == (0, 24) and out.dtype == torch.float16


# Decisions


class StubTactic(Tactic):
    backend = "stub"


class StubBackend(Fc2Backend):
    """A third party's backend: fills out with 7, on the CPU, for M = 1."""

    name = "stub"
    tactic_type = StubTactic

    def is_supported(self, device: DeviceInfo) -> Support:
        return SUPPORTED if device.type == "cpu" else Support(False, "the stub runs on the CPU only")

    def can_implement(self, problem: Fc2Problem, tactic: Tactic) -> Support:
        return SUPPORTED if problem.m == 1 else Support(False, f"M is {problem.m}; the stub takes M = 1")

    def tactics(self, problem: Fc2Problem) -> list[Tactic]:
        return [StubTactic()] if problem.m == 1 else []

    def default_tactic(self, problem: Fc2Problem) -> Tactic:
        return StubTactic()

    def run(self, problem, tactic, a, b, alpha, out) -> None:
        out.fill_(7)


@pytest.fixture
def stub():
    backend = StubBackend()
    dispatch.register(backend)
    yield backend
    backends.unregister("stub")


def test_a_third_party_backend_runs_by_name(stub):
    a, b = make_operands(1, 16, 32, seed=0)
    alpha = torch.ones(1, 1)
    assert (dispatch.fc2(a, b, alpha, backend="stub") == 7).all()
    assert dispatch.backends("cpu")["stub"].ok and list(dispatch.backends("cpu"))[-1] == "stub"
    with pytest.raises(ValueError, match="already registered"):
        dispatch.register(StubBackend())
    a, b = make_operands(2, 16, 32, seed=0)
    with pytest.raises(dispatch.UnavailableError, match="backend 'stub' cannot run this call: M is 2"):
        dispatch.fc2(a, b, torch.ones(2, 1), backend="stub")


def test_auto_takes_torch_on_a_cpu_and_says_why():
    a, b = make_operands(4, 16, 32, seed=0)
    decision = dispatch.explain(a, b, torch.ones(4, 1))
    assert decision.backend == "torch"
    assert {"cute", "triton"} <= {name for name, _ in decision.rejected}
    assert all(reason for _, reason in decision.rejected)
    assert "not cute:" in str(decision) or "cute" in str(decision)


def test_backends_lists_all_with_reasons():
    listed = dispatch.backends("cpu")
    assert list(listed)[:4] == ["cute", "hopper", "triton", "torch"]
    assert listed["torch"].ok and not listed["cute"].ok and listed["cute"].reason


def test_prepare_makes_what_the_device_would_run(monkeypatch):
    """The decision alone, for GPUs that are not here: the layouts asked for, by number of experts."""
    made = []
    for name in ("cute", "hopper", "triton"):
        backend = backends.get(name)
        monkeypatch.setattr(type(backend), "prepare", lambda self, b, in_place: made.append(self.name) or b)
        monkeypatch.setattr(type(backend), "is_supported", lambda self, device: SUPPORTED)
    _, linear = make_operands(1, 64, 6 * 256, seed=0, layout="linear")
    _, swizzled = make_operands(1, 64, 6 * 256, seed=0)
    for gpu, b, experts, expected in (
        ((10, 0), linear, 6, ["cute"]),
        ((10, 0), swizzled, 6, []),
        ((9, 0), swizzled, 6, ["hopper"]),
        ((8, 0), swizzled, 6, ["triton"]),
        ((9, 0), swizzled, 4, []),  # 384 weights per expert are no multiple of the prepared form's 256
    ):
        device = DeviceInfo("cuda", "gpu", gpu, 132)
        monkeypatch.setattr("dispatch.api.DeviceInfo.of", lambda _, device=device: device)
        made.clear()
        dispatch.prepare(b, experts)
        assert made == expected, (gpu, b.layout, experts)


def test_prepare_refuses():
    _, b = make_operands(1, 16, 96, seed=0)
    with pytest.raises(dispatch.ArgumentError, match="K = 96, which is not a multiple of 16 . experts = 64"):
        dispatch.prepare(b, 4)
    with pytest.raises(dispatch.ArgumentError, match="backend is 'x'; known: auto"):
        dispatch.prepare(b, 2, "x")
    with pytest.raises(dispatch.UnavailableError, match="backend 'cute' cannot run"):
        dispatch.prepare(b, 2, "cute")


def test_prepare_gives_the_operand_itself_where_nothing_is_faster():
    _, b = make_operands(1, 16, 32, seed=0)
    assert dispatch.prepare(b, 1) is b and dispatch.prepare(b, 1, "torch") is b and backends.get("torch").unprepare(b) is b
    with pytest.raises(TypeError, match="belongs to 'triton'"):
        backends.get("torch").unprepare(PreparedOperand("triton", "x", b.shape, b.data, b.scale))


# Errors


def valid():
    a, b = make_operands(4, 32, 96, seed=0)
    return {"a": a, "b": b, "alpha": torch.ones(4, 3)}


def rejects(error, message, **changes):
    with pytest.raises(error, match=message):
        dispatch.fc2(**{**valid(), **changes})


def test_operand_errors():
    rejects(TypeError, "a is Tensor; it takes an Nvfp4Tensor", a=torch.ones(4, 96))
    rejects(TypeError, "b is Tensor; .*prepare", b=torch.ones(4, 96))
    rejects(TypeError, "alpha is float64; it takes a float32 tensor", alpha=torch.ones(4, 3, dtype=torch.float64))
    rejects(TypeError, "alpha is list", alpha=[1.0])
    rejects(ValueError, r"alpha has shape \[5, 3\]; a has 4 rows", alpha=torch.ones(5, 3))
    rejects(ValueError, r"alpha has shape \[4\]", alpha=torch.ones(4))
    rejects(ValueError, r"alpha is not contiguous \(strides \[1, 4\]\)", alpha=torch.ones(3, 4).t())
    rejects(ValueError, "b has K = 64 and a has K = 96", b=quantize_nvfp4(torch.ones(32, 64)))
    rejects(ValueError, "K = 96 is not divisible by E = 5", alpha=torch.ones(4, 5))
    rejects(ValueError, "96 / 4 = 24 weights per expert is not a multiple of 16", alpha=torch.ones(4, 4))
    rejects(ValueError, "a is on cpu, b on cpu, alpha on meta", alpha=torch.ones(4, 3, device="meta"))
    rejects(ValueError, "alpha requires grad", alpha=torch.ones(4, 3, requires_grad=True))
    b = valid()["b"]
    rejects(ValueError, "b.global_scale has 2 elements; it takes 1 or 3", b=Nvfp4Tensor(b.data, b.scale, b.layout, torch.ones(2)))
    a = valid()["a"]
    rejects(ValueError, "a.global_scale has 3 elements; it takes 1", a=Nvfp4Tensor(a.data, a.scale, a.layout, torch.ones(3)))


def test_out_errors():
    rejects(ValueError, "out_dtype is float64; accepted: bfloat16, float16, float32", out_dtype=torch.float64)
    rejects(TypeError, "out is list", out=[])
    rejects(ValueError, r"out has shape \[4, 33\]; a and b make it \[4, 32\]", out=torch.empty(4, 33))
    rejects(ValueError, "out has dtype float32 and out_dtype is bfloat16", out=torch.empty(4, 32))
    rejects(ValueError, "out is on meta and a on cpu", out=torch.empty(4, 32, dtype=torch.bfloat16, device="meta"))
    rejects(ValueError, "out is not contiguous", out=torch.empty(32, 4, dtype=torch.bfloat16).t())
    memory = torch.zeros(4 * 32, dtype=torch.float32)
    rejects(
        ValueError,
        "out overlaps the memory of alpha",
        alpha=memory[:12].view(4, 3),
        out=memory.view(4, 32),
        out_dtype=torch.float32,
    )


def test_backend_and_tactic_errors():
    rejects(ValueError, "backend is 'cuda'; known: auto, cute, hopper, triton, torch", backend="cuda")
    rejects(dispatch.UnavailableError, "backend 'cute' cannot run this call: .+", backend="cute")
    rejects(TypeError, "tactic is str", tactic="fast")
    rejects(ValueError, "tactic belongs to backend 'torch' and backend is 'cute'", backend="cute", tactic=TorchTactic())
    rejects(dispatch.UnavailableError, "form is 'slow'; it is 'experts' or 'cached_weight'", tactic=TorchTactic("slow"))
    b = valid()["b"]
    prepared = PreparedOperand("triton", "rows", b.shape, b.data, b.scale)
    rejects(dispatch.UnavailableError, "b was prepared for backend 'triton'", backend="torch", b=prepared)


def test_registration_errors():
    with pytest.raises(TypeError, match="takes an Fc2Backend instance, got ABCMeta"):
        dispatch.register(StubBackend)
    with pytest.raises(KeyError, match="'torch' was not added by register"):
        backends.unregister("torch")
    with pytest.raises(KeyError, match="unknown backend 'x'; known: cute, hopper, triton, torch"):
        backends.get("x")
