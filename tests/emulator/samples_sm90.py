"""sm_90a kernels that the emulator's own tests run and edit: a warp-specialized GEMM on wgmma and TMA, and a
single wgmma with operands written by threads.

Lines that a test edits carry `// @tag` (see `samples.apply`).
"""

from __future__ import annotations

import numpy as np
import torch

from .api import emulate_ptx
from .report import LaunchReport
from .samples import HEADER, LOAD, SWIZZLE_128, U16, regs, tensor_map, wait

TILE_M, TILE_N, TILE_K, STAGES = 64, 64, 64, 3
STAGE_BYTES = 128 * (TILE_M + TILE_N)  # rows of 64 float16
SMEM_BYTES = 1024 + STAGES * STAGE_BYTES
DESCRIPTOR = 1 << 62 | 64 << 32 | 1 << 16  # 128B swizzle, 1024 bytes between groups of eight rows
MMA = "wgmma.mma_async.sync.aligned"
SM90 = HEADER.replace("sm_100a", "sm_90a")


def gemm_warpgroup(left_in_registers: bool = False) -> str:
    """out[groups, 64, 64] f32 = A @ B.T over the K tiles of each group.

    Parameters: tensor maps A, B ([rows, K] float16); out; groups; K tiles of 64 per group. Block 160: warps 0
    to 3 multiply, warp 4 loads. With the left operand in registers they load its fragments from shared memory
    and double them.
    """
    newline = "\n"
    steps, fragments = [], []
    for step in range(4):
        left = f"{{{regs('a', 4, 4 * step)}}}" if left_in_registers else "%qa"
        flags = "1, 1, 0" if left_in_registers else "1, 1, 0, 0"
        steps.append(f"""
    add.s64 %qa, %adesc, {2 * step};
    add.s64 %qb, %bdesc, {2 * step};
    {MMA}.m64n64k16.f32.f16.f16 {{{regs("c", 32)}}}, {left}, %qb, %more, {flags}; // @mma{step}
    mov.pred %more, 1;""")
        for half in range(2):
            fragments.append(f"""
    xor.b32 %y, %x, {32 * step + 16 * half};
    ld.shared.b32 %a{4 * step + 2 * half}, [%y];
    ld.shared.b32 %a{4 * step + 2 * half + 1}, [%y + 1024];""")
        fragments += [f"    mul.f16x2 %a{i}, %a{i}, %two; // @double" for i in range(4 * step, 4 * step + 4)]
    # Row lane/4 of the warp's 16 begins at 128 * row; its 16-byte chunks are swizzled by the row.
    load_left = f"""
    and.b32 %x, %lane, 28;
    shl.b32 %x, %x, 5;
    shl.b32 %y, %warp, 11;
    add.s32 %x, %x, %y;
    add.s32 %x, %x, %stage;
    and.b32 %y, %lane, 28;
    shl.b32 %y, %y, 2;
    add.s32 %x, %x, %y;
    and.b32 %y, %lane, 3;
    shl.b32 %y, %y, 2;
    add.s32 %x, %x, %y;
{newline.join(fragments)}"""
    keep = 0 if left_in_registers else 1
    stores = "\n".join(
        f"    st.global.v2.f32 [%q + {32 * (i // 4) + 2048 * (i // 2 % 2)}], {{%c{i}, %c{i + 1}}}; // @result"
        for i in range(0, 32, 2)
    )
    barriers = "\n".join(
        f"    mbarrier.init.shared::cta.b64 [%smem + {8 * i}], 1;" for i in range(2 * STAGES)
    )
    return f"""{SM90}
.visible .entry gemm(.param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .u64 out,
    .param .u32 groups, .param .u32 tiles)
.reqntid 160, 1, 1
{{
    .reg .pred %p, %done, %elected, %more;
    .reg .b32 %smem, %thread, %warp, %lane, %x, %y, %stage, %bar, %k, %kcoord, %slot, %phase;
    .reg .b32 %total, %zero, %two;
    .reg .b32 %groups, %tiles, %group, %tile, %previous;
    .reg .b32 %a<16>;
    .reg .f32 %c<32>;
    .reg .b64 %q, %qa, %qb, %adesc, %bdesc, %map;

    mov.b32 %smem, smem;
    mov.u32 %thread, %tid.x;
    shr.u32 %warp, %thread, 5;
    shfl.sync.idx.b32 %warp, %warp, 0, 31, -1;
    and.b32 %lane, %thread, 31;
    mov.b32 %zero, 0;
    mov.b32 %two, 0x40004000;
    ld.param.b32 %groups, [groups];
    ld.param.b32 %tiles, [tiles];
    mul.lo.s32 %total, %groups, %tiles;
    setp.ne.s32 %p, %thread, 0;
    @%p bra initialized;
{barriers}
    fence.mbarrier_init.release.cluster;
initialized:
    bar.sync 0; // @init_barrier
    setp.ne.s32 %p, %warp, 4;
    @%p bra multiply;

    setmaxnreg.dec.sync.aligned.u32 24;
    elect.sync _|%elected, -1;
    @!%elected bra finish;
    mov.b32 %k, 0;
    mov.b32 %slot, 0;
    mov.b32 %phase, 1;
load_loop:
    shl.b32 %x, %slot, 3;
    add.s32 %bar, %smem, %x;
    add.s32 %x, %bar, {8 * STAGES};
{wait("%x", "%phase", "wait_empty")}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {STAGE_BYTES}; // @expect
    mad.lo.s32 %stage, %slot, {STAGE_BYTES}, %smem; // @load_stage
    add.s32 %stage, %stage, 1024;
    shl.b32 %kcoord, %k, 6;
    cvta.param.u64 %map, map_a;
    {LOAD.format(2, "cta")} [%stage], [%map, {{%kcoord, %zero}}], [%bar];
    add.s32 %x, %stage, {128 * TILE_M};
    cvta.param.u64 %map, map_b;
    {LOAD.format(2, "cta")} [%x], [%map, {{%kcoord, %zero}}], [%bar];
    add.s32 %slot, %slot, 1;
    setp.ne.s32 %p, %slot, {STAGES};
    @%p bra load_next;
    mov.b32 %slot, 0;
    xor.b32 %phase, %phase, 1; // @load_phase
load_next:
    add.s32 %k, %k, 1;
    setp.lt.s32 %p, %k, %total;
    @%p bra load_loop;
    bra finish;

multiply:
    setmaxnreg.inc.sync.aligned.u32 240;
    mov.b32 %group, 0;
    mov.b32 %slot, 0;
    mov.b32 %previous, -1;
    mov.b32 %phase, 0; // @full_parity
group_loop:
    mov.pred %more, 0; // @first
    mov.b32 %tile, 0;
tile_loop:
    shl.b32 %x, %slot, 3;
    add.s32 %bar, %smem, %x;
{wait("%bar", "%phase", "wait_full")}
    mad.lo.s32 %stage, %slot, {STAGE_BYTES}, %smem; // @multiply_stage
    add.s32 %stage, %stage, 1024; // @operands
{load_left if left_in_registers else ""}
    shr.u32 %x, %stage, 4; // @descriptor
    cvt.u64.u32 %adesc, %x;
    and.b64 %adesc, %adesc, 0x3fff;
    or.b64 %adesc, %adesc, {DESCRIPTOR}; // @swizzle
    add.s64 %bdesc, %adesc, {128 * TILE_M >> 4};
    wgmma.fence.sync.aligned; // @fence
    {"".join(steps)}
    wgmma.commit_group.sync.aligned; // @commit
    wgmma.wait_group.sync.aligned {keep}; // @wait_tile
    {"mov.b32 %previous, %slot;" if left_in_registers else ""}
    setp.lt.s32 %p, %previous, 0;
    @%p bra released;
    shl.b32 %x, %previous, 3;
    add.s32 %x, %x, %smem;
    setp.ne.s32 %p, %thread, 0;
    @%p bra released;
    mbarrier.arrive.shared::cta.b64 _, [%x + {8 * STAGES}]; // @release
released:
    mov.b32 %previous, %slot;
    add.s32 %slot, %slot, 1;
    setp.ne.s32 %p, %slot, {STAGES};
    @%p bra tile_next;
    mov.b32 %slot, 0;
    xor.b32 %phase, %phase, 1; // @full_phase
tile_next:
    add.s32 %tile, %tile, 1;
    setp.lt.s32 %p, %tile, %tiles;
    @%p bra tile_loop;
    wgmma.wait_group.sync.aligned 0; // @wait_last
    ld.param.u64 %q, [out];
    shl.b32 %x, %group, 14;
    shl.b32 %y, %warp, 12;
    add.s32 %x, %x, %y;
    and.b32 %y, %lane, 28;
    shl.b32 %y, %y, 6;
    add.s32 %x, %x, %y;
    and.b32 %y, %lane, 3;
    shl.b32 %y, %y, 3;
    add.s32 %x, %x, %y;
    cvt.u64.u32 %map, %x;
    add.s64 %q, %q, %map;
{stores}
    add.s32 %group, %group, 1;
    setp.lt.s32 %p, %group, %groups;
    @%p bra group_loop;
finish:
    ret;
}}
"""


class WarpgroupProblem:
    """Random operands of `gemm_warpgroup` and the float64 result."""

    def __init__(self, groups: int = 2, tiles: int = 5, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.groups, self.tiles, k = groups, tiles, TILE_K * groups * tiles
        self.a, self.b = (torch.from_numpy(rng.standard_normal((64, k)).astype(np.float16)) for _ in range(2))
        self.out = torch.empty(groups, TILE_M, TILE_N)
        a, b = (x.numpy().astype(np.float64).reshape(64, groups, -1) for x in (self.a, self.b))
        self.expected = np.einsum("mgk,ngk->gmn", a, b)
        self.maps = [tensor_map(U16, x, [k, 64], [2 * k], [64, 64], SWIZZLE_128) for x in (self.a, self.b)]

    def run(self, ptx: str, **options: object) -> LaunchReport:
        """Poison the output and run the kernel."""
        self.out.fill_(float("nan"))
        return emulate_ptx(
            ptx,
            "gemm",
            [*self.maps, self.out, self.groups, self.tiles],
            block=(160, 1, 1),
            smem=SMEM_BYTES,
            buffers={"a": self.a, "b": self.b},
            **options,
        )


def single_wgmma(
    n: int, k: int, a_kind: str, b_kind: str, flags: str, left: bool, accumulate: bool = False
) -> str:
    """One wgmma by one warpgroup. Threads copy `image` (bytes of both operands as they lie) into shared
    memory, take A's registers from `a` when `left`, C from `c` when accumulating, and store D's in `out`.

    Parameters: out, image, image bytes, a, c, descriptors of A and B (the image begins at offset 1024 of the
    CTA).
    """
    count = n // 2
    d_regs, left_operand = f"{{{regs('c', count)}}}", f"{{{regs('a', 4)}}}" if left else "%q"
    load_c = (
        "\n".join(f"    ld.global.f32 %c{i}, [%qc + {4 * i}];" for i in range(count)) if accumulate else ""
    )
    store_d = "\n".join(f"    st.global.f32 [%qd + {4 * i}], %c{i};" for i in range(count))
    load_a = "\n".join(f"    ld.global.b32 %a{i}, [%qa + {4 * i}];" for i in range(4)) if left else ""
    return f"""{SM90}
.visible .entry k(.param .u64 out, .param .u64 image, .param .u32 bytes, .param .u64 a, .param .u64 c,
    .param .u64 adesc, .param .u64 bdesc)
{{
    .reg .pred %p, %more;
    .reg .b32 %smem, %thread, %x, %y, %bytes;
    .reg .b32 %a<4>;
    .reg .f32 %c<{count}>;
    .reg .b64 %q, %qa, %qb, %qc, %qd, %qx, %image;
    mov.b32 %smem, smem;
    mov.u32 %thread, %tid.x;
    ld.param.u64 %image, [image];
    ld.param.u32 %bytes, [bytes];
    shl.b32 %x, %thread, 2;
copy:
    cvt.u64.u32 %qx, %x;
    add.s64 %q, %image, %qx;
    ld.global.b32 %y, [%q];
    add.s32 %a0, %smem, %x;
    st.shared.b32 [%a0], %y;
    add.s32 %x, %x, 512;
    setp.lt.u32 %p, %x, %bytes;
    @%p bra copy;
    fence.proxy.async.shared::cta; // @proxy_fence
    bar.sync 0; // @barrier
    ld.param.u64 %qa, [a];
    mad.wide.u32 %qa, %thread, 16, %qa;
    ld.param.u64 %qc, [c];
    mad.wide.u32 %qc, %thread, {4 * count}, %qc;
    ld.param.u64 %qd, [out];
    mad.wide.u32 %qd, %thread, {4 * count}, %qd;
{load_a}
{load_c}
    ld.param.u64 %q, [adesc];
    ld.param.u64 %qb, [bdesc];
    setp.eq.s32 %more, 0, {0 if accumulate else 1};
    wgmma.fence.sync.aligned; // @fence
    {MMA}.m64n{n}k{k}.f32.{a_kind}.{b_kind} {d_regs}, {left_operand}, %qb, %more, {flags};
    wgmma.commit_group.sync.aligned; // @commit
    wgmma.wait_group.sync.aligned 0; // @wait
{store_d}
    ret;
}}
"""
