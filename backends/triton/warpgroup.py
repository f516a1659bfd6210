"""Dense alpha, 9 tokens and more: every expert meets every token, on the warpgroup instructions of SM 9.0.

One program fills a multiprocessor with specialized warps:

- the first 4 copy weights and packed activations from global to shared memory (asynchronous copies, up to
  COPY_STAGES chunks ahead) and decode activations to float16 in shared memory, where the instruction wants its
  right operand; with two PRODUCERS, 4 more warps decode every second slice;
- each of the CONSUMERS groups of 4 decodes the weights of 64 rows into registers, the left operand, and
  multiplies. Partial sums of one expert and the running total are both float32, in registers.

Weights and activations are decoded once per tile of 64 * CONSUMERS rows x TOKENS tokens.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from backends.triton.fragments import async_load, barrier, decode_weights, reinterpret


def _unit_asm() -> str:
    """$0..$3: the four scale factors of a word ($4; bits 14..7 of float16), each in both 16-bit sides."""
    return "\n".join(f"prmt.b32 ${i}, $4, 0, 0x4{i}4{i}; shl.b32 ${i}, ${i}, 7;" for i in range(4))


def _codes_asm() -> str:
    """$0..$3: 8 float16, 2^-8 of the values of a packed word ($4); $5..$8 are its four scale factors."""
    # A product with two set bits shifts sign and magnitude by different amounts; the masks keep it free of carries.
    return """{ .reg .b32 t;
    and.b32 $0, $4, 0x8E008E00;
    shl.b32 t, $4, 3; and.b32 $1, t, 0x8E008E00;
    and.b32 t, $4, 0x40384038; mul.lo.u32 t, t, 66; and.b32 $2, t, 0x8E008E00;
    and.b32 t, $4, 0x20072007; mul.lo.u32 t, t, 516; and.b32 $3, t, 0x8E008E00;
    mul.f16x2 $0, $0, $5; mul.f16x2 $1, $1, $6; mul.f16x2 $2, $2, $7; mul.f16x2 $3, $3, $8; }"""


_UNITS = gl.constexpr(_unit_asm())
_CODES = gl.constexpr(_codes_asm())
_INT4 = gl.constexpr((gl.int32, gl.int32, gl.int32, gl.int32))
_PLAIN1 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_PLAIN2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit(do_not_specialize=["tokens"])
def pack_activations(
    a_data, a_scale, counts, packed, units, tokens, columns,
    EXPERTS: gl.constexpr, EXPERTS_PADDED: gl.constexpr, INNER: gl.constexpr, A_SWIZZLED: gl.constexpr,
    TOKENS: gl.constexpr,
):  # fmt: skip
    """Activations in the order and packing that `fc2_warpgroup` decodes; a thread per token and 64 values.

    Args:
        a_data: int32 view of [tokens, K/2] bytes.
        packed: int32 [K/256, columns / TOKENS, quarter 4, TOKENS, 8]: word 2s + h holds the values at slots
            8h .. 8h+7 of step s, as `_codes_asm` takes them: in each 16-bit side, from bit 15 down, the signs of scale
            blocks 0, 2, 3, 1, then the magnitudes of 0, 1, 2, 3.
        units: int32 [K/256, columns / TOKENS, quarter 4, TOKENS], four scale factors each: bits 14..7 of the
            float16 64*s. Signs go to the values.
        columns: tokens, rounded up to whole tiles; values past the last token are zero.
    """
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    K: gl.constexpr = EXPERTS * INNER
    e = gl.arange(0, EXPERTS_PADDED, layout=LINE)
    pairs = gl.sum(gl.load(counts + e, mask=e < EXPERTS, other=0), 0)
    if pairs * 4 <= tokens * EXPERTS:
        return
    quarter = gl.program_id(0)
    m = gl.program_id(1) * 128 + gl.arange(0, 128, layout=gl.SliceLayout(1, WIDE))
    i = gl.arange(0, 8, layout=gl.SliceLayout(0, WIDE))
    inside = m < tokens
    start = m.to(gl.int64) * (K // 8) + quarter * 8
    word = gl.load(a_data + start[:, None] + i[None, :], mask=inside[:, None], other=0)
    if A_SWIZZLED:
        where = ((m // 128) * (K // 64) + quarter) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4
    else:
        where = m.to(gl.int64) * (K // 16) + quarter * 4
    scales = gl.load((a_scale + where).to(gl.pointer_type(gl.int32), bitcast=True), mask=inside, other=0)
    # Words 2t and 2t + 1 belong to scale block t: a negative scale factor flips the signs of its 16 codes.
    flip = ((scales[:, None] >> (8 * (i // 2) + 7)[None, :]) & 1) != 0
    word = gl.where(flip, word ^ -2004318072, word)
    even, odd = gl.split(gl.reshape(word, [128, 4, 2]))  # w = 0 and w = 1, [token, t]
    outputs = ()
    for w in gl.static_range(2):
        source = odd if w else even
        outer, inner = gl.split(gl.reshape(source, [128, 2, 2]))  # blocks 0 and 2; 1 and 3
        t0, t2 = gl.split(outer)
        t1, t3 = gl.split(inner)
        for p in gl.static_range(4):
            low = _field(t0, p, 15, 9) | _field(t1, p, 12, 6)
            outputs = outputs + (low | _field(t2, p, 14, 3) | _field(t3, p, 13, 0),)
    joined = gl.join(
        gl.join(gl.join(outputs[0], outputs[4]), gl.join(outputs[2], outputs[6])),
        gl.join(gl.join(outputs[1], outputs[5]), gl.join(outputs[3], outputs[7])),
    )
    joined = gl.convert_layout(gl.reshape(joined, [128, 8]), WIDE)
    tile = quarter // 4 * (columns // TOKENS) + m // TOKENS
    row = (tile * 4 + quarter % 4).to(gl.int64) * TOKENS + m % TOKENS
    stored = m < columns
    gl.store(packed + row[:, None] * 8 + i[None, :], joined, mask=stored[:, None])
    unit = scales - scales
    for t in gl.static_range(4):
        byte = (scales >> (8 * t)) & 0x7F
        # 64 s in float16 from e4m3: the fields of both line up at 2^14 of the value.
        half = (byte << 7).to(gl.int16).to(gl.float16, bitcast=True) * 16384.0
        bits = (half.to(gl.int16, bitcast=True).to(gl.int32) >> 7) & 0xFF
        unit = unit | (gl.where(byte == 0x7F, 0xFF, bits) << (8 * t))
    gl.store(units + row, unit, mask=stored)


@gluon.jit
def _field(words, pair: gl.constexpr, SIGN: gl.constexpr, MAGNITUDE: gl.constexpr):
    """Codes `pair` and `pair` + 4 of 8, with sign and magnitude at the given bits of both sides."""
    code = words >> (4 * pair)
    return ((code & 0x00080008) << (SIGN - 3)) | ((code & 0x00070007) << MAGNITUDE)


@gluon.jit(do_not_specialize=["tokens", "tiles", "slots", "blocks"])
def fc2_warpgroup(
    packed, units, w_data, w_scale, alpha_t, counts, parts, tokens, tiles, slots, blocks,
    EXPERTS: gl.constexpr, EXPERTS_PADDED: gl.constexpr, INNER: gl.constexpr,
    TOKENS: gl.constexpr, CONSUMERS: gl.constexpr, PRODUCERS: gl.constexpr,
    STAGES: gl.constexpr, COPY_STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """An equal share of all (tile, 256 values of K) per program; a tile is 64 * CONSUMERS rows x TOKENS.

    Args:
        packed, units: activations from `pack_activations`.
        alpha_t: float32 [EXPERTS, columns], zero past the last token.
        parts: float32 [tiles, slots, TOKENS, 64 * CONSUMERS] of part sums (2^-16 of them), one slot for
            each program of a tile.
        tiles: row tiles times token tiles, token tiles of one row tile side by side.
        blocks: blocks of 32 rows that B has.
    """
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    CHUNKS: gl.constexpr = EXPERTS * INNER // 256
    SLICES: gl.constexpr = 4 * TOKENS // 128 if TOKENS >= 32 else 1  # of 256 values of K
    e = gl.arange(0, EXPERTS_PADDED, layout=LINE)
    pairs = gl.sum(gl.load(counts + e, mask=e < EXPERTS, other=0), 0)
    if pairs * 4 <= tokens * EXPERTS:
        return
    program = gl.program_id(0)
    all_units = tiles * CHUNKS
    first = (program.to(gl.int64) * all_units // gl.num_programs(0)).to(gl.int32)
    last = ((program + 1).to(gl.int64) * all_units // gl.num_programs(0)).to(gl.int32)

    acts = gl.allocate_shared_memory(
        gl.float16, [STAGES * SLICES, TOKENS, 256 // SLICES], gl.NVMMASharedLayout(128, 16, 2)
    )
    codes = gl.allocate_shared_memory(gl.int32, [COPY_STAGES, 4 * TOKENS, 8], _PLAIN2)
    factors = gl.allocate_shared_memory(gl.int32, [COPY_STAGES, 4 * TOKENS], _PLAIN1)
    alphas = gl.allocate_shared_memory(gl.float32, [COPY_STAGES, TOKENS], _PLAIN1)
    words = gl.allocate_shared_memory(gl.int32, [COPY_STAGES, 2 * CONSUMERS, 1024], _PLAIN2)
    scales = gl.allocate_shared_memory(gl.int32, [COPY_STAGES, 2 * CONSUMERS, 128], _PLAIN2)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES * SLICES, 1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [STAGES * SLICES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [COPY_STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [COPY_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES * SLICES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(drained.index(i), count=CONSUMERS)
    for i in gl.static_range(COPY_STAGES):
        mbarrier.init(loaded.index(i), count=128)
        mbarrier.init(used.index(i), count=CONSUMERS + PRODUCERS - 1)
    fence_async_shared()
    barrier()
    rings = (acts, codes, factors, alphas, words, scales, filled, drained, loaded, used)
    share = (first, last, gl.cdiv(tokens, TOKENS))
    sources = (packed, units, w_data, w_scale, alpha_t, blocks)
    # In its first tile there may be programs before this one; all later tiles it begins itself.
    start = first // CHUNKS * CHUNKS
    owner = (((start + 1).to(gl.int64) * gl.num_programs(0) - 1) // all_units).to(gl.int32)
    place = (parts, slots, program - owner)
    sizes: gl.constexpr = (EXPERTS, INNER, TOKENS, SLICES, CONSUMERS, STAGES, COPY_STAGES, PRODUCERS)
    if PRODUCERS == 2:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize(
            [
                (_produce, (rings, share, sources, 0, sizes)),
                (_consume, (rings, share, place, 0, sizes)),
                (_consume, (rings, share, place, 1, sizes)),
                (_produce, (rings, share, sources, 1, sizes)),
            ],
            [4, 4, 4], [REGISTERS, REGISTERS, 256 - REGISTERS],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_produce, (rings, share, sources, 0, sizes)),
                (_consume, (rings, share, place, 0, sizes)),
                (_consume, (rings, share, place, 1, sizes)),
            ],
            [4, 4], [REGISTERS, REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 4)
        gl.warp_specialize(
            [
                (_produce, (rings, share, sources, 0, sizes)),
                (_consume, (rings, share, place, 0, sizes)),
                (_consume, (rings, share, place, 1, sizes)),
                (_consume, (rings, share, place, 2, sizes)),
                (_consume, (rings, share, place, 3, sizes)),
            ],
            [4, 4, 4, 4], [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip


@gluon.jit
def _produce(rings, share, sources, WHICH: gl.constexpr, sizes: gl.constexpr):
    """Fills the rings in the order in which `_consume` empties them; every PRODUCERS-th slice of them."""
    acts, codes, factors, alphas, words, scales, filled, drained, loaded, used = rings
    first, last, token_tiles = share
    TOKENS: gl.constexpr = sizes[2]
    SLICES: gl.constexpr = sizes[3]
    STAGES: gl.constexpr = sizes[5]
    COPY_STAGES: gl.constexpr = sizes[6]
    PRODUCERS: gl.constexpr = sizes[7]
    QUARTERS: gl.constexpr = 4 // SLICES  # per slice
    ROWS: gl.constexpr = QUARTERS * TOKENS
    # A thread decodes 8 words of one token, or 4 where there are 16 tokens.
    WORDS: gl.constexpr = gl.BlockedLayout([1, ROWS // 16], [ROWS // 4, 128 // ROWS], [4, 1], [1, 0])
    UNITS: gl.constexpr = gl.SliceLayout(1, WORDS)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)  # of float16
    CHUNKS: gl.constexpr = sizes[0] * sizes[1] // 256
    ahead = (first % CHUNKS, first // CHUNKS // token_tiles, first // CHUNKS % token_tiles)
    if WHICH == 0:
        for early in gl.static_range(COPY_STAGES - 2):
            ahead = _copy(rings, first + early < last, ahead, early, token_tiles, sources, sizes)
    for at in range(first, last):
        step = at - first
        if WHICH == 0:
            # The stage of two chunks before: waiting for the last one would hold up the decoding.
            stage = (step + COPY_STAGES - 2) % COPY_STAGES
            turn = (step + COPY_STAGES - 2) // COPY_STAGES
            mbarrier.wait(used.index(stage), (turn + 1) & 1, pred=turn > 0)
            ahead = _copy(rings, at + COPY_STAGES - 2 < last, ahead, stage, token_tiles, sources, sizes)
        stage = step % COPY_STAGES
        slot = step % STAGES
        phase = (step // STAGES + 1) & 1
        mbarrier.wait(loaded.index(stage), (step // COPY_STAGES) & 1)
        for s in gl.static_range(WHICH, SLICES, PRODUCERS):
            index = slot * SLICES + s
            code = codes.index(stage).slice(s * ROWS, ROWS, dim=0).load(WORDS)
            unit = factors.index(stage).slice(s * ROWS, ROWS, dim=0).load(UNITS)
            u0, u1, u2, u3 = gl.inline_asm_elementwise(_UNITS, "=&r,=&r,=&r,=&r,r", [unit], _INT4, True, 1)
            code, u0 = gl.broadcast(code, u0[:, None])
            code, u1 = gl.broadcast(code, u1[:, None])
            code, u2 = gl.broadcast(code, u2[:, None])
            code, u3 = gl.broadcast(code, u3[:, None])
            x0, x1, x2, x3 = gl.inline_asm_elementwise(
                _CODES, "=&r,=&r,=&r,=&r,r,r,r,r,r", [code, u0, u1, u2, u3], _INT4, True, 1
            )
            values = gl.reshape(gl.join(gl.join(x0, x2), gl.join(x1, x3)), [QUARTERS, TOKENS, 32])
            values = gl.reshape(gl.permute(values, (1, 0, 2)), [TOKENS, 32 * QUARTERS])
            mbarrier.wait(drained.index(index), phase, pred=step >= STAGES)
            reinterpret(acts.index(index), gl.int32, [TOKENS, 32 * QUARTERS], PAIRS).store(values)
            fence_async_shared()
            mbarrier.arrive(filled.index(index), count=1)
        if WHICH > 0:
            mbarrier.arrive(used.index(stage), count=1)


@gluon.jit
def _copy(rings, wanted, at, stage, token_tiles, sources, sizes: gl.constexpr):
    """Starts copying weights and activations of the unit at (chunk, row tile, token tile); the next unit.

    One stage for both: loads return in the order of their issue, so a later one would wait for these weights.
    """
    _, codes, factors, alphas, words, scales, _, _, loaded, _ = rings
    packed, units, w_data, w_scale, alpha_t, blocks = sources
    chunk, row_tile, token_tile = at
    CHUNKS: gl.constexpr = sizes[0] * sizes[1] // 256
    TOKENS: gl.constexpr = sizes[2]
    PIECES: gl.constexpr = sizes[4] // 2  # of 128 rows, which are contiguous in memory
    DATA: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    SCALE: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    CODES: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    if wanted:
        for piece in gl.static_range(PIECES):
            # Rows past the end of B repeat its last 128.
            block = gl.minimum((row_tile * PIECES + piece) * 4, blocks - 4)
            base = chunk.to(gl.int64) * blocks + block
            where = (gl.arange(0, 4, layout=gl.SliceLayout(1, DATA)) * 1024)[:, None]
            where = where + gl.arange(0, 1024, layout=gl.SliceLayout(0, DATA))[None, :]
            target = words.index(stage).slice(4 * piece, 4, dim=0)
            async_load(target, w_data + base * 1024 + where)
            where = (gl.arange(0, 4, layout=gl.SliceLayout(1, SCALE)) * 128)[:, None]
            where = where + gl.arange(0, 128, layout=gl.SliceLayout(0, SCALE))[None, :]
            target = scales.index(stage).slice(4 * piece, 4, dim=0)
            async_load(target, w_scale + base * 128 + where)
        tile = chunk * token_tiles + token_tile
        where = (gl.arange(0, 4 * TOKENS, layout=gl.SliceLayout(1, CODES)) * 8)[:, None]
        where = where + gl.arange(0, 8, layout=gl.SliceLayout(0, CODES))[None, :]
        base = tile.to(gl.int64) * (4 * TOKENS)
        async_load(codes.index(stage), packed + base * 8 + where)
        where = gl.arange(0, 4 * TOKENS, layout=LINE)
        async_load(factors.index(stage), units + base + where)
        tile = chunk // (sizes[1] // 256) * token_tiles + token_tile
        where = gl.arange(0, TOKENS, layout=LINE)
        async_load(alphas.index(stage), alpha_t + tile * TOKENS + where)
        async_copy.mbarrier_arrive(loaded.index(stage), increment_count=False)
    end = (chunk + 1 == CHUNKS).to(gl.int32)
    token_tile += end
    row_end = (token_tile == token_tiles).to(gl.int32)
    return (chunk + 1) * (1 - end), row_tile + row_end, token_tile * (1 - row_end)


@gluon.jit
def _consume(rings, share, place, GROUP: gl.constexpr, sizes: gl.constexpr):
    """Rows 64 * GROUP .. 64 * GROUP + 63 of the program's tiles."""
    acts, _, _, alphas, words, scales, filled, drained, loaded, used = rings
    first, last, token_tiles = share
    parts, slots, slot0 = place
    CHUNKS: gl.constexpr = sizes[0] * sizes[1] // 256
    TOKENS: gl.constexpr = sizes[2]
    SLICES: gl.constexpr = sizes[3]
    QUARTERS: gl.constexpr = 4 // SLICES  # per slice
    ROWS: gl.constexpr = 64 * sizes[4]
    STAGES: gl.constexpr = sizes[5]
    COPY_STAGES: gl.constexpr = sizes[6]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    total = gl.full([64, TOKENS], 0.0, gl.float32, ACC)
    zero = gl.full([64, TOKENS], 0.0, gl.float32, ACC)
    mbarrier.wait(loaded.index(0), 0)
    factors = _factors(scales.index(0), GROUP)
    # Waiting for activations before decoding weights, not after, keeps no decoded weights across the wait:
    # else two producers at 128 tokens would spill. One producer leaves registers to hide the wait.
    WAIT_FIRST: gl.constexpr = sizes[7] == 2
    # All words of a chunk wait in registers where these suffice: a load from shared memory takes 30 cycles.
    LOADS: gl.constexpr = 4 if TOKENS < 128 else 1
    x = _load(words.index(0), GROUP, 0, LOADS)
    left = _left(x[0], factors[0], ACC)
    for at in range(first, last):
        step = at - first
        stage = step % COPY_STAGES
        slot = step % STAGES
        phase = (step // STAGES) & 1
        partial = zero
        for q in gl.static_range(4):
            if q % QUARTERS == 0 and (q == 0 or not WAIT_FIRST):
                mbarrier.wait(filled.index(slot * SLICES + q // QUARTERS), phase)
            right = acts.index(slot * SLICES + q // QUARTERS).slice(64 * (q % QUARTERS), 64, dim=1)
            partial = warpgroup_mma(left, right.permute((1, 0)), partial, use_acc=q > 0, is_async=True)
            if q < 3:
                # The last quarter's products are done and its registers free when the next ones are decoded.
                partial = warpgroup_mma_wait(1, deps=[partial])
                if q > 0 and q % QUARTERS == 0:
                    mbarrier.arrive(drained.index(slot * SLICES + q // QUARTERS - 1), count=1)
                if (q + 1) % QUARTERS == 0 and WAIT_FIRST:
                    mbarrier.wait(filled.index(slot * SLICES + (q + 1) // QUARTERS), phase)
                if LOADS == 1:
                    left = _left(_load(words.index(stage), GROUP, q + 1, 1)[0], factors[q + 1], ACC)
                else:
                    left = _left(x[q + 1], factors[q + 1], ACC)
        # The next chunk's first registers are ready before this one's sums are.
        following = (step + 1) % COPY_STAGES
        mbarrier.wait(loaded.index(following), ((step + 1) // COPY_STAGES) & 1, pred=at + 1 < last)
        factors = _factors(scales.index(following), GROUP)
        x = _load(words.index(following), GROUP, 0, LOADS)
        left = _left(x[0], factors[0], ACC)
        partial, left = warpgroup_mma_wait(0, deps=[partial, left])
        alpha = alphas.index(stage).load(COLUMN)
        mbarrier.arrive(used.index(stage), count=1)
        if QUARTERS == 1:
            mbarrier.arrive(drained.index(slot * SLICES + SLICES - 2), count=1)
        mbarrier.arrive(drained.index(slot * SLICES + SLICES - 1), count=1)
        total = total + partial * alpha[None, :]
        if (at + 1) % CHUNKS == 0 or at + 1 == last:
            tile = at // CHUNKS
            part = tile * slots + gl.where(tile == first // CHUNKS, slot0, 0)
            where = part.to(gl.int64) * (TOKENS * ROWS)
            row = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)) + 64 * GROUP
            offsets = gl.arange(0, TOKENS, layout=COLUMN)[None, :] * ROWS + row[:, None]
            gl.store(parts + where + offsets, total)
            total = zero


@gluon.jit
def _four(words):
    """The last dimension of [128, 4] apart: one element per thread each."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    even, odd = gl.split(gl.reshape(words, [128, 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return (
        gl.convert_layout(x0, LINE, assert_trivial=True), gl.convert_layout(x1, LINE, assert_trivial=True),
        gl.convert_layout(x2, LINE, assert_trivial=True), gl.convert_layout(x3, LINE, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def _factors(scales, GROUP: gl.constexpr):
    """Per quarter, the scale factors of the warp's rows g and g + 8 in the 16-bit sides, as float16 bits."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    WARPS: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [2, 2, 1, 1], [3, 2, 1, 0])
    # Both warps of a block of 32 rows read the same words; the second turns its half of them to the front.
    block = gl.reshape(scales.slice(2 * GROUP, 2, dim=0).load(PAIRS), [2, 32, 4])
    block = gl.convert_layout(block, gl.SliceLayout(1, WARPS), assert_trivial=True)
    block, _ = gl.broadcast(block[:, None, :, :], gl.full([2, 2, 32, 4], 0, gl.int32, WARPS))
    words = _four(gl.reshape(block, [128, 4]))
    turn = gl.arange(0, 128, layout=LINE) // 32 % 2 * 8
    result = ()
    for q in gl.static_range(4):
        result = result + (
            gl.inline_asm_elementwise(
                "shf.l.wrap.b32 $0, $1, $1, $2; and.b32 $0, $0, 0x7F807F80;", "=r,r,r", [words[q], turn],
                gl.int32, True, 1,
            ),
        )  # fmt: skip
    return result


@gluon.jit
def _load(words, GROUP: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """The thread's four words of each of COUNT quarters."""
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    result = ()
    for q in gl.static_range(FIRST, FIRST + COUNT):
        block = words.slice(2 * GROUP, 2, dim=0).slice(256 * q, 256, dim=1).load(PAIRS)
        result = result + (_four(gl.reshape(block, [128, 4])),)
    return result


@gluon.jit
def _left(x, factors, ACC: gl.constexpr):
    """[64, 64] float16 weights, in the registers of the left operand."""
    steps = ()
    for s in gl.static_range(4):
        d = decode_weights(x[s], factors)
        first = gl.join(gl.join(d[0], d[1]), gl.join(d[2], d[3]))
        second = gl.join(gl.join(d[4], d[5]), gl.join(d[6], d[7]))
        steps = steps + (gl.join(first, second),)
    joined = gl.join(gl.join(steps[0], steps[1]), gl.join(steps[2], steps[3]))
    # warp, g, t, side, row half, k half, step bit 0, step bit 1
    values = gl.permute(gl.reshape(joined, [4, 8, 4, 2, 2, 2, 2, 2]), (0, 4, 1, 7, 6, 5, 2, 3))
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    return gl.convert_layout(gl.reshape(values, [64, 64]), LEFT, assert_trivial=True)
