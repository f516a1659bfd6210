"""PTX kernels that the emulator's own tests run, and edit to prove that each check can fail.

`gemm_2cta` is a small but complete SM100 kernel: a warp-specialized NVFP4 GEMM of CTA pairs with a three-
stage TMA ring, two accumulator stages in TMEM, scale factors through tcgen05.cp, and a TMA store. Lines that
a test edits carry `// @tag`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from .api import emulate_ptx
from .numerics import decode_table
from .report import LaunchReport
from .tma import encode_driver_descriptor

HEADER = ".version 8.8\n.target sm_100a\n.address_size 64\n.extern .shared .align 1024 .b8 smem[];\n"

LOAD = "cp.async.bulk.tensor.{}d.shared::{}.global.tile.mbarrier::complete_tx::bytes"
COMMIT = "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64"
MMA = "tcgen05.mma.cta_group::2.kind::mxf4nvf4.block_scale.block16"

TILE_N, STAGES = 64, 3
STAGE_BYTES = 128 * 128 + 32 * 128 + 2048 + 2048  # A, half of B, SFA, SFB of one K tile of 256
OUT_OFFSET = 1024 + STAGES * STAGE_BYTES
SMEM_BYTES = OUT_OFFSET + 128 * TILE_N * 4
# Barriers in the first KiB: full[3] at 0, empty[3] at 24, acc_full[2] at 48, acc_empty[2] at 64, TMEM address
# at 80.


def regs(prefix: str, count: int, start: int = 0) -> str:
    return ", ".join(f"%{prefix}{i}" for i in range(start, start + count))


def wait(barrier: str, parity: str, tag: str) -> str:
    """Block until the phase with this parity has completed."""
    return f"""{tag}_again:
    mbarrier.try_wait.parity.shared::cta.b64 %done, [{barrier}], {parity}; // @{tag}
    @!%done bra {tag}_again; // @{tag}"""


def gemm_2cta() -> str:
    """out[256, 64 * clusters] f32 = sum over groups and K tiles of A @ B.T.

    Parameters: tensor maps A, B, SFA, SFB, OUT; groups; K tiles of 256 per group. Grid (2 * clusters),
        cluster 2, block 192.
    """
    k_steps = []
    for step in range(4):
        k_steps.append(f"""
    add.s64 %qa, %adesc, {2 * step};
    add.s64 %qb, %bdesc, {2 * step};
    add.s32 %sfa, %tmem, {128 + 4 * step};
    add.s32 %sfb, %tmem, {144 + 4 * step}; // @sfb{step}
    {MMA} [%acc], %qa, %qb, %idesc, [%sfa], [%sfb], %more; // @mma{step}
    mov.pred %more, 1;""")
    copies = []
    for step in range(4):
        for name, column, offset in (("sfa", 128, 20480), ("sfb", 144, 22528)):
            copies.append(f"""
    add.s32 %x, %stage, {offset + 512 * step};
    shr.u32 %x, %x, 4;
    and.b32 %x, %x, 16383;
    cvt.u64.u32 %q, %x;
    or.b64 %q, %q, {1 << 46 | 8 << 32 | 1 << 16};
    add.s32 %x, %tmem, {column + 4 * step};
    tcgen05.cp.cta_group::2.32x128b.warpx4 [%x], %q; // @cp_{name}{step}""")
    stores = "\n".join(
        f"    st.shared.v4.b32 [%out + {16 * i}], {{{regs('s', 4, 4 * i)}}}; // @stage_out" for i in range(16)
    )
    adds = "\n".join(f"    add.f32 %s{i}, %s{i}, %t{i};" for i in range(64))
    zeros = "\n".join(f"    mov.b32 %s{i}, 0;" for i in range(64))
    barriers = "\n".join(
        f"    mbarrier.init.shared::cta.b64 [%smem + {offset}], {count}; // @init_{name}"
        for name, first, number, count in (
            ("full", 0, 3, 1),
            ("empty", 24, 3, 1),
            ("acc_full", 48, 2, 1),
            ("acc_empty", 64, 2, 8),
        )
        for offset in range(first, first + 8 * number, 8)
    )
    return HEADER + f"""
.visible .entry gemm(
    .param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .align 64 .b8 map_sfa[128],
    .param .align 64 .b8 map_sfb[128], .param .align 64 .b8 map_out[128], .param .u32 groups,
    .param .u32 tiles)
.reqntid 192, 1, 1
{{
    .reg .pred %p, %done, %lead, %elected, %more;
    .reg .b16 %half;
    .reg .b32 %smem, %tid, %warp, %rank, %x, %y, %stage, %bar, %k, %kcoord, %slot, %phase, %total;
    .reg .b32 %groups, %tiles, %row;
    .reg .b32 %tmem, %acc, %sfa, %sfb, %idesc, %group, %aslot, %aphase, %tile, %remote, %out, %n, %empty;
    .reg .b32 %t<64>, %s<64>;
    .reg .b64 %q, %qa, %qb, %adesc, %bdesc, %map;

    mov.b32 %smem, smem;
    mov.u32 %tid, %tid.x;
    shr.u32 %warp, %tid, 5;
    shfl.sync.idx.b32 %warp, %warp, 0, 31, -1;
    mov.u32 %rank, %cluster_ctarank;
    mov.u32 %n, %clusterid.x;
    ld.param.b32 %groups, [groups];
    ld.param.b32 %tiles, [tiles];
    mul.lo.s32 %total, %groups, %tiles;
    setp.ne.s32 %p, %warp, 0;
    @%p bra initialized;
    elect.sync _|%elected, -1;
    @!%elected bra initialized;
{barriers}
initialized:
    fence.mbarrier_init.release.cluster; // @init_fence
    barrier.cluster.arrive.relaxed; // @init_arrive
    barrier.cluster.wait; // @init_wait

    setp.ne.s32 %p, %warp, 0;
    @%p bra allocated;
    tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%smem + 80], 256; // @alloc
allocated:
    bar.sync 0; // @alloc_barrier
    ld.shared.b32 %tmem, [%smem + 80];
    setp.eq.s32 %p, %warp, 5;
    @%p bra load;
    setp.eq.s32 %p, %warp, 4;
    @%p bra multiply;
    bra epilogue;

load:
    elect.sync _|%elected, -1;
    @!%elected bra finish; // @load_elect
    setp.eq.s32 %lead, %rank, 0;
    mov.b32 %k, 0;
    mov.b32 %slot, 0;
    mov.b32 %phase, 1;
load_loop:
    shl.b32 %x, %slot, 3;
    add.s32 %bar, %smem, %x;
    add.s32 %empty, %bar, 24;
{wait("%empty", "%phase", "wait_empty")}
    @!%lead bra loads; // @lead_expect
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {2 * STAGE_BYTES}; // @expect
loads:
    and.b32 %bar, %bar, 0xFEFFFFFF; // @peer_bit
    mad.lo.s32 %stage, %slot, {STAGE_BYTES}, %smem; // @load_stage
    add.s32 %stage, %stage, 1024; // @load_base
    shl.b32 %kcoord, %k, 8;
    shl.b32 %row, %rank, 7;
    cvta.param.u64 %map, map_a;
    {LOAD.format(2, 'cluster')}.cta_group::2 [%stage], [%map, {{%kcoord, %row}}], [%bar]; // @load_a
    add.s32 %x, %stage, 16384;
    shl.b32 %y, %n, 6;
    mad.lo.s32 %row, %rank, 32, %y;
    cvta.param.u64 %map, map_b;
    {LOAD.format(2, 'cluster')}.cta_group::2 [%x], [%map, {{%kcoord, %row}}], [%bar]; // @load_b
    add.s32 %x, %stage, 20480;
    shl.b32 %y, %k, 2;
    cvta.param.u64 %map, map_sfa;
    mov.b32 %row, 0;
    {LOAD.format(3, 'cluster')}.cta_group::2 [%x], [%map, {{%row, %y, %rank}}], [%bar]; // @load_sfa
    add.s32 %x, %stage, 22528;
    cvta.param.u64 %map, map_sfb;
    {LOAD.format(3, 'cluster')}.cta_group::2 [%x], [%map, {{%row, %y, %n}}], [%bar]; // @load_sfb
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
    setp.ne.s32 %p, %rank, 0;
    @%p bra finish; // @mma_leader
    elect.sync _|%elected, -1;
    @!%elected bra finish;
    mov.b32 %idesc, {1 << 7 | 1 << 10 | (TILE_N // 8) << 17 | (256 // 16) << 24}; // @idesc
    mov.b32 %group, 0;
    mov.b32 %slot, 0;
    mov.b32 %phase, 0; // @mma_phase
    mov.b32 %aslot, 0;
    mov.b32 %aphase, 1;
group_loop:
    shl.b32 %x, %aslot, 3;
    add.s32 %x, %x, %smem;
    add.s32 %bar, %x, 64;
{wait("%bar", "%aphase", "wait_acc_empty")}
    shl.b32 %acc, %aslot, 6; // @acc_slot
    add.s32 %acc, %acc, %tmem;
    mov.pred %more, 0; // @first
    mov.b32 %tile, 0;
tile_loop:
    shl.b32 %x, %slot, 3;
    add.s32 %bar, %smem, %x;
{wait("%bar", "%phase", "wait_full")}
    mad.lo.s32 %stage, %slot, {STAGE_BYTES}, %smem; // @mma_stage
    add.s32 %stage, %stage, 1024;
{"".join(copies)}
    shr.u32 %x, %stage, 4;
    and.b32 %x, %x, 16383;
    cvt.u64.u32 %adesc, %x;
    or.b64 %adesc, %adesc, {2 << 61 | 1 << 46 | 64 << 32 | 1 << 16};
    add.s32 %x, %stage, 16384;
    shr.u32 %x, %x, 4;
    and.b32 %x, %x, 16383;
    cvt.u64.u32 %bdesc, %x;
    or.b64 %bdesc, %bdesc, {2 << 61 | 1 << 46 | 64 << 32 | 1 << 16};
{"".join(k_steps)}
    add.s32 %bar, %bar, 24;
    mov.b16 %half, 3;
    {COMMIT} [%bar], %half; // @commit_empty
    add.s32 %slot, %slot, 1;
    setp.ne.s32 %p, %slot, {STAGES};
    @%p bra tile_next;
    mov.b32 %slot, 0;
    xor.b32 %phase, %phase, 1; // @full_phase
tile_next:
    add.s32 %tile, %tile, 1;
    setp.lt.s32 %p, %tile, %tiles;
    @%p bra tile_loop;
    shl.b32 %x, %aslot, 3;
    add.s32 %x, %x, %smem;
    mov.b16 %half, 3;
    {COMMIT} [%x + 48], %half; // @commit_acc
    xor.b32 %aslot, %aslot, 1;
    setp.ne.s32 %p, %aslot, 0;
    @%p bra group_next;
    xor.b32 %aphase, %aphase, 1;
group_next:
    add.s32 %group, %group, 1;
    setp.lt.s32 %p, %group, %groups;
    @%p bra group_loop;
    bra finish;

epilogue:
{zeros}
    mov.b32 %group, 0;
    mov.b32 %aslot, 0;
    mov.b32 %aphase, 0; // @epilogue_phase
epilogue_loop:
    shl.b32 %x, %aslot, 3;
    add.s32 %x, %x, %smem;
    add.s32 %bar, %x, 48;
{wait("%bar", "%aphase", "wait_acc_full")}
    shl.b32 %y, %warp, 21; // @quarter
    add.s32 %y, %y, %tmem;
    shl.b32 %acc, %aslot, 6;
    add.s32 %acc, %acc, %y;
    tcgen05.ld.sync.aligned.32x32b.x64.b32 {{{regs('t', 64)}}}, [%acc]; // @ld
    tcgen05.wait::ld.sync.aligned; // @wait_ld
    add.s32 %bar, %x, 64;
    elect.sync _|%elected, -1; // @release_elect
    @!%elected bra released;
    mapa.shared::cluster.u32 %remote, %bar, 0; // @release_leader
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%remote]; // @release
released:
{adds}
    xor.b32 %aslot, %aslot, 1;
    setp.ne.s32 %p, %aslot, 0;
    @%p bra epilogue_next;
    xor.b32 %aphase, %aphase, 1; // @acc_phase
epilogue_next:
    add.s32 %group, %group, 1;
    setp.lt.s32 %p, %group, %groups; // @group_count
    @%p bra epilogue_loop;
    shl.b32 %out, %tid, 8;
    add.s32 %out, %out, %smem;
    add.s32 %out, %out, {OUT_OFFSET};
{stores}
    fence.proxy.async.shared::cta; // @proxy_fence
    bar.sync 1, 128; // @store_barrier
    setp.ne.s32 %p, %tid, 0;
    @%p bra free;
    add.s32 %x, %smem, {OUT_OFFSET}; // @store_source
    shl.b32 %y, %n, 6;
    shl.b32 %row, %rank, 7;
    cvta.param.u64 %map, map_out;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%map, {{%y, %row}}], [%x]; // @store
    cp.async.bulk.commit_group; // @store_commit
    cp.async.bulk.wait_group.read 0; // @store_wait
free:
    setp.ne.s32 %p, %warp, 0;
    @%p bra finish;
    tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;
    tcgen05.dealloc.cta_group::2.sync.aligned.b32 %tmem, 256; // @dealloc
finish:
    barrier.cluster.arrive; // @last_arrive
    barrier.cluster.wait; // @last_wait
    ret;
}}
"""


@dataclass(frozen=True)
class Edit:
    """One change to the lines that carry a tag: dropped when `to` is None, else `old` replaced by `to`."""

    tag: str
    old: str = ""
    to: str | None = None


def apply(ptx: str, *edits: Edit) -> str:
    """Edit tagged lines; an edit that changes nothing is an error in the test."""
    for edit in edits:
        lines, changed = [], False
        for line in ptx.split("\n"):
            if re.search(rf"// @{edit.tag}$", line):
                new = "" if edit.to is None else line.replace(edit.old, edit.to)
                changed |= new != line
                line = new
            lines.append(line)
        if not changed:
            raise ValueError(f"edit of @{edit.tag} changes nothing")
        ptx = "\n".join(lines)
    return ptx


def aligned(count: int, alignment: int = 256) -> torch.Tensor:
    """uint8 memory whose address is a multiple of `alignment`."""
    memory = torch.empty(count + alignment, dtype=torch.uint8)
    return memory[-memory.data_ptr() % alignment :][:count]


U16, F32, FP4 = 1, 7, 13  # CUtensorMapDataType
SWIZZLE_NONE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128 = range(4)  # CUtensorMapSwizzle


def tensor_map(
    dtype: int,
    tensor: torch.Tensor,
    dims: list[int],
    strides: list[int],
    box: list[int],
    swizzle: int = SWIZZLE_NONE,
) -> bytes:
    """A 128-byte tensor map over `tensor`'s memory; dims and box innermost first, strides in bytes from dim 1
    on."""
    return encode_driver_descriptor(
        dtype, tensor.data_ptr(), dims, strides, box, [1] * len(dims), swizzle, 0
    ).ljust(128, b"\0")


class GemmProblem:
    """Random operands of `gemm_2cta` and the float64 result."""

    def __init__(self, clusters: int = 1, groups: int = 4, tiles: int = 2, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.clusters, self.groups, self.tiles = clusters, groups, tiles
        m, n, k = 256, TILE_N * clusters, 256 * groups * tiles
        blocks = k // 64
        self.a, self.b = aligned(m * k // 2), aligned(n * k // 2)
        self.sfa, self.sfb = aligned(2 * blocks * 512), aligned(clusters * blocks * 512)
        self.out = aligned(m * n * 4).view(torch.float32).view(m, n)
        for codes in (self.a, self.b):
            codes.copy_(torch.from_numpy(rng.integers(0, 256, codes.numel()).astype(np.uint8)))
        scales_a = rng.integers(0x20, 0x48, (m, k // 16)).astype(np.uint8)
        scales_b = rng.integers(0x20, 0x48, (128 * clusters, k // 16)).astype(np.uint8)
        for memory, scales in ((self.sfa, scales_a), (self.sfb, scales_b)):
            tiled = scales.reshape(-1, 4, 32, blocks, 4).transpose(0, 3, 2, 1, 4)  # 128x4 scale layout
            memory.copy_(torch.from_numpy(np.ascontiguousarray(tiled).reshape(-1)))

        def values(codes: torch.Tensor, scales: np.ndarray, rows: int) -> np.ndarray:
            data = codes.numpy().reshape(rows, -1)
            table = decode_table("e2m1").astype(np.float64)
            flat = np.stack([table[data & 15], table[data >> 4]], -1).reshape(rows, k)
            return flat * np.repeat(decode_table("e4m3").astype(np.float64)[scales], 16, 1)

        used = scales_b.reshape(clusters, 128, -1)[:, :TILE_N].reshape(n, -1)
        self.expected = values(self.a, scales_a, m) @ values(self.b, used, n).T
        self.maps = [
            tensor_map(FP4, self.a, [k, m], [k // 2], [256, 128], SWIZZLE_128),
            tensor_map(FP4, self.b, [k, n], [k // 2], [256, 32], SWIZZLE_128),
            tensor_map(U16, self.sfa, [256, blocks, 2], [512, blocks * 512], [256, 4, 1]),
            tensor_map(U16, self.sfb, [256, blocks, clusters], [512, blocks * 512], [256, 4, 1]),
            tensor_map(F32, self.out, [n, m], [n * 4], [TILE_N, 128]),
        ]

    def run(self, ptx: str, **options: object) -> LaunchReport:
        """Poison the output and run the kernel."""
        self.out.fill_(float("nan"))
        return emulate_ptx(
            ptx,
            "gemm",
            [*self.maps, self.groups, self.tiles],
            grid=(2 * self.clusters, 1, 1),
            block=(192, 1, 1),
            cluster=(2, 1, 1),
            smem=SMEM_BYTES,
            buffers={"a": self.a, "b": self.b, "sfa": self.sfa, "sfb": self.sfb, "out": self.out},
            **options,
        )


# Building blocks of small kernels.
DECLARATIONS = """
    .reg .pred %p<8>, %done;
    .reg .b16 %h<8>;
    .reg .b32 %r<160>;
    .reg .f32 %f<32>;
    .reg .b64 %d<32>;
    .reg .b128 %q;
"""


def kernel(body: str, params: str = ".param .u64 out", target: str = "sm_100a") -> str:
    """PTX of an entry `k` with registers %p, %h, %r, %f, %d, %q and the given body."""
    header = HEADER.replace("sm_100a", target)
    return f"{header}.visible .entry k({params})\n{{{DECLARATIONS}{body}\n ret;\n}}\n"


def run(
    body: str, *args: object, params: str = ".param .u64 out", target: str = "sm_100a", **options: object
) -> LaunchReport:
    return emulate_ptx(kernel(body, params, target), "k", args, **options)


def ints(count: int) -> torch.Tensor:
    """Poisoned int32 output."""
    return torch.full((count,), -1, dtype=torch.int32)


STORE = """
    ld.param.u64 %d0, [out];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %d1, %r0, 4, %d0;
    st.global.u32 [%d1], %r1;"""
