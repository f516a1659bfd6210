"""The activations of a dense call, decoded once for all row tiles of the dense kernel of SM 9.0."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from backends.hopper import instructions as ins
from backends.hopper.dense_plan import CHUNK, DecodeConfig

_THREADS = 128
#: Tokens of a CTA, eight threads each. Four or two tokens a thread were no faster (H100, 2026-11-25).
_CTA_TOKENS = _THREADS // 8


class DecodeKernel:
    """Activations as float16, 2^-8 of the values, laid out as the warpgroup instruction reads them in shared memory."""

    #: Types and alignments in bytes of the pointers of `__call__`.
    pointers = ((Int32, 16), (cutlass.Uint8, 4), (Int32, 4), (Int32, 16), (Int32, 4))
    #: Integers of `__call__`.
    INTEGERS = 5

    def __init__(self, config: DecodeConfig) -> None:
        self.a_swizzled = config.a_swizzled

    @cute.jit
    def __call__(
        self,
        a_data: cute.Pointer,
        a_scale: cute.Pointer,
        counts: cute.Pointer,
        acts: cute.Pointer,
        flags: cute.Pointer,
        tokens: Int32,
        columns: Int32,
        experts: Int32,
        chunks: Int32,
        flag_count: Int32,
        stream,
    ):
        """Launch on `stream`. Nothing is written unless more than a quarter of alpha is nonzero.

        Args:
            a_data: [tokens, K/8] words.
            counts: int32 [experts], nonzeros of alpha.
            acts: [K/64, columns, 8, 4] words: the eight 16-byte units of a token's 64 values, unit u at place
                u ^ (token % 8) (128-byte swizzle). Unit u holds at its lane t the values u % 4 and u % 4 + 4 of word
                2t + u / 4, the order in which prepared weights come apart. Zero past the last token.
            flags: [flag_count] words, set to zero.
            chunks: K / 256.
        """
        self.kernel(a_data, a_scale, counts, acts, flags, tokens, columns, experts, chunks, flag_count).launch(
            grid=(chunks, cute.ceil_div(columns, _CTA_TOKENS), 1), block=(_THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self, a_data: cute.Pointer, a_scale: cute.Pointer, counts: cute.Pointer, acts: cute.Pointer, flags: cute.Pointer,
        tokens: Int32, columns: Int32, experts: Int32, chunks: Int32, flag_count: Int32,
    ):  # fmt: skip
        cute.arch.griddepcontrol_launch_dependents()
        thread, lane = cute.arch.thread_idx()[0], cute.arch.lane_idx()
        chunk, block, _ = cute.arch.block_idx()
        # Lane 2q + s of a token reads half s of quarter q of the chunk, and makes the pairs s and s + 2 of it all: two
        # neighbours then store the two halves of one 32-byte sector.
        half, quarter = lane % 2, chunk * (CHUNK // 64) + lane % 8 // 2
        row = block * _CTA_TOKENS + thread // 8
        cute.arch.griddepcontrol_wait()
        # On their way while the counts are read.
        mine = self.words(a_data, row, tokens, quarter * 8 + half * 4, chunks)
        scale = self.scales(a_scale, row, tokens, quarter, chunks)
        if ins.is_dense(counts, tokens, experts):
            if (chunk == 0) & (block == 0):
                for i in cutlass.range(thread, flag_count, _THREADS, unroll=1):
                    cute.arch.store(flags + i, Int32(0))
            self.decode(acts, row, columns, quarter, half, mine, scale)

    def words(self, a_data, row, tokens, at, chunks) -> tuple:
        address = Int64((a_data + (row.to(Int64) * (chunks * (CHUNK // 8)) + at)).toint())
        return ins.load_global4_if(row < tokens, address)

    def scales(self, a_scale, row, tokens, quarter, chunks) -> Int32:
        """The four scale factors of a token's 64 values."""
        if self.a_swizzled:
            at = (row // 128 * (chunks * 4) + quarter).to(Int64) * 512 + (row % 32 * 16 + row % 128 // 32 * 4)
        else:
            at = row.to(Int64) * (chunks * 16) + quarter * 4
        return ins.load_global1_if(row < tokens, Int64((a_scale + at).toint()))

    def decode(self, acts, row, columns, quarter, half, mine, scale) -> None:
        other = [cute.arch.shuffle_sync_bfly(word, 1) for word in mine]
        swap = 0 - half
        low = [(x & ~swap) | (y & swap) for x, y in zip(mine, other)]
        high = [(x & swap) | (y & ~swap) for x, y in zip(mine, other)]
        factors = ins.split_e4m3(scale)
        pairs = [ins.decode_pairs(word >> (4 * half), factors[i // 2]) for i, word in enumerate((*low, *high))]
        line = acts + (quarter.to(Int64) * columns + row) * 32
        for parity in range(2):
            for i in range(2):
                unit = 4 * parity + half + 2 * i
                values = tuple(pairs[2 * t + parity][i] for t in range(4))
                address = Int64((line + (unit ^ (row & 7)) * 4).toint())
                ins.store_global4_if(row < columns, address, values)
