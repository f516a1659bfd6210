"""The design's counts, read from the emulator's report: what the five changes to the first published kernel are for."""
from __future__ import annotations

import pytest

pytest.importorskip("cutlass")

from backends.cute.budget import Budget, CuteTactic
from tests import cute_emulation as emulation

EXPERTS, INTERMEDIATE = 8, 256
K = EXPERTS * INTERMEDIATE


def report_of(tactic: CuteTactic, m: int = 256, n: int = 128):
    return emulation.run(tactic, m, n, INTERMEDIATE, EXPERTS)[1]


@pytest.mark.parametrize("tile_k", [128, 256])
def test_one_commit_per_expert(tile_k) -> None:
    # At K = 65536 and tile_k 128: 256 round trips through tensor memory per output tile instead of 512.
    report = report_of(CuteTactic(128, 128, tile_k, 1, 1), m=128)
    k_tiles = K // tile_k
    assert report.counter("tcgen05.commit") - k_tiles == EXPERTS
    # Every accumulator is read once: 8 sub-tiles of 16 columns by 4 warps.
    assert report.counter("TMEM loads") == EXPERTS * 8 * 4
    assert report.counter("MMA instructions") == K // 64


def test_no_alpha_pipeline() -> None:
    tactic = CuteTactic(128, 128, 256, 1, 1)
    report = report_of(tactic, m=128)
    launch = report.launches[0]
    assert launch.block == (192, 1, 1)
    # alpha once per row and expert, four bytes each, from global memory; nothing else is loaded but by TMA.
    assert launch.loads == {"alpha": 128 * EXPERTS * 4}
    # Shared memory holds the stages, the output staging, two barriers a stage and two words: nothing for alpha.
    plan = Budget.of(tactic)
    words = 2 * 8 * (plan.ab_stages + plan.acc_stages) + 2 * 4
    assert plan.smem_bytes + words <= launch.dynamic_smem < plan.smem_bytes + words + 1024


@pytest.mark.parametrize("m", [1, 33, 128, 129, 200])
def test_alpha_of_rows_that_exist_alone(m) -> None:
    # A pair's second CTA may have no rows at all: its threads load nothing.
    report = report_of(CuteTactic(256, 128, 256, 2, 1), m=m)
    assert report.launches[0].loads == {"alpha": m * EXPERTS * 4}


def test_multicast_halves_the_loads_of_b() -> None:
    def loaded(tactic: CuteTactic) -> dict[str, int]:
        report = report_of(tactic)
        return {name: report.counter(f"TMA bytes from {name}") for name in ("a", "b", "sfa", "sfb")}

    single = loaded(CuteTactic(128, 128, 256, 1, 1))
    assert single == {"a": 256 * K // 2, "b": 2 * 128 * K // 2, "sfa": 256 * K // 16, "sfb": 2 * 128 * K // 16}
    for shared in (CuteTactic(128, 128, 256, 2, 1), CuteTactic(256, 128, 256, 2, 1)):
        half = single | {"b": single["b"] // 2, "sfb": single["sfb"] // 2}
        assert loaded(shared) == half


def test_multicast_halves_the_loads_of_a() -> None:
    single = report_of(CuteTactic(128, 64, 256, 1, 1), m=128)
    shared = report_of(CuteTactic(128, 64, 256, 1, 2), m=128)
    for name in ("a", "sfa"):
        counter = f"TMA bytes from {name}"
        assert shared.counter(counter) == single.counter(counter) // 2
    # The 128 scale rows of B cover two N tiles of 64, and each CTA loads them.
    assert shared.counter("TMA bytes from sfb") == single.counter("TMA bytes from sfb")


def test_tensor_memory_columns() -> None:
    for tactic, columns in ((CuteTactic(128, 64, 256, 1, 1), 256), (CuteTactic(128, 128, 256, 1, 1), 512)):
        assert report_of(tactic, m=128).launches[0].high_water["TMEM columns"] == columns
