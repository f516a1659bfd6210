"""Made-up shoot-out results for the tests of tables, plots and comparisons."""
from __future__ import annotations

from typing import Any

from backends import Fc2Problem
from bench.clocks import Clocks
from bench.records import Absent, Results, Row
from bench.stats import Summary
from dispatch.hardware import GPUS, expected_active_experts, floor_seconds

ENVIRONMENT = {
    "device": "NVIDIA H200",
    "versions": {"torch": "2.11.0"},
    "date": "2026-11-23T00:00:00+00:00",
    "ceilings": {"read_bandwidth": 4.38e12, "mma_flops": 790e12, "source": "a test"},
    "ceilings_measured": {"read_bandwidth": 4.1e12, "bf16_flops": 780e12},
}


def row(
    m: int = 32,
    us: float = 100.0,
    backend: str = "torch",
    b_layout: str = "128x4",
    alpha: str = "topk:8",
    **changes: Any,
) -> Row:
    """A row of the DeepSeek-V3 shape on an H200; `changes` replace fields."""
    problem = Fc2Problem(m, 7168, 65536, 256, b_layout=b_layout, capability=(9, 0))
    active = 256.0 if alpha == "dense" else expected_active_experts(m, 256, 8)
    pairs = m * (256.0 if alpha == "dense" else 8.0)
    tactic = {"backend": backend, **changes.pop("fields", {})}
    shown = ",".join(f"{name}={value}" for name, value in tactic.items() if name != "backend")
    values = dict(
        problem=problem,
        alpha=alpha,
        active_experts=active,
        pairs=pairs,
        tactic=tactic,
        label=f"{backend}({shown})" + (" prepared" if "/" in b_layout else ""),
        timer="graph",
        l2="cold",
        warmup=10,
        iterations=50,
        time=Summary(us, 0.98 * us, 1.03 * us, 50),
        busy_us=None,
        error_over_bar=0.99,
        relative_error=1.6e-3,
        reproducible=True,
        floor_us=floor_seconds(problem, GPUS["H200"], active, pairs) * 1e6,
        dense_floor_us=floor_seconds(problem, GPUS["H200"]) * 1e6,
    )
    return Row(**{**values, **changes})


def shoot_out(ms: tuple[int, ...] = (1, 8, 32, 128, 384)) -> Results:
    """Two forms of alpha, three backends, plain and prepared weights, a row that misses the bar, a throttled one."""
    rows = []
    for alpha in ("topk:8", "dense"):
        for m in ms:
            base = row(m, alpha=alpha).floor_us
            for block_m in (8, 16, 32):
                us = 1.3 * base + 4 + abs(block_m - 16) + 0.02 * m
                rows.append(
                    row(
                        m,
                        us,
                        "triton",
                        "triton/interleaved",
                        alpha,
                        fields={"block_m": block_m, "split": 2},
                        auto=block_m == 16,
                    )
                )
            hot = Clocks((1400, 1980), 70, ("software power cap",)) if m == 384 else Clocks((1980, 1980), 55)
            rows.append(
                row(
                    m,
                    2.5 * base + 9,
                    "triton",
                    alpha=alpha,
                    fields={"block_m": 16, "split": 2},
                    auto=True,
                    clocks=hot,
                )
            )
            rows.append(row(m, 9000.0 + m, "torch", alpha=alpha, fields={"form": "experts"}, timer="events"))
            rows.append(
                row(m, 232.0 + 0.8 * m, "torch", alpha=alpha, fields={"form": "cached_weight"}, error_over_bar=50.0)
            )
    return Results(dict(ENVIRONMENT), rows, [Absent("cute", "needs an SM 10.0 or 10.3 GPU; this is SM 9.0")])
