"""Routed alpha, any number of tokens: each expert's weights meet only the tokens that selected it."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from backends.triton.fragments import load4, load4_shared, multiply1, multiply2, prefetch


@gluon.jit(do_not_specialize=["tokens"])
def fc2_routed(
    w_data, w_scale, gathered, counts, token_of, weight_of, lists, sums, tokens, hidden,
    EXPERTS: gl.constexpr, EXPERTS_PADDED: gl.constexpr, INNER: gl.constexpr, SETS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """64 rows of B and every SETS-th used expert per program of 4 warps.

    Warp w owns rows 16w .. 16w+15 of the tile and alone reads and writes their sums, one expert after the other, so
    that the order of additions is fixed without atomics. The sums of a program fit the second-level cache.

    The weights are in the second-level cache AHEAD steps, and in registers one step, before their use.

    Args:
        gathered, counts, token_of, weight_of: of `plan.gather_tokens`.
        lists: int32 [SETS, tiles, EXPERTS] of scratch.
        sums: float32 [SETS, tiles, tokens, 64]; 2^-16 of the part sums.
    """
    THREADS: gl.constexpr = 128
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    QUAD: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    CHUNKS: gl.constexpr = INNER // 256
    e = gl.arange(0, EXPERTS_PADDED, layout=LINE)
    uses = gl.load(counts + e, mask=e < EXPERTS, other=0)
    if gl.sum(uses, 0) * 4 > tokens * EXPERTS:
        return
    tile = gl.program_id(0)
    part = gl.program_id(1)
    tiles = gl.num_programs(0)
    thread = gl.arange(0, THREADS, layout=LINE)
    lane = thread % 32
    warp = thread // 32
    t = lane % 4
    block = tile * 2 + warp // 2
    rows32 = gl.cdiv(hidden, 128).to(gl.int64) * 4
    weights = (w_data + block * 1024 + (warp % 2) * 128 + lane * 4, w_scale + block * 128 + lane * 4, rows32)
    turn = (warp % 2) * 8
    always = gl.full([THREADS], 1, gl.int32, LINE)
    zero = gl.full([THREADS], 0.0, gl.float32, LINE)
    none = (zero, zero, zero, zero)

    sums += (part * tiles + tile).to(gl.int64) * tokens * 64
    quad = gl.arange(0, THREADS, layout=gl.SliceLayout(1, QUAD))[:, None] * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, QUAD))[None, :]
    for first in range(0, tokens, 8):
        gl.store(sums + first * 64 + quad, gl.full([THREADS, 4], 0.0, gl.float32, QUAD), mask=first + quad // 64 < tokens)
    active = lists + (part * tiles + tile) * EXPERTS
    used = (uses > 0).to(gl.int32)
    gl.store(active + gl.associative_scan(used, 0, _sum) - used, e, mask=used != 0)
    steps = gl.sum(used, 0) * CHUNKS
    gl.thread_barrier()
    sums += warp * 16 + lane // 4

    # Each warp of a pair that shares 32 rows prefetches half of their chunk: 36 lines of 128 bytes.
    line = warp % 2 * 18 + lane
    lines = gl.where(
        line < 32, w_data + block * 1024 + line * 32, w_scale + block * 128 + (line - 32) * 32
    )
    line_step = gl.where(line < 32, 1024, 128) * rows32
    has_line = (lane < 18).to(gl.int32)
    queue = ()
    for i in gl.static_range(AHEAD + 1):
        queue = queue + (_expert(active, part + i * SETS, steps, CHUNKS),)
        if i > 0:
            prefetch(lines + (queue[i] * CHUNKS + (part + i * SETS) % CHUNKS) * line_step, has_line)
    lists = (counts, token_of + 2 * t, weight_of + 2 * t)
    uses_now = _uses(lists, queue[0], tokens, part < steps)
    words = _weights(weights, queue[0] * CHUNKS + part % CHUNKS, always)
    for step in range(part, steps, SETS):
        expert = queue[0]
        count, listed = uses_now
        x, scale = words
        inside = step + SETS < steps
        words = _weights(weights, queue[1] * CHUNKS + (step + SETS) % CHUNKS, always * inside.to(gl.int32))
        uses_now = _uses(lists, queue[1], tokens, inside)
        far = step + AHEAD * SETS
        prefetch(lines + (queue[AHEAD] * CHUNKS + far % CHUNKS) * line_step, has_line * (far < steps).to(gl.int32))
        queue = _shifted(queue, _expert(active, far + SETS, steps, CHUNKS), AHEAD)
        s = (_turned(scale[0], turn), _turned(scale[1], turn), _turned(scale[2], turn), _turned(scale[3], turn))
        slots = expert.to(gl.int64) * tokens
        rows = gathered + (slots + lane // 4) * (INNER // 2) + (step % CHUNKS) * 128 + t * 4
        for first in range(0, count, 16):
            if first > 0:
                listed = _listed(lists, slots + first)
            pair = _pair(listed, 2 * t, count - first)
            old = _old_sums(sums, pair)
            b = _activations(rows, first, count, lane, INNER)
            if count - first <= 8:
                p = none
                for q in gl.static_range(4):
                    p = multiply1(p, x[q], s[q], b[q], 0)
                _new_sums(sums, old, pair, p)
            else:
                pair2 = _pair(_listed(lists, slots + first + 8), 2 * t, count - first - 8)
                c = _activations(rows, first + 8, count, lane, INNER)
                old2 = _old_sums(sums, pair2)
                wide = (zero, zero, zero, zero, zero, zero, zero, zero)
                for q in gl.static_range(4):
                    wide = multiply2(wide, x[q], s[q], b[q], c[q])
                _new_sums(sums, old, pair, (wide[0], wide[1], wide[2], wide[3]))
                _new_sums(sums, old2, pair2, (wide[4], wide[5], wide[6], wide[7]))
            _warp_barrier(zero)


@gluon.jit
def _sum(x, y):
    return x + y


@gluon.jit
def _expert(active, step, steps, CHUNKS: gl.constexpr):
    return gl.load(active + step // CHUNKS, mask=step < steps, other=0)


@gluon.jit
def _shifted(queue, last, LENGTH: gl.constexpr):
    shifted = ()
    for i in gl.static_range(LENGTH):
        shifted = shifted + (queue[i + 1],)
    return shifted + (last,)


@gluon.jit
def _uses(lists, expert, tokens, inside):
    """How many tokens an expert has, and what its list says of this thread's two of the first 8, valid or not."""
    count = gl.load(lists[0] + expert, mask=inside, other=0)
    return count, _listed(lists, expert.to(gl.int64) * tokens)


@gluon.jit
def _listed(lists, slot):
    """This thread's two entries of the 8 from a slot on: tokens, and alpha."""
    token_of, weight_of = lists[1], lists[2]
    return gl.load(token_of + slot), gl.load(token_of + slot + 1), gl.load(weight_of + slot), gl.load(weight_of + slot + 1)


@gluon.jit
def _pair(listed, mine, left):
    """The entries with row -1 past the last token. Apart from the loads, so that nothing waits for the count."""
    return gl.where(mine < left, listed[0], -1), gl.where(mine + 1 < left, listed[1], -1), listed[2], listed[3]


@gluon.jit
def _weights(weights, chunk, wanted):
    """16 rows x 256 values of one warp: four times four words, and four words of scale factors."""
    w_data, w_scale, rows32 = weights
    data = w_data + chunk * (rows32 * 1024)
    x = (load4(data, wanted), load4(data + 256, wanted), load4(data + 512, wanted), load4(data + 768, wanted))
    return x, load4(w_scale + chunk * (rows32 * 128), wanted)


@gluon.jit
def _turned(scale, turn):
    """The word with this warp's half of the rows in the place of half 0."""
    return gl.inline_asm_elementwise("shf.l.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [scale, turn], gl.int32, True, 1)


@gluon.jit
def _activations(rows, first, count, lane, INNER: gl.constexpr):
    """Right operands of 8 tokens and 4 x 64 values of K, zeros past the last token."""
    present = (first + lane // 4 < count).to(gl.int32)
    b = ()
    for q in gl.static_range(4):
        low = load4_shared(rows + first * (INNER // 2) + q * 32, present)
        high = load4_shared(rows + first * (INNER // 2) + q * 32 + 16, present)
        b = b + ((low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]),)
    return b


@gluon.jit
def _old_sums(sums, pair):
    """This thread's sums so far: 2 rows of B, 8 apart, of 2 tokens."""
    row0, row1 = pair[0], pair[1]
    at0 = sums + row0 * 64
    at1 = sums + row1 * 64
    return (
        gl.load(at0, mask=row0 >= 0, other=0.0), gl.load(at1, mask=row1 >= 0, other=0.0),
        gl.load(at0 + 8, mask=row0 >= 0, other=0.0), gl.load(at1 + 8, mask=row1 >= 0, other=0.0),
    )  # fmt: skip


@gluon.jit
def _new_sums(sums, old, pair, p):
    row0, row1, weight0, weight1 = pair
    at0 = sums + row0 * 64
    at1 = sums + row1 * 64
    gl.store(at0, old[0] + weight0 * p[0], mask=row0 >= 0)
    gl.store(at1, old[1] + weight1 * p[1], mask=row1 >= 0)
    gl.store(at0 + 8, old[2] + weight0 * p[2], mask=row0 >= 0)
    gl.store(at1 + 8, old[3] + weight1 * p[3], mask=row1 >= 0)


@gluon.jit
def _warp_barrier(like):
    """Orders the warp's stores before its next loads: a token's column moves between lanes from expert to expert."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=f,f", [like], gl.float32, False, 1)
