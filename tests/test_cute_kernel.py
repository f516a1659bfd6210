"""The SM100 kernel, executed on the emulator with every race check on and held to the elementwise float64 bar.

The quick selection touches every tile, cluster, K tile, output type and division of the work once; `-m full` runs the
grid of each against all token counts and the other sizes in rotation.
"""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("cutlass")

from backends.cute import budget
from backends.cute.budget import STREAM_K, CuteTactic
from tests import cute_emulation as emulation
from tests.reference import ALPHA_KINDS

TACTICS = [kernel for kernel in budget.all_kernels() if not kernel.skip]
TOKENS = (1, 8, 127, 128, 129, 160, 200, 255, 256, 257, 384)
# 8 * 125 and 8 * 65: rows of a multiple of 16 bytes that end inside a tile, and inside a swizzle row.
HIDDEN = (64, 192, 256, 520, 1000)
# (intermediate, experts); 128 where tile_k is 128. K stays near 4096: time, not the kernel, forbids all pairs.
SIZES = ((256, 1), (512, 3), (256, 8), (1024, 1), (256, 17), (512, 4), (1024, 3), (128, 8))
SPLITS = (1, 2, 4, 3, STREAM_K)
OUT_DTYPES = ("bfloat16", "float16", "float32")


def name(tactic: CuteTactic) -> str:
    return f"{tactic.tile_m}x{tactic.tile_n}x{tactic.tile_k}@{tactic.cluster_m}x{tactic.cluster_n}s{tactic.split_k}"


@pytest.mark.parametrize(
    ("tactic", "m", "n", "intermediate", "experts", "alpha_kind", "out_dtype"),
    [
        (CuteTactic(128, 64, 256, 1, 1), 200, 192, 512, 3, "dense", "bfloat16"),
        (CuteTactic(128, 64, 128, 1, 4, split_k=2), 129, 520, 128, 3, "top_k", "float32"),
        (CuteTactic(128, 128, 256, 1, 1, split_k=STREAM_K), 257, 520, 256, 4, "dense", "bfloat16"),
        (CuteTactic(128, 128, 128, 2, 2, split_k=3), 255, 192, 256, 4, "one_hot", "float16"),
        (CuteTactic(128, 128, 256, 1, 2, split_k=2), 8, 1000, 256, 8, "top_k", "bfloat16"),
        (CuteTactic(128, 256, 256, 1, 1), 127, 520, 1024, 3, "dense", "bfloat16"),
        (CuteTactic(128, 256, 128, 2, 1, split_k=STREAM_K), 384, 520, 128, 3, "ragged", "float32"),
        (CuteTactic(256, 128, 256, 2, 1), 128, 256, 256, 17, "dense", "bfloat16"),
        (CuteTactic(256, 128, 128, 2, 2), 257, 520, 256, 1, "dense", "float16"),
        (CuteTactic(256, 128, 256, 2, 1, split_k=STREAM_K), 160, 520, 256, 8, "dense", "bfloat16"),
        (CuteTactic(256, 256, 256, 2, 1), 1, 520, 256, 3, "dense", "float32"),
        (CuteTactic(256, 256, 128, 2, 2, split_k=2), 256, 1000, 128, 4, "zero", "bfloat16"),
    ],
    ids=lambda value: name(value) if isinstance(value, CuteTactic) else None,
)
def test_kernel(tactic, m, n, intermediate, experts, alpha_kind, out_dtype) -> None:
    emulation.run(
        tactic, m, n, intermediate, experts, alpha_kind=alpha_kind, out_dtype=out_dtype, schedule="lazy", sms=16
    )


@pytest.mark.parametrize(
    ("tactic", "m", "experts", "alpha_kind"),
    [
        (CuteTactic(128, 128, 256, 1, 1, STREAM_K), 8, 40, "top_k"),
        (CuteTactic(256, 128, 128, 2, 1, 2), 160, 8, "one_hot"),
        (CuteTactic(128, 64, 256, 2, 2, STREAM_K), 1, 8, "zero"),
    ],
    ids=str,
)
def test_skip(tactic, m, experts, alpha_kind) -> None:
    check_skip(replace(tactic, skip=True), m, experts, alpha_kind)


@pytest.mark.full
@pytest.mark.parametrize("tactic", [k for k in budget.all_kernels() if k.skip], ids=name)
def test_skip_grid(tactic) -> None:
    for i, m in enumerate((8, 128 * tactic.cluster_m), start=budget.all_kernels().index(tactic)):
        split_k = (1, STREAM_K, 3)[i % 3]
        check_skip(replace(tactic, split_k=split_k), m, (8, 17, 33)[i % 3], ALPHA_KINDS[i % len(ALPHA_KINDS)])


def check_skip(tactic: CuteTactic, m: int, experts: int, alpha_kind: str) -> None:
    """The kernel computes the reference, and loads of B only the experts that some row selects."""
    _, report = emulation.run(tactic, m, 512, 256, experts, alpha_kind=alpha_kind, schedule="random", sms=12)
    alpha = emulation.make_alpha(alpha_kind, m, experts, torch.Generator().manual_seed(1))
    selected = max(1, int((alpha != 0).any(dim=0).sum()))
    assert report.counter("TMA bytes from b") == 512 * selected * 256 // 2


@pytest.mark.full
@pytest.mark.parametrize("tactic", TACTICS, ids=name)
def test_kernel_grid(tactic) -> None:
    index = TACTICS.index(tactic)
    for i, m in enumerate(TOKENS, start=index):
        intermediate, experts = SIZES[i % len(SIZES)]
        intermediate = max(intermediate, tactic.tile_k)
        split_k = min(SPLITS[i // 2 % len(SPLITS)], experts)
        emulation.run(
            replace(tactic, split_k=split_k), m, HIDDEN[(i + index) % len(HIDDEN)], intermediate, experts,
            alpha_kind=ALPHA_KINDS[i % len(ALPHA_KINDS)], out_dtype=OUT_DTYPES[index % len(OUT_DTYPES)], seed=i,
            schedule=("eager", "lazy", "random")[i // 3 % 3], sms=(148, 12)[i // 5 % 2],
        )


def equal_under_schedules(tactic: CuteTactic, seeds: range) -> None:
    problem = emulation.problem_of(200, 264, 256, 4)
    a, b = emulation.make_operands(problem.m, problem.n, problem.k, 0)
    alpha = emulation.make_alpha("dense", problem.m, problem.experts, torch.Generator().manual_seed(1))
    outs = []
    for seed in seeds:
        out = torch.full((problem.m, problem.n), float("nan"), dtype=problem.out_dtype)
        emulation.launch(tactic, problem, a, b, alpha, out, schedule="random", seed=seed, sms=16, concurrent=4)
        outs.append(out.view(torch.int16))
    emulation.assert_meets_bar(outs[0].view(problem.out_dtype), *emulation.reference(a, b, alpha))
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_schedules_do_not_change_bits() -> None:
    equal_under_schedules(CuteTactic(256, 128, 256, 2, 1, split_k=STREAM_K), range(3))


@pytest.mark.full
@pytest.mark.parametrize(
    "tactic",
    # Stream-K: whole and divided tiles, the reduction included.
    [replace(k, split_k=STREAM_K) for k in TACTICS if k.tile_k == 256 and k.cluster_n < 4],
    ids=name,
)
def test_ten_schedules_do_not_change_bits(tactic) -> None:
    equal_under_schedules(tactic, range(10))


def test_pdl_computes_the_same() -> None:
    plain, _ = emulation.run(CuteTactic(), 8, 64, 256, 2)
    dependent, _ = emulation.run(CuteTactic(pdl=True), 8, 64, 256, 2)
    assert torch.equal(plain, dependent)


def test_stream_k_uses_every_sm() -> None:
    # Two tiles of eight experts on five SMs: parts of three or four experts, three of which cross no tile border.
    _, report = emulation.run(CuteTactic(split_k=STREAM_K), 8, 256, 256, 8, sms=5)
    assert report.launches[0].grid == (1, 1, 5)
    assert report.counter("tcgen05.commit") == 16 + 16  # one per expert, and one per K tile to free its stage
