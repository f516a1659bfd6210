"""The shape the kernel was designed for, emulated once in full: M = 128, N = 7168, K = 65536, E = 256.

`python -m tests.test_cute_target FILE` runs it and writes what it counted to a JSON file; minutes of one core.
"""
from __future__ import annotations

import json
import sys
import time

import pytest
import torch

pytest.importorskip("cutlass")

from backends import Nvfp4Tensor
from backends.cute.budget import CuteTactic
from tests import cute_emulation as emulation
from tests.reference import assert_meets_bar, half_ulp, reference

M, N, INTERMEDIATE, EXPERTS = 128, 7168, 256, 256
TACTIC = CuteTactic(256, 128, 256, 2, 1)
_ROWS = 512  # of B at a time in the reference, which is float64


def emulate_target() -> dict:
    problem = emulation.problem_of(M, N, INTERMEDIATE, EXPERTS)
    a, b = emulation.make_operands(M, N, problem.k, seed=2026)
    alpha = emulation.make_alpha("top_k", M, EXPERTS, torch.Generator().manual_seed(1))
    out = torch.full((M, N), float("nan"), dtype=problem.out_dtype)
    begin = time.perf_counter()
    report = emulation.launch(TACTIC, problem, a, b, alpha, out)
    seconds = time.perf_counter() - begin
    worst = 0.0
    plain = b.to_layout("linear")
    for row in range(0, N, _ROWS):
        rows = slice(row, row + _ROWS)
        part = Nvfp4Tensor(plain.data[rows], plain.scale.view(N, -1)[rows].contiguous(), "linear")
        exact, magnitude = reference(a, part, alpha)
        got = out[:, rows]
        assert_meets_bar(got, exact, magnitude)
        allowed = half_ulp(torch.maximum(exact.abs(), got.double().abs()), got.dtype) + 2.0**-18 * magnitude
        worst = max(worst, float(((got.double() - exact).abs() / allowed).nan_to_num().max()))
    launch = report.launches[0]
    return {
        "what": "emulated on a CPU; no time of a GPU can be read from it",
        "problem": problem.to_json(),
        "tactic": TACTIC.to_json(),
        "alpha": "top_k",
        "emulation_seconds": round(seconds, 1),
        "warp_instructions": report.instructions,
        "grid": launch.grid,
        "block": launch.block,
        "cluster": launch.cluster,
        "error_over_bar": worst,
        "counters": dict(sorted(launch.counters.items())),
        "high_water": launch.high_water,
        "bytes_loaded_but_by_tma": launch.loads,
    }


def check_counts(record: dict) -> None:
    tiles = N // TACTIC.tile_n
    counters = record["counters"]
    assert tuple(record["grid"]) == (2, 1, tiles) and tuple(record["block"]) == (192, 1, 1)
    # One commit per expert for the epilogue and one per K tile to free its stage, by the pair's leader alone.
    assert counters["tcgen05.commit"] == tiles * (EXPERTS + EXPERTS)
    # alpha of every row and expert once per column tile, four bytes each; the pair's second CTA has no rows.
    assert record["bytes_loaded_but_by_tma"] == {"alpha": tiles * EXPERTS * M * 4}
    # Each CTA of a pair loads its half of B: every byte of B is read once.
    assert counters["TMA bytes from b"] == N * EXPERTS * INTERMEDIATE // 2
    assert counters["TMA bytes from sfb"] == N * EXPERTS * INTERMEDIATE // 16


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_target_shape() -> None:
    check_counts(emulate_target())


if __name__ == "__main__":
    result = emulate_target()
    check_counts(result)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
