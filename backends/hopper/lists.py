"""The first kernel of a call on SM 9.0: what is to do, read from alpha, and the first activations of a dense call.

Every warp either lists the tokens of an expert or decodes what `dense.py` comes to need first, which takes as long and is
not used in a routed call.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from backends.hopper import instructions as ins
from backends.hopper.decode import decode_task
from backends.hopper.dense_plan import TASK_TOKENS
from backends.hopper.tactic import ListConfig
from backends.hopper.work import Work

_WARPS = 8
# Loads of alpha that a lane has on its way.
_LOADS = 8


class ListKernel:
    """One instance per compiled kernel; sizes are run-time arguments."""

    #: Integers of `__call__`.
    INTEGERS = 16
    #: Types and alignments in bytes of the pointers of `__call__`.
    pointers = (
        (Int32, 4), (Int32, 16), (cutlass.Uint8, 4), (Int32, 4), (Int32, 4), (Int32, 4), (Int32, 4), (cutlass.Float16, 16),
        (Int32, 4),
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
        acts: cute.Pointer,
        counters: cute.Pointer,
        tokens: Int32,
        experts: Int32,
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
            acts: `DenseTiling.acts_bytes`, of which the first `ahead` places in the order of need are decoded.
            counters: int32 [zeros], zero but for those of the dense kernel that say so.
            before: of them, those in front of the dense kernel's.
            others: `DenseTiling.work`.
        """
        work = Work(row_tiles, chunks, clusters, full, streamed, aligned, cost, slots, columns, walks, steps, ahead)
        warps = cute.ceil_div(experts, _WARPS) * _WARPS + ahead * (columns // TASK_TOKENS)
        self.kernel(
            alpha, a_data, a_scale, counts, token_of, weight_of, alpha_t, acts, counters, tokens, experts, before, zeros, work
        ).launch(
            grid=(cute.ceil_div(warps, _WARPS), 1, 1), block=(32 * _WARPS, 1, 1), stream=stream, use_pdl=True
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, alpha: cute.Pointer, a_data: cute.Pointer, a_scale: cute.Pointer, counts: cute.Pointer, token_of: cute.Pointer,
        weight_of: cute.Pointer, alpha_t: cute.Pointer, acts: cute.Pointer, counters: cute.Pointer, tokens: Int32,
        experts: Int32, before: Int32, zeros: Int32, work: Work,
    ):  # fmt: skip
        # In this order: no kernel of the call starts before the operands and all scratch memory are its own.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        number = cute.arch.block_idx()[0] * _WARPS + warp
        task = number - cute.ceil_div(experts, _WARPS) * _WARPS
        if number < experts:
            self.list_tokens(alpha, counts, token_of, weight_of, alpha_t, tokens, experts, number, work)
        if (task >= 0) & (task < work.ahead * (work.columns // TASK_TOKENS)):
            chunk, needed, first = work.task(task)
            if needed:
                decode_task(
                    a_data, a_scale, acts, first, tokens, work.columns, chunk, work.chunks, self.config.a_swizzled
                )
        self.reset(counters, before, zeros, work)

    @cute.jit
    def list_tokens(self, alpha, counts, token_of, weight_of, alpha_t, tokens, experts, expert, work):
        """A warp: one expert."""
        lane = cute.arch.lane_idx()
        row = Int64(expert) * (cute.ceil_div(tokens, 16) * 16)
        column = Int64(alpha_t.toint()) + Int64(expert) * work.columns * 4
        source = Int64(alpha.toint()) + Int64(expert) * 4
        count = Int32(0)
        for first in cutlass.range(0, work.columns, 32 * _LOADS, unroll=1):
            rows = [first + 32 * i + lane for i in range(_LOADS)]
            loaded = [ins.load_global1_if(m < tokens, source + Int64(m) * experts * 4) for m in rows]
            for m, bits in zip(rows, loaded):
                ins.store_global1_if(m < work.columns, column + m * 4, bits)
                used = bits & 0x7FFFFFFF != 0
                ballot = cute.arch.vote_ballot_sync(used)
                place = (row + (count + cute.arch.popc(ballot & ((Int32(1) << lane) - 1)))) * 4
                ins.store_global1_if(used, Int64(token_of.toint()) + place, m)
                ins.store_global1_if(used, Int64(weight_of.toint()) + place, bits)
                count += cute.arch.popc(ballot)
        ins.store_global1_if(lane == 0, Int64((counts + expert).toint()), count)

    @cute.jit
    def reset(self, counters, before, zeros, work):
        """All counters, by all threads."""
        thread = cute.arch.block_idx()[0] * (32 * _WARPS) + cute.arch.thread_idx()[0]
        threads = cute.arch.grid_dim()[0] * (32 * _WARPS)
        tasks = work.columns // TASK_TOKENS
        ready, taken = before, before + work.chunks
        for i in cutlass.range(thread, zeros, threads, unroll=1):
            value = Int32(0)
            if i == taken:
                value = work.ahead * tasks
            ins.store_global1_if((i < ready) | (i >= taken), Int64((counters + i).toint()), value)
        for place in cutlass.range(thread, work.walks * work.steps, threads, unroll=1):
            chunk, needed = work.demanded(place)
            ins.store_global1_if(needed, Int64((counters + ready + chunk).toint()), tasks * Int32(place < work.ahead))
