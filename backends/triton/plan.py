"""Which experts and tokens there is work for: small kernels that read alpha on the device.

A call is "routed" when at most a quarter of alpha is nonzero, else "dense". Both main kernels are launched and the one
whose form it is not returns at once, so that alpha never travels to the host.
"""
import triton
import triton.language as tl


@triton.jit
def is_dense(counts, tokens, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr):
    """Whether the dense kernel takes this call: where the tensor cores, not the weights' bytes, set the pace anyway."""
    e = tl.arange(0, EXPERTS_PADDED)
    pairs = tl.sum(tl.load(counts + e, mask=e < EXPERTS, other=0), 0)
    return pairs * 4 > tokens * EXPERTS


@triton.jit(do_not_specialize=["tokens"])
def list_tokens(alpha, counts, token_of, weight_of, alpha_t, tokens, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Per expert (one program each): its tokens in ascending order, and their alpha.

    Args:
        counts: int32 [EXPERTS].
        token_of, weight_of: int32 and float32 [EXPERTS, tokens]; the first counts[e] of row e are written.
        alpha_t: float32 [EXPERTS, tokens], alpha transposed.
    """
    e = tl.program_id(0)
    count = 0
    for first in range(0, tokens, BLOCK):
        m = first + tl.arange(0, BLOCK)
        weight = tl.load(alpha + m * EXPERTS + e, mask=m < tokens, other=0.0)
        tl.store(alpha_t + e.to(tl.int64) * tokens + m, weight, mask=m < tokens)
        used = (weight != 0.0).to(tl.int32)
        where = e.to(tl.int64) * tokens + count + tl.cumsum(used, 0) - used
        tl.store(token_of + where, m, mask=used != 0)
        tl.store(weight_of + where, weight, mask=used != 0)
        count += tl.sum(used, 0)
    tl.store(counts + e, count)


@triton.jit
def _decode_pair(word, unit, PAIR: tl.constexpr):
    """Values PAIR and PAIR + 4 of a word of 8 codes, times the scale factor, as two float16 in 32 bits."""
    low = (word >> (4 * PAIR)) & 15
    high = (word >> (4 * PAIR + 16)) & 15
    low = (((low & 8) << 12) | ((low & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True) * unit
    high = (((high & 8) << 12) | ((high & 7) << 9)).to(tl.uint16).to(tl.float16, bitcast=True) * unit
    low = low.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16) | low


@triton.jit(do_not_specialize=["tokens"])
def gather_tokens(
    a_data, a_scale, counts, token_of, active, gathered, tokens,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, INNER: tl.constexpr, A_SWIZZLED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decoded activations of each expert's tokens, in the order of the right operand; and the list of used experts.

    Program (e, 0) serves expert e; one more program writes the list.

    Args:
        a_data: int32 view of [tokens, K/2] bytes.
        active: int32 [1 + EXPERTS]: how many experts have tokens, then which, ascending.
        gathered: int32 [EXPERTS, tokens, INNER / 64 quarters, word 2, lane t 4, pair 4], float16 pairs 2^-8 of the values.
    """
    e = tl.program_id(0)
    if is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED):
        return
    if e == EXPERTS:
        i = tl.arange(0, EXPERTS_PADDED)
        used = (tl.load(counts + i, mask=i < EXPERTS, other=0) > 0).to(tl.int32)
        tl.store(active + 1 + tl.cumsum(used, 0) - used, i, mask=used != 0)
        tl.store(active, tl.sum(used, 0))
    else:
        count = tl.load(counts + e)
        k_words: tl.constexpr = EXPERTS * INNER // 8
        blocks: tl.constexpr = EXPERTS * INNER // 16
        for first in range(0, count, ROWS):
            slot = first + tl.arange(0, ROWS)
            m = tl.load(token_of + e.to(tl.int64) * tokens + slot, mask=slot < count, other=0).to(tl.int64)
            for chunk in range(0, INNER // 256):
                word = tl.arange(0, 32)  # quarter 4, lane t 4, word 2: the order of the plain form
                column = e * (INNER // 8) + chunk * 32 + word
                present = (slot < count)[:, None] & (word >= 0)[None, :]
                code = tl.load(a_data + m[:, None] * k_words + column[None, :], mask=present, other=0).to(tl.uint32, bitcast=True)
                block = (column // 2)[None, :]
                row = m[:, None]
                if A_SWIZZLED:
                    where = ((row // 128) * (blocks // 4) + block // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + block % 4
                else:
                    where = row * blocks + block
                byte = tl.load(a_scale + where, mask=present, other=0).to(tl.uint16)
                unit = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True) * 16384.0
                unit = tl.where((byte & 0x7F) == 0x7F, float("nan"), unit).to(tl.float16)
                quarter, lane, half = word // 8, word // 2 % 4, word % 2
                target = (e.to(tl.int64) * tokens + slot[:, None]) * (INNER // 2) + chunk * 128
                target += (quarter * 32 + half * 16 + lane * 4)[None, :]
                for pair in tl.static_range(4):
                    tl.store(gathered + target + pair, _decode_pair(code, unit, pair).to(tl.int32, bitcast=True), mask=present)


@triton.jit(do_not_specialize=["tokens"])
def sum_sets(sums, counts, out, tokens, hidden, tiles, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, SETS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """out[m, 64 * tile + n] = 65536 * (sums[0, tile, m, n] + sums[1, tile, m, n] + ...), in this order."""
    if is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED):
        return
    tile = tl.program_id(0)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, 64)
    where = (tile.to(tl.int64) * tokens + m[:, None]) * 64 + n[None, :]
    inside = (m < tokens)[:, None] & (tile * 64 + n < hidden)[None, :]
    total = tl.load(sums + where, mask=inside, other=0.0)
    for part in tl.static_range(1, SETS):
        total += tl.load(sums + tl.cast(tiles, tl.int64) * tokens * 64 * part + where, mask=inside, other=0.0)
    target = m[:, None].to(tl.int64) * hidden + tile * 64 + n[None, :]
    tl.store(out + target, (total * 65536.0).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "tiles", "token_tiles", "programs"])
def sum_slots(
    parts, counts, out, tokens, hidden, tiles, token_tiles, programs,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The output of the dense kernel: 65536 times the parts of each tile, added in the order of their programs."""
    if is_dense(counts, tokens, EXPERTS, EXPERTS_PADDED):
        tile = tl.program_id(0)
        units = tiles * CHUNKS
        # Program p computed units p * units // programs and on: the tile's first and last units tell its programs.
        first = ((tile * CHUNKS + 1).to(tl.int64) * programs - 1) // units
        last = ((tile * CHUNKS + CHUNKS).to(tl.int64) * programs - 1) // units
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, ROWS)
        m = (tile % token_tiles) * TOKENS + j
        row = (tile // token_tiles) * ROWS + n
        inside = (m < tokens)[:, None] & (row < hidden)[None, :]
        where = tile.to(tl.int64) * (SLOTS * TOKENS * ROWS) + j[:, None] * ROWS + n[None, :]
        total = tl.full((BLOCK, ROWS), 0.0, tl.float32)
        for slot in range(0, (last - first + 1).to(tl.int32)):
            total += tl.load(parts + where + slot * (TOKENS * ROWS), mask=inside, other=0.0)
        target = m[:, None].to(tl.int64) * hidden + row[None, :]
        tl.store(out + target, (total * 65536.0).to(out.dtype.element_ty), mask=inside)
