"""What each CTA of the streaming kernel does, on the device.

Its share lies in shared memory, as words: in registers it would be in the way of the consumers, which have none to spare.

- part: of a strip; the first part stores the sums, and the helpers' is behind the last.
- strip: the first; the next is a cluster further on.
- rounds: strips, one after the other.
- first, end: items of each of them.
- left: parts whose sums the first part adds.
"""

from __future__ import annotations

import cutlass
from cutlass import Int32

from backends.hopper import instructions as ins

FIELDS = ("part", "strip", "rounds", "first", "end", "left")


def share(
    block: Int32, items: Int32, strips: Int32, cluster: int, parts: Int32, helpers: Int32, rounds: Int32, cost: Int32
) -> tuple:
    """A block's, in the order of `FIELDS`. The last four arguments are those of `stream_plan.Division`."""
    # A helper's h items of each strip and the others' (items - h) / parts take equally long; none are less than they cost.
    helped = cutlass.max(items - cost, 0) // (parts * rounds + 1)
    helped *= Int32(helped * parts * rounds > cost)
    kept = items - helped
    # The first part waits for the others: its blocks are the last to start, or a GPU that is shared with others might never
    # have room for those.
    row, group = (block - helpers) // strips, block // cluster
    part = parts - 1 - row
    before = group * rounds
    choices = (
        (parts, part),
        (before * cluster + block % cluster, block - helpers - row * strips),
        (cutlass.min(rounds, strips // cluster - before) * Int32(helped > 0), Int32(1)),
        (kept, part * kept // parts),
        (items, (part + 1) * kept // parts),
    )
    helper = Int32(block < helpers)
    return (*(ins.select(helper, *choice) for choice in choices), parts - 1 + Int32(helped > 0))
