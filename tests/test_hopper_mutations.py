"""The emulated tests of the streaming kernel can fail: each of these faults, put into its text, is reported."""
from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from backends.hopper import compiler, stream
from backends.hopper.stream_plan import StreamConfig
from tests import hopper_emulation as emulation
from tests.emulator import EmulatorError

CONFIG = StreamConfig(rows=64, phases=2, stages=2, slots=4, tokens=64, experts=40, chunks=1, out_dtype="float32")
EXPECT = "            cute.arch.mbarrier_arrive_and_expect_tx(full, SLOT_BYTES + HEADER_BYTES)\n"
MINE = "            if slot % config.cluster == rank:\n"
TURN = "            cute.arch.mbarrier_wait(turn, ((item - 1) // config.phases) & 1)\n"
# The lanes of a warp run in step on the emulator: a missing `sync_warp` before an arrival cannot be found there.
MUTATIONS = {
    "additions out of turn": (TURN, "            pass\n"),
    "weights overwritten before they are read": (
        'if turn > 0:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "weights_empty"',
        'if turn > 99:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "weights_empty"',
    ),
    "weights not awaited": (
        'cute.arch.mbarrier_wait(self._barrier(barriers, "weights_full", stage), (item // config.stages) & 1)', "pass"
    ),
    "activations overwritten before they are read": (
        'if turn > 0:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "slot_empty"',
        'if turn > 99:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "slot_empty"',
    ),
    "slots awaited out of order": (
        "                    cute.arch.mbarrier_wait(acquired, ((item - 1) // config.phases) & 1)\n", "                    pass\n"
    ),
    "tokens' list not counted among the bytes": ("full, SLOT_BYTES + HEADER_BYTES)", "full, SLOT_BYTES)"),
    "one arrival too few for a free slot": ('"slot_empty": self.config.blocks', '"slot_empty": 1'),
    "list of experts not awaited": (
        "self._list_experts(smem, counts, lane)\n        cute.arch.sync_threads()\n", "self._list_experts(smem, counts, lane)\n"
    ),
    "padding tokens added": ("targets.append((token >= 0, ", "targets.append((token >= -1, "),
    "fourth group of a pass never multiplied": ("left <= width) |", "left < width) |"),
    "columns past the last stored": ("if column < hidden:", "if column >= 0:"),
}
# Of a cluster of two CTAs.
CLUSTER_MUTATIONS = {
    "slots freed by one CTA's consumers": ("self.config.blocks * self.config.cluster}", "self.config.blocks}"),
    "slots released to the own CTA, twice": ("peer = lane if config.cluster > 1 else None", "peer = None"),
    "slots released to the first CTA, twice": ("peer = lane if config.cluster > 1 else None", "peer = lane * 0"),
    "bytes expected before the slot is free": (
        'if turn > 0:\n                cute.arch.mbarrier_wait(self._barrier(barriers, "slot_empty"',
        "if (turn > 0) & (slot % 2 == rank):\n"
        '                cute.arch.mbarrier_wait(self._barrier(barriers, "slot_empty"',
    ),
    "bytes expected by the copying CTA only": (EXPECT + MINE, MINE + "    " + EXPECT),
    "every slot copied by both CTAs": (MINE, "            if slot >= 0:\n"),
    "activations copied into one CTA": ("Int32(SLOT_BYTES), barrier, config.cluster)", "Int32(SLOT_BYTES), barrier)"),
    "peer's barriers not awaited": (
        "            cute.arch.cluster_wait()\n        cute.arch.sync_threads()\n",
        "            pass\n        cute.arch.sync_threads()\n",
    ),
    "peer's last signals not awaited": ("                cute.arch.cluster_wait()\n", "                pass\n"),
}


def alpha() -> torch.Tensor:
    """Several turns of both rings; some experts with more groups of tokens than the ring of activations has slots."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn((60, 40), generator=generator) * (torch.rand((60, 40), generator=generator) < 0.15)
    values[:, ::19] = 1.5
    return values


@pytest.mark.full
@pytest.mark.parametrize("fault", [*MUTATIONS, *CLUSTER_MUTATIONS])
def test_fault_is_reported(fault, monkeypatch, tmp_path) -> None:
    text, changed = {**MUTATIONS, **CLUSTER_MUTATIONS}[fault]
    config = replace(CONFIG, cluster=1 if fault in MUTATIONS else 2)
    source = Path(stream.__file__).read_text()
    assert text in source, "the kernel's text has moved on: state this fault anew"
    # The DSL reads a function's text from its file.
    path = tmp_path / f"mutated_{re.sub(r'[^a-z]', '_', fault)}.py"
    path.write_text(source.replace(text, changed))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(compiler, "StreamKernel", module.StreamKernel)
    emulation.compiled.cache_clear()
    try:
        with pytest.raises((EmulatorError, AssertionError)):
            for schedule, seed in (("lazy", 0), ("eager", 0), *(("random", seed) for seed in range(4))):
                emulation.run(config, 60, 100, alpha(), schedule=schedule, emulator_seed=seed)
    finally:
        emulation.compiled.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("cluster", [1, 2])
def test_the_same_call_without_a_fault(cluster) -> None:
    for schedule in ("lazy", "eager", "random"):
        emulation.run(replace(CONFIG, cluster=cluster), 60, 100, alpha(), schedule=schedule)
