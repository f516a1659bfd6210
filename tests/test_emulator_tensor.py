"""TMA, tensor memory and the tensor core of the emulator, on small hand-written PTX kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .emulator import Fault, Race, emulate_ptx
from .emulator.numerics import decode_table
from .emulator.samples import F32, LOAD, STORE, U16, ints, kernel, run, aligned, regs, tensor_map, wait

from .test_emulator_ptx import every_schedule


def tma_round_trip(rank: int) -> str:
    """Load a box by TMA, copy shared memory as it lies to `raw`, store the box by TMA."""
    coords = ", ".join(["%r2", "%r3", "%r4"][:rank])
    return f"""
    ld.param.u32 %r2, [x0];
    ld.param.u32 %r3, [x1];
    mov.u32 %r4, 0;
    ld.param.u32 %r5, [bytes];
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    add.u32 %r21, %r20, 1024;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra loaded;
    mbarrier.init.shared.b64 [%r20], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], %r5;
    cvta.param.u64 %d2, source;
    {LOAD.format(rank, 'cta')} [%r21], [%d2, {{{coords}}}], [%r20];
loaded:
    bar.sync 0;
{wait("%r20", "0", "full")}
    ld.param.u64 %d3, [raw];
    mov.u32 %r6, %r0;
copy:
    mad.lo.u32 %r7, %r6, 4, %r21;
    ld.shared.u32 %r8, [%r7];
    mad.wide.u32 %d4, %r6, 4, %d3;
    st.global.u32 [%d4], %r8;
    add.u32 %r6, %r6, 32;
    shr.u32 %r9, %r5, 2;
    setp.lt.u32 %p1, %r6, %r9;
    @%p1 bra copy;
    @%p0 bra stored;
    cvta.param.u64 %d5, target;
    cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%d5, {{{coords}}}], [%r21];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
stored:"""


class TestTma:
    PARAMS = (
        ".param .align 64 .b8 source[128], .param .align 64 .b8 target[128], .param .u64 raw, "
        ".param .u32 x0, "
        ".param .u32 x1, .param .u32 bytes"
    )

    @every_schedule
    @pytest.mark.parametrize("swizzle,inner", [(0, 64), (1, 16), (2, 32), (3, 64)])
    @pytest.mark.parametrize("x0,x1", [(0, 0), (16, 8), (-8, -3), (40, 90)])
    def test_box_swizzle_fill_and_clip(
        self, swizzle: int, inner: int, x0: int, x1: int, schedule: str, seed: int
    ) -> None:
        """u16 [100, 80] with a box of 32 rows: outside is zero on load and untouched by the store."""
        rows, columns, box_rows = 100, 80, 32
        source = torch.arange(1, rows * columns + 1, dtype=torch.int16)
        target = torch.full((rows * columns,), -1, dtype=torch.int16)
        raw = ints(box_rows * inner // 2)
        maps = [
            tensor_map(U16, t, [columns, rows], [columns * 2], [inner, box_rows], swizzle)
            for t in (source, target)
        ]
        report = run(
            tma_round_trip(2),
            *maps,
            raw,
            x0,
            x1,
            box_rows * inner * 2,
            params=self.PARAMS,
            smem=8192,
            buffers={"source": source, "target": target},
            schedule=schedule,
            seed=seed,
        )
        padded = np.zeros((rows + 200, columns + 200), np.int16)
        padded[100 : 100 + rows, 100 : 100 + columns] = source.view(rows, columns).numpy()
        box = padded[100 + x1 : 100 + x1 + box_rows, 100 + x0 : 100 + x0 + inner]
        got = raw.numpy().view(np.int16).reshape(-1, 8)
        chunk = np.arange(len(got))
        address = 2048 + 16 * chunk
        physical = (address ^ (address >> 7 & (0, 1, 3, 7)[swizzle]) << 4) - 2048 >> 4
        np.testing.assert_array_equal(got[physical].reshape(box_rows, inner), box)
        want = np.full((rows, columns), -1, np.int16)
        r0, r1, c0, c1 = max(x1, 0), min(x1 + box_rows, rows), max(x0, 0), min(x0 + inner, columns)
        want[r0:r1, c0:c1] = source.view(rows, columns)[r0:r1, c0:c1].numpy()
        np.testing.assert_array_equal(target.view(rows, columns).numpy(), want)
        assert report.counters["TMA load bytes"] == box_rows * inner * 2

    def test_a_descriptor_larger_than_its_buffer(self) -> None:
        source, target = torch.zeros(64 * 31, dtype=torch.int16), torch.zeros(64 * 32, dtype=torch.int16)
        maps = [tensor_map(U16, t, [64, 32], [128], [64, 32]) for t in (source, target)]
        with pytest.raises(
            Fault, match="TMA load of 4096 bytes .* out of bounds: 0 bytes into buffer 'source' of 3968"
        ):
            run(
                tma_round_trip(2),
                *maps,
                ints(1024),
                0,
                0,
                4096,
                params=self.PARAMS,
                smem=8192,
                buffers={"source": source, "target": target},
            )

    @every_schedule
    def test_reading_before_the_wait_is_found(self, schedule: str, seed: int) -> None:
        source, target = torch.zeros(64 * 32, dtype=torch.int16), torch.zeros(64 * 32, dtype=torch.int16)
        maps = [tensor_map(U16, t, [64, 32], [128], [64, 32]) for t in (source, target)]
        with pytest.raises(Race, match="by a bulk copy that signals the mbarrier"):
            run(
                tma_round_trip(2).replace(wait("%r20", "0", "full"), ""),
                *maps,
                ints(1024),
                0,
                0,
                4096,
                params=self.PARAMS,
                smem=8192,
                buffers={"source": source, "target": target},
                schedule=schedule,
                seed=seed,
            )

    @every_schedule
    def test_multicast(self, schedule: str, seed: int) -> None:
        """CTA 1 of 4 loads one box into CTAs 0, 1 and 3; each waits on its own barrier."""
        text = f"""
    mov.u32 %r20, smem;
    add.u32 %r21, %r20, 128;
    mov.u32 %r0, %tid.x;
    mov.u32 %r2, %cluster_ctarank;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra ready;
    mbarrier.init.shared.b64 [%r20], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 512;
ready:
    fence.mbarrier_init.release.cluster;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    setp.eq.u32 %p1, %r2, 2;
    @%p1 bra finish;
    setp.ne.u32 %p2, %r2, 1;
    or.pred %p2, %p2, %p0;
    @%p2 bra issued;
    cvta.param.u64 %d2, source;
    mov.u32 %r3, 0;
    mov.b16 %h0, 11;
    {LOAD.format(2, 'cluster')}.multicast::cluster [%r21], [%d2, {{%r3, %r3}}], [%r20], %h0;
issued:
{wait("%r20", "0", "full")}
    mad.lo.u32 %r4, %r0, 4, %r21;
    ld.shared.u32 %r1, [%r4];
    mad.lo.u32 %r5, %r2, 32, %r0;
    ld.param.u64 %d0, [out];
    mad.wide.u32 %d1, %r5, 4, %d0;
    st.global.u32 [%d1], %r1;
finish:
    barrier.cluster.arrive;
    barrier.cluster.wait;"""
        source, out = torch.arange(256, dtype=torch.int16), ints(128)
        options = dict(
            params=".param .align 64 .b8 source[128], .param .u64 out",
            grid=(4, 1, 1),
            cluster=(4, 1, 1),
            smem=1024,
            buffers={"source": source},
            schedule=schedule,
            seed=seed,
        )
        report = run(text, tensor_map(U16, source, [32, 8], [64], [32, 8]), out, **options)
        want = source.view(torch.int32)[:32].tolist()
        assert out.tolist() == want * 2 + [-1] * 32 + want
        assert report.counters["TMA load bytes"] == 3 * 512 and report.counters["TMA multicast loads"] == 1
        with pytest.raises(Fault, match="outside the cluster"):
            run(
                text.replace("%h0, 11", "%h0, 27"),
                tensor_map(U16, source, [32, 8], [64], [32, 8]),
                out,
                **options,
            )


def mma_kernel(kind: str, rows: int, n: int, idesc: int, columns: int = 128) -> str:
    """D[rows, n] of one CTA = A @ B.T for K bytes of 128 per row (4 instructions), 128-byte swizzle; D as f32
    by row.

    For block-scaled kinds the scale factors lie behind the operands, 512 contiguous bytes per instruction and
    operand.
    """
    scaled = kind.startswith("mx")
    total = 128 * rows + 128 * n
    steps = []
    for step in range(4):
        scale_operands = ""
        if scaled:
            for name, column, offset in (("%r30", columns, total), ("%r31", columns + 16, total + 2048)):
                steps.append(f"""
    add.u32 {name}, %r10, {column + 4 * step};
    add.u32 %r32, %r21, {offset + 512 * step};
    shr.u32 %r32, %r32, 4;
    and.b32 %r32, %r32, 16383;
    cvt.u64.u32 %d6, %r32;
    or.b64 %d6, %d6, {1 << 46 | 8 << 32 | 1 << 16};
    tcgen05.cp.cta_group::1.32x128b.warpx4 [{name}], %d6;""")
            scale_operands = "[%r30], [%r31], "
        block = {
            "mxf4nvf4": ".block_scale.block16",
            "mxf8f6f4": ".block_scale.block32",
            "mxf4": ".block_scale.block32",
        }
        steps.append(f"""
    tcgen05.mma.cta_group::1.kind::{kind}{block.get(kind, '')} [%r10], %d4, %d5, %r11, {scale_operands}%p4;
    mov.pred %p4, 1;
    add.u64 %d4, %d4, 2;
    add.u64 %d5, %d5, 2;""")
    stores = "\n".join(f"    st.global.u32 [%d1+{4 * j}], %r{40 + j};" for j in range(32))
    return f"""
    mov.u32 %r20, smem;
    add.u32 %r21, %r20, 1024;
    mov.u32 %r0, %tid.x;
    shr.u32 %r2, %r0, 5;
    shfl.sync.idx.b32 %r2, %r2, 0, 31, -1;
    setp.ne.u32 %p0, %r0, 0;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra allocated;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20+16], 256;
    @%p0 bra allocated;
    mbarrier.init.shared.b64 [%r20], 1;
    mbarrier.init.shared.b64 [%r20+8], 1;
    fence.mbarrier_init.release.cluster;
allocated:
    bar.sync 0;
    ld.shared.u32 %r10, [%r20+16];
    @%p0 bra issued;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], {total + (4096 if scaled else 0)};
    mov.u32 %r3, 0;
    cvta.param.u64 %d2, map_a;
    {LOAD.format(2, 'cta')} [%r21], [%d2, {{%r3, %r3}}], [%r20];
    add.u32 %r4, %r21, {128 * rows};
    cvta.param.u64 %d2, map_b;
    {LOAD.format(2, 'cta')} [%r4], [%d2, {{%r3, %r3}}], [%r20];
    {f'''ld.param.u64 %d7, [scales];
    add.u32 %r4, %r21, {total};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r4], [%d7], 4096, [%r20];''' if scaled else ''}
{wait("%r20", "0", "full")}
    shr.u32 %r5, %r21, 4;
    and.b32 %r5, %r5, 16383;
    cvt.u64.u32 %d4, %r5;
    or.b64 %d4, %d4, {2 << 61 | 1 << 46 | 64 << 32 | 1 << 16};
    add.u64 %d5, %d4, {128 * rows >> 4};
    mov.u32 %r11, {idesc};
    mov.pred %p4, 0;
{"".join(steps)}
    tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r20+8];
issued:
    bar.warp.sync -1;
{wait("%r20 + 8", "0", "multiplied")}
    shl.b32 %r6, %r2, 21;
    add.u32 %r6, %r6, %r10;
    mov.u32 %r7, 0;
    ld.param.u64 %d0, [out];
    mul.wide.u32 %d1, %r0, {4 * n};
    add.u64 %d1, %d1, %d0;
columns:
    tcgen05.ld.sync.aligned.32x32b.x32.b32 {{{regs('r', 32, 40)}}}, [%r6];
    tcgen05.wait::ld.sync.aligned;
{stores}
    add.u64 %d1, %d1, 128;
    add.u32 %r6, %r6, 32;
    add.u32 %r7, %r7, 32;
    setp.lt.u32 %p5, %r7, {n};
    @%p5 bra columns;
    bar.sync 0;
    @%p1 bra freed;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 256;
freed:"""


class TestMma:
    N = 64

    def _run(
        self,
        kind: str,
        a: np.ndarray,
        b: np.ndarray,
        idesc: int,
        scales: torch.Tensor | None,
        schedule: str,
        seed: int,
    ) -> np.ndarray:
        """a, b: bytes [128 or N, 128]. Returns TMEM lanes 0..127 as rows."""
        operands = [aligned(x.size) for x in (a, b)]
        for memory, x in zip(operands, (a, b)):
            memory.copy_(torch.from_numpy(np.ascontiguousarray(x).reshape(-1)))
        maps = [
            tensor_map(U16, memory, [64, len(x)], [128], [64, len(x)], 3)
            for memory, x in zip(operands, (a, b))
        ]
        out = torch.full((128, self.N), float("nan"))
        scales = aligned(16) if scales is None else scales
        emulate_ptx(
            kernel(
                mma_kernel(kind, 128, self.N, idesc),
                ".param .align 64 .b8 map_a[128], "
                ".param .align 64 .b8 map_b[128], .param .u64 out, .param .u64 scales",
            ),
            "k",
            [*maps, out, scales],
            block=(128, 1, 1),
            smem=1024 + 128 * (128 + self.N) + 4096,
            schedule=schedule,
            seed=seed,
            buffers={"a": operands[0], "b": operands[1]},
        )
        return out.numpy()

    def _shape(self, d: int = 1, a: int = 0, b: int = 0) -> int:
        return d << 4 | a << 7 | b << 10 | self.N // 8 << 17 | 128 // 16 << 24

    @every_schedule
    def test_f16_and_bf16(self, schedule: str, seed: int) -> None:
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((128, 64)).astype(np.float16), rng.standard_normal((self.N, 64)).astype(
            np.float16
        )
        got = self._run("f16", a.view(np.uint8), b.view(np.uint8), self._shape(), None, schedule, seed)
        np.testing.assert_allclose(got, a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-5, atol=1e-4)
        wide = [torch.from_numpy(x.astype(np.float32)).bfloat16() for x in (a, b)]
        got = self._run(
            "f16", *(x.view(torch.uint8).numpy() for x in wide), self._shape(1, 1, 1), None, schedule, seed
        )
        np.testing.assert_allclose(got, (wide[0].double() @ wide[1].double().T).numpy(), rtol=1e-5, atol=1e-4)

    def test_negated_a_and_fp8(self) -> None:
        rng = np.random.default_rng(1)
        a, b = (rng.integers(0, 0x78, (rows, 128)).astype(np.uint8) for rows in (128, self.N))
        table = [decode_table(name).astype(np.float64) for name in ("e4m3", "e5m2")]
        got = self._run("f8f6f4", a, b, self._shape(1, 0, 1) | 1 << 13, None, "eager", 0)
        np.testing.assert_allclose(got, -(table[0][a] @ table[1][b].T), rtol=1e-6)

    def test_tf32(self) -> None:
        rng = np.random.default_rng(2)
        a, b = (rng.standard_normal((rows, 32)).astype(np.float32) for rows in (128, self.N))
        got = self._run("tf32", a.view(np.uint8), b.view(np.uint8), self._shape(1, 2, 2), None, "eager", 0)
        np.testing.assert_allclose(got, a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-2, atol=2e-2)

    @every_schedule
    @pytest.mark.parametrize("kind,block,scale_format", [("mxf4nvf4", 16, "ue4m3"), ("mxf4", 32, "ue8m0")])
    def test_fp4_with_block_scales(
        self, kind: str, block: int, scale_format: str, schedule: str, seed: int
    ) -> None:
        rng = np.random.default_rng(3)
        a, b = (rng.integers(0, 256, (rows, 128)).astype(np.uint8) for rows in (128, self.N))
        low, high = (0x28, 0x48) if scale_format == "ue4m3" else (120, 132)
        per_step = 64 // block
        codes = rng.integers(low, high, (2, 4, 128, 4)).astype(
            np.uint8
        )  # operand, instruction, row, byte of the column
        scales = aligned(4096)
        scales.copy_(
            torch.from_numpy(
                np.ascontiguousarray(codes.reshape(2, 4, 4, 32, 4).transpose(0, 1, 3, 2, 4)).reshape(-1)
            )
        )
        idesc = self._shape(0, 1, 1) | (1 << 23 if scale_format == "ue8m0" else 0)
        got = self._run(kind, a, b, idesc, scales, schedule, seed)
        fp4, factor = decode_table("e2m1").astype(np.float64), decode_table(scale_format).astype(np.float64)

        def values(x: np.ndarray, code: np.ndarray) -> np.ndarray:
            flat = np.stack([fp4[x & 15], fp4[x >> 4]], -1).reshape(len(x), 256)
            per_row = code.transpose(1, 0, 2)[: len(x), :, :per_step].reshape(len(x), -1)
            return flat * np.repeat(factor[per_row], block, 1)

        np.testing.assert_allclose(got, values(a, codes[0]) @ values(b, codes[1]).T, rtol=1e-6, atol=1e-3)

    def test_lanes_of_m_64(self) -> None:
        """Row i of D lies at lane i % 16 + 32 * (i / 16)."""
        rng = np.random.default_rng(4)
        a, b = rng.standard_normal((128, 64)).astype(np.float16), rng.standard_normal((self.N, 64)).astype(
            np.float16
        )
        idesc = 1 << 4 | self.N // 8 << 17 | 64 // 16 << 24
        with pytest.raises(
            Fault, match="nothing has written"
        ):  # the kernel reads all lanes, of which half hold nothing
            self._run("f16", a.view(np.uint8), b.view(np.uint8), idesc, None, "eager", 0)


class TestTensorMemory:
    def _text(
        self, shape: str, repeat: int, count: int, extra: str = "tcgen05.wait::st.sync.aligned;"
    ) -> str:
        stores = "\n".join(f"    st.global.u32 [%d1+{128 * j}], %r{40 + j};" for j in range(count))
        marks = "\n".join(f"    mad.lo.u32 %r{40 + j}, %r0, 1000, {j};" for j in range(32))
        return f"""
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20], 32;
    bar.warp.sync -1;
    ld.shared.u32 %r10, [%r20];
{marks}
    tcgen05.st.sync.aligned.32x32b.x32.b32 [%r10], {{{regs('r', 32, 40)}}};
    {extra}
    tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {{{regs('r', count, 40)}}}, [%r10];
    tcgen05.wait::ld.sync.aligned;
    ld.param.u64 %d0, [out];
    mad.wide.u32 %d1, %r0, 4, %d0;
{stores}
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;"""

    @pytest.mark.parametrize(
        "shape,repeat,count", [("32x32b", 32, 32), ("16x64b", 16, 16), ("16x128b", 8, 16), ("16x256b", 4, 16)]
    )
    def test_load_shapes(self, shape: str, repeat: int, count: int) -> None:
        out = ints(32 * count)
        run(self._text(shape, repeat, count), out, smem=64)
        got = out.view(count, 32).numpy()
        t = np.arange(32)
        for r in range(count):
            lane, column = {
                "32x32b": (t, r),
                "16x64b": (t // 4 + 8 * (t & 1), (t >> 1 & 1) + 2 * r),
                "16x128b": (t // 4 + 8 * (r & 1), t % 4 + 4 * (r // 2)),
                "16x256b": (t // 4 + 8 * (r // 2 % 2), 2 * (t % 4) + r % 2 + 8 * (r // 4)),
            }[shape]
            np.testing.assert_array_equal(got[r], 1000 * lane + column)

    def test_packed_load(self) -> None:
        """.pack::16b: register j holds the low halves of columns 2j and 2j + 1."""
        out = ints(32 * 16)
        text = self._text("32x32b", 16, 16).replace("x16.b32", "x16.pack::16b.b32")
        run(text, out, smem=64)
        lane, j = np.arange(32)[None, :], np.arange(16)[:, None]
        want = (1000 * lane + 2 * j) & 0xFFFF | ((1000 * lane + 2 * j + 1) & 0xFFFF) << 16
        np.testing.assert_array_equal(out.view(16, 32).numpy().view(np.uint32), want)

    def test_missing_wait_st_is_found(self) -> None:
        with pytest.raises(Race, match="tcgen05.ld of TMEM .* tcgen05.st of warp 0"):
            run(self._text("32x32b", 32, 32, ""), ints(1024), smem=64)

    def test_use_after_dealloc(self) -> None:
        text = self._text("32x32b", 32, 32)
        free = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;"
        with pytest.raises(Fault, match="reaches outside the live allocations"):
            run(text.replace(free, "").replace("tcgen05.ld", free + "\n    tcgen05.ld"), ints(1024), smem=64)

    def test_allocation_waits_for_room(self) -> None:
        """Two warps allocate 512 columns each: the second gets them when the first has freed its own."""
        out = ints(64)
        run(
            """
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    shr.u32 %r2, %r0, 5;
    mad.lo.u32 %r3, %r2, 4, %r20;
    shfl.sync.idx.b32 %r3, %r3, 0, 31, -1;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 512;
    bar.warp.sync -1;
    ld.shared.u32 %r1, [%r3];
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 512;""" + STORE,
            out,
            block=(64, 1, 1),
            smem=64,
        )
        assert out.tolist() == [0] * 64


def test_float32_reduction_store() -> None:
    """cp.reduce.async.bulk.tensor adds f32 boxes of several CTAs."""
    out = torch.zeros(32, 4)
    run(
        """
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    cvt.rn.f32.u32 %f0, %r0;
    mad.lo.u32 %r2, %r0, 16, %r20;
    st.shared.v4.f32 [%r2], {%f0, %f0, %f0, %f0};
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 exit;
    mov.u32 %r3, 0;
    cvta.param.u64 %d2, target;
    cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%d2, {%r3, %r3}], [%r20];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;""",
        tensor_map(F32, out, [4, 32], [16], [4, 32]),
        params=".param .align 64 .b8 target[128]",
        grid=(3, 1, 1),
        smem=512,
        buffers={"out": out},
        schedule="random",
        seed=1,
    )
    assert torch.equal(out, 3 * torch.arange(32.0)[:, None].expand(32, 4))
