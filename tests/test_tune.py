"""Tuning on a CPU with backends that misbehave in every way: candidates are isolated, checked, timed and
remembered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import dispatch
from backends import (
    DeviceInfo,
    Fc2Problem,
    quantize_nvfp4,
    register,
    registry,
    unregister,
)
from backends.cute.budget import CuteTactic
from backends.torch_baseline import TorchTactic
from dispatch import ArgumentError, environment, isolation, precompile, store, tune
from dispatch.candidates import PRUNE, Point, coarse_to_fine, next_m, plan
from dispatch.choice import choose
from dispatch.hardware import GPUS
from dispatch.evidence import Measured
from dispatch.measured import Entry, table_problem
from dispatch.model import Family, Model
from dispatch.tune import autotune, judge
from tests.stub_backends import CompilingBackend, HangingBackend, StubBackend, StubTactic

CPU = DeviceInfo("cpu", "cpu")
# float32, so that a flipped last bit stays inside the accuracy bar and only reproducibility catches it.
PROBLEM = Fc2Problem(3, 64, 128, 4, torch.float32, device_type="cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    settings = replace(environment.Settings.of({}), cache_dir=tmp_path)
    monkeypatch.setattr(environment, "settings", lambda: settings)
    store.forget()
    yield tmp_path
    store.forget()


@pytest.fixture
def stub(request):
    register(getattr(request, "param", StubBackend)())
    yield
    unregister("stub")


def quiet(*arguments, **options):
    return autotune(*arguments, progress=False, refine=options.pop("refine", False), **options)


def test_candidates_are_isolated_checked_timed_and_remembered(stub, cache):
    report = quiet(PROBLEM, backends=["stub"], budget_s=120)
    failures = {e.tactic.fault: e.failure for e in report.entries if e.seconds is None}
    assert failures["wrong"].startswith("wrong result") and failures["nan"].startswith("wrong result: inf")
    assert failures["random"] == "two runs on the same inputs differ"
    assert "unspecified launch failure" in failures["raise"]
    assert failures["oom"] == "out of device memory"
    assert failures["crash"] == "killed by SIGABRT"
    times = {e.tactic: e for e in report.entries if e.seconds is not None}
    assert set(times) == {StubTactic(delay_ms=5), StubTactic(delay_ms=1)}
    assert 1e-3 < times[StubTactic(delay_ms=1)].seconds < times[StubTactic(delay_ms=5)].seconds
    notes = times[StubTactic(delay_ms=1)].notes
    assert (
        notes["timer"] == "host"
        and notes["kernel"]
        and notes["date"].startswith("20")
        and notes["samples"] >= 5
    )

    # Decisions of this process use it at once; the default would have been the slow one.
    decision = choose(PROBLEM, CPU, store.measured_for(CPU), "stub")
    assert (decision.tactic, decision.source) == (StubTactic(delay_ms=1), "measured")
    # Others find it in the store.
    store.forget()
    assert choose(PROBLEM, CPU, store.measured_for(CPU), "stub").source == "measured"
    assert os.listdir(cache) and str(report).startswith("tuned 1 problems")

    # A second run has nothing to do; asked to, it measures again.
    began = time.monotonic()
    again = quiet(PROBLEM, backends=["stub"])
    assert (len(again.done), len(again.resumed)) == (0, 1) and time.monotonic() - began < 2


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("stub", [CompilingBackend], indirect=True)
def test_kernels_are_compiled_side_by_side_before(stub, crashes, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_KERNELS", str(tmp_path))
    monkeypatch.setattr(precompile.Compilers, "count", lambda self, jobs: 2)
    if crashes:
        monkeypatch.setenv("STUB_COMPILER_CRASHES", "1")
    before = set(_children_alive())  # such as the compiler processes that torch keeps
    report = quiet(PROBLEM, ms=[1, 3], backends=["stub"], budget_s=120)
    kernels = {path.name: path.read_text() for path in tmp_path.glob("[13]-*")}
    assert set(kernels) == {f"{m}-{delay}" for m in (1, 3) for delay in (1, 2, 3, 4, 5) if not (crashes and delay == 4)}
    assert len(set(kernels.values())) >= 2, "two processes compiled"
    assert len(report.done) == 2 and report.phases["compile"] > 0.4
    failed = {e.tactic.delay_ms for e in report.entries if e.seconds is None}
    assert failed == ({4} if crashes else set())
    if not crashes:
        assert "compile " in str(report) and report.phases["compile"] < 60
        assert set(_children_alive()) <= before


@pytest.mark.parametrize("stub", [CompilingBackend], indirect=True)
def test_what_time_did_not_suffice_to_compile_ahead_is_compiled_when_it_is_checked(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_KERNELS", str(tmp_path))
    compilers = precompile.Compilers("cpu", CPU, isolation.importable_backends(), 60.0)
    assert compilers.compile([(PROBLEM, StubTactic(delay_ms=1))], time.monotonic() - 1, print) == 0
    compilers.close()
    report = quiet(PROBLEM, backends=["stub"], budget_s=120, candidates=3)
    assert len([e for e in report.entries if e.seconds]) == 3


def test_how_many_processes_compile(monkeypatch):
    def count(jobs: int, **of_device) -> int:
        info = replace(GPUS["H200"].device, **of_device)
        return precompile.Compilers("cuda", info, (), 60.0).count([(problem(m + 1), StubTactic()) for m in range(jobs)])

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(precompile, "_available_memory", lambda: 100 << 30)
    assert [count(jobs) for jobs in (1, 5, 100)] == [1, 5, precompile.MOST]
    assert count(100, memory_bytes=8 << 30) == 2, "each may hold the weights twice"
    monkeypatch.setattr(precompile, "_available_memory", lambda: 13 << 30)
    assert count(100) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert count(100) == 1


@pytest.mark.parametrize("stub", [HangingBackend], indirect=True)
def test_a_hanging_candidate_costs_only_itself(stub, monkeypatch):
    monkeypatch.setattr(tune, "CHECK_SECONDS", 3.0)
    began = time.monotonic()
    report = quiet(PROBLEM, backends=["stub"], budget_s=120)
    assert time.monotonic() - began < 90
    failed = [e for e in report.entries if e.seconds is None]
    assert [(e.tactic.fault, e.failure) for e in failed] == [("hang", "no answer within 3 s")]
    assert {e.tactic for e in report.entries if e.seconds} == {StubTactic(delay_ms=5), StubTactic(delay_ms=1)}


@pytest.mark.parametrize("stub", [HangingBackend], indirect=True)
def test_the_budget_is_kept_and_what_was_not_reached_is_no_failure(stub):
    began = time.monotonic()
    report = quiet(PROBLEM, ms=[1, 2], backends=["stub"], budget_s=8)
    assert time.monotonic() - began < 8 + tune.GRACE_SECONDS + 3
    # A slow machine may measure the first point with the one tactic that it had time for, before the one that hangs.
    assert report.left and len(report.left) + len(report.done) == 2
    assert all(entry.seconds is not None for entry in report.entries)
    assert f"{len(report.left)} not reached (run again to go on)" in str(report)


def test_operands_name_the_problem_and_torch_alone_suffices():
    a, b = quantize_nvfp4(torch.ones(2, 32)), quantize_nvfp4(torch.ones(8, 32))
    report = quiet(a, b, torch.ones(2, 2), ms=[2])
    assert [p.problem.m for p in report.done] == [2]
    decision = dispatch.explain(a, b, torch.ones(2, 2))
    assert (decision.tactic, decision.source) == (TorchTactic(), "measured")


def test_points_cut_short_are_measured_anew():
    tuner = tune._Tuner("cpu", CPU, 60, None, 4, False)
    point = Point(PROBLEM, "topk:1")
    partly = Entry(table_problem(PROBLEM), "topk:1", TorchTactic(), 1e-3, notes={"cut": "1 of 4"})
    store.remember(CPU, [partly])
    assert tuner._known(point) == []
    store.remember(CPU, [replace(partly, notes={})])
    assert len(tuner._known(point)) == 1


def test_judging_decisions_stores_nothing(cache):
    store.remember(CPU, [Entry(table_problem(PROBLEM), "topk:1", TorchTactic(), 1e-3)])
    (result,) = judge([PROBLEM], ms=[3], budget_s=60, progress=False)
    assert (result.chosen, result.source, result.regret) == (TorchTactic(), "measured", 0.0)
    assert result.seconds != 1e-3, "measured now"
    assert not list(cache.glob("*.json"))
    assert store.measured_for(CPU).user.entries[0].seconds == 1e-3


def test_arguments_are_checked():
    with pytest.raises(ArgumentError, match="m is 0"):
        quiet(PROBLEM, ms=[0])
    with pytest.raises(ArgumentError, match="alpha form is 'sometimes'"):
        quiet(PROBLEM, alphas=["sometimes"])
    with pytest.raises(ArgumentError, match="backend is 'x'; known: "):
        quiet(PROBLEM, backends=["x"])


def test_inputs_that_cannot_be_made_are_reported():
    point = Point(replace(PROBLEM, k=10**13, experts=1), "dense")
    tuner = tune._Tuner("cpu", CPU, 60, ["torch"], 4, False)
    report = tuner.run([point], refine=False, progress=False)
    assert [p for p, _ in report.impossible] == [point] and not report.done
    assert "no inputs: " in str(report)


SCRIPT = """
import os, sys
import backends
from tests.stub_backends import HangingBackend
from tests.test_tune import PROBLEM
from dispatch.tune import autotune
backends.register(HangingBackend())
print("start", flush=True)
autotune(PROBLEM, ms=[1], backends=["stub"], budget_s=100)
"""


def test_ctrl_c_ends_the_worker_too(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "FC2_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert parent.stdout.readline() == "start\n"
    children = []
    while not children:
        time.sleep(0.2)
        children = _children(parent.pid)
    time.sleep(1.0)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(timeout=30) not in (0, None)
    time.sleep(0.2)
    assert not [child for child in children if os.path.exists(f"/proc/{child}/status") and not _zombie(child)]


def _children_alive() -> list[int]:
    return [child for child in _children(os.getpid()) if not _zombie(child)]


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def _zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


# The plan


def problem(m: int) -> Fc2Problem:
    return Fc2Problem(m, 7168, 65536, 256, capability=(10, 0))


@pytest.fixture
def b200(monkeypatch):
    from backends import Support
    from backends.cute.backend import CuteBackend

    monkeypatch.setattr(CuteBackend, "is_supported", lambda self, device: Support(True))
    return GPUS["B200"].device


def test_the_plan_starts_with_rule_and_default_and_is_pruned_by_the_model(b200):
    found = store.shipped_for(b200)
    known = Measured(found, None, store.model_for(b200, found))
    tactics = plan(Point(problem(256), "topk:8"), b200, known, ["cute"], 12)
    assert tactics[0] == CuteTactic(256, 128, 256, 2, 1)
    assert len(tactics) == 12 == len(set(tactics))
    estimates = [known.evidence(problem(256)).estimate(t) for t in tactics]
    times = [e.seconds for e in estimates if e][2:]
    assert times == sorted(times) and max(times) <= PRUNE * min(times)
    assert sum(e is None for e in estimates) >= 3, "tiles that nothing is known about get their chance"


def test_the_plan_without_a_model_samples_the_list_and_keeps_winners(b200):
    winner = CuteTactic(256, 256, 128, 2, 2, split_k=4)
    tactics = plan(Point(problem(64), "topk:8"), b200, Measured(), ["cute"], 10, [winner])
    assert len(tactics) == 10 and tactics[:2] == [registry.get("cute").default_tactic(problem(64)), winner]
    assert len({(t.tile_m, t.tile_n) for t in tactics}) >= 4


def test_the_plan_never_holds_what_misses_the_accuracy_bar():
    assert plan(Point(PROBLEM, "topk:1"), CPU, Measured(), ["torch"], 10) == [TorchTactic()]


def test_coarse_to_fine_covers_evenly_wherever_it_stops():
    points = [Point(problem(m), "dense") for m in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert [p.problem.m for p in coarse_to_fine(points)] == [1, 256, 16, 4, 64, 2, 8, 32, 128]
    two = [Point(replace(problem(m), n=n), "dense") for m in (1, 2, 4) for n in (7168, 64)]
    assert [(p.problem.n, p.problem.m) for p in coarse_to_fine(two)] == [
        (n, m) for n in (7168, 64) for m in (1, 4, 2)
    ]


def test_buckets_are_refined_where_the_wrong_winner_costs():
    x, y = StubTactic(delay_ms=1), StubTactic(delay_ms=2)
    agree = {1: {x: 1.0, y: 2.0}, 64: {x: 3.0, y: 4.0}}
    assert next_m(agree) is None
    cheap = {1: {x: 1.0, y: 1.04}, 64: {x: 3.1, y: 3.0}}
    assert next_m(cheap) is None
    costly = {1: {x: 1.0, y: 2.0}, 64: {x: 4.0, y: 3.0}, 128: {x: 4.0, y: 3.0}}
    assert next_m(costly) == 8
    assert next_m({**costly, 8: {}}) is None, "a token count where nothing ran is not tried again"
    assert next_m({10: costly[1], 12: costly[64]}) is None, "close enough"
    unknown = {16: {x: 1.0}, 64: {y: 3.0}}
    assert next_m(unknown) == 32


def test_the_model_prunes(monkeypatch):
    model = Model(132, 4e12, 8e14, {"torch/experts": Family(1e-5, 0.5, {"gemm": 0.5})})
    assert plan(Point(PROBLEM, "dense"), CPU, Measured(None, None, model), ["torch"], 10) == [TorchTactic()]


def test_tuning_refuses_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(dispatch.UnavailableError, match="during a CUDA graph capture"):
        autotune(PROBLEM)


# On a GPU


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
def test_tuning_on_a_gpu_is_graph_timed_cold_and_repeatable():
    problem = Fc2Problem(16, 1024, 64 * 256, 64)
    info = DeviceInfo.of("cuda")
    report = quiet(problem, ms=[1, 16], alphas=["topk:8", "dense"], budget_s=240, candidates=4)
    assert len(report.done) == 4 and not report.left, str(report)
    assert not [e for e in report.entries if e.seconds is None], str(report)
    for e in report.entries:
        assert (e.notes["timer"], e.notes["l2"]) == ("graph", "cold") and e.notes["samples"] in (1, 4, tune.ROUNDS)
        assert 1e-6 < e.seconds < 1e-1
    decided = replace(problem, device_type="cuda", capability=info.capability)
    decision = choose(decided, info, store.measured_for(info))
    assert decision.source == "measured"
    best = min(e.seconds for e in report.entries if e.alpha == "topk:8" and e.problem.m == 16)
    assert decision.seconds <= best * (1 + 0.021)


@cuda
def test_a_decision_inside_a_capture_is_safe_and_tuning_there_is_refused():
    a, b = (quantize_nvfp4(torch.randn(rows, 512, device="cuda")) for rows in (4, 128))
    alpha = torch.rand(4, 2, device="cuda")
    expected = dispatch.fc2(a, b, alpha)
    store.forget()  # tables are read again, which is host work only
    tune.forget_plans()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dispatch.fc2(a, b, alpha)
        with pytest.raises(dispatch.UnavailableError, match="during a CUDA graph capture"):
            autotune(a, b, alpha)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@cuda
def test_inputs_too_large_for_the_gpu_are_reported():
    rows = torch.cuda.get_device_properties(0).total_memory // 4096
    report = quiet(Fc2Problem(1, rows * 16, 65536, 256), backends=["torch"], budget_s=60)
    assert report.impossible and "out of device memory" in report.impossible[0][1]
