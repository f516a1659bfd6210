"""Which form a call takes on SM 9.0. Every kernel looks at the same part of alpha, so that all find the same, and none waits for
the listing kernel to tell: the dense kernel's blocks leave a routed call while the streaming kernel works at it.

Either form computes whatever alpha is; a part that misleads costs time only.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from backends.hopper import instructions as ins

# Tokens that are looked at, evenly spread, and experts of each.
_TOKENS, _EXPERTS = 8, 256


@cute.jit
def is_dense(
    alpha: cute.Pointer, tokens: Int32, experts: Int32, votes: Int32, warps: int, warp: Int32, lane: Int32
) -> Boolean:
    """Whether more than a quarter of alpha is nonzero, by that part of it; asked by a whole block.

    Args:
        alpha: float32 [tokens, experts] as its bits.
        votes: shared memory, `VOTES_BYTES`.
        warps, warp, lane: of the block, and the thread's.
    """
    rows, columns = cutlass.min(tokens, _TOKENS), cutlass.min(experts, _EXPERTS)
    nonzeros = Int32(0)
    for row in cutlass.range(warp, rows, warps, unroll=1):
        source = Int64(alpha.toint()) + Int64(row * tokens // rows) * experts * 4
        first = row * experts // rows
        columns_of = [i + lane for i in range(0, _EXPERTS, 32)]
        # Other experts of each token, where there are many.
        places = [first + c - Int32(first + c >= experts) * experts for c in columns_of]
        loaded = [ins.load_global1_if(c < columns, source + Int64(p) * 4) for c, p in zip(columns_of, places)]
        nonzeros += sum(Int32(bits & 0x7FFFFFFF != 0) for bits in loaded)
    nonzeros = cute.arch.warp_redux_sync(nonzeros, "add")
    ins.store1_if(lane == 0, votes + warp * 4, nonzeros)
    cute.arch.sync_threads()
    mine = ins.load1(votes + cutlass.min(lane, warps - 1) * 4)
    return cute.arch.warp_redux_sync(mine * Int32(lane < warps), "add") * 4 > rows * columns
