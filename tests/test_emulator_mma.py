"""mma.sync and what plain sm_90a kernels use around it, against NumPy and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from .emulator import Fault, PtxError
from .emulator.numerics import decode_table
from .emulator.samples import Edit, apply, ints, regs, run, wait
from .test_emulator_ptx import every_schedule

KINDS = {
    "f16": (16, lambda rng, n: rng.standard_normal(n).astype(np.float16).view(np.uint16)),
    "bf16": (
        16,
        lambda rng, n: (rng.standard_normal(n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
    ),
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
        {{{regs("r", 4, 40)}}}, {{{regs("r", a_count, 10)}}},
        {{{regs("r", b_count, 20)}}}, {{{regs("r", 4, 30)}}};
    ld.param.u64 %d2, [out];
    mad.wide.u32 %d3, %r0, 16, %d2;
    st.global.v4.b32 [%d3], {{{regs("r", 4, 40)}}};"""


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
    c = (
        rng.integers(-9, 9, (16, 8)).astype(np.int32)
        if integer
        else rng.standard_normal((16, 8)).astype("f4")
    )
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
    tensors = [
        torch.from_numpy(np.ascontiguousarray(x).view(np.int32).copy()) for x in (lanes_a, lanes_b, lanes_c)
    ]
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
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, "
        "{%r1, %r2};",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, "
        "{%r1,%r2,%r3,%r4};",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1, %r2}, {%r1, %r2}, {%r5}, {%r1, %r2};",
        "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r5,%r6}, "
        "{%r1,%r2,%r3,%r4}, %r7, 0;",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(
        PtxError, match="unsupported shape or types|wrong number of registers|unknown modifier"
    ):
        run(text, torch.zeros(1), target="sm_90a")


def test_opcodes_of_the_other_target_are_refused() -> None:
    with pytest.raises(PtxError, match="tcgen05 exists on sm_100a, not on sm_90a"):
        run("tcgen05.wait::ld.sync.aligned;", torch.zeros(1), target="sm_90a")
    with pytest.raises(PtxError, match="wgmma exists on sm_90a, not on sm_100a"):
        run("wgmma.fence.sync.aligned;", torch.zeros(1))
    with pytest.raises(PtxError, match=r"\.target sm_80: the emulator models"):
        run("ret;", torch.zeros(1), target="sm_80")


def rounded(exact: Fraction, kind: str) -> int:
    """Code of a finite exact value rounded to nearest even, by exact arithmetic."""
    mantissa, low, high = (10, -14, 15) if kind == "f16" else (7, -126, 127)
    sign, magnitude = (1 if exact < 0 else 0) << 15, abs(exact)
    exponent = low
    while magnitude >= Fraction(2) ** (exponent + 1) and exponent <= high:
        exponent += 1
    steps = magnitude / Fraction(2) ** (exponent - mantissa)
    whole = steps.numerator // steps.denominator
    rest = steps - whole
    whole += rest > Fraction(1, 2) or rest == Fraction(1, 2) and whole % 2
    code = (exponent - low) * 2**mantissa + whole  # a carry moves into the exponent
    return sign | min(code, (high - low + 2) << mantissa)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name,count", [("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)])
def test_half2_arithmetic_rounds_once(kind: str, name: str, count: int) -> None:
    """Random codes, of a width that makes cancellation, subnormal results and near-ties common."""
    rng = np.random.default_rng(5)
    n, limit = 1024, 0x7C00 if kind == "f16" else 0x7F80
    codes = rng.integers(0, limit, (count, 2 * n))
    codes[:, ::3] = rng.integers(0, 0x200, codes[:, ::3].shape)  # subnormal
    if name == "fma":  # a product next to a tie of the sum
        codes[2, ::5] = rng.integers(0, limit, codes[2, ::5].shape) & ~7
    codes |= rng.integers(0, 2, codes.shape) << 15
    packed = [torch.from_numpy((c[::2] | c[1::2] << 16).astype(np.uint32).view(np.int32)) for c in codes]
    out = torch.full((n,), -1, dtype=torch.int32)
    loads = "".join(
        f"ld.param.u64 %d2, [x{i}]; add.u64 %d2, %d2, %d4; ld.global.u32 %r{10 + i}, [%d2];"
        for i in range(count)
    )
    run(
        f"""
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d4, %r0, 4;
    {loads}
    {name}.rn.{kind}x2 %r1, {regs("r", count, 10)};
    ld.param.u64 %d2, [out]; add.u64 %d2, %d2, %d4; st.global.u32 [%d2], %r1;""",
        out,
        *packed,
        params=".param .u64 out" + "".join(f", .param .u64 x{i}" for i in range(count)),
        block=(n, 1, 1),
        target="sm_90a",
    )
    exact = [[Fraction(float(v)) for v in values(c.astype(np.uint16), kind)] for c in codes]
    function = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}.get(
        name, lambda a, b, c: a * b + c
    )
    got = out.numpy().view(np.uint16)
    for i, operands in enumerate(zip(*exact)):
        want = function(*operands)
        if want:  # the sign of zero follows other rules
            assert got[i] == rounded(want, kind), (i, name, [hex(c[i]) for c in codes])
        else:
            assert got[i] & 0x7FFF == 0


def test_bit_operations_against_python() -> None:
    """prmt, lop3, shf, bfe and bfi with operands that differ between lanes."""
    rng = np.random.default_rng(6)
    n = 128
    x = rng.integers(0, 1 << 32, (4, n))
    x[3, ::4] &= 0x7777
    tensors = [torch.from_numpy(row.astype(np.uint32).view(np.int32)) for row in x]
    tables = [0xE8, 0x96, 0xCA, 0xEA, 0x1B, 0x7F]
    lines = [
        "prmt.b32 %r20, %r10, %r11, %r13;",
        "prmt.b32 %r21, %r10, %r11, 0xBA98;",
        "prmt.b32 %r22, %r10, %r11, 0x6240;",
        "shf.l.wrap.b32 %r23, %r10, %r11, %r12;",
        "shf.r.clamp.b32 %r24, %r10, %r11, %r12;",
        "shf.r.wrap.b32 %r25, %r10, %r11, 12;",
        "bfe.u32 %r26, %r10, 28, 9;",
        "bfi.b32 %r27, %r10, %r11, 7, 13;",
        *(f"lop3.b32 %r{28 + i}, %r10, %r11, %r12, {t};" for i, t in enumerate(tables)),
    ]
    count = len(lines)
    out = torch.full((count, n), -1, dtype=torch.int32)
    loads = "".join(
        f"ld.param.u64 %d2, [x{i}]; add.u64 %d2, %d2, %d4; ld.global.u32 %r{10 + i}, [%d2];" for i in range(4)
    )
    stores = "".join(f"st.global.u32 [%d3 + {4 * n * i}], %r{20 + i};" for i in range(count))
    run(
        "mov.u32 %r0, %tid.x; mul.wide.u32 %d4, %r0, 4;"
        + loads
        + "".join(lines)
        + "ld.param.u64 %d3, [out]; add.u64 %d3, %d3, %d4;"
        + stores,
        out,
        *tensors,
        params=".param .u64 out" + "".join(f", .param .u64 x{i}" for i in range(4)),
        block=(n, 1, 1),
        target="sm_90a",
    )

    def permuted(a: int, b: int, selector: int) -> int:
        data, result = (a | b << 32).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = data[nibble & 7]
            result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        return result

    def bitwise(a: int, b: int, c: int, table: int) -> int:
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32)
        )

    got = out.numpy().view(np.uint32)
    for j, (a, b, c, s) in enumerate(x.T.tolist()):
        both, mask = a | b << 32, (1 << 32) - 1
        want = [
            permuted(a, b, s),
            permuted(a, b, 0xBA98),
            permuted(a, b, 0x6240),
            both << (c & 31) >> 32 & mask,
            both >> min(c, 32) & mask,
            both >> 12 & mask,
            a >> 28,
            b & ~(8191 << 7) | (a & 8191) << 7,
            *(bitwise(a, b, c, t) for t in tables),
        ]
        assert got[:, j].tolist() == want


EXCHANGE = f"""
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    mov.u32 %r2, %cluster_ctarank;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra ready;
    mbarrier.init.shared.b64 [%r20], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 256; // @expect
ready:
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire; // @ready
    xor.b32 %r3, %r2, 1;
    mad.lo.u32 %r4, %r0, 8, %r20;
    add.u32 %r4, %r4, 128;
    mapa.shared::cluster.u32 %r5, %r4, %r3;
    mapa.shared::cluster.u32 %r6, %r20, %r3; // @barrier
    mad.lo.u32 %r7, %r2, 1000, %r0;
    add.u32 %r8, %r7, 500;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r5], {{%r7, %r8}}, [%r6];
{wait("%r20", "0", "landed")}
    ld.shared.v2.u32 {{%r9, %r10}}, [%r4];
    ld.param.u64 %d2, [out];
    mov.u32 %r11, %ctaid.x;
    mad.lo.u32 %r11, %r11, 32, %r0;
    mad.wide.u32 %d3, %r11, 8, %d2;
    st.global.v2.u32 [%d3], {{%r9, %r10}};
    barrier.cluster.arrive;
    barrier.cluster.wait;"""


class TestStoreAsync:
    """Two CTAs exchange 8 bytes a lane through distributed shared memory."""

    def run(self, text: str, out: torch.Tensor, schedule: str, seed: int) -> None:
        options = dict(grid=(2, 1, 1), cluster=(2, 1, 1), smem=1024, schedule=schedule, seed=seed)
        run(text, out, target="sm_90a", **options)

    @every_schedule
    def test_exchange(self, schedule: str, seed: int) -> None:
        out = ints(128)
        self.run(EXCHANGE, out, schedule, seed)
        t = torch.arange(32, dtype=torch.int32)
        first = torch.stack([t, t + 500], 1)
        assert torch.equal(out.view(2, 32, 2), torch.stack([first + 1000, first]))

    @every_schedule
    @pytest.mark.parametrize(
        "edit,pattern",
        [
            (Edit("landed"), "not ordered after its write by a bulk copy|nothing has written"),
            (Edit("expect", "256", "128"), "transaction-count mismatch|not ordered after|deadlock"),
            (Edit("barrier", ", %r3;", ", %r2;"), "not the same"),
            (Edit("ready"), "no mbarrier is initialized|before its mbarrier.init"),
        ],
    )
    def test_mistakes_are_found(self, edit: Edit, pattern: str, schedule: str, seed: int) -> None:
        with pytest.raises(Fault, match=pattern):
            self.run(apply(EXCHANGE, edit), ints(128), schedule, seed)
