"""The portable kernel: any shape, plain operands, SM 8.0 and up, and Triton's interpreter.

Weights are the left operand of the matrix instruction and tokens the right one, since tokens are few. Both are decoded
to float16 by bit arithmetic: e2m1 times e4m3 lies within 2^-10 .. 2688 with at most 6 significant bits, which float16
holds exactly once scaled by 2^-8. Even and odd k (the low and the high nibbles) are never interleaved: their products
are two instructions on the same accumulator.

The module has no state and uses only core operations of the language, so that it can be loaded a second time for the
interpreter (`backend.py`).
"""
import triton
import triton.language as tl

# Decoded values are 2^-8 of the true ones, on both sides.
_UNSCALE = tl.constexpr(65536.0)


@triton.jit
def _decode_e2m1(code):
    """float16 2^-14 times the value of 4-bit codes: sign to bit 15, magnitude to bits 11..9 (subnormals included)."""
    bits = code.to(tl.uint16)
    return (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)


@triton.jit
def _decode_e4m3(byte):
    """float16 2^6 times the value of e4m3 bytes; NaN stays NaN."""
    bits = byte.to(tl.uint16)
    # Exponent bias 7 against 15: the bits in place read 2^-8 of the value.
    value = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 16384.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def _scale_offset(row, block, blocks, SWIZZLED: tl.constexpr):
    """Byte of the scale factor of (row, 16-value block) in the "128x4" or the "linear" layout; row is 64-bit."""
    if SWIZZLED:
        columns = (blocks + 3) // 4
        return ((row // 128) * columns + block // 4) * 512 + (row % 32) * 16 + ((row % 128) // 32) * 4 + block % 4
    else:
        return row * blocks + block


@triton.jit
def _either(x, y):
    return x | y


@triton.jit(do_not_specialize=["tokens"])
def fc2_tiled(
    a_data, a_scale, b_data, b_scale, alpha, out, tokens, hidden,
    EXPERTS: tl.constexpr, INNER: tl.constexpr, A_SWIZZLED: tl.constexpr, B_SWIZZLED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of one part of the experts.

    out is [tokens, hidden] of the output type where SPLIT is 1, else float32 [SPLIT, tokens, hidden].
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    part = tl.program_id(2)
    in_n, in_m = n < hidden, m < tokens
    row_bytes: tl.constexpr = EXPERTS * INNER // 2
    blocks: tl.constexpr = EXPERTS * INNER // 16
    experts_per_split: tl.constexpr = (EXPERTS + SPLIT - 1) // SPLIT
    byte = tl.arange(0, BLOCK_K // 2)
    block = tl.arange(0, BLOCK_K // 16)
    total = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    # Loop bounds are compile-time values: the interpreter of Triton 3.6 takes no others with NumPy 2.4 and up.
    for i in range(0, experts_per_split):
        e = part * experts_per_split + i
        weight = tl.load(alpha + m * EXPERTS + e, mask=in_m & (e + m * 0 < EXPERTS), other=0.0)
        # An expert that no token of the tile selected contributes nothing, whatever its weights.
        if tl.reduce((weight != 0.0).to(tl.int32), 0, _either) != 0:
            partial = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
            for k0 in range(0, INNER, BLOCK_K):
                in_byte = k0 // 2 + byte < (INNER // 2)
                in_block = k0 // 16 + block < (INNER // 16)
                k_byte = e * (INNER // 2) + k0 // 2 + byte
                k_block = e * (INNER // 16) + k0 // 16 + block
                b_mask = in_n[:, None] & in_byte[None, :]
                b_code = tl.load(b_data + n[:, None] * row_bytes + k_byte[None, :], mask=b_mask, other=0)
                b_where = _scale_offset(n[:, None], k_block[None, :], blocks, B_SWIZZLED)
                b_unit = _decode_e4m3(tl.load(b_scale + b_where, mask=in_n[:, None] & in_block[None, :], other=0))
                b_unit = tl.broadcast_to(b_unit[:, :, None], (BLOCK_N, BLOCK_K // 16, 8))
                b_unit = tl.reshape(b_unit, (BLOCK_N, BLOCK_K // 2))
                a_mask = in_byte[:, None] & in_m[None, :]
                a_code = tl.load(a_data + m[None, :] * row_bytes + k_byte[:, None], mask=a_mask, other=0)
                a_where = _scale_offset(m[None, :], k_block[:, None], blocks, A_SWIZZLED)
                a_unit = _decode_e4m3(tl.load(a_scale + a_where, mask=in_block[:, None] & in_m[None, :], other=0))
                a_unit = tl.broadcast_to(a_unit[:, None, :], (BLOCK_K // 16, 8, BLOCK_M))
                a_unit = tl.reshape(a_unit, (BLOCK_K // 2, BLOCK_M))
                even = tl.dot(_decode_e2m1(b_code & 15) * b_unit, _decode_e2m1(a_code & 15) * a_unit, partial)
                partial = tl.dot(_decode_e2m1(b_code >> 4) * b_unit, _decode_e2m1(a_code >> 4) * a_unit, even)
            total += (partial * _UNSCALE) * weight[None, :]
    where = (part.to(tl.int64) * tokens + m[:, None]) * hidden + n[None, :]
    result = tl.trans(total).to(out.dtype.element_ty)
    tl.store(out + where, result, mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["numel"])
def sum_parts(parts, out, numel, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + ... + parts[SPLIT - 1, i], in this order, in float32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    total = tl.load(parts + i, mask=inside, other=0.0)
    for part in range(1, SPLIT):
        total += tl.load(parts + part * numel + i, mask=inside, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)
