"""Activations of a routed call, gathered for the streaming kernel of SM 9.0, a slot at a time: up to eight tokens of an
expert, 256 values of K.

A slot is the tokens' numbers, -1 for none, their alpha, then [token 8, piece 8, lane t 4, pair 4] float16 pairs, 2^-8 of the
values in the order of the tensor core's right operand; a token that is none is not written. Piece p of a token is at place
p ^ (token % 2): neighbouring tokens' pieces lie in different banks of shared memory, and a lane has two places to load from,
every second piece 128 bytes behind the last.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from backends.hopper import instructions as ins
from backends.hopper.decode import scale_offset
from backends.hopper.dense_plan import STREAM_TOKENS
from backends.hopper.stream_plan import GROUP, LIST_BYTES, TOKEN_BYTES


def is_late(count: Int32, tokens: Int32) -> Boolean:
    """Whether an expert's tokens are gathered by the streaming kernel, not by the listing one: where they are so many that
    the call is most likely the dense kernel's, which would not use them."""
    return (tokens > STREAM_TOKENS) & (2 * count > tokens)


def gather_slot(a_data, a_scale, token, weight, slot, chunk, chunks, a_swizzled: bool) -> None:
    """One slot, by a warp.

    Args:
        token, weight: the slot's tokens, -1 for none, and the bits of their alpha; each lane has those of lane % 8.
        slot: its address.
        chunk, chunks: of K.
    """
    lane = cute.arch.lane_idx()
    # A lane's word of eight values makes 16 bytes of a piece.
    quarter, t, half = chunk * 4 + lane // 8, lane // 2 % 4, lane % 2
    loaded = []
    for i in range(GROUP):
        m = cute.arch.shuffle_sync(token, i)
        words = Int64((a_data + (Int64(m) * (chunks * 32) + (chunk * 32 + lane))).toint())
        scales = Int64((a_scale + scale_offset(m, quarter, chunks, a_swizzled)).toint())
        loaded.append((m >= 0, ins.load_global1_if(m >= 0, words), ins.load_global1_if(m >= 0, scales)))
    ins.store_global1_if(lane < 2 * GROUP, slot + lane * 4, ins.select(Int32(lane < GROUP), token, weight))
    piece = lane // 8 * 2 + half
    for i, (present, word, scales) in enumerate(loaded):
        factor = ins.expand_e4m3(scales >> (8 * t))
        even, odd = ins.decode_pairs(word, factor), ins.decode_pairs(word >> 4, factor)
        target = slot + (LIST_BYTES + i * TOKEN_BYTES + (piece ^ i % 2) * 64 + t * 16)
        ins.store_global4_if(present, target, (even[0], odd[0], even[1], odd[1]))
