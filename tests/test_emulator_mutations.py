"""Every check of the emulator can fail: a correct 2-CTA GEMM with one mistake is reported under every
schedule.

The sample kernel is `samples.gemm_2cta`; each case edits lines of its PTX. Schedules meet a mistake at
different points, so a case lists the alternatives of what may be reported.
"""

from __future__ import annotations

import numpy as np
import pytest

from .emulator import Deadlock, Fault, Race
from .emulator.samples import OUT_OFFSET, STAGE_BYTES, Edit, GemmProblem, apply, gemm_2cta

SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 1), ("random", 2)]
PTX = gemm_2cta()
IDESC = 1 << 7 | 1 << 10 | 8 << 17 | 16 << 24
PAIR_BYTES = str(2 * STAGE_BYTES)


@pytest.fixture(scope="module")
def problem() -> GemmProblem:
    return GemmProblem()


@pytest.mark.parametrize("schedule,seed", SCHEDULES)
def test_unmodified_kernel_is_clean_and_right(problem: GemmProblem, schedule: str, seed: int) -> None:
    report = problem.run(PTX, schedule=schedule, seed=seed)
    np.testing.assert_allclose(
        problem.out.numpy(), problem.expected, rtol=0, atol=1e-6 * np.abs(problem.expected).max()
    )
    assert report.counters["MMA instructions"] == 4 * 8
    assert report.counters["TMA load bytes"] == 8 * 2 * STAGE_BYTES
    assert report.high_water["TMEM columns"] == 256


def test_results_are_bitwise_equal_across_seeds() -> None:
    problem = GemmProblem(clusters=3, groups=3, tiles=1)
    results = []
    for seed in range(4):
        problem.run(PTX, schedule="random", seed=seed, num_sms=6)
        results.append(problem.out.clone())
    assert all((r == results[0]).all() for r in results)


MUTATIONS = {
    # waits and phases
    "the producer does not wait for an empty stage": (
        [Edit("wait_empty")],
        r"two bulk copies of one phase|arrivals but only",
    ),
    "the MMA does not wait for a full stage": (
        [Edit("wait_full")],
        r"nothing has written|not ordered after its write",
    ),
    "the full phase starts swapped": (
        [Edit("mma_phase", "%phase, 0", "%phase, 1")],
        r"nothing has written|not ordered after its write",
    ),
    "the consumer never flips the full phase": (
        [Edit("full_phase")],
        r"deadlock|bulk copy into shared memory",
    ),
    "the producer never flips the empty phase": (
        [Edit("load_phase")],
        r"two bulk copies of one phase|bulk copy into|arrivals but only",
    ),
    "the epilogue does not wait for the accumulator": (
        [Edit("wait_acc_full")],
        r"tcgen05.ld of TMEM columns",
    ),
    "the accumulator is overwritten before it is read": (
        [Edit("wait_acc_empty")],
        r"race: (tensor-core write|tcgen05.ld)",
    ),
    "the epilogue never flips its phase": ([Edit("acc_phase")], r"deadlock|tcgen05.ld of TMEM columns"),
    "the epilogue waits for one group too many": ([Edit("group_count", "setp.lt", "setp.le")], r"deadlock"),
    # arrivals and counts
    "the epilogue does not release the accumulator": ([Edit("release")], r"deadlock"),
    "the release goes to the CTA's own barrier": ([Edit("release_leader", ", 0;", ", %rank;")], r"deadlock"),
    "the accumulator barrier expects half of the arrivals": (
        [Edit("init_acc_empty", ", 8;", ", 4;")],
        r"deadlock|tensor-core write",
    ),
    "the accumulator barrier expects twice the arrivals": (
        [Edit("init_acc_empty", ", 8;", ", 16;")],
        r"deadlock",
    ),
    "the empty barrier expects two arrivals": ([Edit("init_empty", ", 1;", ", 2;")], r"deadlock"),
    "both CTAs expect the bytes": ([Edit("lead_expect")], r"arrivals but only 0 of 1 are pending"),
    # transactions
    "half of the bytes are expected": (
        [Edit("expect", PAIR_BYTES, str(STAGE_BYTES))],
        r"transaction-count mismatch|not ordered after its write|deadlock",
    ),
    "twice the bytes are expected": ([Edit("expect", PAIR_BYTES, str(4 * STAGE_BYTES))], r"deadlock"),
    "16 bytes too many are expected": ([Edit("expect", PAIR_BYTES, str(2 * STAGE_BYTES + 16))], r"deadlock"),
    "the peer CTA keeps its own barrier address": ([Edit("peer_bit")], r"deadlock"),
    "every lane issues the loads": (
        [Edit("load_elect")],
        r"two bulk copies|arrivals but only|transaction count",
    ),
    # commits
    "the accumulator is not committed": ([Edit("commit_acc")], r"deadlock"),
    "the stage is not released": ([Edit("commit_empty")], r"deadlock"),
    "the stage is released in one CTA only": ([Edit("commit_empty", ".multicast::cluster", "")], r"deadlock"),
    "both CTAs issue the MMA": ([Edit("mma_leader")], r"deadlock|race|arrivals but only"),
    # set-up and tear-down of the cluster
    "no wait for the cluster after mbarrier.init": (
        [Edit("init_wait")],
        r"before its mbarrier.init .* is visible|no mbarrier",
    ),
    "no fence after mbarrier.init": ([Edit("init_fence")], r"before its mbarrier.init .* is visible"),
    "a CTA exits while its peer still signals it": (
        [Edit("last_arrive"), Edit("last_wait")],
        r"may exit while|has exited",
    ),
    # tensor memory
    "TMEM is never freed": ([Edit("dealloc")], r"exits with TMEM still allocated: 256 columns"),
    "half of TMEM is freed": ([Edit("dealloc", "256", "128")], r"which is not an allocation"),
    "too few columns are allocated": (
        [Edit("alloc", "256", "128"), Edit("dealloc", "256", "128")],
        r"reaches outside the live allocations",
    ),
    "the TMEM address is read before it is written": (
        [Edit("alloc_barrier")],
        r"nothing has written|not ordered after",
    ),
    "the first MMA accumulates": (
        [Edit("first", "0", "1")],
        r"accumulates onto TMEM columns .* nothing has written",
    ),
    "the accumulator is released before the load arrived": ([Edit("wait_ld")], r"may still be in flight"),
    "every group uses the same accumulator stage": (
        [Edit("acc_slot", "%aslot", "0")],
        r"tcgen05.ld of TMEM|tensor-core write",
    ),
    "a scale-factor copy is missing": (
        [Edit("cp_sfb2")],
        r"SFB reads TMEM columns 152..154 .* nothing has written",
    ),
    "scale factors are read at the wrong column": (
        [Edit("sfb3", "156", "300")],
        r"SFB reads TMEM columns 300",
    ),
    "a warp reads another quarter of TMEM": (
        [Edit("quarter", ", 21", ", 20")],
        r"is not aligned|it may only reach lanes",
    ),
    "the instruction descriptor says N = 128": (
        [Edit("idesc", str(IDESC), str(IDESC + (8 << 17)))],
        r"TMEM columns|nothing has written|deadlock",
    ),
    # shared memory
    "every MMA reads stage 0": ([Edit("mma_stage", "%slot", "0")], r"bulk copy into shared memory"),
    "stages overlap": ([Edit("load_stage", str(STAGE_BYTES), "16384")], r"bulk copy into shared memory"),
    "a load is misaligned": ([Edit("load_base", "1024", "1040")], r"not 128-byte aligned"),
    "the store is not fenced": ([Edit("proxy_fence")], r"no fence.proxy.async"),
    "the store does not wait for the other warps": ([Edit("store_barrier")], r"bulk store read"),
    "the store barrier waits for five warps": ([Edit("store_barrier", "128", "160")], r"deadlock"),
    "the store barrier waits for three warps": (
        [Edit("store_barrier", "128", "96")],
        r"bulk store read|deadlock",
    ),
    "the store is not waited for": ([Edit("store_wait")], r"exits without waiting for its bulk stores"),
    "the store reads past shared memory": (
        [Edit("store_source", str(OUT_OFFSET), str(OUT_OFFSET + 128))],
        r"out of bounds",
    ),
}


@pytest.mark.parametrize("schedule,seed", SCHEDULES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(problem: GemmProblem, name: str, schedule: str, seed: int) -> None:
    edits, pattern = MUTATIONS[name]
    with pytest.raises(Fault, match=pattern) as caught:
        problem.run(apply(PTX, *edits), schedule=schedule, seed=seed)
    message = str(caught.value)
    assert f"schedule={schedule!r}, seed={seed}" in message and "PTX line" in message


def test_deadlock_report_names_who_waits_for_what(problem: GemmProblem) -> None:
    with pytest.raises(Deadlock) as caught:
        problem.run(apply(PTX, Edit("release")))
    message = str(caught.value)
    assert "warp 4, PTX line" in message and "mbarrier at shared offset 0x440 of CTA 0, parity 0" in message
    assert "8 of 8 arrivals" in message


def test_race_names_both_sides(problem: GemmProblem) -> None:
    with pytest.raises(Race) as caught:
        problem.run(apply(PTX, Edit("proxy_fence")))
    assert "bulk store read of shared memory" in str(
        caught.value
    ) and "by warp 0 of CTA rank 0 (PTX line" in str(caught.value)
