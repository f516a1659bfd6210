"""The warpgroup instruction of SM 9.0 with its left operand in registers, as inline PTX."""

from __future__ import annotations

from cutlass import Float32, Int32

from backends.hopper.instructions import ptx

# High half of a descriptor: the swizzle's code, and 1024 bytes from one group of 8 rows to the next, in units of 16.
_K_MAJOR_HIGH = 1 << 30 | 1024 >> 4


def descriptor(address: Int32) -> Int32:
    """Low half of the descriptor of a K-major right operand with 128-byte swizzle, for `multiply`.

    Args:
        address: in shared memory, a multiple of 16. The sum with a number of 16-byte units is a descriptor too.
    """
    return (address >> 4) | 1 << 16


def multiply(sums: tuple | None, left: tuple, right: Int32, tokens: int) -> tuple:
    """Steps of 64 rows x `tokens` x 16 values begin and are committed as one group; the accumulators.

    Args:
        sums: tokens / 2 accumulators, or None to begin with zero.
        left: four registers for each step.
        right: descriptor of the right operand's first step; steps are 32 bytes apart.
    """
    count, steps = tokens // 2, len(left) // 4
    d = ", ".join(f"${i}" for i in range(count))
    lines = [
        ".reg .pred p, q; .reg .b32 low; .reg .b64 b; setp.ne.b32 p, 1, 0; setp.ne.b32 q, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(steps):
        a = ", ".join(f"${count + 4 * step + i}" for i in range(4))
        lines.append(f"add.s32 low, ${count + 4 * steps}, {2 * step}; mov.b64 b, {{low, {_K_MAJOR_HIGH}}};")
        added = "p" if sums or step else "q"
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.f16.f16 {{{d}}}, {{{a}}}, b, {added}, 1, 1, 0;")
    lines.append("wgmma.commit_group.sync.aligned;")
    text = "{ " + "\n".join(lines) + " }"
    return ptx(text, (Float32,) * count, (*left, right, *(sums or ())), tied=len(sums or ()), memory=True)


def wait(pending: int) -> None:
    """Waits until at most `pending` groups are unfinished."""
    ptx(f"wgmma.wait_group.sync.aligned {pending};", (), (), memory=True)


def finish(sums: tuple, ready: tuple) -> tuple[tuple, tuple]:
    """Waits for all groups; the accumulators, readable, and registers that must be computed before the wait."""
    kinds = (Float32,) * len(sums) + (Int32,) * len(ready)
    values = ptx("wgmma.wait_group.sync.aligned 0;", kinds, (*sums, *ready), tied=len(kinds), memory=True)
    return values[: len(sums)], values[len(sums) :]
