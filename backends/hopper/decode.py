"""Activations of a dense call, decoded for the dense kernel of SM 9.0, `TASK_TOKENS` of a chunk at a time.

They become float16, 2^-8 of the values, laid out as the warpgroup instruction reads them in shared memory:
[K/64, columns, 8, 4] words, the eight 16-byte units of a token's 64 values, unit u at place u ^ (token % 8) (128-byte
swizzle). Unit u holds at its lane t the values u % 4 and u % 4 + 4 of word 2t + u / 4, the order in which prepared weights
come apart. Zero past the last token.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Int64

from backends.hopper import instructions as ins
from backends.hopper.dense_plan import CHUNK


def decode_task(a_data, a_scale, acts: Int64, first, tokens, columns, chunk, chunks, a_swizzled: bool) -> None:
    """A chunk of the tokens from `first` on, by a warp: two turns of eight lanes a token. `acts`: address of the first chunk.

    Lane 2q + s of a token reads half s of quarter q of the chunk, and makes the pairs s and s + 2 of it all: two
    neighbours then store the two halves of one 32-byte sector.
    """
    lane = cute.arch.lane_idx()
    half, quarter = lane % 2, chunk * (CHUNK // 64) + lane % 8 // 2
    rows = [first + lane // 8, first + lane // 8 + 4]
    loaded = []
    for row in rows:
        words, scales = _addresses(a_data, a_scale, row, quarter, half, chunks, a_swizzled)
        loaded.append((ins.load_global4_if(row < tokens, words), ins.load_global1_if(row < tokens, scales)))
    for row, (words, scale) in zip(rows, loaded):
        _decode(acts + (quarter.to(Int64) * columns + row) * 128, row, half, words, scale)


def _addresses(a_data, a_scale, row, quarter, half, chunks, a_swizzled: bool) -> tuple[Int64, Int64]:
    """Of four words of a token, and of the four scale factors of 64 values."""
    words = a_data + (row.to(Int64) * (chunks * (CHUNK // 8)) + (quarter * 8 + half * 4))
    return Int64(words.toint()), Int64((a_scale + scale_offset(row, quarter, chunks, a_swizzled)).toint())


def _decode(line, row, half, mine, scale) -> None:
    """Four words of a token's 64 values, of which the neighbouring lane has the others, to the token's line of `acts`."""
    other = [cute.arch.shuffle_sync_bfly(word, 1) for word in mine]
    swap = 0 - half
    low = [(x & ~swap) | (y & swap) for x, y in zip(mine, other)]
    high = [(x & swap) | (y & ~swap) for x, y in zip(mine, other)]
    factors = ins.split_e4m3(scale)
    for parity in range(2):
        words = (*low, *high)[parity::2]
        pairs = [ins.decode_pairs(word >> (4 * half), factor) for word, factor in zip(words, factors)]
        for i in range(2):
            unit = 4 * parity + half + 2 * i
            ins.store_global4(Int64(line + (unit ^ (row & 7)) * 16), [pair[i] for pair in pairs])


def scale_offset(row: Int32, quarter: Int32, chunks: Int32, swizzled: bool) -> Int64:
    """Where the four scale factors of 64 values of a token are, `quarter` counted over all of K."""
    if swizzled:
        return (row // 128 * (chunks * 4) + quarter).to(Int64) * 512 + (row % 32 * 16 + row % 128 // 32 * 4)
    return row.to(Int64) * (chunks * 16) + quarter * 4
