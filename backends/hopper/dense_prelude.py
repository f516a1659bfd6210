"""The small kernels before and after the dense kernel of SM 9.0 (Triton)."""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from backends.hopper.dense_plan import DenseTiling
from backends.triton.plan import decode_pair, is_dense, wait_for_predecessor

#: Tokens that a program of `decode_activations` takes.
BLOCK = 64


@triton.jit(do_not_specialize=["tokens", "columns"])
def decode_activations(
    a_data, a_scale, counts, acts, tokens, columns,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, INNER: tl.constexpr, A_SWIZZLED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Activations as float16, 2^-8 of the values, laid out as the warpgroup instruction reads them in shared memory.

    A thread makes the 16 bytes that it stores; the words it takes them from come from the L1 four times.

    Args:
        a_data: int32 view of [tokens, K/2] bytes.
        acts: int32 [K/64, columns, 8, 4]: the eight 16-byte units of a token's 64 values, unit u at place u ^ (token % 8)
            (128-byte swizzle). Unit u holds at its lane t the values u % 4 and u % 4 + 4 of word 2t + u / 4, the order in
            which prepared weights come apart. Zero past the last token.
    """
    wait_for_predecessor()
    if not is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED, True):
        return
    K: tl.constexpr = EXPERTS * INNER
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    place = tl.arange(0, 8)[None, :]
    unit = place ^ (m % 8)
    inside = (m < tokens) & (place >= 0)
    row = m.to(tl.int64)
    for q in tl.static_range(4):
        quarter = tl.program_id(0) * 4 + q
        if A_SWIZZLED:
            where = ((row // 128) * (K // 64) + quarter) * 512 + (row % 32) * 16 + (row % 128 // 32) * 4
        else:
            where = row * (K // 16) + quarter * 4
        scales = tl.load((a_scale + where + place * 0).to(tl.pointer_type(tl.int32), bitcast=True), mask=inside, other=0)
        words = a_data + row * (K // 8) + quarter * 8 + unit // 4
        x0 = _decode(words, scales, unit, inside, 0)
        x1 = _decode(words, scales, unit, inside, 1)
        x2 = _decode(words, scales, unit, inside, 2)
        x3 = _decode(words, scales, unit, inside, 3)
        four = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK, 8, 4))
        target = (quarter.to(tl.int64) * columns + row) * 32 + place * 4
        stored = (m < columns)[:, :, None] & (tl.arange(0, 4) >= 0)[None, None, :]
        tl.store(acts + target[:, :, None] + tl.arange(0, 4)[None, None, :], four.to(tl.int32, bitcast=True), mask=stored)


@triton.jit
def _decode(words, scales, unit, inside, LANE: tl.constexpr):
    code = tl.load(words + 2 * LANE, mask=inside, other=0).to(tl.uint32, bitcast=True) >> (unit % 4 * 4).to(tl.uint32)
    byte = (scales >> (8 * LANE)) & 0xFF
    factor = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True) * 16384.0
    factor = tl.where((byte & 0x7F) == 0x7F, float("nan"), factor).to(tl.float16)
    return decode_pair(code, factor, 0)


@triton.jit(do_not_specialize=["tokens", "hidden", "chunks", "row_tiles", "clusters", "whole", "streamed", "slots"])
def add_parts(
    parts, counts, out, tokens, hidden, chunks, row_tiles, clusters, whole, streamed, slots,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = 65536 times the part sums of each tile, added in the order of K. 128 columns x BLOCK tokens a program.

    Args:
        parts: float32 [whole + streamed * slots, TOKENS, ROWS]; `dense_plan.DenseTiling` names the integers.
    """
    wait_for_predecessor()
    if not is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED, True):
        return
    column = tl.program_id(0) * 128
    n = column + tl.arange(0, 128)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (m < tokens)[:, None] & (n < hidden)[None, :]
    tile = tl.program_id(1) * BLOCK // TOKENS * row_tiles + column // ROWS
    where = (m % TOKENS)[:, None] * ROWS + (n % ROWS)[None, :]
    count = 1
    part = tile
    if tile >= whole:
        begin = (tile - whole) * chunks
        first = ((begin + 1) * clusters - 1) // (streamed * chunks)
        count = ((begin + chunks) * clusters - 1) // (streamed * chunks) - first + 1
        part = whole + (tile - whole) * slots
    total = tl.full((BLOCK, 128), 0.0, tl.float32)
    end = part + count
    while part < end:
        total += tl.load(parts + part.to(tl.int64) * (TOKENS * ROWS) + where, mask=inside, other=0.0)
        part += 1
    target = m.to(tl.int64)[:, None] * hidden + n[None, :]
    tl.store(out + target, (total * 65536.0).to(out.dtype.element_ty), mask=inside)


def launch_decode(
    tiling: DenseTiling, experts: int, a_data: torch.Tensor, a_scale: torch.Tensor, a_swizzled: bool,
    counts: torch.Tensor, acts: torch.Tensor, tokens: int,
) -> None:  # fmt: skip
    """Enqueue `decode_activations`.

    Args:
        a_data: int32 view of [tokens, K/2] bytes. a_scale: uint8, "128x4" where a_swizzled, else linear.
        counts: int32 [experts], nonzeros of alpha.
        acts: at least `tiling.acts_bytes` bytes, int32, aligned to 128.
    """
    decode_activations[(tiling.chunks, -(-tiling.columns // BLOCK))](
        a_data, a_scale, counts, acts, tokens, tiling.columns,
        EXPERTS=experts, EXPERTS_PADDED=_power_of_two(experts), INNER=tiling.chunks * 256 // experts,
        A_SWIZZLED=a_swizzled, BLOCK=BLOCK, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def launch_finish(
    tiling: DenseTiling, experts: int, parts: torch.Tensor, counts: torch.Tensor, out: torch.Tensor
) -> None:
    """Enqueue `add_parts`: out [tokens, hidden] of any of the output types."""
    tokens, hidden = out.shape
    block = 8
    add_parts[(-(-hidden // 128), -(-tokens // block))](
        parts, counts, out, tokens, hidden, tiling.chunks, tiling.row_tiles, tiling.clusters, tiling.whole,
        tiling.streamed, tiling.slots,
        EXPERTS=experts, EXPERTS_PADDED=_power_of_two(experts), TOKENS=tiling.kernel.tokens, ROWS=tiling.kernel.rows,
        BLOCK=block, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
