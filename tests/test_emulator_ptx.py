"""The emulator feature by feature, on small hand-written PTX kernels."""

from __future__ import annotations

import pytest
import torch

from .emulator import Deadlock, Fault, PtxError, Race
from .emulator.samples import STORE, ints, run, wait

SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 3), ("random", 4)]
every_schedule = pytest.mark.parametrize("schedule,seed", SCHEDULES)


class TestArithmeticAndControl:
    def test_divergent_loop(self) -> None:
        """Collatz steps: every lane leaves the loop at another time."""
        out = ints(64)
        run(
            """
    mov.u32 %r2, %tid.x;
    add.u32 %r2, %r2, 1;
    mov.u32 %r1, 0;
again:
    setp.eq.u32 %p0, %r2, 1;
    @%p0 bra finished;
    and.b32 %r3, %r2, 1;
    setp.eq.u32 %p1, %r3, 0;
    @%p1 bra even;
    mad.lo.u32 %r2, %r2, 3, 1;
    bra next;
even:
    shr.u32 %r2, %r2, 1;
next:
    add.u32 %r1, %r1, 1;
    bra again;
finished:""" + STORE,
            out,
            block=(64, 1, 1),
        )

        def steps(n: int) -> int:
            return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

        assert out.tolist() == [steps(n) for n in range(1, 65)]

    def test_guarded_instructions_keep_the_other_lanes(self) -> None:
        out = ints(32)
        run(
            """
    mov.u32 %r2, %tid.x;
    mov.u32 %r1, 7;
    setp.lt.u32 %p0, %r2, 10;
    @%p0 add.u32 %r1, %r1, %r2;
    @!%p0 mov.u32 %r1, 99;""" + STORE,
            out,
        )
        assert out.tolist() == [7 + t if t < 10 else 99 for t in range(32)]

    def test_some_lanes_exit_early(self) -> None:
        out = ints(32)
        run(
            """
    mov.u32 %r1, %tid.x;
    setp.gt.u32 %p0, %r1, 20;
    @%p0 exit;""" + STORE,
            out,
        )
        assert out.tolist() == [t if t <= 20 else -1 for t in range(32)]

    def test_float_and_packed_conversion(self) -> None:
        x = torch.randn(32)
        out = ints(32)
        run(
            """
    ld.param.u64 %d2, [x];
    mov.u32 %r2, %tid.x;
    mad.wide.u32 %d3, %r2, 4, %d2;
    ld.global.nc.f32 %f0, [%d3];
    mul.rn.f32 %f1, %f0, 0f40400000;
    fma.rn.f32 %f2, %f0, %f1, 0fBF800000;
    cvt.rn.bf16x2.f32 %r1, %f2, %f1;""" + STORE,
            out,
            x,
            params=".param .u64 out, .param .u64 x",
        )
        low, high = x * 3, (x.double() * (x * 3).double() - 1).float()
        want = torch.stack([low, high], 1).bfloat16().view(torch.int32).flatten()
        assert torch.equal(out, want)

    def test_maximum_of_three(self) -> None:
        out = torch.full((32,), float("nan"))
        run(
            """
    mov.u32 %r2, %tid.x;
    cvt.rn.f32.u32 %f0, %r2;
    max.NaN.f32 %f1, 0f41000000, 0f40000000, %f0;
    mov.b32 %r1, %f1;""" + STORE,
            out,
        )
        assert torch.equal(out, torch.arange(32.0).clamp(min=8))

    def test_packed_f32x2(self) -> None:
        out = torch.full((64,), float("nan"))
        run(
            """
    mov.u32 %r0, %tid.x;
    cvt.rn.f32.u32 %f0, %r0;
    mov.b64 %d2, {%f0, %f0};
    mov.f32 %f1, 0f40000000;
    mov.f32 %f2, 0f40400000;
    mov.b64 %d3, {%f1, %f2};
    fma.rn.f32x2 %d4, %d2, %d3, %d3;
    mov.b64 {%f3, %f4}, %d4;
    ld.param.u64 %d0, [out];
    mad.wide.u32 %d1, %r0, 8, %d0;
    st.global.v2.f32 [%d1], {%f3, %f4};""",
            out,
        )
        t = torch.arange(32.0)
        assert torch.equal(out.view(32, 2), torch.stack([2 * t + 2, 3 * t + 3], 1))

    def test_shuffle_vote_and_elect(self) -> None:
        out = ints(32)
        run(
            """
    mov.u32 %r2, %tid.x;
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    setp.gt.u32 %p0, %r2, 15;
    vote.sync.ballot.b32 %r4, %p0, -1;
    popc.b32 %r5, %r4;
    elect.sync %r6|%p1, -1;
    selp.b32 %r7, 1000, 0, %p1;
    mad.lo.u32 %r1, %r5, 100, %r3;
    add.u32 %r1, %r1, %r7;""" + STORE,
            out,
        )
        assert out.tolist() == [1600 + (t ^ 1) + (1000 if t == 0 else 0) for t in range(32)]

    def test_transposed_matrix(self) -> None:
        """Lane 4r + i gives values 2i and 2i + 1 of row r, here 8r + 2i and the next, and takes them of column r."""
        out = ints(32)
        run(
            """
    mov.u32 %r2, %tid.x;
    mul.lo.u32 %r2, %r2, 131074;
    add.u32 %r2, %r2, 65536;
    movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r2;""" + STORE,
            out,
        )
        assert out.tolist() == [(t // 4 + 8 * (2 * (t % 4) + 1)) << 16 | t // 4 + 16 * (t % 4) for t in range(32)]

    def test_a_predicated_prefetch_does_nothing(self) -> None:
        out = ints(32)
        run(
            """
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p0, %r1, 10;
    ld.param.u64 %d2, [out];
    @%p0 prefetch.global.L2 [%d2];""" + STORE,
            out,
        )
        assert out.tolist() == list(range(32))

    def test_unknown_opcode_and_modifier_name_the_line(self) -> None:
        for text in (
            "frobnicate.b32 %r0, %r1;",
            "add.s32.sideways %r0, %r1, %r2;",
            "ld.global.L9::evict.b32 %r0, [%d0];",
        ):
            with pytest.raises(PtxError, match=r"line 14: .*" + text.split(" ")[0].split(".")[0]):
                run("\n    " + text, ints(1))


class TestGlobalMemory:
    def test_out_of_bounds_names_the_buffer(self) -> None:
        with pytest.raises(Fault, match=r"out of bounds: 124 bytes into buffer 'arg0' of 124 bytes"):
            run("mov.u32 %r1, 1;" + STORE, torch.zeros(31, dtype=torch.int32))

    def test_misaligned(self) -> None:
        with pytest.raises(Fault, match="misaligned global store of 4 bytes"):
            run("ld.param.u64 %d0, [out]; add.u64 %d0, %d0, 2; st.global.u32 [%d0], 0;", ints(4))

    def test_unregistered_address(self) -> None:
        with pytest.raises(Fault, match="no registered buffer"):
            run("mov.u64 %d0, 4096; ld.global.u32 %r0, [%d0];", ints(1))

    @every_schedule
    def test_atomics_count_every_lane(self, schedule: str, seed: int) -> None:
        out = torch.zeros(1, dtype=torch.int32)
        run(
            "ld.param.u64 %d0, [out]; red.global.add.u32 [%d0], 3;",
            out,
            grid=(5, 1, 1),
            block=(96, 1, 1),
            schedule=schedule,
            seed=seed,
        )
        assert out.item() == 3 * 5 * 96


def last_arriver(fence: str = "fence.acq_rel.gpu;", order: str = "relaxed") -> str:
    """Each CTA adds its number + 1 to a workspace slot; the last to arrive sums the slots in order."""
    return f"""
    ld.param.u64 %d0, [out];
    ld.param.u64 %d2, [workspace];
    ld.param.u64 %d3, [counter];
    mov.u32 %r0, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r2, 5;
    add.u32 %r3, %r3, %r0;
    mad.wide.u32 %d4, %r3, 4, %d2;
    add.u32 %r4, %r2, 1;
    st.global.u32 [%d4], %r4;
    bar.sync 0;
    setp.ne.u32 %p0, %r0, 0;
    mov.u32 %r5, 0;
    @%p0 bra joined;
    {fence}
    atom.{order}.gpu.global.add.u32 %r5, [%d3], 1;
    {fence}
joined:
    bar.sync 0;
    shfl.sync.idx.b32 %r5, %r5, 0, 31, -1;
    mov.u32 %r6, %nctaid.x;
    sub.u32 %r6, %r6, 1;
    setp.ne.u32 %p1, %r5, %r6;
    @%p1 exit;
    mov.u32 %r1, 0;
    mov.u32 %r7, 0;
sum:
    shl.b32 %r8, %r7, 5;
    add.u32 %r8, %r8, %r0;
    mad.wide.u32 %d5, %r8, 4, %d2;
    ld.global.u32 %r9, [%d5];
    mad.lo.u32 %r1, %r1, 10, %r9;
    add.u32 %r7, %r7, 1;
    setp.le.u32 %p2, %r7, %r6;
    @%p2 bra sum;
""" + STORE


class TestAcrossClusters:
    PARAMS = ".param .u64 out, .param .u64 workspace, .param .u64 counter"

    def _run(self, text: str, schedule: str, seed: int) -> torch.Tensor:
        out = ints(32)
        run(
            text,
            out,
            ints(4 * 32),
            torch.zeros(1, dtype=torch.int32),
            params=self.PARAMS,
            grid=(4, 1, 1),
            schedule=schedule,
            seed=seed,
        )
        return out

    @every_schedule
    @pytest.mark.parametrize("order", ["relaxed", "acq_rel"])
    def test_last_arriver_sums_in_order(self, order: str, schedule: str, seed: int) -> None:
        text = last_arriver("fence.acq_rel.gpu;" if order == "relaxed" else "", order)
        assert self._run(text, schedule, seed).tolist() == [1234] * 32

    @every_schedule
    @pytest.mark.parametrize("fence", ["", "fence.acq_rel.cta;"])
    def test_a_missing_or_narrow_fence_is_a_race(self, fence: str, schedule: str, seed: int) -> None:
        with pytest.raises(
            Race, match="global load .* is not ordered after its write by warp 0 .* of cluster"
        ):
            self._run(last_arriver(fence), schedule, seed)

    @every_schedule
    def test_cluster_launch_control(self, schedule: str, seed: int) -> None:
        """One warp takes over every CTA that has not started; each number is counted once."""
        text = f"""
    ld.param.u64 %d0, [out];
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 exit;
    mbarrier.init.shared.b64 [%r20], 1;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, 0;
count:
    mad.wide.u32 %d1, %r2, 4, %d0;
    red.global.add.u32 [%d1], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 16;
    clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r20+16], [%r20];
{wait("%r20", "%r3", "answer")}
    xor.b32 %r3, %r3, 1;
    ld.shared.b128 %q, [%r20+16];
    fence.proxy.async.shared::cta;
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p1, %q;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r2, %q;
    @%p1 bra count;"""
        out = torch.zeros(7, dtype=torch.int32)
        run(text, out, grid=(7, 1, 1), smem=64, schedule=schedule, seed=seed, concurrent=2)
        assert out.tolist() == [1] * 7


class TestSharedMemoryAndBarriers:
    @every_schedule
    def test_mbarrier_ping_pong(self, schedule: str, seed: int) -> None:
        """Two warps hand one word back and forth through two mbarriers."""
        text = f"""
    mov.u32 %r20, smem;
    add.u32 %r21, %r20, 8;
    mov.u32 %r0, %tid.x;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra ready;
    mbarrier.init.shared.b64 [%r20], 32;
    mbarrier.init.shared.b64 [%r21], 32;
ready:
    bar.sync 0;
    shr.u32 %r2, %r0, 5;
    and.b32 %r3, %r0, 31;
    shl.b32 %r4, %r3, 2;
    add.u32 %r4, %r4, %r20;
    mov.u32 %r5, 0;
    mov.u32 %r1, 0;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra second;
first:
    add.u32 %r1, %r1, 1;
    st.shared.u32 [%r4+64], %r1;
    mbarrier.arrive.shared.b64 _, [%r20];
{wait("%r21", "%r5", "pong")}
    ld.shared.u32 %r1, [%r4+192];
    xor.b32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r1, 20;
    @%p2 bra first;
    bra stop;
second:
{wait("%r20", "%r5", "ping")}
    ld.shared.u32 %r1, [%r4+64];
    add.u32 %r1, %r1, 3;
    st.shared.u32 [%r4+192], %r1;
    mbarrier.arrive.shared.b64 _, [%r21];
    xor.b32 %r5, %r5, 1;
    setp.lt.u32 %p2, %r1, 20;
    @%p2 bra second;
stop:""" + STORE
        out = ints(64)
        run(text, out, block=(64, 1, 1), smem=512, schedule=schedule, seed=seed)
        assert out.tolist() == [20] * 64
        with pytest.raises(
            Fault,
            match="load of shared offset .* (not ordered after its write by warp 0|nothing has written)",
        ):
            run(
                text.replace(wait("%r20", "%r5", "ping"), ""),
                ints(64),
                block=(64, 1, 1),
                smem=512,
                schedule=schedule,
                seed=seed,
            )

    @every_schedule
    def test_missing_named_barrier_is_a_race(self, schedule: str, seed: int) -> None:
        text = """
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    mad.lo.u32 %r2, %r0, 4, %r20;
    st.shared.u32 [%r2], %r0;
    bar.sync 1, 64;
    xor.b32 %r3, %r0, 32;
    mad.lo.u32 %r4, %r3, 4, %r20;
    ld.shared.u32 %r1, [%r4];""" + STORE
        out = ints(64)
        run(text, out, block=(64, 1, 1), smem=256, schedule=schedule, seed=seed)
        assert out.tolist() == [t ^ 32 for t in range(64)]
        with pytest.raises(Fault, match="not ordered after|nothing has written"):
            run(
                text.replace("bar.sync 1, 64;", ""),
                out,
                block=(64, 1, 1),
                smem=256,
                schedule=schedule,
                seed=seed,
            )

    def test_bytes_of_one_word_may_belong_to_different_warps(self) -> None:
        out = ints(32)
        run(
            """
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    shr.u32 %r2, %r0, 5;
    and.b32 %r3, %r0, 31;
    shl.b32 %r4, %r3, 2;
    add.u32 %r5, %r4, %r2;
    add.u32 %r5, %r5, %r20;
    cvt.u16.u32 %h0, %r2;
    st.shared.u8 [%r5], %h0;
    bar.sync 0;
    setp.ne.u32 %p0, %r2, 0;
    @%p0 exit;
    add.u32 %r6, %r4, %r20;
    ld.shared.u32 %r1, [%r6];""" + STORE,
            out,
            block=(128, 1, 1),
            smem=128,
        )
        assert out.tolist() == [0x03020100] * 32

    def test_uninitialized_and_out_of_bounds(self) -> None:
        with pytest.raises(Fault, match="nothing has written"):
            run("mov.u32 %r2, smem; ld.shared.u32 %r1, [%r2];", ints(1), smem=64)
        with pytest.raises(Fault, match="shared offset 1088.* out of bounds"):
            run("mov.u32 %r2, smem; st.shared.u32 [%r2+64], 1;", ints(1), smem=64)
        with pytest.raises(Fault, match="where no mbarrier is initialized"):
            run("mov.u32 %r2, smem; mbarrier.arrive.shared.b64 _, [%r2];", ints(1), smem=64)

    def test_two_warps_may_initialize_a_barrier_alike(self) -> None:
        text = """
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    shr.u32 %r2, %r0, 5;
    add.u32 %r3, %r2, COUNT;
    elect.sync _|%p0, -1;
    @!%p0 bra ready;
    mbarrier.init.shared.b64 [%r20], %r3;
ready:
    bar.sync 0;"""
        run(text.replace("%r2, COUNT", "0, 5"), ints(1), block=(64, 1, 1), smem=64)
        with pytest.raises(Race, match="store to shared offset 0x400"):
            run(text.replace("COUNT", "5"), ints(1), block=(64, 1, 1), smem=64)

    def test_deadlock_of_a_named_barrier(self) -> None:
        with pytest.raises(Deadlock, match="named barrier 2: 32 of 64 threads"):
            run(
                "mov.u32 %r0, %tid.x; setp.gt.u32 %p0, %r0, 31; @%p0 exit; bar.sync 2, 64;",
                ints(1),
                block=(64, 1, 1),
            )

    @every_schedule
    def test_distributed_shared_memory(self, schedule: str, seed: int) -> None:
        text = """
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    mov.u32 %r2, %cluster_ctarank;
    xor.b32 %r3, %r2, 1;
    mad.lo.u32 %r4, %r0, 4, %r20;
    mapa.shared::cluster.u32 %r5, %r4, %r3;
    mad.lo.u32 %r6, %r2, 100, %r0;
    st.shared::cluster.u32 [%r5], %r6;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ld.shared.u32 %r1, [%r4];
    ld.param.u64 %d0, [out];
    mad.lo.u32 %r7, %r2, 32, %r0;
    mad.wide.u32 %d1, %r7, 4, %d0;
    st.global.u32 [%d1], %r1;"""
        options = dict(grid=(2, 1, 1), cluster=(2, 1, 1), smem=128, schedule=schedule, seed=seed)
        out = ints(64)
        run(text, out, **options)
        assert out.tolist() == [100 + t for t in range(32)] + list(range(32))
        with pytest.raises(Race, match="load of shared offset"):  # a relaxed arrive orders nothing
            run(text.replace("cluster.arrive", "cluster.arrive.relaxed"), out, **options)

    @every_schedule
    def test_cp_async(self, schedule: str, seed: int) -> None:
        text = """
    ld.param.u64 %d2, [x];
    mov.u32 %r20, smem;
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %d3, %r0, 4, %d2;
    mad.lo.u32 %r2, %r0, 4, %r20;
    cp.async.ca.shared.global [%r2], [%d3], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.u32 %r1, [%r2];""" + STORE
        out, x = ints(32), torch.arange(32, dtype=torch.int32)
        options = dict(params=".param .u64 out, .param .u64 x", smem=128, schedule=schedule, seed=seed)
        run(text, out, x, **options)
        assert torch.equal(out, x)
        with pytest.raises(Race, match="cp.async"):
            run(text.replace("cp.async.wait_group 0;", ""), out, x, **options)
