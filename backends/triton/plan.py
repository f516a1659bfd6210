"""The small kernels around the main ones: what there is to do, read from alpha on the device, and the final sums.

A call is "routed" when at most a quarter of alpha is nonzero, else "dense". Both main kernels are launched and the one
whose form it is not returns at once, so that alpha never travels to the host.
"""
import triton
import triton.language as tl


@triton.jit
def is_dense(counts, tokens, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, HAS_DENSE: tl.constexpr):
    """Whether the dense kernel takes this call: where the tensor cores, not the weights' bytes, set the pace anyway."""
    if not HAS_DENSE:
        return False
    e = tl.arange(0, EXPERTS_PADDED)
    pairs = tl.sum(tl.load(counts + e, mask=e < EXPERTS, other=0), 0)
    return pairs * 4 > tokens * EXPERTS


@triton.jit
def decode_pair(word, unit, PAIR: tl.constexpr):
    """Values PAIR and PAIR + 4 of a word of 8 codes, times the scale factor, as two float16 in 32 bits."""
    low = (word >> (4 * PAIR)) & 15
    high = (word >> (4 * PAIR + 16)) & 15
    low = (((low & 8) << 12) | ((low & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True) * unit
    high = (((high & 8) << 12) | ((high & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True) * unit
    low = low.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | low


@triton.jit
def wait_for_predecessor():
    """Lets the next kernel of the stream be launched now, and waits until the one before is complete (SM 9.0)."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["tokens", "columns"])
def list_tokens(
    alpha, counts, token_of, weight_of, alpha_t, tokens, columns, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Per expert (one program each): its tokens in ascending order and their alpha.

    Args:
        counts: int32 [EXPERTS].
        token_of, weight_of: int32 and float32 [EXPERTS, tokens rounded up to 16]; row e holds counts[e] of them, then
            tokens -1 up to a multiple of 16.
        alpha_t: float32 [EXPERTS, columns], alpha transposed, then zeros.
    """
    if OVERLAP:
        wait_for_predecessor()
    e = tl.program_id(0)
    row_of = e.to(tl.int64) * ((tokens + 15) // 16 * 16)
    count = 0
    for first in range(0, columns, BLOCK):
        m = first + tl.arange(0, BLOCK)
        weight = tl.load(alpha + m * EXPERTS + e, mask=m < tokens, other=0.0)
        tl.store(alpha_t + e.to(tl.int64) * columns + m, weight, mask=m < columns)
        used = (weight != 0.0).to(tl.int32)
        where = row_of + count + tl.cumsum(used, 0) - used
        tl.store(token_of + where, m, mask=used != 0)
        tl.store(weight_of + where, weight, mask=used != 0)
        count += tl.sum(used, 0)
    tl.store(counts + e, count)
    pad = count + tl.arange(0, 16)
    tl.store(token_of + row_of + pad, pad * 0 - 1, mask=pad < (count + 15) // 16 * 16)


@triton.jit(do_not_specialize=["tokens"])
def gather_tokens(
    a_data, a_scale, counts, token_of, gathered, tokens,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, INNER: tl.constexpr, A_SWIZZLED: tl.constexpr,
    ROWS: tl.constexpr, HAS_DENSE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The decoded activations of each expert's tokens: programs (expert, part of its tokens), nothing if dense.

    Args:
        a_data: int32 view of [tokens, K/2] bytes.
        counts, token_of: of `list_tokens`.
        gathered: int32 [EXPERTS, eights of tokens, INNER / 256, slot], float16 pairs 2^-8 of the values in the order of the
            right operand; padding tokens are not written. A slot is [quarter 4, word 2, token 8, lane t 4, pair 4].
    """
    if OVERLAP:
        wait_for_predecessor()
    if is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED, HAS_DENSE):
        return
    e = tl.program_id(0)
    row_of = e.to(tl.int64) * ((tokens + 15) // 16 * 16)
    count = tl.load(counts + e)
    k_words: tl.constexpr = EXPERTS * INNER // 8
    blocks: tl.constexpr = EXPERTS * INNER // 16
    word = tl.arange(0, 32)  # of a 256-value chunk: quarter 4, lane t 4, word 2
    quarter, lane, half = word // 8, word // 2 % 4, word % 2
    for first in range(tl.program_id(1) * ROWS, count, tl.num_programs(1) * ROWS):
        slot = first + tl.arange(0, ROWS)
        m = tl.load(token_of + row_of + slot, mask=slot < count, other=-1)
        present = (slot < count)[:, None] & (word >= 0)[None, :]
        row = m.to(tl.int64)[:, None]
        for chunk in range(0, INNER // 256):
            column = e * (INNER // 8) + chunk * 32 + word
            code = tl.load(a_data + row * k_words + column[None, :], mask=present, other=0).to(tl.uint32, bitcast=True)
            block = (column // 2)[None, :]
            if A_SWIZZLED:
                where = ((row // 128) * (blocks // 4) + block // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + block % 4
            else:
                where = row * blocks + block
            byte = tl.load(a_scale + where, mask=present, other=0).to(tl.uint16)
            unit = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True) * 16384.0
            unit = tl.where((byte & 0x7F) == 0x7F, float("nan"), unit).to(tl.float16)
            eight = (row_of + slot[:, None]) // 8 * (INNER // 256) + chunk
            target = eight * 1024 + (quarter * 256 + half * 128 + lane * 4)[None, :] + (slot % 8 * 16)[:, None]
            even = tl.join(decode_pair(code, unit, 0), decode_pair(code, unit, 2))
            odd = tl.join(decode_pair(code, unit, 1), decode_pair(code, unit, 3))
            four = tl.reshape(tl.join(even, odd), (ROWS, 32, 4)).to(tl.int32, bitcast=True)
            tl.store(gathered + target[:, :, None] + tl.arange(0, 4)[None, None, :], four, mask=present[:, :, None])


@triton.jit(do_not_specialize=["tokens", "tiles", "token_tiles", "programs"])
def finish(
    sums, parts, counts, out, tokens, hidden, tiles, token_tiles, programs,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNKS: tl.constexpr, SETS: tl.constexpr,
    TOKENS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, DENSE_ROWS: tl.constexpr, HAS_DENSE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = 65536 times the part sums of whichever main kernel ran, added in a fixed order. 64 columns x BLOCK tokens.

    Args:
        sums: of the routed kernel, float32 [SETS, strips, tokens, ROWS].
        parts: of the dense kernel, float32 [tiles, SLOTS, TOKENS, DENSE_ROWS].
    """
    if OVERLAP:
        wait_for_predecessor()
    n = tl.arange(0, 64)
    column = tl.program_id(0)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (m < tokens)[:, None] & (column * 64 + n < hidden)[None, :]
    if is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED, HAS_DENSE):
        tile = (column * 64 // DENSE_ROWS) * token_tiles + tl.program_id(1) * BLOCK // TOKENS
        # Program p computed units p * units // programs and on: the tile's first and last units tell its programs.
        units = tiles.to(tl.int64) * CHUNKS
        first = ((tile.to(tl.int64) * CHUNKS + 1) * programs - 1) // units
        last = ((tile.to(tl.int64) + 1) * CHUNKS * programs - 1) // units
        row = column * 64 % DENSE_ROWS + n
        where = tile.to(tl.int64) * (SLOTS * TOKENS * DENSE_ROWS) + (m % TOKENS)[:, None] * DENSE_ROWS + row[None, :]
        total = tl.full((BLOCK, 64), 0.0, tl.float32)
        for slot in range(0, (last - first + 1).to(tl.int32)):
            total += tl.load(parts + where + slot * (TOKENS * DENSE_ROWS), mask=inside, other=0.0)
    else:
        # The routed kernel keeps rows g and g + 8 of each 16 side by side: read in its order, then take the pairs apart.
        strips = (tl.num_programs(0) * 64 + ROWS - 1) // ROWS
        region = tokens.to(tl.int64) * ROWS
        where = (column * 64 // ROWS) * region + m[:, None].to(tl.int64) * ROWS + column * 64 % ROWS + n[None, :]
        present = (m < tokens)[:, None] & (n >= 0)[None, :]
        total = tl.load(sums + where, mask=present, other=0.0)
        for part in tl.static_range(1, SETS):
            total += tl.load(sums + strips * region * part + where, mask=present, other=0.0)
        total = tl.reshape(tl.permute(tl.reshape(total, (BLOCK, 4, 8, 2)), (0, 1, 3, 2)), (BLOCK, 64))
    target = m[:, None].to(tl.int64) * hidden + column * 64 + n[None, :]
    tl.store(out + target, (total * 65536.0).to(out.dtype.element_ty), mask=inside)
