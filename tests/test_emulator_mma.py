"""mma.sync and what plain sm_90a kernels use around it, against NumPy and exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .emulator import PtxError
from .emulator.numerics import decode_table
from .emulator.samples import regs, run

KINDS = {
    "f16": (16, lambda rng, n: rng.standard_normal(n).astype(np.float16).view(np.uint16)),
    "bf16": (16, lambda rng, n: (rng.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)),
    "tf32": (32, lambda rng, n: rng.standard_normal(n).astype(np.float32).view(np.uint32) & 0xFFFFE000),
    "e4m3": (8, lambda rng, n: rng.integers(0, 0x78, n).astype(np.uint8)),
    "e5m2": (8, lambda rng, n: (rng.integers(0, 0x60, n) | rng.integers(0, 2, n) << 7).astype(np.uint8)),
    "s8": (8, lambda rng, n: rng.integers(0, 256, n).astype(np.uint8)),
    "u8": (8, lambda rng, n: rng.integers(0, 256, n).astype(np.uint8)),
}


def values(codes: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return codes.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "tf32":
        return codes.view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return codes.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    return decode_table(kind).astype(np.float64)[codes]


def mma_case(shape: str, a_kind: str, b_kind: str, a_count: int) -> str:
    """Lane t holds its registers of A, B, C at a[t], b[t], c[t]; D goes to out[t]."""
    accumulator = "s32" if a_kind in ("s8", "u8") else "f32"
    b_count = a_count // 2

    def load(name: str, first: int, count: int) -> str:
        lines = [f"ld.param.u64 %d2, [{name}];", f"mad.wide.u32 %d3, %r0, {4 * count}, %d2;"]
        return "\n".join(lines + [f"ld.global.nc.b32 %r{first + i}, [%d3 + {4 * i}];" for i in range(count)])

    return f"""
    mov.u32 %r0, %tid.x;
    {load("a", 10, a_count)}
    {load("b", 20, b_count)}
    {load("c", 30, 4)}
    mma.sync.aligned.{shape}.row.col.{accumulator}.{a_kind}.{b_kind}.{accumulator}
        {{{regs('r', 4, 40)}}}, {{{regs('r', a_count, 10)}}}, {{{regs('r', b_count, 20)}}}, {{{regs('r', 4, 30)}}};
    ld.param.u64 %d2, [out];
    mad.wide.u32 %d3, %r0, 16, %d2;
    st.global.v4.b32 [%d3], {{{regs('r', 4, 40)}}};"""


PARAMS = ".param .u64 out, .param .u64 a, .param .u64 b, .param .u64 c"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape,a_kind,b_kind",
    [
        ("m16n8k16", "f16", "f16"),
        ("m16n8k16", "bf16", "bf16"),
        ("m16n8k8", "f16", "f16"),
        ("m16n8k8", "bf16", "bf16"),
        ("m16n8k8", "tf32", "tf32"),
        ("m16n8k32", "e4m3", "e5m2"),
        ("m16n8k32", "s8", "u8"),
    ],
)
def test_mma_sync_against_numpy(shape: str, a_kind: str, b_kind: str, seed: int) -> None:
    """The fragments are gathered here by the prose of the PTX ISA, element by element."""
    rng = np.random.default_rng(seed)
    k = int(shape.split("k")[1])
    bits, make = KINDS[a_kind]
    a, b = make(rng, 16 * k).reshape(16, k), KINDS[b_kind][1](rng, k * 8).reshape(k, 8)
    integer = a_kind in ("s8", "u8")
    c = rng.integers(-9, 9, (16, 8)).astype(np.int32) if integer else rng.standard_normal((16, 8)).astype("f4")
    per, count = 32 // bits, 16 * k * bits // 32 // 32
    lanes_a, lanes_b = np.zeros((32, count * per), a.dtype), np.zeros((32, count * per // 2), b.dtype)
    lanes_c = np.zeros((32, 4), c.dtype)
    for t in range(32):
        group, member = divmod(t, 4)
        for i in range(count * per):
            register, within = divmod(i, per)
            row = group if register in (0, 2) else group + 8
            column = member * per + within + (k // 2 if register >= 2 else 0)
            lanes_a[t, i] = a[row, column]
        for i in range(count * per // 2):
            register, within = divmod(i, per)
            lanes_b[t, i] = b[member * per + within + (k // 2 if register else 0), group]
        for i in range(4):
            lanes_c[t, i] = c[group + (8 if i >= 2 else 0), 2 * member + i % 2]
    out = torch.full((32, 4), -1, dtype=torch.int32) if integer else torch.full((32, 4), float("nan"))
    tensors = [torch.from_numpy(np.ascontiguousarray(x).view(np.int32).copy()) for x in (lanes_a, lanes_b, lanes_c)]
    run(mma_case(shape, a_kind, b_kind, count), out, *tensors, params=PARAMS, target="sm_90a")
    want = values(a, a_kind) @ values(b, b_kind) + c
    got = np.zeros((16, 8), out.numpy().dtype)
    for t in range(32):
        for i in range(4):
            got[t // 4 + (8 if i >= 2 else 0), 2 * (t % 4) + i % 2] = out[t, i]
    if integer:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize(
    "text",
    [
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2};",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, "
        "{%r1,%r2,%r3,%r4};",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1, %r2}, {%r1, %r2}, {%r5}, {%r1, %r2};",
        "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r5,%r6}, "
        "{%r1,%r2,%r3,%r4}, %r7, 0;",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(PtxError, match="unsupported shape or types|wrong number of registers|unknown modifier"):
        run(text, torch.zeros(1), target="sm_90a")


def test_opcodes_of_the_other_target_are_refused() -> None:
    with pytest.raises(PtxError, match="tcgen05 exists on sm_100a, the target is sm_90a"):
        run("tcgen05.wait::ld.sync.aligned;", torch.zeros(1), target="sm_90a")
    with pytest.raises(PtxError, match="wgmma exists on sm_90a, the target is sm_100a"):
        run("wgmma.fence.sync.aligned;", torch.zeros(1))
    with pytest.raises(PtxError, match=r"\.target sm_80: the emulator models"):
        run("ret;", torch.zeros(1), target="sm_80")
