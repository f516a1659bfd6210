"""`dispatch.fc2` on a CUDA device: every backend that runs there, graphs, streams, `torch.compile`."""

from __future__ import annotations

import pytest
import torch

import backends
import dispatch
from backends import DeviceInfo, Fc2Problem, registry
from backends.torch_baseline import TorchTactic
from tests.reference import ALPHA_KINDS, assert_meets_bar, make_alpha, make_operands, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [
    # m, n, experts, inner
    *((m, 320, 5, 256) for m in (1, 7, 8, 9, 40, 127, 128, 129, 160, 192, 200, 255, 256, 257, 384, 512, 700)),
    (5, 192, 17, 16),
    (64, 8000, 3, 48),
    (129, 7168, 8, 256),
    (33, 72, 1, 512),
    (2, 8, 257, 16),
]


def running_backends() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [name for name, support in dispatch.backends("cuda").items() if support]


def operands(m: int, n: int, experts: int, inner: int, kind: str, layout: str = "128x4"):
    a, b = make_operands(m, n, experts * inner, seed=m + n, layout=layout, device="cuda")
    return a, b, make_alpha(kind, m, experts, torch.Generator().manual_seed(m)).cuda()


def forms(a, b, alpha, name: str) -> list:
    """b as it is and as this backend prepares it, those of them that the backend takes; skips the test if none."""
    taken, reason = [], ""
    for prepare in (lambda: b, lambda: dispatch.prepare(b, alpha.shape[1], name)):
        try:
            weights = prepare()
            dispatch.explain(a, weights, alpha, name)
        except dispatch.UnavailableError as refusal:
            reason = str(refusal)
        else:
            if weights not in taken:
                taken.append(weights)
    if not taken:
        pytest.skip(reason)
    return taken


@pytest.mark.parametrize("name", running_backends())
@pytest.mark.parametrize("layout", ["128x4", "linear"])
@pytest.mark.parametrize("m, n, experts, inner", SHAPES)
def test_meets_the_bar_and_repeats(m, n, experts, inner, layout, name):
    a, b, alpha = operands(m, n, experts, inner, "ragged", layout)
    exact, magnitude = reference(a, b, alpha)
    for weights in forms(a, b, alpha, name):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            out = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
            dispatch.fc2(a, weights, alpha, name, out_dtype=dtype, out=out)
            assert_meets_bar(out, exact, magnitude)
            assert torch.equal(out, dispatch.fc2(a, weights, alpha, name, out_dtype=dtype))


@pytest.mark.parametrize("name", running_backends())
@pytest.mark.parametrize("m, n, experts", [(150, 5120, 40), (500, 2880, 80)])
def test_routed_alpha_where_multiprocessors_are_idle(m, n, experts, name):
    """On 132 of them, "hopper" lets those take a share of the items of several strips."""
    a, b, alpha = operands(m, n, experts, 256, "top_k")
    exact, magnitude = reference(a, b, alpha)
    for weights in forms(a, b, alpha, name):
        out = torch.full((m, n), torch.nan, dtype=torch.float32, device="cuda")
        dispatch.fc2(a, weights, alpha, name, out_dtype=torch.float32, out=out)
        assert_meets_bar(out, exact, magnitude)
        assert torch.equal(out, dispatch.fc2(a, weights, alpha, name, out_dtype=torch.float32))


@pytest.mark.parametrize("name", running_backends())
@pytest.mark.parametrize("kind", ALPHA_KINDS)
def test_every_alpha(kind, name):
    a, b, alpha = operands(40, 512, 16, 256, kind)
    for weights in forms(a, b, alpha, name):
        out = dispatch.fc2(a, weights, alpha, name, out_dtype=torch.float32)
        assert_meets_bar(out, *reference(a, b, alpha))


@pytest.mark.parametrize("name", running_backends())
def test_replayed_graph_follows_its_inputs(name):
    a, b, alpha = operands(24, 512, 8, 256, "dense")
    for weights in forms(a, b, alpha, name):
        out = dispatch.fc2(a, weights, alpha, name, out_dtype=torch.float32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dispatch.fc2(a, weights, alpha, name, out_dtype=torch.float32, out=out)
        for seed, kind in enumerate(ALPHA_KINDS):
            fresh, _ = make_operands(24, 8, 8 * 256, seed=seed, device="cuda")
            a.data.copy_(fresh.data)
            a.scale.copy_(fresh.scale)
            alpha.copy_(make_alpha(kind, 24, 8, torch.Generator().manual_seed(seed)))
            out.fill_(torch.nan)
            graph.replay()
            assert_meets_bar(out, *reference(a, b, alpha))


@pytest.mark.parametrize("name", running_backends())
def test_two_streams_at_once(name):
    """Calls on different streams share no scratch memory."""
    calls = []
    for m in (32, 48):
        a, b, alpha = operands(m, 2048, 32, 256, "top_k" if m == 32 else "dense")
        calls.append((a, forms(a, b, alpha, name)[-1], alpha, name))
    expected = [dispatch.fc2(*call, out_dtype=torch.float32) for call in calls]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, call in enumerate(calls):
            with torch.cuda.stream(streams[i]):
                results[i].append(dispatch.fc2(*call, out_dtype=torch.float32))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(result, expected[i]) for result in results[i])


@pytest.mark.parametrize("name", running_backends())
def test_compile_fullgraph(name):
    @torch.compile(fullgraph=True)
    def layer(a, b, alpha):
        return dispatch.fc2(a, b, alpha * 2, name, out_dtype=torch.float32) + 1

    a, b, alpha = operands(24, 256, 8, 256, "top_k")
    exact, magnitude = reference(a, b, alpha * 2)
    assert_meets_bar(layer(a, forms(a, b, alpha, name)[-1], alpha) - 1, exact, magnitude + 2.0**-6)


def test_auto_runs_and_explains():
    a, b, alpha = operands(24, 256, 8, 64, "top_k")
    decision = dispatch.explain(a, b, alpha)
    assert_meets_bar(dispatch.fc2(a, b, alpha), *reference(a, b, alpha))
    assert decision.backend in running_backends() and str(decision)


def test_a_backend_for_other_hardware_refuses():
    if DeviceInfo.of("cuda").capability in ((10, 0), (10, 3)):
        pytest.skip("this device runs every backend")
    a, b, alpha = operands(24, 256, 8, 64, "top_k")
    with pytest.raises(dispatch.UnavailableError, match="backend 'cute' cannot run this call: .*SM"):
        dispatch.fc2(a, b, alpha, "cute")


def test_an_uncompiled_kernel_is_refused_during_a_capture(monkeypatch):
    name = running_backends()[0]
    if name == "torch":
        pytest.skip("no backend here compiles anything")
    a, b, alpha = operands(24, 256, 8, 256, "top_k")
    b = forms(a, b, alpha, name)[-1]
    fresh = type(backends.get(name))()  # nothing compiled yet
    monkeypatch.setitem(registry._instances, name, fresh)
    monkeypatch.setattr(registry, "generation", registry.generation + 1)
    problem = Fc2Problem(24, 256, 2048, 8, b_layout=b.layout, capability=DeviceInfo.of("cuda").capability)
    assert not fresh.is_compiled(problem, fresh.default_tactic(problem))
    out = torch.zeros((24, 256), dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(dispatch.NotCompiledError, match="call fc2 once with the same shapes before the capture"):
        with torch.cuda.graph(graph):
            dispatch.fc2(a, b, alpha, name, out=out)


def test_cached_weight_is_a_library_gemm():
    a, b, alpha = operands(24, 512, 8, 128, "dense")
    out = dispatch.fc2(a, b, alpha, tactic=TorchTactic("cached_weight"), out_dtype=torch.float32)
    exact, magnitude = reference(a, b, alpha)
    assert ((out.double() - exact).abs() <= 2.0**-8 * magnitude).all()


def test_devices_must_agree():
    a, b, alpha = operands(24, 256, 8, 64, "top_k")
    with pytest.raises(dispatch.ArgumentError, match="a is on cuda:0, b on cuda:0, alpha on cpu"):
        dispatch.fc2(a, b, alpha.cpu())


def test_extra_memory_is_bounded():
    """The torch baseline at DeepSeek-V3's size stays far below the 0.94 GB of a decoded B, and so does the quantizer."""
    generator = torch.Generator("cuda").manual_seed(0)
    m, n, experts, inner = 128, 7168, 256, 256
    data = torch.randint(0, 256, (n, experts * inner // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scale = torch.randint(32, 64, (n, experts * inner // 16), dtype=torch.uint8, device="cuda", generator=generator)
    b = dispatch.Nvfp4Tensor(data, scale)
    a, _ = make_operands(m, 8, experts * inner, seed=0, device="cuda")
    alpha = torch.rand(m, experts, device="cuda")
    out = torch.empty((m, n), dtype=torch.bfloat16, device="cuda")

    def peak(call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    assert peak(lambda: dispatch.fc2(a, b, alpha, "torch", out=out)) < 256 << 20
    x = torch.randn(n, 65536, dtype=torch.bfloat16, device="cuda")
    result = b.nbytes + (64 << 20)  # data and scale factors, the latter twice while they are being reordered
    assert peak(lambda: dispatch.quantize_nvfp4(x)) < result + (512 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_quantizing_on_a_device_that_is_not_the_current_one():
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-20, 20).unsqueeze(1)
    there, here = dispatch.quantize_nvfp4(x.to("cuda:1")), dispatch.quantize_nvfp4(x)
    assert torch.equal(there.data.cpu(), here.data) and torch.equal(there.scale.cpu(), here.scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", running_backends())
def test_operands_on_a_device_that_is_not_the_current_one(name):
    a, b = make_operands(24, 320, 5 * 256, seed=1, device="cuda:1")
    alpha = make_alpha("dense", 24, 5, torch.Generator().manual_seed(1)).to("cuda:1")
    exact, magnitude = reference(a, b, alpha)
    for weights in forms(a, b, alpha, name):
        before = torch.cuda.memory_allocated(0)
        out = dispatch.fc2(a, weights, alpha, backend=name)
        assert out.device == torch.device("cuda:1") and torch.cuda.memory_allocated(0) == before
        # Not there: torch.ldexp gives zeros on a device that is not the current one (torch 2.11, two H100, 2026-11-26).
        assert_meets_bar(out.cpu(), exact.cpu(), magnitude.cpu())
