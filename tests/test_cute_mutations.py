"""The emulated tests can fail: each of these faults, put into the kernel's text, is reported."""
from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cutlass")

from backends.cute import compiler, kernel
from backends.cute.budget import STREAM_K, CuteTactic
from tests import cute_emulation as emulation
from tests.emulator import EmulatorError

SPLIT = CuteTactic(128, 128, 256, 1, 1, split_k=2)
PAIR = CuteTactic(256, 128, 256, 2, 1)
RELEASE_EARLY = (
    "                        cute.arch.fence_view_async_tmem_load()\n"
    "                        if cutlass.const_expr(j + 1 < self.subtiles):",
    "                        if cutlass.const_expr(j + 1 < self.subtiles):",
)
PUBLISHED_BY = {"cute.arch.fence_acq_rel_gpu()\n": "pass\n", 'sem="acq_rel", scope="gpu"': 'sem="relaxed", scope="gpu"'}
MUTATIONS = {
    "alpha loaded for rows that do not exist": (PAIR, "if has_row and i + 1 < last:", "if i + 1 < last:"),
    "accumulator handed back before its last read": (PAIR, *RELEASE_EARLY),
    "one commit per K tile": (
        PAIR, "                        full.advance()\n                    acc.producer_commit(empty)",
        "                        full.advance()\n                        acc.producer_commit(empty)",
    ),
    "no wait for a free accumulator": (PAIR, "acc.producer_acquire(empty)", "pass"),
    "half of a pair's bytes expected": (PAIR, "self.budget.stage_bytes * self.pair_size", "self.budget.stage_bytes"),
    "accumulator never cleared": (PAIR, "tcgen05.Field.ACCUMULATE, k_tile != 0", "tcgen05.Field.ACCUMULATE, True"),
    "one expert short": (PAIR, "self._begin(part + 1) - tile * self.count, self.count)",
                         "self._begin(part + 1) - tile * self.count, self.count - 1)"),
    "no offset of odd tiles' scale factors": (CuteTactic(128, 64, 256, 1, 1), "tile_column % 2 * 2", "0"),
    "staging reused before it is stored": (
        CuteTactic(128, 128, 256, 1, 1),
        "            with cute.arch.elect_one():\n                cute.arch.cp_async_bulk_wait_group(0, read=True)\n"
        "            cute.arch.sync_warp()\n", "            pass\n",
    ),
    "staging not made visible to TMA": (SPLIT, 'cute.arch.fence_proxy("async.shared", space="cta")', "pass"),
    "left before the stores have read": (
        SPLIT, "        # Shared memory must outlive the stores that read it.\n        with cute.arch.elect_one():\n"
        "            cute.arch.cp_async_bulk_wait_group(0, read=True)\n", "",
    ),
    # The atomic alone would do: its release covers what the barrier before it ordered.
    "partial sums not published": (
        SPLIT, re.compile(r'cute\.arch\.fence_acq_rel_gpu\(\)\n|sem="acq_rel", scope="gpu"'), PUBLISHED_BY
    ),
    "every arriver sums": (SPLIT, "return flag[0] == splits - 1", "return flag[0] >= 0"),
    "counter not reset": (SPLIT, "cute.arch.store(counter, cutlass.Int32(0))", "pass"),
    "no last cluster barrier": (
        PAIR, "        # No CTA may leave, or free tensor memory, while its cluster can still signal or read it.\n"
        "        self._cluster_sync()\n", "",
    ),
    "sums in tensor memory not ordered": (
        CuteTactic(128, 256, 256, 1, 1), "cute.arch.fence_view_async_tmem_store()", "pass"
    ),
    "list of experts not awaited": (
        replace(SPLIT, split_k=STREAM_K, skip=True),
        "            active[expert] = used\n        cute.arch.sync_threads()\n",
        "            active[expert] = used\n",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("fault", MUTATIONS)
def test_fault_is_reported(fault, monkeypatch, tmp_path) -> None:
    tactic, text, changed = MUTATIONS[fault]
    source = Path(kernel.__file__).read_text()
    pattern = text if isinstance(text, re.Pattern) else re.compile(re.escape(text))
    assert pattern.search(source), "the kernel's text has moved on: state this fault anew"
    # The DSL reads a function's text from its file.
    path = tmp_path / f"mutated_{re.sub(r'[^a-z]', '_', fault)}.py"
    path.write_text(pattern.sub(lambda found: changed if isinstance(changed, str) else changed[found[0]], source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(compiler, "Fc2Kernel", module.Fc2Kernel)
    emulation.compiled.cache_clear()
    try:
        with pytest.raises((EmulatorError, AssertionError)):
            for schedule in ("lazy", "eager", "random"):
                # 100 rows: a pair's second CTA has none. Several items per SM, several experts per item; with `skip`
                # more experts than a warp has lanes.
                intermediate, experts = (256, 40) if tactic.skip else (512, 4)
                emulation.run(tactic, 100, 520, intermediate, experts, schedule=schedule, sms=4)
    finally:
        emulation.compiled.cache_clear()
