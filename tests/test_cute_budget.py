"""The SM100 kernel's budgets by value, and each rejection by its own sentence. Pure: neither the DSL nor a GPU."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from backends import Fc2Problem
from backends.cute import budget
from backends.cute.budget import STREAM_K, Budget, CuteTactic, Division

TARGET = Fc2Problem(128, 7168, 65536, 256, capability=(10, 0))


@pytest.mark.parametrize(
    ("tile", "stage_bytes", "ab_stages"),
    [
        ((128, 64), 16384 + 8192 + 2048 + 2048, 7),
        ((128, 128), 16384 + 16384 + 2048 + 2048, 5),
        ((128, 256), 16384 + 32768 + 2048 + 4096, 3),
        ((256, 128), 16384 + 8192 + 2048 + 2048, 7),
        ((256, 256), 16384 + 16384 + 2048 + 4096, 5),
    ],
)
def test_shared_memory(tile, stage_bytes, ab_stages) -> None:
    full = Budget.of(CuteTactic(*tile, tile_k=256))
    assert (full.stage_bytes, full.ab_stages) == (stage_bytes, ab_stages)
    half = Budget.of(CuteTactic(*tile, tile_k=128))
    assert half.stage_bytes == stage_bytes // 2
    for b in (full, half):
        assert b.smem_bytes + budget.SMEM_RESERVED_BYTES <= budget.SMEM_BYTES
        assert b.smem_bytes + budget.SMEM_RESERVED_BYTES + b.stage_bytes > budget.SMEM_BYTES


@pytest.mark.parametrize(
    ("tile", "acc_stages", "accumulator_and_scales", "columns"),
    [
        ((128, 64), 3, 224, 224),
        ((128, 128), 3, 416, 416),
        ((256, 128), 3, 416, 416),
        # 192 of a row's 256 running sums are kept beside them.
        ((128, 256), 1, 304, 496),
        ((256, 256), 1, 304, 496),
    ],
)
def test_tensor_memory(tile, acc_stages, accumulator_and_scales, columns) -> None:
    b = Budget.of(CuteTactic(*tile, tile_k=256))
    assert (b.acc_stages, b.sum_column, b.tmem_columns) == (acc_stages, accumulator_and_scales, columns)
    assert b.sfa_column == acc_stages * tile[1] and b.sfb_column == b.sfa_column + 16
    assert b.tmem_allocation == (256 if columns <= 256 else 512)


def test_kernels() -> None:
    # Two K tiles of: three CTA tiles with five clusters each, two pair tiles with the two clusters of even M.
    kernels = budget.all_kernels()
    assert len(kernels) == len(set(kernels)) == 2 * 2 * (3 * 5 + 2 * 2)
    assert len(budget.tactics(TARGET)) == 4 * 38 + 2 * 38
    assert not any(t.skip for t in budget.tactics(replace(TARGET, m=257)))
    assert all(t.tile_k == 128 for t in budget.tactics(replace(TARGET, k=384 * 256)))


def test_defaults() -> None:
    assert budget.default_tactic(replace(TARGET, m=32)) == CuteTactic(128, 128, 256, 1, 1, STREAM_K, skip=True)
    assert budget.default_tactic(replace(TARGET, m=33)) == CuteTactic(128, 128, 256, 1, 2, STREAM_K)
    assert budget.default_tactic(TARGET) == CuteTactic(128, 128, 256, 1, 2, STREAM_K)
    assert budget.default_tactic(replace(TARGET, m=129)) == CuteTactic(256, 128, 256, 2, 1, STREAM_K)
    assert budget.default_tactic(replace(TARGET, m=1 << 21)) == CuteTactic(256, 128, 256, 2, 1, 1)
    assert budget.default_tactic(replace(TARGET, k=384 * 256)).tile_k == 128
    for m in (1, 32, 33, 128, 129, 384, 1 << 21):
        for experts in (1, 256, 1024):
            problem = replace(TARGET, m=m, experts=experts, k=experts * 256)
            assert budget.check_problem(problem, budget.default_tactic(problem)).reason == ""


def test_skip_lists_experts_in_shared_memory() -> None:
    for kernel in budget.all_kernels():
        listed = 4 * (budget.MAX_SKIP_EXPERTS + 1) if kernel.skip else 0
        b = Budget.of(kernel)
        barriers = 2 * 8 * (b.ab_stages + b.acc_stages) + 8
        assert b.smem_bytes + barriers + listed <= budget.SMEM_BYTES
        assert b.ab_stages >= 3


@pytest.mark.parametrize(
    ("problem", "tactic", "reason"),
    [
        ({}, {"tile_n": 96}, "tile_m x tile_n is 128x96"),
        ({}, {"tile_m": 64}, "tile_m x tile_n is 64x128"),
        ({}, {"tile_k": 64}, "tile_k is 64"),
        ({}, {"cluster_n": 3}, "cluster_m x cluster_n is 1x3"),
        ({}, {"cluster_m": 4}, "cluster_m x cluster_n is 4x1"),
        ({}, {"tile_m": 256}, "tile_m 256 is shared by two CTAs"),
        ({}, {"split_k": -1}, "split_k is -1"),
        ({}, {"split_k": 257}, "split_k 257 exceeds the 256 experts"),
        ({"m": 1 << 21}, {"split_k": STREAM_K}, "2^22 pairs"),
        ({"m": 129}, {"skip": True}, "takes m up to 128 with cluster_m 1; m is 129"),
        (
            {"experts": 1024, "k": 1024 * 128},
            {"skip": True, "tile_k": 128},
            "skip lists up to 512 experts; this problem has 1024",
        ),
        ({"capability": (9, 0)}, {}, "this device is SM 9.0"),
        ({"capability": (12, 0)}, {}, "this device is SM 12.0"),
        ({"device_type": "cpu", "capability": None}, {}, "this device is cpu"),
        ({"a_layout": "linear"}, {}, "a.to_layout('128x4')"),
        ({"b_layout": "linear"}, {}, "b.to_layout('128x4')"),
        ({"b_layout": "triton/tiled"}, {}, "b has 'triton/tiled'"),
        ({"m": 0}, {}, "at least 1"),
        ({"experts": 3}, {}, "not a multiple of the 3 experts"),
        ({"experts": 512}, {"tile_k": 256}, "intermediate size 128 is not a multiple of tile_k 256"),
        ({"n": 7172}, {}, "a row of out is 7172 x bfloat16 = 14344 bytes"),
        ({"n": 7170, "out_dtype": torch.float32}, {}, "a row of out is 7170 x float32 = 28680 bytes"),
    ],
)
def test_reasons(problem, tactic, reason) -> None:
    support = budget.check_problem(replace(TARGET, **problem), replace(CuteTactic(), **tactic))
    assert not support and reason in support.reason


def test_what_looks_odd_but_is_fine() -> None:
    for problem, tactic in (
        ({"n": 8}, {}),
        ({"n": 4, "out_dtype": torch.float32}, {}),
        ({"capability": (10, 3)}, {}),
        ({"experts": 512}, {"tile_k": 128}),
        ({"m": 100_000}, {}),
        ({"m": 1}, {"tile_m": 256, "cluster_m": 2}),
        ({}, {"split_k": 256}),
        ({"experts": 257, "k": 257 * 256}, {"split_k": 4}),
    ):
        assert budget.check_problem(replace(TARGET, **problem), replace(CuteTactic(), **tactic)).reason == ""


def parts_of(division: Division, tiles: int, experts: int) -> list[tuple[int, int]]:
    """The unit ranges as `Schedule` computes them."""
    units = division.group * experts
    parts = tiles // division.group * division.splits

    def begin(part: int) -> int:
        return part // division.splits * units + part % division.splits * units // division.splits

    return [(begin(p), begin(p + 1)) for p in range(parts)]


@pytest.mark.parametrize("split_k", [1, 2, 3, 4, 8, STREAM_K])
@pytest.mark.parametrize(("m", "n", "experts"), [(1, 64, 8), (128, 7168, 256), (384, 1000, 17), (200, 520, 8)])
@pytest.mark.parametrize("clusters", [1, 5, 37, 148])
def test_division_covers_every_expert_once(split_k, m, n, experts, clusters) -> None:
    problem = Fc2Problem(m, n, experts * 256, experts, capability=(10, 0))
    tactic = CuteTactic(split_k=split_k)
    tiles = budget.cluster_tiles(problem, tactic)
    division = Division.of(problem, tactic, clusters)
    ranges = parts_of(division, tiles, experts)
    assert ranges[0][0] == 0 and ranges[-1][1] == tiles * experts
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    lengths = {end - begin for begin, end in ranges}
    if split_k == STREAM_K:
        assert len(ranges) <= clusters and max(lengths) - min(lengths) <= 1
    else:
        assert min(lengths) >= experts // split_k and max(lengths) <= -(-experts // split_k)
    touching = [0] * tiles
    for begin, end in ranges:
        assert end > begin
        for tile in range(begin // experts, -(-end // experts)):
            touching[tile] += 1
    assert max(touching) <= division.slots


def test_stream_k_at_the_target_shape() -> None:
    # 56 tiles of 256 experts on 148 SMs: 14336 units, 96 or 97 each.
    lengths = [end - begin for begin, end in parts_of(Division.of(TARGET, CuteTactic(split_k=0), 148), 56, 256)]
    assert len(lengths) == 148 and set(lengths) == {96, 97}


def test_workspace() -> None:
    assert Division.of(TARGET, CuteTactic(), 148).workspace_floats(TARGET, CuteTactic()) == 0
    split = CuteTactic(cluster_n=2, split_k=2)
    assert budget.output_tiles(TARGET, split) == 56
    assert Division.of(TARGET, split, 74).workspace_floats(TARGET, split) == 56 * 2 * 128 * 128


def test_importing_the_budget_leaves_the_dsl_alone() -> None:
    code = "import sys, backends.cute.budget, backends.cute.backend; sys.exit('cutlass' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
