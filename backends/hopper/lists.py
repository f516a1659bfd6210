"""The first kernel of a call on SM 9.0: what is to do, read from alpha, and the activations of a routed call.

They are gathered here, before weights ask for the memory's whole rate: behind those it took 6 us (H200, 2026-11-26).
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.memory import SmemAllocator

from backends.hopper import instructions as ins
from backends.hopper.gather import gather_slot, is_late
from backends.hopper.stream_plan import GROUP, SLOT_BYTES
from backends.hopper.tactic import PASS_TOKENS, ListConfig

_WARPS = 4
# Loads of alpha that a lane has on its way.
_LOADS = 8


class ListKernel:
    """One instance per compiled kernel; sizes are run-time arguments."""

    #: Integers of `__call__`.
    INTEGERS = 5
    #: Types and alignments in bytes of the pointers of `__call__`.
    pointers = (
        (Int32, 4), (Int32, 16), (cutlass.Uint8, 4), (Int32, 4), (Int32, 4), (Int32, 4), (Int32, 4), (cutlass.Uint8, 16),
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
        gathered: cute.Pointer,
        counters: cute.Pointer,
        tokens: Int32,
        experts: Int32,
        chunks: Int32,
        columns: Int32,
        zeros: Int32,
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
            gathered: slots (`gather`) [experts, eights of tokens, chunks], but for experts that are late.
            counters: int32 [zeros], of the kernels that follow, set to zero.
            chunks: of an expert.
        """
        self.kernel(
            alpha, a_data, a_scale, counts, token_of, weight_of, alpha_t, gathered, counters, tokens, experts, chunks, columns,
            zeros,
        ).launch(
            grid=(experts, chunks, 1), block=(32 * _WARPS, 1, 1), stream=stream, use_pdl=True
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, alpha: cute.Pointer, a_data: cute.Pointer, a_scale: cute.Pointer, counts: cute.Pointer, token_of: cute.Pointer,
        weight_of: cute.Pointer, alpha_t: cute.Pointer, gathered: cute.Pointer, counters: cute.Pointer, tokens: Int32,
        experts: Int32, chunks: Int32, columns: Int32, zeros: Int32,
    ):  # fmt: skip
        # In this order: no kernel of the call starts before the operands and all scratch memory are its own.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        expert, chunk, _ = cute.arch.block_idx()
        # Every warp finds all tokens of the expert, and keeps those of its own slots.
        mine = SmemAllocator().allocate(8 * PASS_TOKENS, 16).toint()
        writes = (warp == 0) & (chunk == 0)
        wide = cute.ceil_div(tokens, 16) * 16
        row = Int64(expert) * (wide * 4)
        source = Int64(alpha.toint()) + Int64(expert) * 4
        column = Int64(alpha_t.toint()) + Int64(expert) * columns * 4
        count = Int32(0)
        for first in cutlass.range(0, columns, 32 * _LOADS, unroll=1):
            rows = [first + 32 * i + lane for i in range(_LOADS)]
            loaded = [ins.load_global1_if(m < tokens, source + Int64(m) * experts * 4) for m in rows]
            for m, bits in zip(rows, loaded):
                used = bits & 0x7FFFFFFF != 0
                ballot = cute.arch.vote_ballot_sync(used)
                place = count + cute.arch.popc(ballot & ((Int32(1) << lane) - 1))
                own = used & (place // GROUP % _WARPS == warp)
                ins.store2_if(own, mine + place * 8, (m, bits))
                ins.store_global1_if(writes & (m < columns), column + m * 4, bits)
                ins.store_global1_if(writes & used, Int64(token_of.toint()) + row + place * 4, m)
                ins.store_global1_if(writes & used, Int64(weight_of.toint()) + row + place * 4, bits)
                count += cute.arch.popc(ballot)
        ins.store_global1_if(writes & (lane == 0), Int64((counts + expert).toint()), count)
        block = expert * chunks + chunk
        for i in cutlass.range(block * 128 + warp * 32 + lane, zeros, experts * chunks * 128, unroll=1):
            ins.store_global1_if(i >= 0, Int64((counters + i).toint()), Int32(0))
        cute.arch.sync_warp()
        if ~is_late(count, tokens):
            for first in cutlass.range(warp * GROUP, count, _WARPS * GROUP, unroll=1):
                place = first + lane % GROUP
                token, weight = ins.load2_if(place < count, mine + place * 8, (Int32(-1), Int32(0)))
                eight = Int64(expert) * (wide // GROUP) + first // GROUP
                slot = Int64(gathered.toint()) + (eight * chunks + chunk) * SLOT_BYTES
                gather_slot(
                    a_data, a_scale, token, weight, slot, expert * chunks + chunk, experts * chunks, self.config.a_swizzled
                )  # fmt: skip
