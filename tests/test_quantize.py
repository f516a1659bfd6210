"""The quantizer against an independent brute-force one in exact arithmetic, and the repacking of experts."""
from __future__ import annotations

import bisect
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import Nvfp4Tensor, pack_experts, quantize_nvfp4
from backends.quantize import _round_e4m3
from tests.test_operand import E2M1, e4m3

FINITE_E4M3 = [Fraction(e4m3(byte)) for byte in range(0x7F)]


def nearest_even(table: list[Fraction], value: Fraction) -> int:
    """Index of the entry nearest to value; between two, the even index; beyond the end, the last."""
    right = min(bisect.bisect_left(table, value), len(table) - 1)
    left = max(right - 1, 0)
    below, above = value - table[left], table[right] - value
    if below == above:
        return left if left % 2 == 0 else right
    return left if below < above else right


def quantize_block_slowly(block: list[float], factor: Fraction) -> tuple[int, list[int]]:
    """(scale byte, codes) of 16 values, in rational arithmetic."""
    exact = [Fraction(v) for v in block]
    unit = max(abs(v) for v in exact) / 6 / factor
    byte = nearest_even(FINITE_E4M3, unit)
    byte = 1 if byte == 0 and unit > 0 else byte
    if byte == 0:
        return 0, [8 if math.copysign(1, v) < 0 else 0 for v in block]
    step = FINITE_E4M3[byte] * factor
    magnitudes = [Fraction(v) for v in E2M1]
    return byte, [
        nearest_even(magnitudes, abs(v) / step) | (8 if math.copysign(1, f) < 0 else 0) for v, f in zip(exact, block)
    ]


def check_against_brute_force(x: torch.Tensor, global_scale) -> None:
    q = quantize_nvfp4(x, layout="linear", global_scale=global_scale)
    factor = Fraction(1) if q.global_scale is None else Fraction(float(q.global_scale))
    for row in range(x.shape[0]):
        for s in range(x.shape[1] // 16):
            byte, codes = quantize_block_slowly(x[row, s * 16 : s * 16 + 16].double().tolist(), factor)
            packed = q.data[row, s * 8 : s * 8 + 8].tolist()
            assert int(q.scale[row, s]) == byte, (row, s)
            assert [code for b in packed for code in (b & 15, b >> 4)] == codes, (row, s)


@pytest.mark.parametrize("global_scale", [None, "amax", 0.37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_normal_values(dtype, global_scale):
    x = torch.randn((9, 64), generator=torch.Generator().manual_seed(1))
    check_against_brute_force((x * torch.logspace(-4, 2, 9)[:, None]).to(dtype), global_scale)


def test_borders_between_codes_round_to_even():
    # 6 makes the scale 1, so the midpoints of e2m1 are met exactly, from both sides.
    borders = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    above = [math.nextafter(v, 9.0) for v in borders]
    rows = [[6.0, *values, *[-v for v in values], 0.0] for values in (borders, above)]
    check_against_brute_force(torch.tensor(rows, dtype=torch.float64).float(), None)
    q = quantize_nvfp4(torch.tensor(rows[:1]), layout="linear")
    assert q.dequantize()[0, 1:8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=16, max_size=16), st.sampled_from([None, "amax"]))
def test_any_values(values, global_scale):
    check_against_brute_force(torch.tensor([values], dtype=torch.float32), global_scale)


def test_scale_rounding_at_every_border():
    grid = [float(v) for v in FINITE_E4M3]
    borders = [(x + y) / 2 for x, y in zip(grid, grid[1:])]
    values = [v for b in borders for v in (math.nextafter(b, 0), b, math.nextafter(b, 1e9))] + [448.0, 449.0, 1e30]
    expected = [FINITE_E4M3[nearest_even(FINITE_E4M3, Fraction(v))] or Fraction(1, 512) for v in values]
    assert _round_e4m3(torch.tensor(values, dtype=torch.float64)).tolist() == [float(v) for v in expected]


def test_extremes():
    zero = quantize_nvfp4(torch.zeros(3, 32), global_scale="amax")
    assert not zero.dequantize().any() and float(zero.global_scale) == 1.0
    assert quantize_nvfp4(torch.full((1, 16), 1e9), layout="linear").dequantize().max() == 448 * 6
    bad = torch.zeros(1, 32)
    bad[0, 3] = math.inf
    values = quantize_nvfp4(bad).dequantize()
    assert values[0, :16].isnan().all() and not values[0, 16:].any()
    assert quantize_nvfp4(torch.empty(0, 32)).shape == (0, 32)


def test_chunks_do_not_show(monkeypatch):
    x = torch.randn(37, 64)
    whole = quantize_nvfp4(x)
    monkeypatch.setattr("backends.quantize._CHUNK_VALUES", 5 * 64)
    pieces = quantize_nvfp4(x)
    assert torch.equal(whole.data, pieces.data) and torch.equal(whole.scale, pieces.scale)


@pytest.mark.parametrize("layout", ["128x4", "linear"])
@pytest.mark.parametrize("experts, n, inner", [(1, 8, 16), (5, 136, 48), (3, 130, 64)])
def test_pack_experts_from_floats(experts, n, inner, layout):
    w2 = torch.randn(experts, n, inner, dtype=torch.float32).to(torch.bfloat16)
    packed = pack_experts(w2, layout=layout)
    assert packed.shape == (n, experts * inner) and packed.layout == layout
    for e in range(experts):
        alone = quantize_nvfp4(w2[e]).dequantize()
        assert torch.equal(packed.decode(slice(e * inner, (e + 1) * inner)), alone)


@pytest.mark.parametrize("layout", ["128x4", "linear"])
@pytest.mark.parametrize("source", ["128x4", "linear"])
def test_pack_experts_from_nvfp4_keeps_codes_and_scales(source, layout):
    experts = [quantize_nvfp4(torch.randn(40, 48) * (e + 1), layout=source, global_scale="amax") for e in range(4)]
    packed = pack_experts(experts, layout=layout)
    assert packed.global_scale.tolist() == [float(x.global_scale) for x in experts]
    assert torch.equal(packed.dequantize(), torch.cat([x.dequantize() for x in experts], dim=1))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: quantize_nvfp4(torch.zeros(2, 24)), ValueError, r"x has shape \[2, 24\]"),
        (lambda: quantize_nvfp4(torch.zeros(2, 32, dtype=torch.int32)), TypeError, "x is int32"),
        (lambda: quantize_nvfp4(torch.zeros(2, 32), global_scale="max"), ValueError, "global_scale is 'max'"),
        (lambda: quantize_nvfp4(torch.zeros(2, 32), global_scale=torch.ones(2)), ValueError, "one factor for x"),
        (lambda: pack_experts(torch.zeros(4, 32)), ValueError, r"w2 has shape \[4, 32\]; .* \[E, N, I\]"),
        (lambda: pack_experts([]), ValueError, "w2 has no experts"),
        (lambda: pack_experts(torch.zeros(2, 4, 24)), ValueError, "I = 24"),
        (lambda: pack_experts([quantize_nvfp4(torch.zeros(4, 32)), torch.zeros(4, 32)]), TypeError, r"w2\[1\] is Tensor"),
        (
            lambda: pack_experts([quantize_nvfp4(torch.zeros(4, 32)), quantize_nvfp4(torch.zeros(5, 32))]),
            ValueError,
            r"w2\[1\] is \[5, 32\] on cpu; w2\[0\] is \[4, 32\]",
        ),
        (
            lambda: pack_experts([quantize_nvfp4(torch.zeros(4, 32)), quantize_nvfp4(torch.zeros(4, 32), global_scale=1.0)]),
            ValueError,
            "differ in having a global_scale",
        ),
    ],
)
def test_misuse_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nvfp4_of_the_quantizer_is_what_the_operand_says():
    x = torch.randn(130, 96)
    swizzled, linear = quantize_nvfp4(x), quantize_nvfp4(x, layout="linear")
    assert isinstance(swizzled, Nvfp4Tensor) and swizzled.layout == "128x4"
    assert torch.equal(swizzled.dequantize(), linear.dequantize())
