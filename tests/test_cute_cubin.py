"""What the SM100 kernels use, read off cubins compiled here, against the budget's rules and the committed table.

The quick selection compiles three kernels, the ones with the most registers among them; `-m full` all, for all outputs.
"""
from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("cutlass")

from backends.cute import budget
from backends.cute.budget import CuteTactic
from backends.cute.cache import describe
from backends.cute.compiler import compile_kernel
from backends.cute.resources import Resources, find_tool, inspect
from backends.problem import OUT_DTYPES

TABLE = Path(__file__).parent.parent / "bench" / "results" / "cute_sm100a_kernels.json"
QUICK = (CuteTactic(256, 128, 256, 2, 1), CuteTactic(256, 256, 128, 2, 1), CuteTactic(128, 128, 256, 1, 1, skip=True))

try:
    find_tool("nvdisasm"), find_tool("cuobjdump")
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


def check_rules(tactic: CuteTactic, use: Resources) -> None:
    """The rules by which `check_tactic` accepts a kernel hold in its machine code."""
    counts = use.instructions
    assert use.stack_bytes == 0 and counts["spill_instructions"] == 0, "spills"
    assert use.registers <= 255
    assert use.smem_bytes + budget.SMEM_RESERVED_BYTES <= budget.SMEM_BYTES
    # One block-scaled FP4 MMA per 64 K elements, 2-CTA exactly for pair tiles, and no other kind.
    assert counts["mma"] == tactic.tile_k // 64 and counts["mma_not_block_scaled"] == 0
    assert counts["mma_2cta"] == (counts["mma"] if tactic.tile_m == 256 else 0)
    # A stage is released once per K tile, an accumulator committed once per expert.
    assert counts["commits"] == 2
    # A, B and their scale factors; multicast only in clusters.
    assert counts["tma_loads"] == 4
    # A along N, B along M, each with its scales; a pair's CTAs split B but share its scale factors.
    shared = 2 * (tactic.cluster_n > 1) + (1 + (tactic.tile_m == 128)) * (tactic.cluster_m > 1)
    assert counts["tma_multicast_loads"] == shared
    # Running sums in registers are updated two at a time; sub-tiles in tensor memory are written back.
    assert counts["packed_fma"] >= tactic.tile_n // 2
    assert (counts["tmem_stores"] > 0) == (tactic.tile_n == 256)


@pytest.mark.parametrize("tactic", QUICK, ids=describe)
def test_rules(tactic) -> None:
    check_rules(tactic, inspect(tactic))


@pytest.mark.full
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("tactic", budget.all_kernels(), ids=describe)
def test_rules_of_all(tactic, out_dtype) -> None:
    check_rules(tactic, inspect(tactic, out_dtype))


def test_committed_table() -> None:
    """The table covers every kernel, spills nowhere, and says what the compiler at hand still makes of one."""
    table = json.loads(TABLE.read_text())
    rows = {(row["kernel"], row["out_dtype"]): row for row in table["kernels"]}
    assert {kernel for kernel, out_dtype in rows if out_dtype == "bfloat16"} == set(map(describe, budget.all_kernels()))
    for kernel in budget.all_kernels():
        row = dict(rows[describe(kernel), "bfloat16"])
        counts = {name: row.pop(name) for name in list(row) if name not in Resources.__dataclass_fields__}
        check_rules(kernel, Resources(**row, instructions=counts))
        plan = budget.Budget.of(kernel)
        assert (row["ab_stages"], row["acc_stages"], row["smem_bytes"], row["tmem_columns"]) == (
            plan.ab_stages, plan.acc_stages, plan.smem_bytes, plan.tmem_columns
        )
    if table["dsl"] == metadata.version("nvidia-cutlass-dsl"):
        assert inspect(QUICK[0]).row() == rows[describe(QUICK[0]), "bfloat16"]


def test_arch_of_the_cubin(tmp_path) -> None:
    options = f"--keep-ptx --dump-dir={tmp_path}"
    compiled = compile_kernel(CuteTactic(128, 64, 128), "bfloat16", "sm_103a", options=options)
    text = compiled.artifacts.PTX
    assert ".target sm_103a" in (text.decode() if isinstance(text, bytes) else text)
