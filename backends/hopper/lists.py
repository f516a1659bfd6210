"""The first kernel of a call on SM 9.0: what is to do, read from alpha, and the activations, before weights ask for the
memory's whole rate.

A block lists the tokens of an expert and gathers a chunk of them for `stream.py` (behind the weights that took 6 us, H200,
2026-11-26), or decodes some of what `dense.py` comes to need first. A call uses only one of both.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.memory import SmemAllocator

from backends.hopper import instructions as ins
from backends.hopper.decode import decode_task
from backends.hopper.dense_plan import AHEAD, CHUNK, TASK_TOKENS
from backends.hopper.gather import gather_slot, is_late
from backends.hopper.stream_plan import GROUP, SLOT_BYTES
from backends.hopper.tactic import PASS_TOKENS, ListConfig
from backends.hopper.work import Work

_WARPS = 4
# Loads of alpha by a lane: for all tokens of a pass, rounded up to whole tiles of the dense kernel.
_LOADS = 5


class ListKernel:
    """One instance per compiled kernel; sizes are run-time arguments."""

    #: Integers of `__call__`.
    INTEGERS = 17
    #: Types and alignments in bytes of the pointers of `__call__`.
    pointers = (
        (Int32, 4), (Int32, 16), (cutlass.Uint8, 4), (Int32, 4), (Int32, 4), (Int32, 4), (Int32, 4), (cutlass.Uint8, 16),
        (cutlass.Float16, 16), (Int32, 4),
    )  # fmt: skip

    def __init__(self, config: ListConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        alpha: cute.Pointer,
        a_data: cute.Pointer,
        a_scale: cute.Pointer,
        counts: cute.Pointer,
        token_of: cute.Pointer,
        weight_of: cute.Pointer,
        alpha_t: cute.Pointer,
        gathered: cute.Pointer,
        first_acts: cute.Pointer,
        counters: cute.Pointer,
        tokens: Int32,
        experts: Int32,
        expert_chunks: Int32,
        before: Int32,
        zeros: Int32,
        row_tiles: Int32,
        chunks: Int32,
        clusters: Int32,
        full: Int32,
        streamed: Int32,
        aligned: Int32,
        cost: Int32,
        slots: Int32,
        columns: Int32,
        walks: Int32,
        steps: Int32,
        ahead: Int32,
        stream,
    ):
        """Launch on `stream`.

        Args:
            alpha: float32 [tokens, experts], like all float32 here as its bits.
            a_data: [tokens, K/8] words.
            counts: int32 [experts], nonzeros of alpha of each.
            token_of, weight_of: int32 and float32 [experts, tokens rounded up to 16]; row e holds counts[e] tokens in
                ascending order, and their alpha.
            alpha_t: float32 [experts, columns], alpha transposed, then zeros.
            gathered: slots (`gather`) [experts, eights of tokens, chunks of an expert], but for experts that are late.
            first_acts: `DenseTiling.ahead_bytes`, activations as in `decode`, chunks in the order in which they are needed.
            counters: int32 [zeros], of the kernels that follow: zero, but for the dense kernel's of what is decoded ahead.
            expert_chunks: chunks of an expert.
            before: counters in front of the dense kernel's.
            others: `DenseTiling.work`.
        """
        work = Work(row_tiles, chunks, clusters, full, streamed, aligned, cost, slots, columns, walks, steps, ahead)
        tasks = ahead * (columns // TASK_TOKENS)
        self.kernel(
            alpha, a_data, a_scale, counts, token_of, weight_of, alpha_t, gathered, first_acts, counters, tokens, experts,
            expert_chunks, before, zeros, work,
        ).launch(
            grid=(chunks + cute.ceil_div(tasks, _WARPS), 1, 1), block=(32 * _WARPS, 1, 1), stream=stream, use_pdl=True
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, alpha: cute.Pointer, a_data: cute.Pointer, a_scale: cute.Pointer, counts: cute.Pointer, token_of: cute.Pointer,
        weight_of: cute.Pointer, alpha_t: cute.Pointer, gathered: cute.Pointer, first_acts: cute.Pointer,
        counters: cute.Pointer, tokens: Int32, experts: Int32, expert_chunks: Int32, before: Int32, zeros: Int32, work: Work,
    ):  # fmt: skip
        cute.arch.griddepcontrol_wait()
        # Not before: the kernels that follow look at alpha as soon as they start.
        cute.arch.griddepcontrol_launch_dependents()
        warp, block = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.block_idx()[0]
        mine = SmemAllocator().allocate(8 * PASS_TOKENS + 4 * _WARPS * _LOADS, 16).toint()
        if block < work.chunks:
            self.list_tokens(
                mine, alpha, a_data, a_scale, counts, token_of, weight_of, alpha_t, gathered, tokens, experts, block,
                expert_chunks, work, warp,
            )  # fmt: skip
        else:
            blocks = work.columns // TASK_TOKENS
            number = (block - work.chunks) * _WARPS + warp
            chunk, needed, first = work.task(number)
            if needed & (number < work.ahead * blocks):
                line = Int64(work.columns) * (CHUNK * 2)
                acts = first_acts.toint() + Int64(number // blocks - chunk) * line
                decode_task(
                    a_data, a_scale, acts, first, tokens, work.columns, chunk, work.chunks, self.config.a_swizzled
                )
        self.reset(counters, before, zeros, work)

    @cute.jit
    def list_tokens(
        self, mine, alpha, a_data, a_scale, counts, token_of, weight_of, alpha_t, gathered, tokens, experts, chunk, expert_chunks,
        work, warp,
    ):  # fmt: skip
        """A block: the tokens of an expert, and a chunk of them.

        Each warp reads 32 tokens of 128, one sector each: all of them in every warp took the loads four times (lanes that
        read a column of alpha are served one after the other).
        """
        lane = cute.arch.lane_idx()
        expert = chunk // expert_chunks
        writes = chunk % expert_chunks == 0
        wide = cute.ceil_div(tokens, 16) * 16
        row = Int64(expert) * (wide * 4)
        source = Int64(alpha.toint()) + Int64(expert) * 4
        column = Int64(alpha_t.toint()) + Int64(expert) * work.columns * 4
        rows = [32 * (warp + _WARPS * i) + lane for i in range(_LOADS)]
        loaded = [ins.load_global1_if(m < tokens, source + Int64(m) * experts * 4) for m in rows]
        ballots = [cute.arch.vote_ballot_sync(bits & 0x7FFFFFFF != 0) for bits in loaded]
        totals = mine + 8 * PASS_TOKENS
        for i, ballot in enumerate(ballots):
            ins.store1_if(lane == 0, totals + (warp + _WARPS * i) * 4, cute.arch.popc(ballot))
        cute.arch.sync_threads()
        own = ins.load1(totals + cutlass.min(lane, _WARPS * _LOADS - 1) * 4)
        scan = own * Int32(lane < _WARPS * _LOADS)
        for distance in (1, 2, 4, 8, 16):
            below = cute.arch.shuffle_sync_up(scan, distance, mask_and_clamp=0)
            scan += below * Int32(lane >= distance)
        count = cute.arch.shuffle_sync(scan, 31)
        for i, (m, bits, ballot) in enumerate(zip(rows, loaded, ballots)):
            used = bits & 0x7FFFFFFF != 0
            before = cute.arch.shuffle_sync(scan - own, warp + _WARPS * i)
            place = before + cute.arch.popc(ballot & ((Int32(1) << lane) - 1))
            ins.store2_if(used, mine + place * 8, (m, bits))
            ins.store_global1_if(writes & (m < work.columns), column + m * 4, bits)
            ins.store_global1_if(writes & used, Int64(token_of.toint()) + row + place * 4, m)
            ins.store_global1_if(writes & used, Int64(weight_of.toint()) + row + place * 4, bits)
        ins.store_global1_if(writes & (warp == 0) & (lane == 0), Int64((counts + expert).toint()), count)
        cute.arch.sync_threads()
        if ~is_late(count, tokens):
            for first in cutlass.range(warp * GROUP, count, _WARPS * GROUP, unroll=1):
                place = first + lane % GROUP
                token, weight = ins.load2_if(place < count, mine + place * 8, (Int32(-1), Int32(0)))
                eight = Int64(expert) * (wide // GROUP) + first // GROUP
                slot = Int64(gathered.toint()) + (eight * expert_chunks + chunk % expert_chunks) * SLOT_BYTES
                gather_slot(a_data, a_scale, token, weight, slot, chunk, work.chunks, self.config.a_swizzled)

    @cute.jit
    def reset(self, counters, before, zeros, work):
        """All counters, by all threads."""
        thread = cute.arch.block_idx()[0] * (32 * _WARPS) + cute.arch.thread_idx()[0]
        threads = cute.arch.grid_dim()[0] * (32 * _WARPS)
        taken = before + work.chunks
        for i in cutlass.range(thread, zeros, threads, unroll=1):
            value = Int32(0)
            if i == taken:
                value = work.ahead * (work.columns // TASK_TOKENS)
            ins.store_global1_if((i < before) | (i >= taken), Int64((counters + i).toint()), value)
        for place in cutlass.range(thread, work.walks * work.steps, threads, unroll=1):
            chunk, needed = work.demanded(place)
            value = Int32(0)
            if place < work.ahead:
                value = AHEAD + place
            ins.store_global1_if(needed, Int64((counters + before + chunk).toint()), value)
