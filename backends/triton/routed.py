"""Routed alpha, any number of tokens: each expert's weights meet only the tokens that selected it."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from backends.triton.fragments import barrier, load4_always, load4_cached, multiply1, multiply2

_LOAD2 = gl.constexpr(
    "{ .reg .pred p; setp.ge.s32 p, $3, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; @p ld.global.v2.f32 {$0, $1}, [$2]; }"
)
_STORE2 = gl.constexpr(
    "{ .reg .pred p; setp.ge.s32 p, $2, 0; @p st.global.v2.f32 [$1], {$3, $4}; mov.b32 $0, 0; }"
)


@gluon.jit(do_not_specialize=["tokens"])
def fc2_routed(
    w_data, w_scale, gathered, counts, token_of, weight_of, lists, sums, tokens, hidden,
    EXPERTS: gl.constexpr, EXPERTS_PADDED: gl.constexpr, INNER: gl.constexpr, SETS: gl.constexpr, WIDTH: gl.constexpr,
    WARPS: gl.constexpr, HAS_DENSE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """16 * WARPS rows of B and every SETS-th item per program; an item is up to WIDTH (8 or 16) tokens of an expert.

    Warp w owns rows 16w .. 16w+15 of the strip and alone reads and writes their sums, one item after the other, so that
    the order of additions is fixed without atomics. What an item needs is requested while the item before is multiplied,
    into the registers that become free; past the last item that is an item which exists, for nothing.

    Args:
        counts, token_of, weight_of: of `plan.list_tokens`; gathered: of `plan.gather_tokens`.
        lists: int32 [SETS, strips, EXPERTS * ceil(tokens / WIDTH)] of scratch.
        sums: float32 [SETS, strips, tokens, 16 * WARPS]; 2^-16 of the part sums, rows g and g + 8 of a warp side by side.
    """
    THREADS: gl.constexpr = 32 * WARPS
    ROWS: gl.constexpr = 16 * WARPS
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    QUAD: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    CHUNKS: gl.constexpr = INNER // 256
    if OVERLAP:
        # Lets the next kernel be launched now, and waits until the one before is complete (SM 9.0).
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1
        )
    e = gl.arange(0, EXPERTS_PADDED, layout=LINE)
    uses = gl.load(counts + e, mask=e < EXPERTS, other=0)
    if HAS_DENSE:
        if gl.sum(uses, 0) * 4 > tokens * EXPERTS:
            return
    strip = gl.program_id(0)
    part = gl.program_id(1)
    strips = gl.num_programs(0)
    thread = gl.arange(0, THREADS, layout=LINE)
    lane = thread % 32
    warp = thread // 32
    t = lane % 4
    rows32 = gl.cdiv(hidden, 128).to(gl.int64) * 4
    block = strip * (WARPS // 2) + warp // 2
    half = warp % 2
    zero = gl.full([THREADS], 0.0, gl.float32, LINE)

    # The items in ascending order of experts: expert, group, and number of tokens in bits 0..15, 16..24 and 25..30.
    per_expert = gl.cdiv(tokens, WIDTH)
    groups = (uses + WIDTH - 1) // WIDTH
    items = lists + (part * strips + strip).to(gl.int64) * per_expert * EXPERTS
    base = gl.associative_scan(groups, 0, _sum) - groups
    for group in range(0, gl.max(groups, 0)):
        members = gl.minimum(uses - group * WIDTH, WIDTH)
        gl.store(items + base + group, e + group * 65536 + members * 33554432, mask=group < groups)
    steps = gl.sum(groups, 0) * CHUNKS

    sums += (part * strips + strip).to(gl.int64) * tokens * ROWS
    quad = gl.arange(0, THREADS, layout=gl.SliceLayout(1, QUAD))[:, None] * 4 + gl.arange(0, 4, layout=gl.SliceLayout(0, QUAD))[None, :]
    for first in range(0, tokens, 8):
        gl.store(sums + first * ROWS + quad, gl.full([THREADS, 4], 0.0, gl.float32, QUAD), mask=first + quad // ROWS < tokens)
    barrier()
    sums += warp * 16 + lane // 4 * 2

    columns = gl.cdiv(tokens, 16) * 16
    lists_of = (token_of + 2 * t, weight_of + 2 * t, columns, gathered + lane * 4)
    weights = (w_data + block * 1024 + half * 128 + lane * 4, w_scale + block * 128 + lane * 4, rows32)
    item = _item(items, part, steps, CHUNKS)
    after = _item(items, part + SETS, steps, CHUNKS)
    acts = _activation_pointer(lists_of, item, part, CHUNKS, WIDTH)
    has_token, has_second = _members(item, lane)
    data, factors = _weight_pointers(weights, item, part, CHUNKS)
    x = ()
    b = ()
    c = ()
    for q in gl.static_range(4):
        x = x + (load4_always(data + q * 256),)
        b = b + (_activations(acts + q * 256, has_token),)
        if WIDTH == 16:
            c = c + (_activations(acts + CHUNKS * 1024 + q * 256, has_second),)
    scale = load4_always(factors)
    listed = _listed(lists_of, item, WIDTH)
    for step in range(part, steps, SETS):
        old = _old_sums(sums, listed[0], listed[1], ROWS)
        if WIDTH == 16:
            old2 = _old_sums(sums, listed[4], listed[5], ROWS)
        here = listed
        acts = _activation_pointer(lists_of, after, step + SETS, CHUNKS, WIDTH)
        has_token, has_second = _members(after, lane)
        data, factors = _weight_pointers(weights, after, step + SETS, CHUNKS)
        # Small requests first: a warp's loads return in order, and the ones for weights come from memory.
        listed = _listed(lists_of, after, WIDTH)
        turned = (_turned(scale[0], half), _turned(scale[1], half), _turned(scale[2], half), _turned(scale[3], half))
        scale = load4_always(factors)
        following = ()
        b_following = ()
        c_following = ()
        if WIDTH == 16:
            p = (zero, zero, zero, zero, zero, zero, zero, zero)
            for q in gl.static_range(4):
                p = multiply2(p, x[q], turned[q], b[q], c[q])
                following = following + (load4_always(data + q * 256),)
                b_following = b_following + (_activations(acts + q * 256, has_token),)
                c_following = c_following + (_activations(acts + CHUNKS * 1024 + q * 256, has_second),)
            _new_sums(sums, old, here[0], here[1], here[2], here[3], (p[0], p[1], p[2], p[3]), ROWS)
            _new_sums(sums, old2, here[4], here[5], here[6], here[7], (p[4], p[5], p[6], p[7]), ROWS)
        else:
            p = (zero, zero, zero, zero)
            for q in gl.static_range(4):
                p = multiply1(p, x[q], turned[q], b[q], 0)
                following = following + (load4_always(data + q * 256),)
                b_following = b_following + (_activations(acts + q * 256, has_token),)
            _new_sums(sums, old, here[0], here[1], here[2], here[3], p, ROWS)
        x = following
        b = b_following
        c = c_following
        # Asked for last: the next step's weights depend on it, and where it was asked for first ptxas waited for it before the
        # first product, which made M = 16 to 128 take 4 to 8% more (H200, 2026-11-27).
        after = _item(items, step + 2 * SETS, steps, CHUNKS)
        _warp_barrier(zero)


@gluon.jit
def _sum(x, y):
    return x + y


@gluon.jit
def _item(items, step, steps, CHUNKS: gl.constexpr):
    return gl.load(items + step // CHUNKS, mask=step < steps, other=0)


@gluon.jit
def _members(item, lane):
    """Whether an item has this lane's token among its first 8, and among its second 8."""
    members = item // 33554432
    return (lane // 4 < members).to(gl.int32), (lane // 4 + 8 < members).to(gl.int32)


@gluon.jit
def _weight_pointers(weights, item, step, CHUNKS: gl.constexpr):
    w_data, w_scale, rows32 = weights
    chunk = ((item & 65535) * CHUNKS + step % CHUNKS) * rows32
    return w_data + chunk * 1024, w_scale + chunk * 128


@gluon.jit
def _activation_pointer(lists_of, item, step, CHUNKS: gl.constexpr, WIDTH: gl.constexpr):
    """Where a thread's part of the right operand of an item's first 8 tokens begins."""
    columns, gathered = lists_of[2], lists_of[3]
    eights = (item & 65535).to(gl.int64) * (columns // 8) + (item // 65536 & 511) * (WIDTH // 8)
    return gathered + (eights * CHUNKS + step % CHUNKS) * 1024


@gluon.jit
def _activations(pointer, wanted):
    """Right operand of 8 tokens and 64 values of K; anything in the columns past the last token."""
    low = load4_cached(pointer, wanted)
    high = load4_cached(pointer + 128, wanted)
    return low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]


@gluon.jit
def _turned(scale, half):
    """The word with this warp's half of the rows in the place of half 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 n; shl.b32 n, $2, 3; shf.l.wrap.b32 $0, $1, $1, n; }", "=r,r,r", [scale, half], gl.int32, True, 1
    )


@gluon.jit
def _listed(lists_of, item, WIDTH: gl.constexpr):
    """This thread's two tokens (-1 past the last one) of each 8 of the item, and their alpha."""
    token_of, weight_of, columns = lists_of[0], lists_of[1], lists_of[2]
    slot = (item & 65535).to(gl.int64) * columns + (item // 65536 & 511) * WIDTH
    here = (
        gl.load(token_of + slot), gl.load(token_of + slot + 1), gl.load(weight_of + slot), gl.load(weight_of + slot + 1)
    )  # fmt: skip
    if WIDTH == 16:
        here = here + (
            gl.load(token_of + slot + 8), gl.load(token_of + slot + 9),
            gl.load(weight_of + slot + 8), gl.load(weight_of + slot + 9),
        )  # fmt: skip
    return here


@gluon.jit
def _old_sums(sums, row0, row1, ROWS: gl.constexpr):
    """This thread's sums so far: rows g and g + 8 of two tokens."""
    first = gl.inline_asm_elementwise(
        _LOAD2, "=&f,=&f,l,r", [(sums + row0 * ROWS).to(gl.int64), row0], (gl.float32, gl.float32), False, 1
    )
    second = gl.inline_asm_elementwise(
        _LOAD2, "=&f,=&f,l,r", [(sums + row1 * ROWS).to(gl.int64), row1], (gl.float32, gl.float32), False, 1
    )
    return first[0], first[1], second[0], second[1]


@gluon.jit
def _new_sums(sums, old, row0, row1, weight0, weight1, p, ROWS: gl.constexpr):
    gl.inline_asm_elementwise(
        _STORE2, "=r,l,r,f,f", [(sums + row0 * ROWS).to(gl.int64), row0, old[0] + weight0 * p[0], old[1] + weight0 * p[2]],
        gl.int32, False, 1,
    )  # fmt: skip
    gl.inline_asm_elementwise(
        _STORE2, "=r,l,r,f,f", [(sums + row1 * ROWS).to(gl.int64), row1, old[2] + weight1 * p[1], old[3] + weight1 * p[3]],
        gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def _warp_barrier(like):
    """Orders the warp's stores before its next loads: a token's column moves between lanes from item to item."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=f,f", [like], gl.float32, False, 1)
