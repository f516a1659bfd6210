"""The streaming kernel: every selected expert's weights pass once by each CTA, which holds the sums of all its tokens.

    out[m, n] = sum_e alpha[m, e] * sum_{k in expert e} A[m, k] * B[n, k]

A CTA owns 32 or 64 rows of B, a strip. It walks the items, an expert's 256 values of K each, in ascending order, and keeps
float32 sums of all tokens in shared memory. Where there are fewer strips than multiprocessors, several CTAs take a part of
the items of each, helpers the same part of several strips (`share.py`), and the CTA with the first part adds the sums of the
others. Three roles:

- the last warp copies prepared weights into a ring of stages, at most 54 KB ahead;
- the one before it copies gathered activations, in the order of the tensor core's right operand, up to eight tokens to a
  slot of a second ring; in a cluster of two CTAs each fetches every second slot from the L2, for both;
- a consumer takes 32 rows of an item into registers, decodes them as the left operand and multiplies them with every
  slot of the item. Items are dealt to the consumers in turn. A ring of barriers passes the right to add, so that sums
  grow in the order of the items, whichever is ready first: results repeat bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32

from backends.hopper import instructions as ins
from backends.hopper.form import is_dense
from backends.hopper.gather import gather_slot, is_late
from backends.hopper.share import FIELDS, share
from backends.hopper.stream_plan import (
    BLOCK_DATA,
    BLOCK_ROWS,
    BLOCK_SCALES,
    GATHER_COUNTERS,
    GROUP,
    LIST_BYTES,
    SLOT_BYTES,
    TOKEN_BYTES,
    StreamConfig,
)  # fmt: skip

# The hardware barrier at which all consumers meet, behind those of `_turn`.
_SUMS = 15
# Tasks of gathering a late expert.
_STRIPES = 16
_OUT_TYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}


def _turn(consumer):
    """The hardware barrier at which a consumer waits for its turn to add: number 0 is `sync_threads`."""
    return consumer + 1


class Places(NamedTuple):
    """What a consumer's lane adds to where a slot or a token's sums begin.

    Attributes:
        lists: to a slot, for its first token's number.
        pieces: the same, for its token's pieces 0 and 1.
        sums: of the block's rows of token 0.
        rows: of these, the lane's.
    """

    lists: Int32
    pieces: tuple[Int32, Int32]
    sums: Int32
    rows: Int32


class StreamKernel:
    """One instance per compiled kernel; the tokens and the hidden size are run-time arguments."""

    #: Integers of `__call__`.
    INTEGERS = 6

    def __init__(self, config: StreamConfig) -> None:
        self.config = config
        self.out_type = _OUT_TYPES[config.out_dtype]
        self.offset = config.offsets()
        self.barrier = config.barriers
        self.many_barriers = config.slot_barriers > config.slots
        self.row_bytes = config.rows * 4
        #: Types and alignments in bytes of the pointers of `__call__`.
        self.pointers = (
            (Int32, 4), (Int32, 16), (cutlass.Uint8, 4), (cutlass.Uint8, 16), (cutlass.Uint8, 16), (cutlass.Uint8, 16), (Int32, 16),
            (Int32, 4), (Int32, 4), (Float32, 16), (Int32, 4), (self.out_type, 2),
        )  # fmt: skip

    @cute.jit
    def __call__(
        self,
        alpha: cute.Pointer,
        a_data: cute.Pointer,
        a_scale: cute.Pointer,
        w_data: cute.Pointer,
        w_scale: cute.Pointer,
        gathered: cute.Pointer,
        counts: cute.Pointer,
        token_of: cute.Pointer,
        weight_of: cute.Pointer,
        sums: cute.Pointer,
        counters: cute.Pointer,
        out: cute.Pointer,
        tokens: Int32,
        hidden: Int32,
        parts: Int32,
        helpers: Int32,
        rounds: Int32,
        cost: Int32,
        stream,
    ):
        """Launch on `stream`. Nothing is written where alpha is dense (`form`), unless the kernel is one for `few` tokens.

        Args:
            alpha: float32 [tokens, experts], as its bits.
            a_data: [tokens, K/8] words.
            w_data, w_scale: uint8, prepared weights (`backends/triton/layout.py`).
            gathered, counts, token_of, weight_of: of `lists.ListKernel`; `counts` may be read up to a multiple of 8.
            sums: workspace, float32 [Division.left, strips, tokens, rows].
            counters: int32 [GATHER_COUNTERS + strips], zero before a call.
            out: [tokens, hidden].
            parts, helpers, rounds, cost: of `stream_plan.Division`.
        """
        self.kernel(
            alpha, a_data, a_scale, w_data, w_scale, gathered, counts, token_of, weight_of, sums, counters, out, tokens, hidden,
            parts, helpers, rounds, cost,
        ).launch(
            grid=(helpers + self._strips(hidden) * parts, 1, 1),
            block=(self.config.threads, 1, 1),
            cluster=(self.config.cluster, 1, 1) if self.config.cluster > 1 else None,
            smem=self.offset["end"],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, alpha: cute.Pointer, a_data: cute.Pointer, a_scale: cute.Pointer, w_data: cute.Pointer, w_scale: cute.Pointer,
        gathered: cute.Pointer, counts: cute.Pointer, token_of: cute.Pointer, weight_of: cute.Pointer, sums: cute.Pointer,
        counters: cute.Pointer, out: cute.Pointer, tokens: Int32, hidden: Int32, parts: Int32, helpers: Int32, rounds: Int32,
        cost: Int32,
    ):  # fmt: skip
        config = self.config
        base = cute.arch.get_dyn_smem(cutlass.Int64, alignment=128)
        smem = Int32(base.toint())
        barriers = base + self.offset["barriers"] // 8
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()

        self._start_barriers(barriers, thread)
        zero = Float32(0.0)
        for at in cutlass.range(thread * 16, tokens * self.row_bytes, config.threads * 16):
            ins.store4(smem + self.offset["sums"] + at, (zero, zero, zero, zero))
        cute.arch.griddepcontrol_launch_dependents()
        dense = Boolean(False)
        if cutlass.const_expr(config.few):
            self._count(smem, alpha, tokens, thread)
        else:
            votes = smem + self.offset["votes"]
            dense = is_dense(alpha, tokens, config.experts, votes, config.threads // 32, warp, lane)
            # Where there is nothing to do, one block stays, as in the dense kernel.
            if ~dense | (cute.arch.block_idx()[0] == 0):
                cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(config.cluster > 1):
            cute.arch.cluster_wait()
        if ~dense:
            cute.arch.sync_threads()
            if warp == 0:
                used = self._list_experts(smem, counts, tokens, lane)
                block, strips = cute.arch.block_idx()[0], self._strips(hidden)
                mine = share(block, used * config.chunks, strips, config.cluster, parts, helpers, rounds, cost)
                for i in cutlass.range_constexpr(0, len(FIELDS), 2):
                    ins.store2_if(lane == 0, smem + self.offset["share"] + i * 4, mine[i : i + 2])
            cute.arch.sync_threads()
            flags = counters + GATHER_COUNTERS
            if warp < config.consumers:
                if cutlass.const_expr(not config.few):
                    if self._late(smem) > 0:
                        self.gather(smem, a_data, a_scale, token_of, weight_of, gathered, counters, tokens, lane)
                self.consume(smem, barriers, tokens, hidden, sums, flags, warp, lane)
            elif warp == config.consumers:
                if cutlass.const_expr(config.few):
                    # Weights need not wait for the listing kernel.
                    cute.arch.griddepcontrol_wait()
                else:
                    tasks = self._late(smem) * _STRIPES
                    while ins.counted((counters + 1).toint()) < tasks:
                        pass
                    ins.fence_async()
                self.fetch(smem, gathered, tokens, lane)
            elif lane == 0:
                self.load(smem, w_data, w_scale, hidden)
            cute.arch.sync_threads()
            # No CTA may leave while its peer still signals its barriers.
            if cutlass.const_expr(config.cluster > 1):
                cute.arch.cluster_arrive()
            if self._mine(smem, "part") == 0:
                if self._mine(smem, "left") > 0:
                    self._add(smem, sums, flags, tokens, hidden, warp, lane)
                self._store(smem, out, tokens, hidden, warp, lane)
            if cutlass.const_expr(config.cluster > 1):
                cute.arch.cluster_wait()

    def _strips(self, hidden: Int32) -> Int32:
        """Whole clusters: prepared weights are padded to 128 rows, as many as the tallest cluster takes."""
        return cute.ceil_div(hidden, self.config.rows * self.config.cluster) * self.config.cluster

    def _mine(self, smem: Int32, field: str) -> Int32:
        """Of this CTA's share (`share.py`)."""
        return ins.load1(smem + self.offset["share"] + FIELDS.index(field) * 4)

    def _late(self, smem: Int32) -> Int32:
        """Experts whose activations are still to be gathered."""
        return ins.load1(smem + self.offset["totals"] + 4)

    def _barrier(self, barriers: cute.Pointer, kind: str, index) -> cute.Pointer:
        return barriers + (self.barrier[kind] + index)

    @cute.jit
    def _start_barriers(self, barriers: cute.Pointer, thread: Int32):
        blocks = self.config.blocks
        arrivals = {"weights_empty": blocks, "slot_empty": blocks * self.config.cluster}
        kinds = list(self.barrier)
        # One takes a warp 45 cycles: many are divided over all warps, though their fences take 1.3 us (H100, 2026-11-26).
        step = self.config.threads if self.many_barriers else 1
        if thread < step:
            for kind, following in zip(kinds, kinds[1:]):
                begin, end, count = self.barrier[kind], self.barrier[following], arrivals.get(kind, 1)
                if cutlass.const_expr(self.many_barriers):
                    for i in cutlass.range(begin + thread, end, step, unroll=1):
                        cute.arch.mbarrier_init(barriers + i, count)
                else:
                    for i in cutlass.range_constexpr(begin, end):
                        cute.arch.mbarrier_init(barriers + i, count)
            cute.arch.mbarrier_init_fence()
        # Awaited before anything is copied: a peer's copies and arrivals need barriers that exist. The fence suffices.
        if cutlass.const_expr(self.config.cluster > 1):
            cute.arch.cluster_arrive_relaxed()

    @cute.jit
    def _count(self, smem: Int32, alpha: cute.Pointer, tokens: Int32, thread: Int32):
        """Nonzeros of alpha of each expert, in the table's first words."""
        experts = self.config.experts
        for e in cutlass.range(thread, experts, self.config.threads, unroll=1):
            places = [Int64((alpha + (m * experts + e)).toint()) for m in range(self.config.tokens)]
            loaded = [ins.load_global1_if(m < tokens, place) for m, place in enumerate(places)]
            ins.store1(smem + self.offset["table"] + e * 8, sum(Int32(bits & 0x7FFFFFFF != 0) for bits in loaded))

    @cute.jit
    def _list_experts(self, smem: Int32, counts: cute.Pointer, tokens: Int32, lane: Int32):
        """The table of selected experts, (expert, tokens << 16; groups of the experts before), two entries for none, and
        totals: selected experts, which are returned as well, and those whose activations are still to be gathered."""
        experts = self.config.experts
        table = smem + self.offset["table"]
        used, groups, late = Int32(0), Int32(0), Int32(0)
        for first in cutlass.range(0, experts, 8 * 32, unroll=1):
            mine = first + lane * 8
            if cutlass.const_expr(self.config.few):
                loaded = [ins.load1(table + cutlass.min(mine + i, experts - 1) * 8) for i in range(8)]
                cute.arch.sync_warp()  # entries take the counts' place
            else:
                loaded = []
                for i in (0, 4):
                    loaded += ins.load_global4(Int64((counts + (mine + i)).toint()), mine + i < experts, Int32)
            listed = [count * Int32(mine + i < experts) for i, count in enumerate(loaded)]
            # Selected experts and their groups in one scan: at most 256, and 64 each.
            own = Int32(0)
            for count in listed:
                late += Int32(is_late(count, tokens))
                own += (Int32(count > 0) << 16) + (count + GROUP - 1) // GROUP
            scan = own
            for distance in (1, 2, 4, 8, 16):
                below = cute.arch.shuffle_sync_up(scan, distance, mask_and_clamp=0)
                scan += below * Int32(lane >= distance)
            entry, before = used + (scan - own >> 16), groups + (scan - own & 0xFFFF)
            for i, count in enumerate(listed):
                ins.store2_if(count > 0, table + entry * 8, (mine + i | (count << 16), before))
                entry += Int32(count > 0)
                before += (count + GROUP - 1) // GROUP
            total = cute.arch.shuffle_sync(scan, 31)
            used += total >> 16
            groups += total & 0xFFFF
        late = cute.arch.warp_redux_sync(late, "add")
        ins.store2_if(lane < 2, table + (used + lane) * 8, (Int32(0), groups))
        ins.store2_if(lane == 0, smem + self.offset["totals"], (used, late))
        return used

    @cute.jit
    def gather(
        self, smem: Int32, a_data: cute.Pointer, a_scale: cute.Pointer, token_of: cute.Pointer, weight_of: cute.Pointer,
        gathered: cute.Pointer, counters: cute.Pointer, tokens: Int32, lane: Int32,
    ):  # fmt: skip
        """A consumer warp: slots of late experts, until no CTA has one left; a task is every so many of an expert's.

        Tasks are taken, never assigned: they get done however many CTAs a shared GPU has room for at once.
        """
        config = self.config
        wide, used = cute.ceil_div(tokens, 16) * 16, ins.load1(smem + self.offset["totals"])
        task = ins.take(counters.toint(), lane)
        while task < used * _STRIPES:
            packed = ins.load1(smem + self.offset["table"] + task // _STRIPES * 8)
            expert, count = packed & 0xFFFF, packed >> 16
            if is_late(count, tokens):
                for i in cutlass.range(
                    task % _STRIPES, (count + GROUP - 1) // GROUP * config.chunks, _STRIPES, unroll=1
                ):
                    first, chunk = i // config.chunks * GROUP, i % config.chunks
                    left = count - first
                    row = expert * wide + first
                    listed, at = lane % GROUP < left, Int64(row + lane % GROUP) * 4
                    token = ins.load_global1_if(listed, Int64(token_of.toint()) + at)
                    token = ins.select(Int32(listed), token, Int32(-1))
                    weight = ins.load_global1_if(listed, Int64(weight_of.toint()) + at)
                    slot = Int64(gathered.toint()) + (Int64(row // GROUP) * config.chunks + chunk) * SLOT_BYTES
                    gather_slot(
                        a_data, a_scale, token, weight, slot, expert * config.chunks + chunk, config.experts * config.chunks,
                        config.a_swizzled,
                    )  # fmt: skip
                cute.arch.sync_warp()
                if lane == 0:
                    ins.count_up((counters + 1).toint())
            task = ins.take(counters.toint(), lane)

    @cute.jit
    def load(self, smem: Int32, w_data: cute.Pointer, w_scale: cute.Pointer, hidden: Int32):
        """One lane: the weights of item after item, of strip after strip.

        Memory waits for this lane where stages are few, so that only copies come behind the wait for a free one: with what
        else it takes M = 32, 64, 128 and 192 took 56, 75, 84 and 86 us instead of 52, 69, 78 and 83 (H200, 2026-11-26).
        """
        config = self.config
        smem = ins.fixed(smem)
        table, weights = smem + self.offset["table"], smem + self.offset["weights"]
        full, empty = (smem + self.offset["barriers"] + 8 * self.barrier[k] for k in ("weights_full", "weights_empty"))
        data_bytes, scale_bytes = config.blocks * BLOCK_DATA, config.blocks * BLOCK_SCALES
        blocks, once = Int64(cute.ceil_div(hidden, 128) * 4), Int64(ins.EVICT_FIRST)
        first, end, strip = (self._mine(smem, field) for field in ("first", "end", "strip"))
        # The stage's place, the parity of its last turn, whether it is free, and the barrier that tells of its weights.
        place, turn, free, mark = Int32(0), Int32(1), Int32(1), Int32(0)
        for done in cutlass.range(self._mine(smem, "rounds"), unroll=1):
            row_block = Int64((strip + done * config.cluster) * config.blocks)
            entry, chunk = first // config.chunks, first % config.chunks
            expert = ins.load1(table + entry * 8) & 0xFFFF
            for _ in cutlass.range(first, end, unroll=1):
                block = blocks * (expert * config.chunks + chunk) + row_block
                data, scale = Int64(w_data.toint()) + block * BLOCK_DATA, Int64(w_scale.toint()) + block * BLOCK_SCALES
                target, barrier = weights + place * config.stage_bytes, full + mark * 8
                if free == 0:
                    ins.wait(empty + place * 8, turn)
                ins.expect_bytes(barrier, Int32(config.stage_bytes))
                ins.copy_bulk(target, data, Int32(data_bytes), barrier, policy=once)
                ins.copy_bulk(target + data_bytes, scale, Int32(scale_bytes), barrier, policy=once)
                place += 1
                mark += 1
                if place == config.stages:
                    place, turn = Int32(0), turn ^ 1
                if mark == config.stage_barriers:
                    mark = Int32(0)
                chunk += 1
                if chunk == config.chunks:
                    chunk, entry = Int32(0), entry + 1
                    expert = ins.load1(table + entry * 8) & 0xFFFF
                free = ins.completed(empty + place * 8, turn)

    @cute.jit
    def fetch(self, smem: Int32, gathered: cute.Pointer, tokens: Int32, lane: Int32):
        """One warp: copy slot after slot of gathered activations, as many tokens as there are, for each strip anew.

        The CTAs of a cluster take turns at copying, each into all of them. A slot is free when the consumers of all
        have released it. Each CTA expects its bytes for itself; a peer's copy may land before that.

        Where slots are many the kernel waits for this warp, so that one must cost it little: every lane finds one of 32, then
        one lane copies them.
        """
        config = self.config
        smem = ins.fixed(smem)
        requests = smem + self.offset["requests"]
        eights = cute.ceil_div(tokens, 16) * (16 // GROUP)
        first = self._mine(smem, "first")
        origin, end = self._first_slot(smem, first)[0], self._first_slot(smem, self._mine(smem, "end"))[0]
        for done in cutlass.range(self._mine(smem, "rounds"), unroll=1):
            offset, entry = done * (end - origin) - origin, first // config.chunks
            for base in cutlass.range(origin, end, 32, unroll=1):
                slot = base + lane
                entry = self._entry(smem, entry, base, lane)
                packed, before = ins.load2(smem + self.offset["table"] + entry * 8)
                count, eight, chunk = packed >> 16, slot - before * config.chunks, Int32(0)
                if cutlass.const_expr(config.chunks > 1):
                    groups = cutlass.max(count + GROUP - 1 >> 3, 1)  # none behind the last expert
                    chunk = Int32(Uint32(eight) // Uint32(groups))
                    eight -= chunk * groups
                number = ((packed & 0xFFFF) * eights + eight) * config.chunks + chunk
                size = LIST_BYTES + cutlass.min(count - eight * GROUP, GROUP) * TOKEN_BYTES
                place, turn = self._in_ring(slot + offset, config.slots)
                if cutlass.const_expr(self.many_barriers):
                    place |= self._in_ring(slot + offset, config.slot_barriers)[0] << 16
                ins.store4(requests + lane * 16, (number, size, place, turn))
                cute.arch.sync_warp()
                if lane == 0:
                    self._copy_slots(smem, requests, Int64(gathered.toint()), cutlass.min(end - base, 32))
                cute.arch.sync_warp()
                entry = cute.arch.shuffle_sync(entry, 31)

    @cute.jit
    def _copy_slots(self, smem: Int32, requests: Int32, gathered: Int64, number: Int32):
        """One lane: that many slots, asked for 16 bytes apart: number in memory, bytes, place in the ring, parity of its turn.

        Of many barriers the slot's comes above its place. What takes long begins one slot ahead.
        """
        config = self.config
        full, empty = (smem + self.offset["barriers"] + 8 * self.barrier[k] for k in ("slot_full", "slot_empty"))
        rank = cute.arch.block_idx()[0] % config.cluster
        slot, size, mark, turn = ins.load4(requests)
        place, mark = self._unpacked(mark)
        free = Int32(0)
        for following in cutlass.range(1, number + 1, unroll=1):
            if free == 0:
                ins.wait(empty + place * 8, turn ^ 1)
            target, barrier, here = smem + self.offset["activations"] + place * SLOT_BYTES, full + mark * 8, place
            source, copied = gathered + Int64(slot) * SLOT_BYTES, size
            ins.expect_bytes(barrier, size)
            slot, size, mark, turn = ins.load4(requests + cutlass.min(following, number - 1) * 16)
            place, mark = self._unpacked(mark)
            free = ins.completed(empty + place * 8, turn ^ 1)
            if here % config.cluster == rank:
                ins.copy_bulk(target, source, copied, barrier, config.cluster)

    def _unpacked(self, packed: Int32) -> tuple:
        """Place in the ring, barrier."""
        return (packed & 0xFFFF, packed >> 16) if self.many_barriers else (packed, packed)

    def _entry(self, smem: Int32, entry: Int32, base: Int32, lane: Int32) -> Int32:
        """The table's entry with slot `base + lane`, where `entry` is the one with slot `base`, or the one before that."""
        used = ins.load1(smem + self.offset["totals"])
        later = cutlass.min(entry + 1 + lane, used)
        begins = ins.load1(smem + self.offset["table"] + later * 8 + 4) * self.config.chunks - base
        starts = (Int32(1) << (begins & 31)) * Int32((begins >= 0) & (begins < 32))
        starts = cute.arch.warp_redux_sync(starts, "or")
        return entry + cute.arch.popc(starts & ((Int32(2) << lane) - 1))

    @cute.jit
    def consume(
        self, smem: Int32, barriers: cute.Pointer, tokens: Int32, hidden: Int32, sums: cute.Pointer, flags: cute.Pointer,
        warp: Int32, lane: Int32,
    ):  # fmt: skip
        """Every `phases`-th item: 32 rows of its weights times all of its tokens, added to the sums in order.

        The sums of a part that is not the first are left to the CTA that has that.
        """
        config = self.config
        block, phase = warp % config.blocks, warp // config.blocks
        before_me = (phase + config.phases - 1) % config.phases * config.blocks + block
        after_me = (phase + 1) % config.phases * config.blocks + block
        weights = smem + self.offset["weights"] + block * BLOCK_DATA + lane * 16
        g, t = lane // 4, lane % 4
        activations = smem + self.offset["activations"]
        pieces = activations + (LIST_BYTES + g * TOKEN_BYTES + t * 16)
        odd = g % 2 * 64
        # A lane's offsets, in registers: the compiler else makes them anew for each pass.
        places = Places(
            ins.fixed(activations + t * 8),
            (ins.fixed(pieces + odd), ins.fixed(pieces + (64 - odd))),
            ins.fixed(smem + self.offset["sums"] + block * 128),
            ins.fixed(g * 16),
        )
        scale_offset = config.blocks * BLOCK_DATA - block * (BLOCK_DATA - BLOCK_SCALES)
        # Items and slots count from the CTA's first. What an item needs besides its data is found while the one before it is
        # multiplied: on the way it took 1000 of 3300 cycles, and the kernel waited for its consumers (H200, 2026-11-26).
        begin = self._mine(smem, "first")
        last = self._mine(smem, "end") - begin
        loaded, loaded_turn, before_turn, start = phase, Int32(0), Int32(phase == 0), phase
        for done in cutlass.range(self._mine(smem, "rounds"), unroll=1):
            origin, end = self._first_slot(smem, begin)[0], self._first_slot(smem, begin + last)[0]
            offset = done * (end - origin) - origin
            slot, members = self._first_slot(smem, begin + cutlass.min(start, last))
            mark, turn = self._in_ring(slot + offset, config.slot_barriers)
            for item in cutlass.range(start, last, config.phases, unroll=1):
                cute.arch.mbarrier_wait(self._barrier(barriers, "weights_full", loaded), loaded_turn)
                stage = self._place(loaded, config.stages, config.stage_barriers)
                source = weights + stage * config.stage_bytes
                words = [[ins.load4(source + (2 * q + half) * 512) for half in range(2)] for q in range(4)]
                scales = ins.load4(source + scale_offset)
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(self._barrier(barriers, "weights_empty", stage))
                here, here_turn, left = mark, turn, members
                slot, members = self._first_slot(smem, begin + cutlass.min(item + config.phases, last))
                mark, turn = self._in_ring(slot + offset, config.slot_barriers)

                if cutlass.const_expr(config.ordered):
                    if item > 0:
                        cute.arch.mbarrier_wait(self._barrier(barriers, "acquired", before_me), before_turn)
                waits = Int32(item > 0)
                while left > 0:
                    here, here_turn, left = self._pass(
                        smem, barriers, 0, words, scales, places, here, here_turn, left, waits, warp, lane
                    )
                    waits = Int32(0)
                if item + 1 < last:
                    cute.arch.barrier_arrive(barrier_id=_turn(after_me), number_of_threads=64)
                loaded += config.phases
                if loaded >= config.stage_barriers:
                    loaded, loaded_turn = loaded - config.stage_barriers, loaded_turn ^ 1
                before_turn ^= 1
            start += (last - start + config.phases - 1) // config.phases * config.phases - last
            if self._mine(smem, "part") > 0:
                self._leave(smem, sums, flags, tokens, hidden, done, warp, lane)

    def _first_slot(self, smem: Int32, item: Int32) -> tuple:
        """Of an item, or behind the last: the number of its first slot, its tokens."""
        chunks = self.config.chunks
        entry = Uint32(item) // chunks
        packed, before = ins.load2(smem + self.offset["table"] + Int32(entry) * 8)
        members = packed >> 16
        return before * chunks + (item - Int32(entry) * chunks) * (members + GROUP - 1 >> 3), members

    def _in_ring(self, slot: Int32, ring: int) -> tuple:
        """Place of a slot in a ring of that size, and the parity of its turn."""
        turn = Int32(Uint32(slot) // ring)
        return slot - turn * ring, turn & 1

    def _after(self, mark: Int32, turn: Int32, slots: int) -> tuple:
        """A slot's barrier and turn so many slots later, at most a ring."""
        if slots == 0:
            return mark, turn
        ring = self.config.slot_barriers
        over = Int32(mark + slots >= ring)
        return mark + slots - over * ring, turn ^ over

    def _place(self, mark: Int32, ring: int, barriers: int) -> Int32:
        """The place in the ring of that size of what a barrier of so many tells of."""
        return self._in_ring(mark, ring)[0] if barriers > ring else mark

    @cute.jit
    def _pass(
        self, smem, barriers, level: cutlass.Constexpr, words, scales, places, mark, turn, members, waits, warp, lane
    ):  # fmt: skip
        """The narrowest pass, of the widths from `level` on, that holds `members`, an item's tokens from the slot at `mark` on, or
        the widest. Returns the slot behind it, its turn, and the tokens from there on."""
        config = self.config
        width, narrower = config.widths[level], (0, *config.widths)[level]
        # Only the widest leads to another pass, and each knows how many of its slots are full: all that the narrower one takes.
        if cutlass.const_expr(level + 1 == len(config.widths)):
            self._multiply(
                smem, barriers, width, narrower, words, scales, places, mark, turn, members, waits, warp, lane
            )
            mark, turn = self._after(mark, turn, width)
            members -= width * GROUP
        else:
            if members <= width * GROUP:
                self._multiply(
                    smem, barriers, width, narrower, words, scales, places, mark, turn, members, waits, warp, lane
                )
                members = Int32(0)
            else:
                mark, turn, members = self._pass(
                    smem, barriers, level + 1, words, scales, places, mark, turn, members, waits, warp, lane
                )
        return mark, turn, members

    @cute.jit
    def _multiply(
        self, smem, barriers, width: cutlass.Constexpr, full: cutlass.Constexpr, words, scales, places, mark, turn, members,
        waits, warp, lane,
    ):  # fmt: skip
        """Up to `width` slots of an item, from a barrier on.

        Args:
            full: slots that have eight tokens; the one behind them has one at least.
            places: of the lane.
            members: tokens of the item from there on.
            waits: whether these are its first, and another item was before.
        """
        config = self.config
        rings = []
        for i in cutlass.range_constexpr(width):
            at, at_turn = self._after(mark, turn, i)
            rings.append(self._place(at, config.slots, config.slot_barriers))
            if cutlass.const_expr(i <= full):
                cute.arch.mbarrier_wait(self._barrier(barriers, "slot_full", at), at_turn)
            else:
                if i * GROUP < members:
                    cute.arch.mbarrier_wait(self._barrier(barriers, "slot_full", at), at_turn)
        if cutlass.const_expr(config.ordered):
            if members <= width * GROUP:
                if lane == 0:
                    cute.arch.mbarrier_arrive(self._barrier(barriers, "acquired", warp))
        slots = [ring * SLOT_BYTES for ring in rings]
        present = [None if i < full else lane < (members - i * GROUP) * 4 for i in range(width)]
        zero = Float32(0.0)
        sums = [[(zero, zero, zero, zero) for _ in range(2)] for _ in range(width)]
        right = [(Int32(0), Int32(0), Int32(0), Int32(0)) for _ in range(width)]
        for q in cutlass.range_constexpr(4):
            factors = [ins.scale_pair(scales[q], 8 * half) for half in range(2)]
            for pair in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(width):
                    at = places.pieces[pair] + slots[i] + q * 128
                    right[i] = ins.load4_if(present[i], at, right[i])
                for step in cutlass.range_constexpr(2):
                    for half in cutlass.range_constexpr(2):
                        operand = ins.decode_weights(words[q][half][2 * pair + step], factors[half])
                        for i in cutlass.range_constexpr(width):
                            sums[i][half] = ins.multiply(sums[i][half], operand, right[i][2 * step : 2 * step + 2])
        tokens, weights = [], []
        for i in cutlass.range_constexpr(width):
            header = places.lists + slots[i]
            if cutlass.const_expr(i <= full):
                tokens.append(ins.load2(header))
                weights.append(ins.load2(header + 32, Float32))
            else:
                listed = Boolean(i * GROUP < members)
                tokens.append(ins.load2_if(listed, header, (Int32(-1), Int32(-1))))
                weights.append(ins.load2_if(listed, header + 32, (zero, zero)))
        cute.arch.sync_warp()
        for i in cutlass.range_constexpr(width):
            # To all CTAs of the cluster, any of which may fill the slot next.
            if (lane < config.cluster) & (True if i <= full else i * GROUP < members):
                peer = lane if config.cluster > 1 else None
                cute.arch.mbarrier_arrive(self._barrier(barriers, "slot_empty", rings[i]), peer)
        targets, old = [], []
        for i in cutlass.range_constexpr(width):
            for j in cutlass.range_constexpr(2):
                token = tokens[i][j]
                # A token's 32 rows fill all banks once; which lane meets which of them changes with the token.
                at = places.sums + token * self.row_bytes + (places.rows ^ ((token & 6) * 16))
                targets.append((None if i < full else token >= 0, at))
        if waits > 0:
            cute.arch.barrier(barrier_id=_turn(warp), number_of_threads=64)
        # The other consumers wait for this: all loads first, then all additions.
        for wanted, at in targets:
            old.append(ins.load4_if(wanted, at, (zero, zero, zero, zero)))
        for i in cutlass.range_constexpr(width):
            low, high = sums[i]
            for j in cutlass.range_constexpr(2):
                wanted, at = targets[2 * i + j]
                added = zip(old[2 * i + j], (low[j], low[2 + j], high[j], high[2 + j]))
                ins.store4_if(wanted, at, tuple(x + weights[i][j] * y for x, y in added))

    @cute.jit
    def _leave(self, smem, sums, flags, tokens, hidden, done, warp, lane):
        """All consumers: the sums of a part that is not the first, to the CTA that has that; here they become zero."""
        threads = self.config.consumers * 32
        size, stride = tokens * self.row_bytes, threads * 16
        strip = self._mine(smem, "strip") + done * self.config.cluster
        target, zero = self._part(sums, self._mine(smem, "part") - 1, strip, hidden, size), Float32(0.0)
        cute.arch.barrier(barrier_id=_SUMS, number_of_threads=threads)
        for at in cutlass.range((warp * 32 + lane) * 16, size, stride, unroll=4):
            here = smem + self.offset["sums"] + at
            ins.store_global4(target + at, ins.load4(here, Float32))
            ins.store4(here, (zero, zero, zero, zero))
        cute.arch.barrier(barrier_id=_SUMS, number_of_threads=threads)
        # The last consumer waits for what all of them stored; the others go on.
        if warp == self.config.consumers - 1:
            if cutlass.const_expr(self.config.few):
                # The listing kernel makes the counters zero, and a part without items has not waited for it yet.
                cute.arch.griddepcontrol_wait()
            if lane == 0:
                ins.count_up((flags + strip).toint())

    @cute.jit
    def _add(self, smem, sums, flags, tokens, hidden, warp, lane):
        """The sums that other CTAs left, in their order."""
        size, stride = tokens * self.row_bytes, self.config.threads * 16
        strip, left, zero = self._mine(smem, "strip"), self._mine(smem, "left"), Float32(0.0)
        if warp == 0:
            while ins.counted((flags + strip).toint()) < left:
                pass
        cute.arch.sync_threads()
        for other in cutlass.range(left, unroll=1):
            source = self._part(sums, other, strip, hidden, size)
            for first in cutlass.range((warp * 32 + lane) * 16, size, 8 * stride, unroll=1):
                places = [(first + i * stride < size, first + i * stride) for i in range(8)]
                theirs = [ins.load_global4(source + at, wanted) for wanted, at in places]
                for values, (wanted, at) in zip(theirs, places):
                    here = smem + self.offset["sums"] + at
                    mine = ins.load4_if(wanted, here, (zero, zero, zero, zero))
                    ins.store4_if(wanted, here, tuple(x + y for x, y in zip(mine, values)))
        cute.arch.sync_threads()

    def _part(self, sums, index, strip, hidden, size) -> Int64:
        """Address of a part's sums of a strip."""
        return Int64(sums.toint()) + Int64(index * self._strips(hidden) + strip) * size

    @cute.jit
    def _store(self, smem: Int32, out: cute.Pointer, tokens: Int32, hidden: Int32, warp: Int32, lane: Int32):
        """The sums, times 2^16, in the output's type: a warp writes one token's rows at a time."""
        config = self.config
        first_row = self._mine(smem, "strip") * config.rows
        # Rows g, g + 8, g + 16 and g + 24 of a block lie side by side.
        piece = lane % 8 * 16
        word = ((lane // 16) * 2 + (lane // 8) % 2) * 4
        for token in cutlass.range(warp, tokens, config.threads // 32, unroll=4):
            at = smem + self.offset["sums"] + token * self.row_bytes + (piece ^ ((token & 6) * 16)) + word
            for block in cutlass.range_constexpr(config.blocks):
                column = first_row + block * BLOCK_ROWS + lane
                value = ins.load1(at + block * 128, Float32) * 65536.0
                if column < hidden:
                    target = cute.make_tensor(out + (Int64(token) * hidden + column), cute.make_layout(1))
                    target[0] = value.to(self.out_type)
