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

from backends.hopper import compiler, dense, dense_plan, lists, share, stream
from backends.hopper.dense_plan import dense_tiling
from backends.hopper.stream_plan import StreamConfig
from tests import hopper_emulation as emulation
from tests import test_hopper_lists
from tests.emulator import EmulatorError
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference

CONFIG = StreamConfig(rows=64, phases=2, stages=2, slots=4, tokens=64, experts=40, chunks=1, out_dtype="float32")
EXPECT = "            ins.expect_bytes(barrier, size)\n"
MINE = "            if here % config.cluster == rank:\n"
FREE = "            if free == 0:\n                ins.wait(empty + place * 8, turn ^ 1)\n"
TURN = "            cute.arch.barrier(barrier_id=_turn(warp), number_of_threads=64)\n"
# The lanes of a warp run in step on the emulator, and kernels one after the other: a missing `sync_warp` before an arrival
# or a missing `griddepcontrol_wait` cannot be found there. Nor, in the streaming kernel, a peer's barriers that are not
# awaited: no schedule lets a CTA list all experts before the other has started.
MUTATIONS = {
    "additions out of turn": (TURN, "            pass\n"),
    "weights overwritten before they are read": (
        "                    ins.wait(empty + place * 8, turn)\n",
        "                    pass\n",
    ),
    "a stage taken for free by the turn before": (
        "free = ins.completed(empty + place * 8, turn)\n",
        "free = ins.completed(empty + place * 8, turn ^ 1)\n",
    ),
    "weights not awaited": (
        'cute.arch.mbarrier_wait(self._barrier(barriers, "weights_full", loaded), loaded_turn)',
        "pass",
    ),
    "activations overwritten before they are read": (FREE, ""),
    "a slot taken for free by the phase before": (
        "free = ins.completed(empty + place * 8, turn ^ 1)",
        "free = ins.completed(empty + place * 8, turn)",
    ),
    "slots awaited out of order": (
        '                    cute.arch.mbarrier_wait(self._barrier(barriers, "acquired", before_me), before_turn)\n',
        "                    pass\n",
    ),
    "tokens' list not counted among the bytes": (
        "ins.expect_bytes(barrier, size)",
        "ins.expect_bytes(barrier, size - LIST_BYTES)",
    ),
    "one token too few of a full slot": (
        "cutlass.min(count - eight * GROUP, GROUP)",
        "cutlass.min(count - eight * GROUP, GROUP - 1)",
    ),
    "an expert that begins with 32 slots not fetched": (
        "(begins >= 0) & (begins < 32)",
        "(begins > 0) & (begins < 32)",
    ),
    "the last of 32 slots of the expert before": (
        "popc(starts & ((Int32(2) << lane) - 1))",
        "popc(starts & ((Int32(1) << lane) - 1))",
    ),
    "the next slots not looked for from the last one on": (
        "            entry = cute.arch.shuffle_sync(entry, 31)\n",
        "            pass\n",
    ),
    "one arrival too few for a free slot": ('"slot_empty": blocks', '"slot_empty": 1'),
    "list of experts not awaited": (
        "mine[i : i + 2])\n            cute.arch.sync_threads()\n",
        "mine[i : i + 2])\n",
    ),
    "padding tokens added": ("None if i < full else token >= 0", "None if i <= full else token >= 0"),
    "a slot of eight tokens too many supposed": ("(0, *config.widths)[level]", "(1, *config.widths)[level]"),
    "a wide pass's slots multiplied again": (
        "            mark, turn = self._after(mark, turn, width)\n",
        "            mark, turn = self._after(mark, turn, 0)\n",
    ),
    "the turn awaited by each pass": ("                    waits = Int32(0)\n", "                    waits = waits\n"),
    "pieces of odd tokens taken for each other": ("odd = g % 2 * 64", "odd = 0"),
    "columns past the last stored": ("if column < hidden:", "if column >= 0:"),
    "next item's slots a turn of the ring too late": (
        "return slot - turn * ring, turn & 1",
        "return slot - turn * ring, 1 - turn & 1",
    ),
    "stages' turns not told apart": (
        "loaded, loaded_turn = loaded - config.stage_barriers, loaded_turn ^ 1",
        "loaded, loaded_turn = loaded - config.stage_barriers, loaded_turn",
    ),
    "slots behind the end of the ring": (
        "over = Int32(mark + slots >= ring)",
        "over = Int32(mark + slots > ring)",
    ),
    "late slots not awaited": (
        "while ins.counted((counters + 1).toint()) < tasks:",
        "while ins.counted((counters + 1).toint()) < 0:",
    ),
    "late slots not fenced for copies": ("                    ins.fence_async()\n", ""),
    "late slots announced before they are": (
        "                for i in cutlass.range(\n                    task",
        "                if lane == 0:\n                    ins.count_up((counters + 1).toint())\n                for i in cutlass.range(\n                    task",
    ),
    "a late expert's slots left out": (
        "(count + GROUP - 1) // GROUP * config.chunks",
        "count // GROUP * config.chunks",
    ),
}
# Of a cluster of two CTAs.
CLUSTER_MUTATIONS = {
    "slots freed by one CTA's consumers": ('"slot_empty": blocks * self.config.cluster', '"slot_empty": blocks'),
    "slots released to the own CTA, twice": ("peer = lane if config.cluster > 1 else None", "peer = None"),
    "slots released to the first CTA, twice": ("peer = lane if config.cluster > 1 else None", "peer = lane * 0"),
    "bytes expected before the slot is free": (FREE, FREE.replace("free == 0", "(free == 0) & (place % 2 == rank)")),
    "bytes expected by the copying CTA only": (EXPECT, MINE.replace("here", "place") + "    " + EXPECT),
    "every slot copied by both CTAs": (MINE, "            if here >= 0:\n"),
    "activations copied into one CTA": (
        "source, copied, barrier, config.cluster)",
        "source, copied, barrier)",
    ),
    "peer's last signals not awaited": ("                cute.arch.cluster_wait()\n", "                pass\n"),
}
# Of few tokens, whose experts the kernel counts itself.
FEW_MUTATIONS = {
    "counts not awaited": ("        if ~dense:\n            cute.arch.sync_threads()\n", "        if ~dense:\n"),
    "the last token not counted": ("for m in range(self.config.tokens)]", "for m in range(self.config.tokens - 1)]"),
    "negative zero counted": ("sum(Int32(bits & 0x7FFFFFFF != 0)", "sum(Int32(bits != 0)"),
    "experts behind the last one": ("[count * Int32(mine + i < experts) for", "[count for"),
}
# Of many tokens, whose slots are awaited in no order, at barriers of several rings.
MANY_MUTATIONS = {
    "a slot's barrier lost": ("config.slot_barriers)[0] << 16", "config.slot_barriers)[0] << 20"),
    "a slot's barrier where its place should be": ("(packed & 0xFFFF, packed >> 16)", "(packed, packed >> 16)"),
    "barriers told apart by the turn of their place": (
        "place |= self._in_ring(",
        "turn = self._in_ring(slot + offset, config.slot_barriers)[1]\n                place |= self._in_ring(",
    ),
    "places behind the ring": ("if barriers > ring else mark", "if barriers < ring else mark"),
    "weights told of at the barrier of their place": ("stage_bytes, full + mark * 8", "stage_bytes, full + place * 8"),
    "one barrier not initialized": (
        "cutlass.range(begin + thread, end, step",
        "cutlass.range(begin + thread, end - 1, step",
    ),
}
# Of strips in several parts.
PART_MUTATIONS = {
    "other parts not awaited": (
        "            while ins.counted((flags + strip).toint()) < left:\n                pass\n",
        "            pass\n",
    ),
    "sums of one part too few": ("cutlass.range(left, unroll=1)", "cutlass.range(left - 1, unroll=1)"),
    "a part of another strip": ("index * self._strips(hidden) + strip", "index * self._strips(hidden)"),
    "slots of the parts before counted": (
        "offset = done * (end - origin) - origin\n",
        "offset = done * (end - origin)\n",
    ),
    "result stored before all is added": (
        "ins.store4_if(wanted, here, tuple(x + y for x, y in zip(mine, values)))\n        cute.arch.sync_threads()\n",
        "ins.store4_if(wanted, here, tuple(x + y for x, y in zip(mine, values)))\n",
    ),
}
# Of strips with a helper.
HELPER_MUTATIONS = {
    "sums left before all are added": (
        "Float32(0.0)\n        cute.arch.barrier(barrier_id=_SUMS, number_of_threads=threads)\n",
        "Float32(0.0)\n",
    ),
    "sums announced before all are left": (
        "        cute.arch.barrier(barrier_id=_SUMS, number_of_threads=threads)\n        # The last consumer",
        "        # The last consumer",
    ),
    "a strip begun with the sums of another": (
        "            ins.store4(here, (zero, zero, zero, zero))\n",
        "            pass\n",
    ),
    "sums of another strip": ("- 1, strip, hidden, size)", "- 1, 0, hidden, size)"),
    "weights of the first strip": ("Int64((strip + done * config.cluster)", "Int64((strip + 0 * done)"),
    "slots of the strip before counted anew": ("offset = done * (end - origin) - origin\n", "offset = 0 - origin\n"),
    "slots of another strip's place": ("offset, entry = done * (end - origin) - origin", "offset, entry = 0 - origin"),
    "each strip begun by the first consumer": ("// config.phases * config.phases - last", "* 0 + phase - start"),
}
# Of what a CTA's share is.
SHARE_MUTATIONS = {
    "items of two parts": ("(kept, part * kept // parts)", "(kept, (part * kept - 1) // parts)"),
    "items that no part has": ("(kept, part * kept // parts)", "(kept + 1, part * kept // parts)"),
    "one helper waited for too few": ("parts - 1 + Int32(helped > 0)", "parts - 1"),
    "a helper of too many strips": ("cutlass.min(rounds, strips // cluster - before)", "rounds"),
}


# Of the dense kernel.
DENSE_MUTATIONS = {
    "first half of a chunk given back while it is multiplied": (
        "if cutlass.const_expr(turn == count // 2):",
        "if cutlass.const_expr(turn == 1):",
    ),
    "next chunk not awaited": ("ins.wait(full_at + following * 8, following_phase)", "pass"),
    "next chunk's second half not awaited": ("ins.wait(full_at + after * 8, after_phase)", "pass"),
    "weights overwritten before they are read": (
        "cute.arch.mbarrier_wait(ring.empty + stage, phase)\n        cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.data",
        "cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.data",
    ),
    "activations overwritten before they are read": (
        "cute.arch.mbarrier_wait(ring.empty + stage, phase)\n                    cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.acts",
        "cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.acts",
    ),
    "stages freed by one CTA": ("ring.empty + i, CLUSTER * tile.warps", "ring.empty + i, tile.warps"),
    "stages given back to the first CTA only": ("cutlass.Int32(lane < CLUSTER)", "cutlass.Int32(lane < 1)"),
    "stages given back to one CTA twice": (
        "ring.empty.toint(), lane % CLUSTER)",
        "ring.empty.toint(), lane // CLUSTER)",
    ),
    "nothing given behind the last chunk": (
        "        self.copy_nothing(ring, stage, phase)\n        self.copy_nothing(ring, *self.after(stage, phase))\n",
        "",
    ),
    "scale factors and alpha not counted among the bytes": (
        "self.tile.data_bytes + aside_bytes)",
        "self.tile.data_bytes)",
    ),
    "activations copied into one CTA": ("half, barrier, policy, CLUSTER)", "half, barrier, policy)"),
    "activations not awaited": (
        "while count * TASK_TOKENS < work.columns:",
        "while count * TASK_TOKENS < 0 * work.columns:",
    ),
    "activations not fenced for copies": ("                ins.fence_async()\n", ""),
    "decoded tokens announced before they are": (
        "                decode_task(\n",
        "                if lane == 0:\n                    ins.count_up((ready + chunk).toint())\n                decode_task(\n",
    ),
    "a task taken twice": ("            task = following\n", "            task = following & ~1\n"),
    "others' sums not awaited": ("while ins.counted(flag) < others:\n                    pass", "pass"),
    "sums of one other cluster too few": ("cutlass.range(others, unroll=1)", "cutlass.range(others - 1, unroll=1)"),
    "the same other sums twice": ("                    theirs += warps * size * 4\n", ""),
    "peer's barriers not awaited": (
        "        cute.arch.cluster_wait()\n        if dense:",
        "        if dense:",
    ),
    "a chunk decoded ahead looked for among the others": ("if count >= AHEAD:", "if count >= 2 * AHEAD:"),
    "a chunk decoded ahead of another place": (
        "first_acts.toint(), count - AHEAD",
        "first_acts.toint(), (count - AHEAD) // 2",
    ),
    "a turn's operand made while it may be in use": ("wgmma.wait(1)", "pass"),
    "alpha of the wrong expert": ("(chunk // expert_chunks * work", "(chunk * work"),
    "alpha looked for in a chunk's first half": (
        "alpha_at + second * self.stage_bytes",
        "alpha_at + stage * self.stage_bytes",
    ),
    "alpha of other tokens": ("self.load_alpha(here, 0, early)", "self.load_alpha(here, 8, early + 8)"),
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


# Of the kernel that lists tokens.
LIST_MUTATIONS = {
    "other warps' tokens not counted": ("cute.arch.sync_threads()\n        own = ", "own = "),
    "a warp's own tokens counted before them": (
        "cute.arch.shuffle_sync(scan - own, warp",
        "cute.arch.shuffle_sync(scan, warp",
    ),
    "other warps' tokens not awaited": ("cute.arch.sync_threads()\n        if ~is_late", "if ~is_late"),
    "slots of late experts": ("if ~is_late(count, tokens):", "if count >= 0:"),
    "alpha behind the last token not zero": (
        "ins.store_global1_if(writes & (m < work.columns), column + m * 4, bits)",
        "ins.store_global1_if(writes & (m < tokens), column + m * 4, bits)",
    ),
    "negative zero selects": ("used = bits & 0x7FFFFFFF != 0", "used = bits != 0"),
    "a chunk of another expert": (
        "chunk, work.chunks, self.config.a_swizzled)\n\n    @cute.jit\n    def reset",
        "chunk + 1, work.chunks, self.config.a_swizzled)\n\n    @cute.jit\n    def reset",
    ),
    "decoded ahead at the chunk's own place": ("Int64(number // blocks - chunk) * line", "Int64(0) * line"),
    "more decoded ahead than counted": (
        "needed & (number < work.ahead * blocks)",
        "needed & (number < work.ahead * blocks + 1)",
    ),
    "tasks decoded ahead left to be taken": (
        "value = work.ahead * (work.columns // TASK_TOKENS)",
        "value = work.ahead",
    ),
    "counters in front not reset": ("(i < before) | (i >= taken)", "i >= taken"),
}


def alpha() -> torch.Tensor:
    """Several turns of both rings; some experts with more groups of tokens than the ring of activations has slots."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn((60, 40), generator=generator) * (torch.rand((60, 40), generator=generator) < 0.15)
    values[:, ::19] = 1.5  # all tokens: gathered by the streaming kernel
    return values


SCHEDULES = (("lazy", 0), ("eager", 0), *(("random", seed) for seed in range(4)))


def streaming(schedule: str, seed: int, cluster: int = 1, parts: int = 1) -> None:
    config = replace(CONFIG, cluster=cluster)
    emulation.run(config, 60, 100, alpha(), schedule=schedule, emulator_seed=seed, parts=parts)


def helped(schedule: str, seed: int) -> None:
    """A helper of three strips, whose number of items consumers do not divide, with slots awaited in order; two helpers, of two
    strips and of one; a pair of helpers. Of four blocks or clusters, which the emulator starts in any order, one must help."""
    for n, changes, helpers in ((90, {}, 1), (150, {"rows": 64}, 2), (150, {"rows": 64, "cluster": 2}, 2)):
        config = replace(CONFIG, **{"rows": 32, "phases": 3, "stages": 3, "experts": 20, "chunks": 2, **changes})
        emulation.run(config, 60, n, alpha()[:, :20], schedule=schedule, emulator_seed=seed, helpers=helpers)


def many(schedule: str, seed: int) -> None:
    """More slots than the 128 that items in work may have, of two stages' barriers one stage."""
    config = replace(CONFIG, tokens=512, stages=1, chunks=2)
    emulation.run(config, 60, 64, alpha(), schedule=schedule, emulator_seed=seed)


def few(schedule: str, seed: int) -> None:
    """More experts than a warp lists at a time; the last token alone selects the last of them."""
    config = replace(CONFIG, tokens=16, experts=261)
    weights = torch.zeros(16, 261)
    weights[::3, ::50], weights[15, 260], weights[3, 7] = 1.5, -2.0, -0.0
    emulation.run(config, 16, 64, weights, schedule=schedule, emulator_seed=seed)


def listing(schedule: str, seed: int) -> None:
    """Several slots a warp, chunks of an expert, stretches of K walked at once, experts that are late."""
    for m, experts, inner, clusters, kind in (
        (70, 5, 512, 3, "ragged"),
        (21, 5, 512, 6, "dense"),
        (100, 6, 256, 2, "late"),
    ):
        weights = make_alpha("ragged" if kind == "late" else kind, m, experts, torch.Generator().manual_seed(4))
        if kind == "late":
            weights[:60, 2] = 1.5
        test_hopper_lists.check(weights, inner, clusters, "128x4", schedule, seed)


def multiplying(schedule: str, seed: int) -> None:
    """More chunks than the ring has stages, tiles shared by two clusters and by three, experts of two chunks, tokens and
    rows that do not fill their tiles, results stored in whole sectors and one by one."""
    for m, n, experts, inner, clusters in ((21, 1100, 7, 256, 2), (21, 502, 3, 512, 3)):
        a, b = make_operands(m, n, experts * inner, 1)
        weights = make_alpha("dense", m, experts, torch.Generator().manual_seed(3))
        tiling = dense_tiling(m, n, experts * inner, clusters=clusters)
        out, _ = emulation.dense(tiling, n, a, b, weights, schedule=schedule, seed=seed)
        assert_meets_bar(out, *reference(a, b, weights))


@pytest.fixture(autouse=True)
def little_ahead(monkeypatch):
    """Small problems leave activations to the dense kernel, too."""
    monkeypatch.setattr(dense_plan, "_AHEAD", 1)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Puts a fault into a kernel's text: the DSL reads a function's text from its file."""

    def planted(module, text: str, changed: str):
        source = Path(module.__file__).read_text()
        assert text in source, "the text has moved on: state this fault anew"
        path = tmp_path / f"mutated_{module.__name__.rpartition('.')[2]}.py"
        path.write_text(source.replace(text, changed))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        mutated = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, mutated)
        spec.loader.exec_module(mutated)
        for config, kernel in compiler.KERNELS.items():
            if hasattr(mutated, kernel.__name__):
                monkeypatch.setitem(compiler.KERNELS, config, getattr(mutated, kernel.__name__))
        emulation.compiled.cache_clear()
        return mutated

    yield planted
    emulation.compiled.cache_clear()


def must_be_reported(call) -> None:
    with pytest.raises((EmulatorError, AssertionError)):
        for schedule, seed in SCHEDULES:
            call(schedule, seed)


# Of the streaming kernel, each with a call that it must spoil.
STREAMING = (
    (MUTATIONS, streaming),
    (CLUSTER_MUTATIONS, functools.partial(streaming, cluster=2)),
    (PART_MUTATIONS, functools.partial(streaming, parts=2)),
    (HELPER_MUTATIONS, helped),
    (FEW_MUTATIONS, few),
    (MANY_MUTATIONS, many),
)


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "call"),
    [pytest.param(text, call, id=name) for faults, call in STREAMING for name, text in faults.items()],
)
def test_fault_of_the_streaming_kernel_is_reported(fault, call, plant) -> None:
    plant(stream, *fault)
    must_be_reported(call)


@pytest.mark.full
@pytest.mark.parametrize("fault", SHARE_MUTATIONS)
def test_fault_of_shares_is_reported(fault, plant, monkeypatch) -> None:
    monkeypatch.setattr(stream, "share", plant(share, *SHARE_MUTATIONS[fault]).share)

    def call(schedule: str, seed: int) -> None:
        streaming(schedule, seed, parts=2)
        helped(schedule, seed)

    must_be_reported(call)


@pytest.mark.full
@pytest.mark.parametrize("fault", DENSE_MUTATIONS)
def test_fault_of_the_dense_kernel_is_reported(fault, plant) -> None:
    plant(dense, *DENSE_MUTATIONS[fault])
    must_be_reported(multiplying)


@pytest.mark.full
@pytest.mark.parametrize("fault", LIST_MUTATIONS)
def test_fault_of_the_listing_kernel_is_reported(fault, plant) -> None:
    plant(lists, *LIST_MUTATIONS[fault])
    must_be_reported(listing)


@pytest.mark.full
@pytest.mark.parametrize(
    "call",
    [*(call for _, call in STREAMING), multiplying, listing],
)
def test_the_same_calls_without_a_fault(call) -> None:
    for schedule, seed in SCHEDULES:
        call(schedule, seed)
