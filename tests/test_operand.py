"""The NVFP4 format: codes, scale factors, layouts, global scales, and the layouts of other libraries."""
from __future__ import annotations

import math

import pytest
import torch

from backends import Nvfp4Tensor, PreparedOperand
from backends.operand import scale_shape

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3(byte: int) -> float:
    """Decode by the definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def random_operand(rows: int, k: int, layout: str, seed: int = 0) -> Nvfp4Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=generator)
    height, width = scale_shape(rows, k, layout)
    scale = torch.randint(0, 127, (height, width), dtype=torch.uint8, generator=generator)
    return Nvfp4Tensor(data, scale, layout)


def decode_slowly(x: Nvfp4Tensor) -> torch.Tensor:
    """Element by element, from the byte offset formula."""
    rows, k = x.shape
    padded = scale_shape(rows, k, "128x4")[1]
    flat = x.scale.reshape(-1)
    out = torch.empty((rows, k), dtype=torch.float64)
    for r in range(rows):
        for c in range(k):
            code = (int(x.data[r, c // 2]) >> (4 * (c % 2))) & 15
            value = -E2M1[code & 7] if code & 8 else E2M1[code & 7]
            s = c // 16
            offset = r * (k // 16) + s
            if x.layout == "128x4":
                offset = ((r // 128) * (padded // 4) + s // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + s % 4
            out[r, c] = value * e4m3(int(flat[offset]))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_with_every_scale_decodes_exactly(dtype):
    data = torch.tensor([lo | hi << 4 for lo, hi in zip(range(0, 16, 2), range(1, 16, 2))], dtype=torch.uint8)
    x = Nvfp4Tensor(data.repeat(256, 1), torch.arange(256, dtype=torch.uint8).view(256, 1), "linear")
    codes = torch.tensor(E2M1 + [-v for v in E2M1], dtype=torch.float64)
    expected = torch.tensor([e4m3(s) for s in range(256)], dtype=torch.float64)[:, None] * codes
    assert torch.equal(torch.nan_to_num(x.dequantize(dtype).double(), 12345.0), torch.nan_to_num(expected, 12345.0))


@pytest.mark.parametrize("layout", ["128x4", "linear"])
@pytest.mark.parametrize("rows, k", [(1, 16), (3, 48), (33, 80), (127, 64), (129, 112)])
def test_decoding_follows_the_byte_offset_formula(rows, k, layout):
    x = random_operand(rows, k, layout)
    assert torch.equal(x.dequantize().double(), decode_slowly(x))


@pytest.mark.parametrize("rows, k", [(1, 16), (5, 48), (128, 64), (130, 272), (257, 16)])
def test_layouts_convert_both_ways(rows, k):
    linear = random_operand(rows, k, "linear", seed=rows)
    swizzled = linear.to_layout("128x4")
    assert swizzled.data is linear.data and swizzled.scale.shape == scale_shape(rows, k, "128x4")
    assert torch.equal(swizzled.dequantize(), linear.dequantize())
    assert torch.equal(swizzled.to_layout("linear").scale, linear.scale)
    assert linear.to_layout("linear") is linear


@pytest.mark.parametrize("layout", ["128x4", "linear"])
def test_decode_of_a_part_is_the_part_of_the_whole(layout):
    x = random_operand(300, 208, layout)
    whole = x.decode()
    assert torch.equal(x.decode(slice(80, 192)), whole[:, 80:192])
    assert torch.equal(x.decode(slice(16, 32), slice(128, 300)), whole[128:300, 16:32])
    assert torch.equal(x.decode(rows=slice(256, 290)), whole[256:290])
    with pytest.raises(ValueError, match="multiples of 16"):
        x.decode(slice(8, 32))


def test_scales_and_data_of_either_dtype_are_used_in_place():
    x = random_operand(130, 64, "128x4")
    other = Nvfp4Tensor(x.data.view(torch.float4_e2m1fn_x2), x.scale.reshape(-1).view(torch.float8_e4m3fn))
    assert other.data.data_ptr() == x.data.data_ptr() and other.scale.data_ptr() == x.scale.data_ptr()
    assert torch.equal(other.dequantize(), x.dequantize())
    assert other.shape == (130, 64) and other.nbytes == 130 * 32 + 256 * 4


def test_global_scale_scalar_and_per_expert():
    x = random_operand(4, 96, "linear")
    plain = x.dequantize()
    assert torch.equal(Nvfp4Tensor(x.data, x.scale, "linear", 0.5).dequantize(), plain * 0.5)
    per_expert = torch.tensor([1.0, -2.0, 0.25])
    expected = (plain.view(4, 3, 32) * per_expert[:, None]).view(4, 96)
    assert torch.equal(Nvfp4Tensor(x.data, x.scale, "linear", per_expert).dequantize(), expected)
    with pytest.raises(ValueError, match="do not divide K"):
        Nvfp4Tensor(x.data, x.scale, "linear", torch.ones(5)).dequantize()


# What other libraries produce, built from their documented conventions.


def flashinfer_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's nvfp4_quantize: uint8 data, uint8 scales in layout_128x4, global scale (448*6)/amax."""
    factor = (448 * 6) / x.abs().amax().reshape(1)
    data, linear = _quantize_by_table(x * factor)
    return data, Nvfp4Tensor(data, linear, "linear").to_layout("128x4").scale, factor


def compressed_tensors_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """compressed-tensors' weight_packed, weight_scale (e4m3, [rows, K/16]) and weight_global_scale (448*6)/amax."""
    factor = (448 * 6) / x.abs().amax().reshape(1)
    data, linear = _quantize_by_table(x * factor)
    return data, linear.view(torch.float8_e4m3fn), factor


def torchao_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torchao's NVFP4Tensor: float4_e2m1fn_x2 data, swizzled e4m3 scales, per_tensor_scale amax/(448*6)."""
    data, scale, reciprocal = flashinfer_quantize(x)
    return data.view(torch.float4_e2m1fn_x2), scale.view(torch.float8_e4m3fn).flatten(), (1 / reciprocal).reshape(())


def _quantize_by_table(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.view(x.shape[0], -1, 16)
    scale = (blocks.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    table = torch.tensor(E2M1 + [-v for v in E2M1])
    codes = (blocks / scale.float().unsqueeze(-1)).unsqueeze(-1).sub(table).abs().argmin(-1).view(x.shape)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), scale.view(torch.uint8)


def test_tensors_of_other_libraries_drop_in():
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)) * 0.02
    data, scale, factor = flashinfer_quantize(x)
    flashinfer = Nvfp4Tensor.from_reciprocal(data, scale, "128x4", factor)
    data, scale, factor = compressed_tensors_quantize(x)
    compressed = Nvfp4Tensor.from_reciprocal(data, scale, "linear", factor)
    data, scale, factor = torchao_quantize(x)
    torchao = Nvfp4Tensor(data, scale, "128x4", factor)
    for operand in (flashinfer, compressed, torchao):
        # Half the widest e2m1 gap (1 of 6) of the block's largest value, and e4m3's rounding of the scale.
        bound = x.view(40, 6, 16).abs().amax(-1, keepdim=True) * (1 / 6 + 1 / 16)
        assert ((operand.dequantize() - x).view(40, 6, 16).abs() <= bound).all()
    assert torch.equal(flashinfer.dequantize(), compressed.dequantize())
    assert torch.equal(flashinfer.dequantize(), torchao.dequantize())


# Errors


DATA = torch.zeros((2, 16), dtype=torch.uint8)
SCALE = torch.zeros((2, 2), dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((DATA, SCALE, "64x4"), ValueError, "layout is '64x4'; accepted: '128x4', 'linear'"),
        ((DATA.float(), SCALE, "linear"), TypeError, "data has dtype float32; it takes uint8 or float4_e2m1fn_x2"),
        ((DATA, SCALE.half(), "linear"), TypeError, "scale has dtype float16; it takes uint8 or float8_e4m3fn"),
        (([1], SCALE, "linear"), TypeError, "data is list"),
        ((DATA.view(-1), SCALE, "linear"), ValueError, r"data has shape \[32\]; it takes \[rows, K/2\]"),
        ((DATA[:, :4].contiguous(), SCALE, "linear"), ValueError, "K = 8; K must be a positive multiple of 16"),
        ((DATA.t(), SCALE, "linear"), ValueError, "data is not contiguous"),
        ((DATA, SCALE, "128x4"), ValueError, r"takes 512 \(128 x 4, rows padded.*size of layout 'linear'"),
        ((DATA, SCALE[:1], "linear"), ValueError, r"scale has 2 bytes .* takes 4 \(2 x 2"),
        ((DATA, SCALE, "linear", "big"), TypeError, "global_scale is str"),
        ((DATA, SCALE, "linear", torch.ones(2, 2)), TypeError, "global_scale is a float32 tensor of shape"),
        ((DATA, SCALE, "linear", torch.ones(1, dtype=torch.float64)), TypeError, "global_scale is a float64"),
        ((DATA, SCALE.to("meta"), "linear"), ValueError, "scale is on meta and data on cpu"),
    ],
)
def test_misuse_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Nvfp4Tensor(*arguments)


def test_operands_are_frozen_and_readable():
    x = Nvfp4Tensor(DATA, SCALE, "linear")
    with pytest.raises(AttributeError):
        x.layout = "128x4"
    assert repr(x) == "Nvfp4Tensor(shape=[2, 32], layout='linear', device='cpu')"
    prepared = PreparedOperand("triton", "rows", (2, 32), DATA, SCALE)
    assert prepared.layout == "triton/rows" and prepared.device.type == "cpu" and prepared.nbytes == 36
