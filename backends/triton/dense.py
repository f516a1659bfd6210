"""Dense alpha, 16 tokens and more: every expert meets every token, on the warpgroup instructions of SM 9.0."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from backends.triton.fragments import decode_activations, decode_weights, load1, load4, prefetch

# Chunks by which the second-level cache is ahead of the registers.
AHEAD = gl.constexpr(5)


@gluon.jit(do_not_specialize=["tokens", "tiles"])
def fc2_dense(
    a_data, a_scale, w_data, w_scale, alpha_t, counts, parts, tokens, columns, tiles, rows32,
    EXPERTS: gl.constexpr, EXPERTS_PADDED: gl.constexpr, INNER: gl.constexpr, A_SWIZZLED: gl.constexpr,
    TOKENS: gl.constexpr, SLOTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """An equal share of all (tile, chunk) units per program; a tile is 16 * WARPS rows of B x TOKENS tokens.

    Args:
        alpha_t: float32 [EXPERTS, columns], zero past the last token.
        parts: float32 [tiles, SLOTS, TOKENS, 16 * WARPS] of part sums (2^-16 of them), one slot per program of a tile.
        tiles: row tiles times token tiles, token tiles of one row tile side by side.
    """
    THREADS: gl.constexpr = 32 * WARPS
    ROWS: gl.constexpr = 16 * WARPS
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    CHUNKS: gl.constexpr = EXPERTS * INNER // 256
    e = gl.arange(0, EXPERTS_PADDED, layout=LINE)
    pairs = gl.sum(gl.load(counts + e, mask=e < EXPERTS, other=0), 0)
    if pairs * 4 <= tokens * EXPERTS:
        return
    token_tiles = gl.cdiv(tokens, TOKENS)
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    units = tiles * CHUNKS
    unit = (program.to(gl.int64) * units // programs).to(gl.int32)
    last = ((program + 1).to(gl.int64) * units // programs).to(gl.int32)
    thread = gl.arange(0, THREADS, layout=LINE)
    even = gl.allocate_shared_memory(gl.float16, [TOKENS, 256], SHARED)
    odd = gl.allocate_shared_memory(gl.float16, [TOKENS, 256], SHARED)
    while unit < last:
        tile = unit // CHUNKS
        first = unit % CHUNKS
        count = gl.minimum(last - unit, CHUNKS - first)
        token0 = (tile % token_tiles) * TOKENS
        acts = _activation_pointers(a_data, a_scale, token0, tokens, thread, EXPERTS * INNER, A_SWIZZLED)
        weights = _weight_pointers(w_data, w_scale, tile // token_tiles, thread, rows32, WARPS)
        column = token0 + gl.arange(0, TOKENS, layout=COLUMN)
        total = gl.full([16 * WARPS, TOKENS], 0.0, gl.float32, ACC)
        words = _load_weights(weights, first, count > 0, thread)
        codes = _load_activations(acts, first, count > 0, token0, tokens, thread, EXPERTS * INNER, A_SWIZZLED, TOKENS, WARPS)
        _store_activations(even, codes, TOKENS, WARPS)
        codes = _load_activations(acts, first + 1, count > 1, token0, tokens, thread, EXPERTS * INNER, A_SWIZZLED, TOKENS, WARPS)
        for step in range(0, count, 2):
            at = first + step
            total, words, codes = _chunk(
                total, words, codes, even, odd, acts, weights, alpha_t, column, at, first + count, token0, tokens, columns, thread,
                EXPERTS, INNER, A_SWIZZLED, TOKENS, WARPS, ACC,
            )  # fmt: skip
            total, words, codes = _chunk(
                total, words, codes, odd, even, acts, weights, alpha_t, column, at + 1, first + count, token0, tokens, columns, thread,
                EXPERTS, INNER, A_SWIZZLED, TOKENS, WARPS, ACC,
            )  # fmt: skip
        slot = program - _program_of(tile * CHUNKS, units, programs)
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
        where = (tile * SLOTS + slot).to(gl.int64) * (TOKENS * ROWS)
        offsets = gl.arange(0, TOKENS, layout=COLUMN)[None, :] * ROWS + row[:, None]
        gl.store(parts + where + offsets, total)
        unit += count


@gluon.jit
def _program_of(unit, units, programs):
    """The program whose share holds a unit: the inverse of `p * units // programs`."""
    return (((unit + 1).to(gl.int64) * programs - 1) // units).to(gl.int32)


@gluon.jit
def _chunk(
    total, words, codes, shared, other, acts, weights, alpha_t, column, at, end, token0, tokens, columns, thread,
    EXPERTS: gl.constexpr, INNER: gl.constexpr, A_SWIZZLED: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """One chunk of 256 values from `shared`; meanwhile the next chunk's activations go to `other`."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    fence_async_shared()
    gl.thread_barrier()
    x, scale = words
    partial = gl.full([16 * WARPS, TOKENS], 0.0, gl.float32, ACC)
    turn = (thread // 32 % 2) * 8
    wanted = (at + 1 < end).to(gl.int32) + thread * 0
    prefetch(weights[2] + (at + AHEAD).to(gl.int64) * weights[3], ((at + AHEAD < end) & weights[4]).to(gl.int32))
    following = weights[0] + (at + 1) * weights[5]
    ahead = ()
    # Each quarter's registers take the next chunk's words as soon as they are decoded.
    for q in gl.static_range(4):
        left = _left_operand(x[q], _factors(scale[q], turn), LEFT, WARPS)
        ahead = ahead + (load4(following + 256 * q, wanted),)
        right = shared.slice(64 * q, 64, dim=1).permute((1, 0))
        partial = warpgroup_mma(left, right, partial, use_acc=q > 0, is_async=True)
        # At most two quarters' left operands occupy registers.
        partial = warpgroup_mma_wait(1, deps=[partial])
    scale_ahead = load4(weights[1] + (at + 1) * (weights[5] // 8), wanted)
    _store_activations(other, codes, TOKENS, WARPS)
    later = _load_activations(acts, at + 2, at + 2 < end, token0, tokens, thread, EXPERTS * INNER, A_SWIZZLED, TOKENS, WARPS)
    # Past the end the weights read as zero.
    expert = gl.minimum(at, end - 1) // (INNER // 256)
    alpha = gl.load(alpha_t + expert * columns + column)
    partial = warpgroup_mma_wait(0, deps=[partial])
    return total + partial * alpha[None, :], (ahead, scale_ahead), later


@gluon.jit
def _weight_pointers(w_data, w_scale, tile, thread, rows32, WARPS: gl.constexpr):
    lane = thread % 32
    warp = thread // 32
    block = tile * (WARPS // 2) + warp // 2
    # One line of the tile's chunk per thread for the prefetch: 32 of data, then 4 of scale factors, per 32 rows.
    row = tile * (WARPS // 2) + thread // 36
    line = thread % 36
    lines = gl.where(line < 32, w_data + row * 1024 + line * 32, w_scale + row * 128 + (line - 32) * 32)
    return (
        w_data + block * 1024 + (warp % 2) * 128 + lane * 4, w_scale + block * 128 + lane * 4,
        lines, gl.where(line < 32, 1024, 128) * rows32.to(gl.int64), thread < 18 * WARPS, rows32.to(gl.int64) * 1024,
    )  # fmt: skip


@gluon.jit
def _load_weights(weights, chunk, wanted, thread):
    """16 rows x 256 values of one warp: four times four words, and four words of scale factors."""
    data = weights[0] + chunk * weights[5]
    here = wanted.to(gl.int32) + thread * 0
    x = (load4(data, here), load4(data + 256, here), load4(data + 512, here), load4(data + 768, here))
    return x, load4(weights[1] + chunk * (weights[5] // 8), here)


@gluon.jit
def _factors(scale, turn):
    """Scale factors of the warp's rows, as float16 bits in both sides."""
    return gl.inline_asm_elementwise(
        "shf.l.wrap.b32 $0, $1, $1, $2; and.b32 $0, $0, 0x7F807F80;", "=r,r,r", [scale, turn], gl.int32, True, 1
    )


@gluon.jit
def _left_operand(x, factors, LEFT: gl.constexpr, WARPS: gl.constexpr):
    """[128, 64] float16 in the registers of the instruction, from four words per thread."""
    steps = ()
    for s in gl.static_range(4):
        d = decode_weights(x[s], factors)
        first = gl.join(gl.join(d[0], d[1]), gl.join(d[2], d[3]))
        second = gl.join(gl.join(d[4], d[5]), gl.join(d[6], d[7]))
        steps = steps + (gl.join(first, second),)
    joined = gl.join(gl.join(steps[0], steps[1]), gl.join(steps[2], steps[3]))
    # warp, g, t, side, row half, k half, step bit 0, step bit 1
    parts = gl.reshape(joined, [WARPS, 8, 4, 2, 2, 2, 2, 2])
    parts = gl.permute(parts, (0, 4, 1, 7, 6, 5, 2, 3))
    return gl.convert_layout(gl.reshape(parts, [16 * WARPS, 64]), LEFT, assert_trivial=True)


@gluon.jit
def _activation_pointers(a_data, a_scale, token0, tokens, thread, K: gl.constexpr, A_SWIZZLED: gl.constexpr):
    """Per thread: lane 4g + t of warp 4h + q reads token 8h + g, quarter q, scale block t."""
    quarter = thread // 32 % 4
    t = thread % 4
    return a_data + quarter * 8 + t * 2, a_scale, token0 + thread // 128 * 8 + thread % 32 // 4, quarter, t


@gluon.jit
def _load_activations(
    acts, chunk, wanted, token0, tokens, thread, K: gl.constexpr, A_SWIZZLED: gl.constexpr,
    TOKENS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    data, scales, token, quarter, t = acts
    codes = ()
    for r in gl.static_range(TOKENS // (2 * WARPS)):
        m = token + 2 * WARPS * r
        here = ((m < tokens) & wanted).to(gl.int32)
        word = data + m.to(gl.int64) * (K // 8) + chunk * 32
        block = chunk * 16 + quarter * 4 + t
        if A_SWIZZLED:
            where = ((m // 128) * (K // 64) + block // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + t
        else:
            where = m.to(gl.int64) * (K // 16) + block
        unit = gl.load(scales + where, mask=here != 0, other=0).to(gl.int32)
        codes = codes + ((load1(word, here), load1(word + 1, here), unit),)
    return codes


@gluon.jit
def _store_activations(shared, codes, TOKENS: gl.constexpr, WARPS: gl.constexpr):
    """Decoded activations to shared memory as [TOKENS, 256] float16, each step's 16 values in slot order."""
    words = shared._reinterpret(gl.int32, [TOKENS, 128], gl.NVMMASharedLayout(128, 32, 2))
    # Two repeats at a time where there are many: all at once would take 64 registers.
    REPEATS: gl.constexpr = TOKENS // (2 * WARPS)
    GROUP: gl.constexpr = REPEATS if REPEATS <= 4 else 2
    for first in gl.static_range(0, REPEATS, GROUP):
        pieces = ()
        for r in gl.static_range(GROUP):
            b = decode_activations(codes[first + r][0], codes[first + r][1], codes[first + r][2])
            low = gl.join(gl.join(b[0], b[1]), gl.join(b[2], b[3]))
            high = gl.join(gl.join(b[4], b[5]), gl.join(b[6], b[7]))
            pieces = pieces + (gl.join(low, high),)
        # token group, quarter, g, t, then: slot half, step bit 0, step bit 1, repeat
        parts = gl.reshape(_join_all(pieces, GROUP), [WARPS // 4, 4, 8, 4, 2, 2, 2, GROUP])
        parts = gl.permute(parts, (7, 0, 2, 1, 6, 5, 4, 3))
        rows = words.slice(2 * WARPS * first, 2 * WARPS * GROUP, dim=0)
        rows.store(gl.reshape(parts, [2 * WARPS * GROUP, 128]))


@gluon.jit
def _join_all(pieces, COUNT: gl.constexpr):
    """The pieces along one more, innermost dimension (bits of the index from the first join on, lowest last)."""
    if COUNT == 1:
        joined = pieces[0]
    elif COUNT == 2:
        joined = gl.join(pieces[0], pieces[1])
    else:
        gl.static_assert(COUNT == 4)
        joined = gl.join(gl.join(pieces[0], pieces[2]), gl.join(pieces[1], pieces[3]))
    return joined
