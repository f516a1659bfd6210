"""Decisions by value: each source, each override, each rejection, ties, and how long a decision takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

import dispatch
from backends import DeviceInfo, Fc2Problem, Support, registry
from backends.cute.backend import CuteBackend
from backends.cute.budget import CuteTactic
from backends.torch_baseline import TorchTactic
from backends.triton.backend import TritonBackend
from dispatch import (
    ArgumentError,
    ArgumentTypeError,
    UnavailableError,
    environment,
    execute,
    store,
)
from dispatch.choice import MODEL_MARGIN, NOTHING, TIE_MARGIN, Pin, choose, pick_among
from dispatch.hardware import GPUS
from dispatch.measured import OUT_OF_MEMORY, Entry, Measured, Table
from dispatch.model import Model, fit

B200, H200 = GPUS["B200"].device, GPUS["H200"].device
CPU = DeviceInfo("cpu", "cpu")
RULE = CuteTactic(256, 128, 256, 2, 1)
SPLIT = CuteTactic(128, 128, 256, 1, 2, split_k=2)
NARROW = CuteTactic(128, 64, 256, 1, 1)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As if the packages that the kernels need were installed: decisions are about the device."""

    def sm100(self, device):
        return Support(device.capability in ((10, 0), (10, 3)), f"needs SM 10.0 or 10.3, not {device.arch}")

    def sm80(self, device):
        return Support((device.capability or (0, 0)) >= (8, 0), f"needs SM 8.0, not {device.arch}")

    monkeypatch.setattr(CuteBackend, "is_supported", sm100)
    monkeypatch.setattr(TritonBackend, "is_supported", sm80)
    monkeypatch.setattr(TritonBackend, "is_automatic", sm80)


def problem(
    m: int, device: DeviceInfo = B200, n: int = 7168, k: int = 65536, experts: int = 256, **other
) -> Fc2Problem:
    return Fc2Problem(m, n, k, experts, device_type=device.type, capability=device.capability, **other)


def entry(m: int, tactic, us: float, alpha: str = "topk:8", **other) -> Entry:
    return Entry(Fc2Problem(m, 7168, 65536, 256), alpha, tactic, us * 1e-6 if us else None, **other)


def table(*entries: Entry, gpu: str = "NVIDIA B200") -> Table:
    return Table(gpu, entries)


def shipped(device: DeviceInfo) -> Measured:
    found = store.shipped_for(device)
    return Measured(found, None, store.model_for(device, found))


# The SM100 rule and the published table


@pytest.mark.parametrize("m", [128, 129, 160, 256, 257, 512, 4096])
@pytest.mark.parametrize("known", [NOTHING, shipped(B200)], ids=["untuned", "shipped"])
def test_from_128_tokens_on_sm100_takes_the_pair(m, known):
    decision = choose(problem(m), B200, known)
    assert (decision.backend, decision.tactic, decision.source) == ("cute", RULE, "rule")


def test_the_rule_holds_on_sm103_and_not_elsewhere():
    sm103 = replace(B200, name="NVIDIA B300", capability=(10, 3))
    assert choose(problem(128, sm103), sm103).source == "rule"
    sm120 = replace(B200, name="NVIDIA RTX PRO 6000", capability=(12, 0))
    assert choose(problem(128, sm120), sm120).backend == "triton"


def test_the_rule_falls_back_to_the_shorter_k_tile():
    decision = choose(problem(256, k=128 * 384, experts=128), B200)
    assert (decision.tactic, decision.source) == (replace(RULE, tile_k=128), "rule")


@pytest.mark.parametrize("m, seconds", [(32, 52.09e-6), (64, 52.68e-6), (96, 53.15e-6)])
def test_below_128_tokens_the_best_published_tactic_runs(m, seconds):
    decision = choose(problem(m), B200, shipped(B200))
    assert (decision.tactic, decision.source) == (SPLIT, "measured")
    assert decision.seconds == pytest.approx(seconds)
    narrow = next(c for c in decision.candidates if c.tactic == NARROW)
    assert 0.09 < narrow.seconds / decision.seconds - 1 < 0.12
    assert "published (pr13833)" in str(decision)


@pytest.mark.parametrize("m", [33, 40, 100, 127])
def test_between_published_token_counts(m):
    decision = choose(problem(m), B200, shipped(B200))
    assert (decision.tactic, decision.source) == (SPLIT, "interpolated")
    assert 52e-6 < decision.seconds < 54e-6


@pytest.mark.parametrize("m", [1, 8, 16])
def test_far_fewer_bytes_beat_times_of_other_token_counts_only(m):
    """Skipping unselected experts was never timed on a B200; below the published token counts arithmetic
    decides."""
    decision = choose(problem(m), B200, shipped(B200))
    assert decision.tactic.skip and decision.source == "model"
    published = next(c for c in decision.candidates if c.tactic == SPLIT)
    assert decision.seconds * (1 + MODEL_MARGIN) < published.seconds
    assert not choose(problem(32), B200, shipped(B200)).tactic.skip, "measured there"


def test_a_small_promise_of_the_model_does_not_displace_what_was_measured_nearby():
    near = entry(64, SPLIT, 55.0, "any"), entry(96, SPLIT, 55.0, "any")
    model = store.model_for(B200, store.shipped_for(B200))
    decision = choose(problem(60), B200, Measured(table(*near), None, model))
    assert decision.tactic == SPLIT and decision.source == "model"
    rivals = choose(problem(60), B200, Measured(table(*near), None, model), complete=True).candidates[1:]
    assert min(c.seconds for c in rivals) < decision.seconds / (1 + TIE_MARGIN), (
        "one is predicted to be faster"
    )


def test_another_output_type_takes_the_near_times():
    decision = choose(problem(64, out_dtype=torch.float16), B200, shipped(B200))
    assert (decision.tactic, decision.source) == (SPLIT, "interpolated")


def test_an_unmeasured_shape_is_decided_by_the_model():
    decision = choose(problem(64, n=4096, k=128 * 512, experts=128), B200, shipped(B200))
    assert (decision.backend, decision.source) == ("cute", "model")
    assert decision.seconds <= min(c.seconds for c in decision.candidates) * (1 + TIE_MARGIN)


def test_the_rule_is_overridden_by_the_users_own_measurement_only():
    published = table(
        entry(128, RULE, 70.0, "any", source="pr12686"), entry(128, SPLIT, 50.0, "any", source="pr13833")
    )
    assert choose(problem(128), B200, Measured(published)).source == "rule"
    tuned = table(entry(128, RULE, 70.0), entry(128, SPLIT, 60.0))
    decision = choose(problem(128), B200, Measured(published, tuned))
    assert (decision.tactic, decision.source) == (SPLIT, "measured")
    assert "70.0 us measured by tuning: 17% slower" in str(decision), "explain shows both"
    within = table(entry(128, RULE, 70.0), entry(128, SPLIT, 70.0 / (1 + TIE_MARGIN) + 0.01))
    assert choose(problem(128), B200, Measured(published, within)).source == "rule"
    elsewhere = table(entry(64, RULE, 70.0), entry(64, SPLIT, 60.0))
    assert choose(problem(128), B200, Measured(published, elsewhere)).source == "rule"


# Evidence in general


TRITON = registry.get("triton")
SLOW, FAST, OTHER = TRITON.tactics(problem(16, H200))[1:4]


def test_nothing_known_takes_the_first_backend_and_its_default():
    decision = choose(problem(16, H200), H200)
    assert (decision.backend, decision.source, decision.seconds) == ("triton", "default", None)
    assert decision.tactic == TRITON.default_tactic(problem(16, H200))
    assert dict(decision.rejected) == {"cute": "needs SM 10.0 or 10.3, not SM 9.0"}
    cpu = choose(problem(16, CPU), CPU)
    assert (cpu.backend, cpu.tactic, cpu.source) == ("torch", TorchTactic(), "default")
    assert [name for name, _ in cpu.rejected] == ["cute", "triton"]


def test_measured_here_beats_everything_else():
    known = Measured(table(entry(16, SLOW, 40.0), entry(16, FAST, 20.0), entry(8, OTHER, 1.0)))
    decision = choose(problem(16, H200), H200, known)
    assert (decision.tactic, decision.source, decision.seconds) == (FAST, "measured", pytest.approx(20e-6))


def test_neighbours_that_agree_are_interpolated_straight_in_the_logarithms():
    known = Measured(
        table(entry(4, SLOW, 10.0), entry(4, FAST, 8.0), entry(64, SLOW, 40.0), entry(64, FAST, 32.0))
    )
    decision = choose(problem(16, H200), H200, known)
    assert (decision.tactic, decision.source) == (FAST, "interpolated")
    assert decision.seconds == pytest.approx(16e-6)


def test_interpolation_finds_the_crossing():
    known = Measured(
        table(entry(4, SLOW, 10.0), entry(4, FAST, 20.0), entry(64, SLOW, 80.0), entry(64, FAST, 40.0))
    )
    assert choose(problem(5, H200), H200, known).tactic == SLOW
    assert choose(problem(60, H200), H200, known).tactic == FAST


def test_user_times_replace_shipped_ones_at_the_same_problem_only():
    ours = table(entry(16, SLOW, 10.0), entry(64, SLOW, 10.0), entry(64, FAST, 30.0))
    user = table(entry(16, FAST, 50.0))
    known = Measured(ours, user)
    assert choose(problem(16, H200), H200, known).tactic == FAST, (
        "their 50 us and our 10 us are of different runs"
    )
    assert choose(problem(64, H200), H200, known).tactic == SLOW


def test_routed_times_decide_and_dense_ones_only_where_alone():
    routed = Measured(table(entry(16, SLOW, 10.0), entry(16, FAST, 20.0), entry(16, FAST, 1.0, "dense")))
    decision = choose(problem(16, H200), H200, routed)
    assert (decision.tactic, decision.alpha) == (SLOW, "topk:8")
    dense = Measured(table(entry(16, SLOW, 10.0, "dense"), entry(16, FAST, 2.0, "dense")))
    decision = choose(problem(16, H200), H200, dense)
    assert (decision.tactic, decision.alpha) == (FAST, "dense")


@pytest.mark.parametrize("faster, taken", [(0.5, "default"), (1.9, "default"), (2.1, "fast")])
def test_ties_go_to_the_incumbent(faster, taken):
    default = TRITON.default_tactic(problem(16, H200))
    known = Measured(table(entry(16, default, 20.0 * (1 + faster / 100)), entry(16, FAST, 20.0)))
    assert choose(problem(16, H200), H200, known).tactic == (default if taken == "default" else FAST)


def test_ties_without_an_incumbent_go_by_the_fixed_order():
    one, two = entry(16, SLOW, 20.0), entry(16, FAST, 20.3)
    other = entry(16, FAST, 20.0), entry(16, SLOW, 20.3)
    for entries in ((one, two), (two, one), other):
        chosen = choose(problem(16, H200), H200, Measured(table(*entries)))
        assert chosen.tactic == min(SLOW, FAST, key=str), "measurement noise must not decide"


def test_another_backend_needs_a_known_and_clearly_lower_time():
    times = [entry(16, TorchTactic(), 10.0)]
    assert choose(problem(16, H200), H200, Measured(table(*times))).backend == "triton", (
        "of which nothing is known"
    )
    times.append(entry(16, FAST, 10.1))
    assert choose(problem(16, H200), H200, Measured(table(*times))).backend == "triton", "a tie"
    times[1] = entry(16, FAST, 11.0)
    assert choose(problem(16, H200), H200, Measured(table(*times))).backend == "torch"


def test_a_tactic_that_failed_while_tuning_is_not_taken():
    default = TRITON.default_tactic(problem(16, H200))
    known = Measured(None, table(entry(8, default, 0, failure="wrong result"), entry(16, FAST, 5.0)))
    decision = choose(problem(16, H200), H200, known)
    assert decision.tactic == FAST
    assert f"not {default}: failed while tuning this shape: wrong result" in str(decision)
    assert choose(problem(16, H200), H200, known, tactic=default).tactic == default, (
        "the caller may still ask for it"
    )


def test_what_lacked_memory_may_run_with_fewer_tokens():
    default = TRITON.default_tactic(problem(16, H200))
    known = Measured(None, table(entry(64, default, 0, failure=OUT_OF_MEMORY), entry(256, FAST, 5.0)))
    assert choose(problem(256, H200), H200, known, tactic={"form": "tiled"}).tactic == FAST
    assert default in known.evidence(problem(64, H200)).failures
    assert not known.evidence(problem(16, H200)).failures


def test_a_measured_tactic_that_cannot_run_here_is_refused_with_its_reason():
    known = Measured(table(entry(32, replace(SPLIT, tile_k=192), 1.0, "any"), entry(32, NARROW, 60.0, "any")))
    decision = choose(problem(32), B200, known)
    assert decision.tactic == NARROW
    assert "tile_k is 192" in str(decision)


def test_cached_weight_is_never_automatic():
    known = Measured(table(entry(16, TorchTactic("cached_weight"), 1.0), entry(16, TorchTactic(), 100.0)))
    assert choose(problem(16, CPU), CPU, known).tactic == TorchTactic()
    assert choose(problem(16, CPU), CPU, known, "torch").tactic == TorchTactic()
    assert choose(problem(16, CPU), CPU, known, tactic=TorchTactic("cached_weight")).source == "forced"


def test_pick_among_prefers_the_evidence_alone():
    known = Measured(table(entry(16, SLOW, 40.0), entry(16, FAST, 20.0))).evidence(problem(16, H200))
    assert pick_among([SLOW, FAST], known) == FAST


def test_the_complete_list_gives_the_same_decision():
    for device, known in (
        (B200, shipped(B200)),
        (B200, NOTHING),
        (H200, NOTHING),
        (H200, shipped(H200)),
        (CPU, NOTHING),
    ):
        for m in (1, 33, 128, 300):
            for n, k, experts in ((7168, 65536, 256), (4096, 128 * 384, 128)):
                p = problem(m, device, n, k, experts)
                short, full = choose(p, device, known), choose(p, device, known, complete=True)
                assert (short.tactic, short.source, short.seconds) == (full.tactic, full.source, full.seconds)
                assert len(full.candidates) >= len(short.candidates)


# Overrides


def test_a_named_backend_is_used_or_refused():
    assert choose(problem(16, H200), H200, backend="torch").tactic == TorchTactic()
    with pytest.raises(UnavailableError, match="backend 'cute' cannot run this call: needs SM 10.0"):
        choose(problem(16, H200), H200, backend="cute")
    with pytest.raises(ArgumentError, match="backend is 'x'; known: auto, cute, triton, torch"):
        choose(problem(16, H200), H200, backend="x")


def test_a_whole_tactic_is_forced():
    decision = choose(problem(300), B200, shipped(B200), tactic=NARROW)
    assert (decision.tactic, decision.source) == (NARROW, "forced")


@pytest.mark.parametrize(
    "m, pin, tactic, source",
    [
        (64, {"tile_n": 64}, NARROW, "measured"),
        (64, {"backend": "cute", "tile_m": 256, "split_k": 1, "skip": False}, RULE, "model"),
        (256, {"tile_m": 128, "tile_n": 64}, NARROW, "interpolated"),
        (256, {"tile_k": 128}, replace(RULE, tile_k=128), "rule"),
        (256, {"backend": "torch"}, TorchTactic(), "default"),
    ],
)
def test_a_partial_tactic_pins_the_fields_given(m, pin, tactic, source):
    decision = choose(problem(m), B200, shipped(B200), tactic=pin)
    assert all(getattr(decision.tactic, name) == value for name, value in pin.items() if name != "backend")
    assert (decision.tactic, decision.source) == (tactic, source)


@pytest.mark.parametrize(
    "backend, pin, error, text",
    [
        (
            "auto",
            {"tile_q": 1},
            ArgumentError,
            "tactic pins tile_q; no backend's tactic has all of these fields",
        ),
        ("auto", {"backend": "cute", "tile_q": 1}, ArgumentError, "CuteTactic has no field 'tile_q'"),
        ("auto", {"tile_n": "64"}, ArgumentError, "CuteTactic.tile_n is '64'"),
        ("auto", {"tile_n": 96}, UnavailableError, "tile_m x tile_n is"),
        ("auto", {"backend": "nobody"}, ArgumentError, "backend is 'nobody'"),
        (
            "torch",
            {"backend": "cute"},
            ArgumentError,
            "tactic belongs to backend 'cute' and backend is 'torch'",
        ),
        ("auto", 7, ArgumentTypeError, "tactic is int"),
    ],
)
def test_pins_that_cannot_be_honoured_are_errors(backend, pin, error, text):
    with pytest.raises(error, match=text):
        choose(problem(64), B200, NOTHING, backend, pin)


@pytest.mark.parametrize(
    "text, pin",
    [
        ("cute", Pin("cute", ())),
        ("cute()", Pin("cute", ())),
        (" cute( tile_n = 64 , pdl=True )", Pin("cute", (("tile_n", 64), ("pdl", True)))),
        ("split_k=2", Pin("", (("split_k", 2),))),
        ("torch(form=cached_weight)", Pin("torch", (("form", "cached_weight"),))),
        (str(SPLIT), Pin.of(SPLIT)),
    ],
)
def test_pins_parse_what_tactics_print(text, pin):
    assert Pin.parse(text) == pin


@pytest.mark.parametrize("text", ["", "cute(", "cute(64)", "(tile_n=64)", "a b", "cute(tile n=4)"])
def test_text_that_is_no_tactic_is_refused(text):
    with pytest.raises(ArgumentError, match="tactic is "):
        Pin.parse(text)


def fc2_in(environment_: dict[str, str], body: str = "") -> subprocess.CompletedProcess:
    """A new process with these variables that calls fc2 twice on a CPU."""
    script = (
        "import torch, dispatch\n"
        "a, b = dispatch.quantize_nvfp4(torch.ones(2, 32)), dispatch.quantize_nvfp4(torch.ones(8, 32))\n"
        f"alpha = torch.ones(2, 2)\n{body}\n"
        "for _ in range(2): dispatch.fc2(a, b, alpha)\n"
        "print(dispatch.explain(a, b, alpha).tactic)\n"
    )
    clean = {"FC2_CACHE_DIR": "/nonexistent", **environment_}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**ENVIRONMENT, **clean}
    )


ENVIRONMENT = {name: value for name, value in __import__("os").environ.items() if not name.startswith("FC2_")}


def test_environment_overrides_and_log():
    forced = fc2_in({"FC2_TACTIC": "torch(form=cached_weight)", "FC2_LOG": "1"})
    assert forced.stdout.strip() == "torch(form=cached_weight)", forced.stderr
    logged = [line for line in forced.stderr.splitlines() if "m=2 n=8 k=32 experts=2" in line]
    assert len(logged) == 1 and "torch(form=cached_weight) (forced)" in logged[0], (
        "each decision is logged once"
    )
    refused = fc2_in({"FC2_BACKEND": "cute"})
    assert "backend 'cute' cannot run this call" in refused.stderr
    assert "asked for by the environment: FC2_BACKEND=cute" in refused.stderr


def test_settings_by_value():
    nothing = environment.Settings.of({})
    assert (nothing.backend, nothing.tactic, nothing.log) == ("auto", "", False)
    assert nothing.cache_dir.parts[-2:] == (".cache", "fc2-dispatch")
    some = environment.Settings.of({"FC2_CACHE_DIR": "/x", "FC2_LOG": "1", "FC2_BACKEND": "torch"})
    assert (str(some.cache_dir), some.log, some.backend) == ("/x", True, "torch")
    with pytest.raises(ArgumentError, match="FC2_LOG is '2'; it takes 0 or 1"):
        environment.Settings.of({"FC2_LOG": "2"})


# Warnings and reports


def test_unprepared_weights_are_told_about_on_a_gpu():
    decision = choose(problem(16, H200), H200)
    assert "backend 'triton'" in decision.warning and "dispatch.prepare(b, experts)" in decision.warning
    assert "backend 'cute'" in choose(replace(problem(16, B200), b_layout="linear"), B200).warning
    assert choose(problem(16, B200), B200).warning == ""
    assert choose(problem(16, CPU), CPU).warning == ""


def test_only_torch_on_a_gpu_is_told_about():
    old = DeviceInfo("cuda", "Tesla V100", (7, 0), 80)
    decision = choose(problem(16, old), old)
    assert decision.backend == "torch"
    assert (
        "only the slow torch baseline can run this call" in decision.warning and "SM 8.0" in decision.warning
    )


def test_what_was_not_measured_on_a_gpu_is_said_with_the_remedy():
    text = "`python -m dispatch tune --n 7168 --k 65536 --experts 256` does that"
    assert text in str(choose(problem(16, H200), H200))
    assert text not in str(choose(problem(64), B200, shipped(B200)))


def test_a_foreign_table_is_said():
    known = Measured(table(entry(16, FAST, 5.0)), foreign="NVIDIA H200")
    assert "times are from NVIDIA H200" in str(choose(problem(16, H200), H200, known))


def test_the_report_is_short_and_complete():
    text = str(choose(problem(64), B200, shipped(B200), complete=True))
    lines = text.splitlines()
    assert len(lines) < 20
    assert lines[0].startswith("fc2 m=64 n=7168 k=65536 experts=256 bfloat16") and "NVIDIA B200" in lines[0]
    for part in ("time: 52.7 us published (pr13833)", "floor: ", "runner-up: ", "no time is known"):
        assert part in text


def test_when_nothing_can_run_every_reason_is_given(monkeypatch):
    monkeypatch.setattr(
        type(registry.get("torch")), "is_supported", lambda self, device: Support(False, "is tired")
    )
    with pytest.raises(UnavailableError) as error:
        choose(problem(16, CPU), CPU)
    for text in ("cute: needs SM 10.0", "triton: needs SM 8.0", "torch: is tired"):
        assert text in str(error.value)


# Properties of the function itself


def test_deciding_needs_no_gpu_package():
    script = (
        "import sys\n"
        "for name in ('triton', 'cutlass', 'cupti'): sys.modules[name] = None\n"
        "from dispatch.choice import choose\nfrom dispatch.hardware import GPUS\nfrom dispatch import store\n"
        "from backends import Fc2Problem\n"
        "d = GPUS['B200'].device\n"
        "print(choose(Fc2Problem(128, 7168, 65536, 256, capability=(10, 0)), d, store.measured_for(d)))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert "torch(form=experts)" in run.stdout
    assert "nvidia-cutlass-dsl" in run.stdout and "triton is not installed" in run.stdout


def test_threads_agree():
    known, results = shipped(B200), []

    def work():
        results.append([choose(problem(m), B200, known).tactic for m in range(1, 140, 3)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(result == results[0] for result in results)


def test_new_decisions_take_microseconds_and_cached_ones_less():
    known = shipped(B200)
    problems = [problem(m) for m in range(32, 160)]
    best = min(_seconds(lambda: [choose(p, B200, known) for p in problems]) for _ in range(3))
    assert best / len(problems) < 2e-3  # 0.15 ms on an idle core, 2026-11-23; 1 ms where the model decides
    a, b = dispatch.quantize_nvfp4(torch.ones(2, 32)), dispatch.quantize_nvfp4(torch.ones(8, 32))
    call = (a, b, torch.ones(2, 2), "auto", torch.bfloat16, None, None)
    execute.run_fc2(*call)
    best = min(
        _seconds(lambda: [execute._plans[execute._key(*call)] for _ in range(1000)]) for _ in range(20)
    )
    assert best / 1000 < 10e-6  # 1.3 us on an idle core, 2026-11-23; loaded machines run these tests too


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_tactics_survive_json_in_tables():
    record = json.loads(json.dumps(entry(16, SPLIT, 5.0).to_json()))
    assert Entry.from_json(record) == entry(16, SPLIT, 5.0)


def test_a_model_alone_orders_tactics():
    entries = [entry(64, SPLIT, 50.0, "any"), entry(64, NARROW, 60.0, "any"), entry(256, SPLIT, 100.0, "any")]
    model = fit(entries, 148, 8e12, 9e15)
    assert isinstance(model, Model)
    decision = choose(problem(64, n=4096), B200, Measured(None, None, model))
    assert decision.source == "model" and decision.seconds == pytest.approx(
        min(c.seconds for c in decision.candidates)
    )
