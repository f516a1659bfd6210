"""Building blocks of the kernels for prepared weights: one thread's share of a tensor core instruction.

Tensors here are one-dimensional, one element per thread of the program, and the matrix instruction is written out
(`mma.sync.m16n8k16`, SM 8.0 and up): what the compiler's own matrix operation does not offer is decoding 8 weights
into its left operand without moving anything between threads.

In a warp, lane = 4*g + t. One step of the instruction covers 16 values of K: a thread holds for rows g and g + 8 of the
weights, and for token g, the values of K at its slots (2t, 2t+1) and (2t+8, 2t+9). Which k sits at which slot is free as
long as both operands agree. Here lane t owns 16 consecutive values (one scale block) out of 64 for four steps: step s,
with w = s // 2 and r = 2 * (s % 2), takes k = 8w + r and 8w + r + 4 in its first slot pair, 8w + r + 1 and 8w + r + 5 in
the second: the order in which two packed words of activations come apart without shuffles.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Gluon is experimental; after Triton 3.6 it renamed three things that the kernels need.
_RENAMED = gl.constexpr(hasattr(gl, "barrier"))
#: A barrier of the program's threads.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
#: An asynchronous copy from global to shared memory.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def reinterpret(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as another type, shape and layout."""
    if _RENAMED:
        return buffer.reinterpret(dtype, shape, layout)
    else:
        return buffer._reinterpret(dtype, shape, layout)



# Zeroing first makes a predicated-off load well defined; outputs are early-clobber because of it.
_LOAD4 = gl.constexpr(
    """{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
    @p ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4]; }"""
)
_LOAD4_ALWAYS = gl.constexpr("ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];")
_LOAD4_CACHED = gl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $5, 0; @p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)
_LOAD1 = gl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }"
)


@gluon.jit
def load4(pointer, wanted):
    """Four consecutive 32-bit words per thread, 0 where not wanted; passes by L1, as weights are read once."""
    return gl.inline_asm_elementwise(
        _LOAD4, "=&r,=&r,=&r,=&r,l,r", [pointer.to(gl.int64), wanted], (gl.int32, gl.int32, gl.int32, gl.int32), False, 1
    )


@gluon.jit
def load4_always(pointer):
    """As `load4`, unconditionally."""
    return gl.inline_asm_elementwise(
        _LOAD4_ALWAYS, "=r,=r,=r,=r,l", [pointer.to(gl.int64)], (gl.int32, gl.int32, gl.int32, gl.int32), False, 1
    )


@gluon.jit
def load4_cached(pointer, wanted):
    """As `load4`, through L1, for what several warps of a multiprocessor read; anything where not wanted."""
    return gl.inline_asm_elementwise(
        _LOAD4_CACHED, "=r,=r,=r,=r,l,r", [pointer.to(gl.int64), wanted], (gl.int32, gl.int32, gl.int32, gl.int32), False, 1
    )


@gluon.jit
def load1(pointer, wanted):
    """One 32-bit word per thread, 0 where not wanted."""
    return gl.inline_asm_elementwise(_LOAD1, "=&r,l,r", [pointer.to(gl.int64), wanted], gl.int32, False, 1)


def _activation_asm() -> str:
    """$0..$7 = b0, b1 of steps 0..3 from two words of e2m1 codes ($8, $9) and one e4m3 byte ($10).

    float16 2^-8 of the value: codes in place read 2^-14 of theirs, scale factors 2^6 once multiplied by 2^14.
    A NaN byte (0x7F) is replaced by the float16 NaN.
    """
    lines = [
        ".reg .pred n; .reg .b32 s, x, y;",
        "and.b32 s, $10, 0x7F; setp.eq.u32 n, s, 0x7F; mul.lo.u32 s, s, 0x00800080;",
        "and.b32 x, $10, 0x80; mul.lo.u32 x, x, 0x01000100; or.b32 s, s, x;",
        "mov.b32 y, 0x74007400; mul.f16x2 s, s, y; selp.b32 s, 0x7E007E00, s, n;",
    ]
    for word in range(2):
        for i in range(4):
            out = f"${4 * word + i}"
            code = f"${8 + word}"
            lines.append(f"shl.b32 x, {code}, {12 - 4 * i};" if i < 3 else f"mov.b32 x, {code};")
            lines.append(f"shl.b32 y, {code}, {9 - 4 * i};" if i < 3 else f"shr.u32 y, {code}, 3;")
            lines.append("and.b32 x, x, 0x80008000; and.b32 y, y, 0x0E000E00; or.b32 x, x, y;")
            lines.append(f"mul.f16x2 {out}, x, s;")
    return "{ " + "\n".join(lines) + " }"


_ACTIVATIONS = gl.constexpr(_activation_asm())


@gluon.jit
def decode_activations(word0, word1, scale):
    """The right operand's registers b0, b1 of four steps, float16 times 2^-8, from 16 packed values and their scale."""
    return gl.inline_asm_elementwise(
        _ACTIVATIONS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [word0, word1, scale],
        (gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32), False, 1,
    )  # fmt: skip


def _fields(word: str) -> list[str]:
    """Code of registers a0 to a3 of the left operand, unscaled, from a word (`layout._registers`); a3 needs a2's u."""
    return [
        f"and.b32 a0, {word}, 0x8E008E00;",
        f"shl.b32 t, {word}, 3; and.b32 a1, t, 0x8E008E00;",
        f"shl.b32 u, {word}, 7; shl.b32 t, {word}, 10; xor.b32 t, t, u; and.b32 a2, t, 0x8E008E00;",
        f"shf.l.wrap.b32 t, {word}, {word}, 12; xor.b32 t, t, u; and.b32 a3, t, 0x8E008E00;",
    ]


_SCALED = "mul.f16x2 a0, a0, s0; mul.f16x2 a1, a1, s1; mul.f16x2 a2, a2, s0; mul.f16x2 a3, a3, s1;"


def _multiply_asm(groups: int, half: int) -> str:
    """Four steps of 16 rows times 8 * groups tokens.

    Outputs: 4 * groups accumulators. Inputs: as many accumulators, four words of weights, the word of scale factors,
    8 * groups registers of activations.
    """
    acc, x0 = 4 * groups, 8 * groups
    scale, b0 = x0 + 4, x0 + 5
    lines = [".reg .b32 t, u, s, s0, s1, a0, a1, a2, a3; .reg .b16 l, h;"]
    lines += [f"mov.f32 ${i}, ${acc + i};" for i in range(acc)]
    # Scale factors are the upper byte of a float16 without its sign: rows g in the low half, g + 8 in the high half.
    lines.append(f"prmt.b32 s, ${scale}, ${scale}, 0x2103;" if half else f"mov.b32 s, ${scale};")
    lines.append("and.b32 s, s, 0x7F807F80; mov.b32 {l, h}, s; mov.b32 s0, {l, l}; mov.b32 s1, {h, h};")
    for step in range(4):
        lines += [*_fields(f"${x0 + step}"), _SCALED]
        for group in range(groups):
            d = ", ".join(f"${4 * group + i}" for i in range(4))
            b = b0 + 8 * group + 2 * step
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{d}}}, {{a0, a1, a2, a3}}, {{${b}, ${b + 1}}}, {{{d}}};"
            )
    return "{ " + "\n".join(lines) + " }"


_MULTIPLY_LOW = gl.constexpr(_multiply_asm(1, 0))
_MULTIPLY_HIGH = gl.constexpr(_multiply_asm(1, 1))
_MULTIPLY_WIDE = gl.constexpr(_multiply_asm(2, 0))


@gluon.jit
def multiply1(acc, x, scale, b, HALF: gl.constexpr):
    """acc (4 tensors) plus 16 rows x 64 values of weights times 8 tokens."""
    return gl.inline_asm_elementwise(
        _MULTIPLY_HIGH if HALF else _MULTIPLY_LOW,
        "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [acc[0], acc[1], acc[2], acc[3], x[0], x[1], x[2], x[3], scale,
         b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]],
        (gl.float32, gl.float32, gl.float32, gl.float32), True, 1,
    )  # fmt: skip


@gluon.jit
def multiply2(acc, x, scale, b, c):
    """acc (8 tensors) plus 16 rows (half 0 of scale) x 64 values of weights times 16 tokens."""
    return gl.inline_asm_elementwise(
        _MULTIPLY_WIDE,
        "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], acc[6], acc[7], x[0], x[1], x[2], x[3], scale,
         b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]],
        (gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32, gl.float32), True, 1,
    )  # fmt: skip


def _decode_asm() -> str:
    """$0..$7: registers 0..3 of the left operand, low then high side, from a word of weights and its scale factors."""
    fields = _fields("$8")
    lines = [
        ".reg .b32 t, u, s, s0, s1, a0, a1, a2, a3; .reg .b16 l, h;",
        "mov.b32 {l, h}, $9; mov.b32 s0, {l, l}; mov.b32 s1, {h, h};",
        # In this order: with a0 and a1 first ptxas spills 357 times in the dense kernel's loop at 32 tokens, 2 times so.
        *fields[2:], *fields[:2], _SCALED,
    ]
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, a{i};" for i in range(4)]
    return "{ " + "\n".join(lines) + " }"


_DECODE = gl.constexpr(_decode_asm())


@gluon.jit
def decode_weights(word, scale):
    """Left operand registers 0..3 of one step, low and high side of each: 8 float16 tensors, 2^-8 of the values.

    Args:
        scale: the scale factors of rows g (low side) and g + 8 (high side), as float16 bits.
    """
    return gl.inline_asm_elementwise(
        _DECODE, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [word, scale],
        (gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16), True, 1,
    )  # fmt: skip
