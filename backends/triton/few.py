"""Up to 8 tokens: one kernel from NVFP4 activations and alpha to the output, for routed and dense alpha alike."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from backends.triton.fragments import barrier, decode_activations, load1, load4, multiply1, reinterpret


@gluon.jit
def _sum(x, y):
    return x + y


@gluon.jit(do_not_specialize=["tokens"])
def fc2_few(
    a_data, a_scale, w_data, w_scale, alpha, out, lists, tokens, hidden,
    EXPERTS: gl.constexpr, INNER: gl.constexpr, A_SWIZZLED: gl.constexpr,
    BLOCKS: gl.constexpr, GROUPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """32 * BLOCKS rows of B per program of 4 * GROUPS warps.

    The chunks of 256 values of K that belong to selected experts are dealt out to the groups in turn; within a group,
    warp q multiplies the q-th quarter of the chunk. DEPTH chunks are in flight per warp.

    Args:
        a_data: int32 view of [tokens, K/2] bytes.
        w_data, w_scale: prepared weights (`layout.py`), int32.
        lists: int32 [programs, EXPERTS] of scratch.
    """
    THREADS: gl.constexpr = 128 * GROUPS
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4 * GROUPS], [0])
    K: gl.constexpr = EXPERTS * INNER
    CHUNKS: gl.constexpr = INNER // 256
    thread = gl.arange(0, THREADS, layout=LINE)
    lane = thread % 32
    quarter = (thread // 32) % 4
    g = lane // 4
    t = lane % 4
    program = gl.program_id(0)

    # The experts that some token selected, in ascending order.
    selected = lists + program * EXPERTS
    count = 0
    for first in gl.static_range(0, EXPERTS, THREADS):
        expert = first + thread
        used = gl.full([THREADS], 0, gl.int32, LINE)
        for m in gl.static_range(8):
            weight = gl.load(alpha + m * EXPERTS + expert, mask=(expert < EXPERTS) & (m < tokens), other=0.0)
            used = used | (weight != 0.0).to(gl.int32)
        position = count + gl.associative_scan(used, 0, _sum) - used
        gl.store(selected + position, expert, mask=used != 0)
        count += gl.sum(used, 0)
    barrier()
    steps = count * CHUNKS

    rows32 = gl.cdiv(hidden, 128) * 4
    weights = (
        w_data + program * (BLOCKS * 1024) + quarter * 256 + lane * 4, w_scale + program * (BLOCKS * 128) + lane * 4 + quarter,
        rows32.to(gl.int64),
    )  # fmt: skip
    row = gl.minimum(g, tokens - 1)
    a_data += row.to(gl.int64) * (K // 8) + quarter * 8 + t * 2
    if A_SWIZZLED:
        a_scale += row * 16 + quarter * 512 + t  # fewer than 32 rows; four pieces of 512 bytes per chunk
        scale_step: gl.constexpr = 2048
    else:
        a_scale += row.to(gl.int64) * (K // 16) + quarter * 4 + t
        scale_step: gl.constexpr = 16
    tokens_of = (
        a_data, a_scale, alpha + gl.minimum(2 * t, tokens - 1) * EXPERTS,
        alpha + gl.minimum(2 * t + 1, tokens - 1) * EXPERTS, (g < tokens).to(gl.int32),
    )  # fmt: skip
    if GROUPS == 1:
        group = 0
    else:
        group = thread // 128

    zero = gl.full([THREADS], 0.0, gl.float32, LINE)
    total = ()
    for _ in gl.static_range(BLOCKS):
        total = total + (((zero, zero, zero, zero), (zero, zero, zero, zero)),)
    stages = ()
    for stage in gl.static_range(DEPTH):
        stages = stages + (
            _fetch(selected, stage * GROUPS + group, steps, weights, tokens_of, zero, CHUNKS, scale_step, BLOCKS),
        )
    for first in range(0, steps, DEPTH * GROUPS):
        ahead = ()
        for stage in gl.static_range(DEPTH):
            total = _accumulate(total, stages[stage], zero, BLOCKS)
            step = first + (DEPTH + stage) * GROUPS + group
            ahead = ahead + (_fetch(selected, step, steps, weights, tokens_of, zero, CHUNKS, scale_step, BLOCKS),)
        stages = ahead

    # Partial sums of the warps are added in order, [8 * BLOCKS accumulators, 4 * GROUPS warps, 32 lanes].
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 4 * GROUPS, 1], [1, 1, 32], [4 * GROUPS, 1, 1], [2, 1, 0])
    RESULT: gl.constexpr = gl.SliceLayout(1, SPREAD)
    buffer = gl.allocate_shared_memory(gl.float32, [8 * BLOCKS, THREADS], LINES)
    for block in gl.static_range(BLOCKS):
        for half in gl.static_range(2):
            for i in gl.static_range(4):
                buffer.index(8 * block + 4 * half + i).store(total[block][half][i])
    parts = reinterpret(buffer, gl.float32, [8 * BLOCKS, 4 * GROUPS, 32], CUBE).load(SPREAD)
    sums = gl.sum(parts, 1) * 65536.0
    i = gl.expand_dims(gl.arange(0, 8 * BLOCKS, layout=gl.SliceLayout(1, RESULT)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, RESULT)), 0)
    n = program * (32 * BLOCKS) + (i // 4) * 16 + ((i % 4) // 2) * 8 + lane // 4
    m = 2 * (lane % 4) + i % 2
    gl.store(out + m * hidden + n, sums.to(out.dtype.element_ty), mask=(m < tokens) & (n < hidden))


@gluon.jit
def _fetch(
    selected, step, steps, weights, tokens_of, zero,
    CHUNKS: gl.constexpr, SCALE_STEP: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Everything a thread needs of one chunk, in flight; zeros past the last step."""
    w_data, w_scale, rows32 = weights
    a_data, a_scale, alpha0, alpha1, has_token = tokens_of
    inside = (step < steps) & (zero == 0.0)
    expert = gl.load(selected + step // CHUNKS, mask=step < steps, other=0)
    chunk = expert * CHUNKS + step % CHUNKS
    wanted = inside.to(gl.int32)
    words = ()
    for block in gl.static_range(BLOCKS):
        data = w_data + chunk * (rows32 * 1024) + block * 1024
        scale = load1(w_scale + chunk * (rows32 * 128) + block * 128, wanted)
        words = words + ((load4(data, wanted), load4(data + 128, wanted), scale),)
    used = wanted * has_token
    codes = load1(a_data + chunk * 32, used), load1(a_data + chunk * 32 + 1, used)
    unit = gl.load(a_scale + chunk * SCALE_STEP, mask=used != 0, other=0).to(gl.int32)
    first = gl.load(alpha0 + expert, mask=inside, other=0.0)
    second = gl.load(alpha1 + expert, mask=inside, other=0.0)
    return words, codes, unit, first, second


@gluon.jit
def _accumulate(total, stage, zero, BLOCKS: gl.constexpr):
    """total plus alpha times the partial sums of one chunk."""
    words, codes, unit, first, second = stage
    b = decode_activations(codes[0], codes[1], unit)
    none = (zero, zero, zero, zero)
    added = ()
    for block in gl.static_range(BLOCKS):
        low, high, scale = words[block]
        sum_low, sum_high = total[block]
        added = added + (
            (
                _scaled_sum(sum_low, multiply1(none, low, scale, b, 0), first, second),
                _scaled_sum(sum_high, multiply1(none, high, scale, b, 1), first, second),
            ),
        )
    return added


@gluon.jit
def _scaled_sum(total, partial, first, second):
    return (
        total[0] + first * partial[0], total[1] + second * partial[1],
        total[2] + first * partial[2], total[3] + second * partial[3],
    )  # fmt: skip
