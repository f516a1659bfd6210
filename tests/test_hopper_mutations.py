"""The emulated tests of the kernels for SM 9.0 can fail: each of these faults, put into their text, is reported."""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from backends.hopper import compiler, dense, stream
from backends.hopper.dense_plan import DenseKernelTile, dense_tiling
from backends.hopper.stream_plan import StreamConfig
from tests import hopper_emulation as emulation
from tests.emulator import EmulatorError
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference

CONFIG = StreamConfig(rows=64, phases=2, stages=2, slots=4, tokens=64, experts=40, chunks=1, out_dtype="float32")
EXPECT = "            ins.expect_bytes(full + place * 8, size)\n"
MINE = "            if here % config.cluster == rank:\n"
FREE = "            if free == 0:\n                ins.wait(empty + place * 8, phase)\n"
TURN = "            cute.arch.mbarrier_wait(turn, ((item - 1) // config.phases) & 1)\n"
# The lanes of a warp run in step on the emulator, and kernels one after the other: a missing `sync_warp` before an arrival
# or a missing `griddepcontrol_wait` cannot be found there.
MUTATIONS = {
    "additions out of turn": (TURN, "            pass\n"),
    "weights overwritten before they are read": (
        'if turn > 0:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "weights_empty"',
        'if turn > 99:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "weights_empty"',
    ),
    "weights not awaited": (
        'cute.arch.mbarrier_wait(self._barrier(barriers, "weights_full", stage), (item // config.stages) & 1)',
        "pass",
    ),
    "activations overwritten before they are read": (FREE, ""),
    "a slot taken for free by the phase before": (
        "free = ins.completed(empty + place * 8, phase)",
        "free = ins.completed(empty + place * 8, phase ^ 1)",
    ),
    "slots awaited out of order": (
        "                    cute.arch.mbarrier_wait(acquired, ((item - 1) // config.phases) & 1)\n",
        "                    pass\n",
    ),
    "tokens' list not counted among the bytes": (
        "ins.expect_bytes(full + place * 8, size)",
        "ins.expect_bytes(full + place * 8, size - LIST_BYTES)",
    ),
    "one token too few of a full slot": ("cutlass.min(left, GROUP)", "cutlass.min(left, GROUP - 1)"),
    "the expert after the next one fetched": (
        "packed = following\n                    entry += 1",
        "entry += 1\n                    packed = ins.load1(table + entry * 8 + 8)",
    ),
    "one arrival too few for a free slot": ('"slot_empty": blocks', '"slot_empty": 1'),
    "list of experts not awaited": (
        "self._list_experts(smem, counts, lane)\n        cute.arch.sync_threads()\n",
        "self._list_experts(smem, counts, lane)\n",
    ),
    "padding tokens added": ("targets.append((token >= 0, ", "targets.append((token >= -1, "),
    "fourth group of a pass never multiplied": ("left <= width) |", "left < width) |"),
    "columns past the last stored": ("if column < hidden:", "if column >= 0:"),
}
# Of a cluster of two CTAs.
CLUSTER_MUTATIONS = {
    "slots freed by one CTA's consumers": ("blocks * self.config.cluster,", "blocks,"),
    "slots released to the own CTA, twice": ("peer = lane if config.cluster > 1 else None", "peer = None"),
    "slots released to the first CTA, twice": ("peer = lane if config.cluster > 1 else None", "peer = lane * 0"),
    "bytes expected before the slot is free": (FREE, FREE.replace("free == 0", "(free == 0) & (place % 2 == rank)")),
    "bytes expected by the copying CTA only": (EXPECT, MINE.replace("here", "place") + "    " + EXPECT),
    "every slot copied by both CTAs": (MINE, "            if here >= 0:\n"),
    "activations copied into one CTA": (
        "source, size, full + here * 8, config.cluster)",
        "source, size, full + here * 8)",
    ),
    "peer's barriers not awaited": (
        "            cute.arch.cluster_wait()\n        cute.arch.sync_threads()\n",
        "            pass\n        cute.arch.sync_threads()\n",
    ),
    "peer's last signals not awaited": ("                cute.arch.cluster_wait()\n", "                pass\n"),
}
# Of strips in several parts.
PART_MUTATIONS = {
    "other parts not awaited": (
        "            while ins.counted((flags + strip)",
        "            while ins.counted((flags + strip).toint()) < 0 * ins.counted((flags + strip)",
    ),
    "sums of one part too few": ("cutlass.range(parts - 1, unroll=1)", "cutlass.range(parts - 2, unroll=1)"),
    "a part of another strip": ("index * cute.arch.grid_dim()[0] + strip", "index * cute.arch.grid_dim()[0]"),
    "parts that share an item": ("first, last = part * items // parts,", "first, last = (part * items - 1) // parts,"),
    "slots of the parts before counted": ("            first_slot -= slots_before\n", ""),
    "result stored before all is added": (
        "ins.store4_if(wanted, here, tuple(x + y for x, y in zip(mine, values)))\n        cute.arch.sync_threads()\n",
        "ins.store4_if(wanted, here, tuple(x + y for x, y in zip(mine, values)))\n",
    ),
}


# Of the dense kernel.
DENSE_MUTATIONS = {
    "first half of a chunk given back while it is multiplied": (
        "if cutlass.const_expr(turn == count // 2):",
        "if cutlass.const_expr(turn == 1):",
    ),
    "next chunk not awaited": ("cute.arch.mbarrier_wait(ring.full + following, following_phase)", "pass"),
    "next chunk's second half not awaited": ("cute.arch.mbarrier_wait(ring.full + after, after_phase)", "pass"),
    "weights overwritten before they are read": (
        "cute.arch.mbarrier_wait(ring.empty + stage, phase)\n                    cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.data",
        "cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.data",
    ),
    "activations overwritten before they are read": (
        "cute.arch.mbarrier_wait(ring.empty + stage, phase)\n                    cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.acts",
        "cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.acts",
    ),
    "stages freed by one CTA": ("ring.empty + i, CLUSTER * tile.warps", "ring.empty + i, tile.warps"),
    "stages given back to the first CTA only": ("if lane < CLUSTER:", "if lane < 1:"),
    "scale factors and alpha not counted among the bytes": (
        "self.tile.data_bytes + aside_bytes)",
        "self.tile.data_bytes)",
    ),
    "activations copied into one CTA": ("half, barrier, policy, CLUSTER)", "half, barrier, policy)"),
    "activations not awaited": (
        "while ins.counted((ready + chunk).toint()) * TASK_TOKENS < columns:\n                    pass",
        "pass",
    ),
    "activations not fenced for copies": ("                ins.fence_async()\n", ""),
    "decoded tokens announced before they are": (
        "                decode_task(",
        "                if lane == 0:\n                    ins.count_up((ready + chunk).toint())\n                decode_task(",
    ),
    "a task taken twice": ("            task = following\n", "            task = following & ~1\n"),
    "others' sums not awaited": ("while ins.counted(flag) < others:\n                    pass", "pass"),
    "sums of one other cluster too few": ("cutlass.range(others, unroll=1)", "cutlass.range(others - 1, unroll=1)"),
    "the same other sums twice": ("                    theirs += warps * size * 4\n", ""),
    "peer's barriers not awaited": ("experts)\n        cute.arch.cluster_wait()\n", "experts)\n"),
    "a turn's operand made while it may be in use": ("wgmma.wait(1)", "pass"),
    "alpha of the wrong expert": ("(chunk // expert_chunks)", "chunk"),
    "columns past the last stored": ("(token + 8 * j < tokens) & (row < hidden)", "token + 8 * j < tokens"),
    "tokens past the last stored": ("(token + 8 * j < tokens) & (row < hidden)", "row < hidden"),
    "columns past the last stored one by one": (" & (row + i // 2 * 8 < hidden)", ""),
    "tokens past the last stored one by one": ("(token + (8 * j + i % 2) < tokens) & ", ""),
    "rows of two neighbours exchanged": ("ins.select(odd, low, high)", "ins.select(odd, high, low)"),
    "peer's last signals not awaited": (
        "its barriers.\n            cute.arch.cluster_arrive()\n            cute.arch.cluster_wait()\n",
        "its barriers.\n",
    ),
}


def alpha() -> torch.Tensor:
    """Several turns of both rings; some experts with more groups of tokens than the ring of activations has slots."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn((60, 40), generator=generator) * (torch.rand((60, 40), generator=generator) < 0.15)
    values[:, ::19] = 1.5
    return values


SCHEDULES = (("lazy", 0), ("eager", 0), *(("random", seed) for seed in range(4)))


def streaming(schedule: str, seed: int, cluster: int = 1, parts: int = 1) -> None:
    config = replace(CONFIG, cluster=cluster)
    emulation.run(config, 60, 100, alpha(), schedule=schedule, emulator_seed=seed, parts=parts)


def multiplying(schedule: str, seed: int) -> None:
    """More chunks than the ring has stages, tiles shared by two clusters and by three, experts of two chunks, tokens and
    rows that do not fill their tiles, results stored in whole sectors and one by one."""
    for m, n, experts, inner, clusters in ((13, 1100, 7, 256, 2), (13, 502, 3, 512, 3)):
        a, b = make_operands(m, n, experts * inner, 1)
        weights = make_alpha("dense", m, experts, torch.Generator().manual_seed(3))
        tiling = dense_tiling(m, n, experts * inner, clusters=clusters)
        out, _ = emulation.dense(tiling, n, a, b, weights, schedule=schedule, seed=seed)
        assert_meets_bar(out, *reference(a, b, weights))


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Puts a fault into a kernel's text: the DSL reads a function's text from its file."""

    def planted(module, kernel: str, config: type, text: str, changed: str) -> None:
        source = Path(module.__file__).read_text()
        assert text in source, "the kernel's text has moved on: state this fault anew"
        path = tmp_path / f"mutated_{module.__name__.rpartition('.')[2]}.py"
        path.write_text(source.replace(text, changed))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        mutated = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, mutated)
        spec.loader.exec_module(mutated)
        monkeypatch.setitem(compiler.KERNELS, config, getattr(mutated, kernel))
        emulation.compiled.cache_clear()

    yield planted
    emulation.compiled.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("fault", [*MUTATIONS, *CLUSTER_MUTATIONS, *PART_MUTATIONS])
def test_fault_of_the_streaming_kernel_is_reported(fault, plant) -> None:
    plant(stream, "StreamKernel", StreamConfig, *{**MUTATIONS, **CLUSTER_MUTATIONS, **PART_MUTATIONS}[fault])
    with pytest.raises((EmulatorError, AssertionError)):
        for schedule, seed in SCHEDULES:
            streaming(schedule, seed, 2 if fault in CLUSTER_MUTATIONS else 1, 2 if fault in PART_MUTATIONS else 1)


@pytest.mark.full
@pytest.mark.parametrize("fault", DENSE_MUTATIONS)
def test_fault_of_the_dense_kernel_is_reported(fault, plant) -> None:
    plant(dense, "DenseKernel", DenseKernelTile, *DENSE_MUTATIONS[fault])
    with pytest.raises((EmulatorError, AssertionError)):
        for schedule, seed in SCHEDULES:
            multiplying(schedule, seed)


@pytest.mark.full
@pytest.mark.parametrize(
    "call", [streaming, functools.partial(streaming, cluster=2), functools.partial(streaming, parts=2), multiplying]
)
def test_the_same_calls_without_a_fault(call) -> None:
    for schedule, seed in SCHEDULES:
        call(schedule, seed)
