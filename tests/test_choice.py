"""Decisions by value: each source, each override, each rejection, ties, and how long a decision takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest
import torch

import dispatch
from backends import DeviceInfo, Fc2Problem, Support, Tactic, registry
from backends.cute.backend import CuteBackend
from backends.cute.budget import CuteTactic
from backends.torch_baseline import TorchTactic
from backends.triton.backend import TritonBackend
from backends.triton.tactic import TritonTactic
from dispatch import (
    ArgumentError,
    ArgumentTypeError,
    UnavailableError,
    choice,
    environment,
    execute,
    store,
)
from dispatch.choice import MODEL_MARGIN, NOTHING, choose, pick_among
from dispatch.evidence import Measured
from dispatch.hardware import GPUS
from dispatch.measured import OUT_OF_MEMORY, Entry, Table
from dispatch.model import Family, Model, describe, fit
from dispatch.pins import Pin
from dispatch.report import TIE_MARGIN

B200, H200 = GPUS["B200"].device, GPUS["H200"].device
CPU = DeviceInfo("cpu", "cpu")
RULE = CuteTactic(256, 128, 256, 2, 1)
SPLIT = CuteTactic(128, 128, 256, 1, 2, split_k=2)
NARROW = CuteTactic(128, 64, 256, 1, 1)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As if the packages that the kernels need were installed, and with a fixed list of backends: decisions are
    about the device."""
    three = {name: registry._BUILTIN[name] for name in ("cute", "triton", "torch")}
    monkeypatch.setattr(registry, "_BUILTIN", three)

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
    assert min(c.seconds for c in decision.candidates[1:]) < decision.seconds / (1 + TIE_MARGIN), (
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


def test_the_rule_yields_to_no_other_backends_published_or_predicted_time():
    tiled = TritonTactic(block_m=64)
    published = table(entry(128, RULE, 70.0, "any", source="x"), entry(128, tiled, 10.0, source="shoot-out"))
    assert choose(problem(128), B200, Measured(published)).source == "rule"
    tuned = table(entry(128, RULE, 70.0), entry(128, tiled, 10.0))
    decision = choose(problem(128), B200, Measured(published, tuned))
    assert (decision.backend, decision.source) == ("triton", "measured"), "the user measured it on this GPU"
    alone = table(entry(128, tiled, 10.0))
    assert choose(problem(128), B200, Measured(None, alone)).source == "rule", "it was not timed in that run"


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


@pytest.mark.parametrize("dense, taken", [(51.5, "first"), (49.6, "first"), (49.4, "second")])
def test_a_tie_goes_to_what_is_known_to_be_faster_if_alpha_is_dense(dense, taken):
    first, second = sorted((SLOW, FAST), key=str)
    times = [entry(16, first, 20.2), entry(16, second, 20.0), entry(16, first, 50.5, "dense"), entry(16, second, dense, "dense")]
    chosen = choose(problem(16, H200), H200, Measured(table(*times))).tactic
    assert chosen == (first if taken == "first" else second)


def test_the_report_says_what_decided_a_tie_with_the_default():
    default = TRITON.default_tactic(problem(16, H200))
    times = [entry(16, t, us, alpha) for t, us, alpha in (
        (default, 20.0, "topk:8"), (FAST, 20.2, "topk:8"), (default, 50.0, "dense"), (FAST, 40.0, "dense"),
    )]  # fmt: skip
    decision = choose(problem(16, H200), H200, Measured(table(*times)))
    assert decision.tactic == FAST
    assert "if alpha is dense it takes 40.0 us (measured), the default 50.0 us, which decides" in str(decision)
    assert f"not {default.brief}: 20.0 us measured by tuning: a tie, which goes to the chosen one" in str(decision)


def test_faster_with_dense_alpha_is_no_reason_outside_a_tie():
    times = [entry(16, SLOW, 20.0), entry(16, FAST, 21.0), entry(16, SLOW, 50.0, "dense"), entry(16, FAST, 30.0, "dense")]
    decision = choose(problem(16, H200), H200, Measured(table(*times)))
    assert decision.tactic == SLOW and "if alpha is dense it takes 50.0 us" in str(decision)
    untimed = [entry(16, SLOW, 20.2), entry(16, FAST, 20.0), entry(16, max(SLOW, FAST, key=str), 30.0, "dense")]
    decision = choose(problem(16, H200), H200, Measured(table(*untimed)))
    assert decision.tactic == min(SLOW, FAST, key=str), "the first's dense time is not known"


def test_among_backends_the_best_measured_wins_and_ties_go_to_the_first():
    times = [entry(16, TorchTactic(), 10.0)]
    decision = choose(problem(16, H200), H200, Measured(table(*times)))
    assert (decision.backend, decision.source) == ("torch", "measured"), "nothing is known of the others"
    times.append(entry(16, FAST, 10.1))
    assert choose(problem(16, H200), H200, Measured(table(*times))).backend == "triton", "a tie"
    times[1] = entry(16, FAST, 11.0)
    assert choose(problem(16, H200), H200, Measured(table(*times))).backend == "torch"


def test_by_the_model_another_backend_needs_a_known_and_clearly_lower_time():
    model = Model(132, 4e12, 8e14, {"torch/experts": Family(1e-6, 1.0, {"gemm": 1.0})})
    assert choose(problem(16, H200), H200, Measured(None, None, model)).backend == "triton", "a guess is no time"
    tile = TRITON.default_tactic(problem(16, H200))
    slow = describe(problem(16, H200), tile, 132, "topk:8")
    model = replace(model, families={**model.families, slow.family: Family(1.0, 1.0, {slow.tile: 1.0})})
    decision = choose(problem(16, H200), H200, Measured(None, None, model))
    assert (decision.backend, decision.source) == ("torch", "model")


def test_a_tactic_that_failed_while_tuning_is_not_taken():
    default = TRITON.default_tactic(problem(16, H200))
    known = Measured(None, table(entry(8, default, 0, failure="wrong result"), entry(16, FAST, 5.0)))
    decision = choose(problem(16, H200), H200, known)
    assert decision.tactic == FAST
    assert f"not {default.brief}: failed while tuning this shape: wrong result" in str(decision)
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
    known = Measured(table(entry(16, SLOW, 40.0), entry(16, FAST, 20.0)))
    assert pick_among([SLOW, FAST], known, problem(16, H200)) == FAST
    assert pick_among([SLOW], known, problem(16, H200)) == SLOW


# What was not measured on one side


#: The H200's times of two tiles around M = 384, of which the one that wins at 256 was not timed at 512.
WIDE, TALL = TritonTactic("gathered", 128, 16, 256, 4, 8, 1), TritonTactic("gathered", 64, 16, 256, 3, 4, 1)
ONE_SIDED = (entry(256, WIDE, 138.1), entry(256, TALL, 153.4), entry(512, TALL, 266.1))


def prepared(m: int, device: DeviceInfo = H200, **other) -> Fc2Problem:
    return problem(m, device, b_layout="triton/fragments", **other)


def on_prepared(*entries: Entry) -> Table:
    return table(*(replace(e, problem=replace(e.problem, b_layout="triton/fragments")) for e in entries))


@pytest.mark.parametrize("modelled", [False, True])
@pytest.mark.parametrize("m, taken", [(260, WIDE), (384, TALL), (500, TALL), (600, TALL), (5000, TALL), (200, WIDE)])
def test_a_missing_side_does_not_beat_a_measured_neighbour(m, taken, modelled):
    model = store.model_for(H200, store.shipped_for(H200)) if modelled else None
    decision = choose(prepared(m), H200, Measured(on_prepared(*ONE_SIDED), None, model))
    assert (decision.tactic, decision.source) == (taken, "interpolated" if 256 < m < 512 else "model")


def test_the_shipped_h200_table_at_384_tokens():
    """It has no time of `WIDE` at 512; `TALL` takes 177.2 us at 384 (bench/results/h200-deepseek-v3.md)."""
    decision = choose(prepared(384), H200, shipped(H200))
    assert decision.tactic == TALL and decision.seconds == pytest.approx(177.2e-6, rel=0.10)


def test_a_side_with_one_time_is_no_invitation():
    """What was never timed at M = 1 counts there as clearly slower than the one that was."""
    few, other = TritonTactic("few", 64, 8, 256, 1, 16, 2), TritonTactic("gathered", 64, 8, 256, 7, 4, 1)
    known = Measured(on_prepared(entry(1, few, 7.0), entry(8, few, 25.0), entry(8, other, 24.0)))
    assert [choose(prepared(m), H200, known).tactic for m in (2, 3)] == [few, few]
    assert choose(prepared(8), H200, known).tactic == other


def test_times_are_interpolated_alike_for_all_or_for_none():
    """Straight lines for one tactic and the model's bend for another would not compare."""
    model = store.model_for(H200, store.shipped_for(H200))
    model = replace(model, families={n: f for n, f in model.families.items() if not n.startswith("torch")})
    stranger = TorchTactic()
    pair = [entry(m, t, us) for m, us in ((64, 80.0), (512, 260.0)) for t in (WIDE, stranger)]
    evidence = Measured(on_prepared(*pair), None, model).evidence(prepared(200))
    estimates = evidence.estimates
    assert model.predict(prepared(200), WIDE, "topk:8") and not model.predict(prepared(200), stranger, "topk:8")
    assert estimates[WIDE].seconds == pytest.approx(estimates[stranger].seconds)


# Forms of alpha


def test_the_users_own_top_k_counts():
    ours = table(entry(16, SLOW, 10.0), entry(16, FAST, 20.0))
    user = table(entry(16, SLOW, 9.0, "topk:4"), entry(16, FAST, 6.0, "topk:4"))
    decision = choose(problem(16, H200), H200, Measured(ours, user))
    assert (decision.tactic, decision.alpha) == (FAST, "topk:4"), "they know their router"
    both = table(entry(16, SLOW, 9.0, "topk:4"), entry(16, FAST, 6.0, "topk:6"))
    assert choose(problem(16, H200), H200, Measured(both)).alpha == "topk:6", "nearest to the assumed 8"


def test_what_dense_alpha_would_cost_is_said():
    routed = [entry(16, SLOW, 10.0), entry(16, FAST, 20.0)]
    dense = [entry(16, SLOW, 95.0, "dense"), entry(16, FAST, 60.0, "dense")]
    text = str(choose(problem(16, H200), H200, Measured(table(*routed, *dense))))
    assert f"if alpha is dense it takes 95.0 us (measured), and {FAST} 60.0 us: name that one then" in text
    dense[0] = entry(16, SLOW, 60.5, "dense")
    text = str(choose(problem(16, H200), H200, Measured(table(*routed, *dense))))
    assert "if alpha is dense it takes 60.5 us (measured)\n" in text
    assert "dense" not in str(choose(problem(16, H200), H200, Measured(table(*routed))))


# Backends that read one prepared layout


@dataclass(frozen=True)
class SiblingTactic(Tactic):
    backend = "sibling"
    width: int = 64


class Sibling(TritonBackend):
    """Another backend for the weights that triton prepares, from 2 tokens on."""

    name = "sibling"
    tactic_type = SiblingTactic

    def can_implement(self, problem, tactic):
        if problem.b_layout != "triton/fragments":
            return Support(False, f"reads triton/fragments, not {problem.b_layout}")
        return Support(problem.m > 1, "takes 2 tokens or more")

    def tactics(self, problem):
        return [t for t in (SiblingTactic(64), SiblingTactic(128)) if self.can_implement(problem, t)]

    def default_tactic(self, problem):
        return SiblingTactic()

    def prepared_layout(self, problem):
        return "triton/fragments"


@pytest.fixture
def sibling(monkeypatch):
    """Considered before triton, as a backend for one GPU would be."""
    backends = {"sibling": f"{__name__}:Sibling", **registry._BUILTIN}
    monkeypatch.setattr(registry, "_BUILTIN", backends)
    yield
    registry._instances.pop("sibling", None)


BOTH = (entry(16, SiblingTactic(128), 30.0), entry(16, SiblingTactic(), 33.0), entry(16, TALL, 40.0),
        entry(256, SiblingTactic(), 150.0), entry(256, TALL, 120.0))  # fmt: skip


def test_one_prepared_layout_serves_several_backends(sibling):
    known = Measured(on_prepared(*BOTH))
    decision = choose(prepared(16), H200, known)
    assert (decision.backend, decision.tactic, decision.source) == ("sibling", SiblingTactic(128), "measured")
    assert f"not {TALL.brief}: 40.0 us measured by tuning: 33% slower" in str(decision)
    assert choose(prepared(256), H200, known).tactic == TALL
    assert [choose(prepared(m), H200, known).backend for m in (20, 200)] == ["sibling", "triton"], "interpolated"
    assert choose(prepared(256), H200, known, "sibling").tactic == SiblingTactic()
    assert choose(prepared(16), H200, known, tactic={"width": 64}).tactic == SiblingTactic(64)
    one = choose(prepared(1), H200, known)
    assert one.backend == "triton" and dict(one.rejected)["sibling"] == "takes 2 tokens or more"


def test_an_unmeasured_newcomer_does_not_displace_what_was_measured(sibling):
    known = Measured(on_prepared(entry(16, TALL, 40.0), entry(256, TALL, 120.0)))
    assert [choose(prepared(m), H200, known).backend for m in (16, 64, 256, 600)] == ["triton"] * 4
    assert choose(prepared(16), H200).backend == "sibling", "where nothing was measured the order decides"


def test_plain_weights_name_the_backend_that_wants_them_prepared(sibling):
    decision = choose(problem(16, H200), H200)
    assert decision.backend == "triton" and "sibling" in dict(decision.rejected)
    assert "backend 'sibling' needs or runs much faster with prepared weights" in decision.warning


def test_preparing_for_auto_gives_the_layout_that_both_read(sibling, monkeypatch):
    plain = dispatch.quantize_nvfp4(torch.ones(64, 512))
    monkeypatch.setattr(DeviceInfo, "of", staticmethod(lambda device: H200))
    for backend in ("auto", "sibling", "triton"):
        b = dispatch.prepare(plain, 2, backend)
        assert b.layout == "triton/fragments"
        assert torch.equal(registry.get("triton").unprepare(b).data, plain.data)


# The report is put together when it is read


def test_deciding_lists_and_reports_nothing(monkeypatch):
    problems = [(problem(m), B200) for m in (32, 40, 128, 300)] + [(prepared(m), H200) for m in (1, 5, 64, 600)]
    tables = {device: shipped(device) for device in (B200, H200)}
    first = [choose(p, device, tables[device]) for p, device in problems]

    def refuse(*arguments):
        raise AssertionError("not needed to decide")

    for backend in (CuteBackend, TritonBackend):
        monkeypatch.setattr(backend, "tactics", refuse)
    monkeypatch.setattr(choice, "_survey", refuse)
    assert [choose(p, device, tables[device]) for p, device in problems] == first


def test_the_report_holds_the_decision():
    cases = ((B200, shipped(B200)), (B200, NOTHING), (H200, NOTHING), (H200, shipped(H200)), (CPU, NOTHING))
    for device, known in cases:
        for m in (1, 33, 128, 300):
            for n, k, experts in ((7168, 65536, 256), (4096, 128 * 384, 128)):
                decision = choose(problem(m, device, n, k, experts), device, known)
                chosen = decision.candidates[0]
                assert (chosen.backend, chosen.tactic, chosen.rejected) == (decision.backend, decision.tactic, "")
                assert (chosen.estimate and chosen.estimate.seconds) == decision.seconds
                assert len({c.tactic for c in decision.candidates if c.tactic}) == sum(
                    c.tactic is not None for c in decision.candidates
                )
                assert str(decision).count("\n") < 25


def test_what_the_model_is_not_asked_about_would_not_win_by_much():
    """Only some tactics are predicted at a token count; all of them hardly do better."""
    known = shipped(B200)
    for m in (1, 3, 17, 100, 127, 300, 700):
        decision = choose(problem(m, n=4096, k=128 * 512, experts=128), B200, known)
        if decision.source == "model":
            assert decision.seconds <= 1.05 * min(c.seconds for c in decision.candidates)


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
    decision = choose(problem(16, H200), H200, known)
    assert decision.source == "model" and "times are carried over from NVIDIA H200" in str(decision)
    mine = Measured(known.shipped, table(entry(16, FAST, 6.0)), foreign="NVIDIA H200")
    decision = choose(problem(16, H200), H200, mine)
    assert decision.source == "measured" and "carried over" not in str(decision)


def test_the_report_is_short_and_complete():
    text = str(choose(problem(64), B200, shipped(B200)))
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


@pytest.mark.parametrize(
    "problems, device",
    [
        ([problem(m) for m in range(32, 160)], B200),
        ([prepared(m) for m in range(1, 160)], H200),
        ([problem(m, n=4096) for m in range(1, 128)], B200),
    ],
    ids=["rule and table", "table", "model"],
)
def test_new_decisions_take_microseconds(problems, device):
    """20 us where measured, 45 between, 80 by the model (2-core x86-64, 2026-11-23); ten times that on a loaded one.

    Until something has imported triton, asking whether it is installed takes 100 us more.
    """
    known = shipped(device)
    best = min(_seconds(lambda: [choose(p, device, known) for p in problems]) for _ in range(4))
    assert best / len(problems) < 800e-6


def test_cached_calls_take_less():
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
