"""The SM100 FC2 kernel: NVFP4 operands, fp32 accumulation per expert in tensor memory, alpha applied in the epilogue.

    out[m, n] = sum_e alpha[m, e] * sum_{k in expert e} A[m, k] * B[n, k]

192 threads in three roles, each a method named after the warps that run it:

- `tma_warp` (warp 5) streams K tiles of A, B and their scale factors into a ring of shared memory stages;
- `mma_warp` (warp 4; in a CTA pair the leader's alone) accumulates all K tiles of one expert in one tensor memory
  stage and commits it once;
- `epilogue_warps` (warps 0-3) fold each finished expert into a running sum, `sum += alpha * partial` in ascending
  expert order, and store it once per output tile.

Producer and consumer of the accumulator count the same thing, experts. alpha never touches shared memory: each
epilogue thread owns one row and holds the alpha of the current and of the next expert in registers.

The experts of an output tile may be divided between clusters (split-K, stream-K: `Schedule`). Their fp32 sums are then
added in ascending expert order by whichever CTA finishes last, so results do not depend on timing. With `skip`, experts
that no row selects take part in none of this.
"""
from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.blackwell_helpers as sm100
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from backends.cute import budget
from backends.cute.budget import CuteTactic

MMA_WARP = budget.EPILOGUE_WARPS
TMA_WARP = MMA_WARP + 1
THREADS = 32 * (TMA_WARP + 1)
EPILOGUE_THREADS = 32 * budget.EPILOGUE_WARPS
# Named barrier 0 is __syncthreads.
EPILOGUE_BARRIER = 1

OPERAND = cutlass.Float4E2M1FN
SCALE = cutlass.Float8E4M3FN
SCALE_BLOCK = 16
ACCUMULATOR = cutlass.Float32
# Splits the reduction reads at once: 4 x 32 registers, which the running sum no longer needs.
SPLIT_GROUP = 4
OUT_TYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}


class Fc2Kernel:
    """One instance per compiled kernel. M, N, K, E and the division of the work are run-time arguments.

    Args:
        tactic: tile, cluster and PDL choice; `budget.check_tactic` accepts it.
        out_dtype: "bfloat16", "float16" or "float32".
    """

    def __init__(self, tactic: CuteTactic, out_dtype: str) -> None:
        self.tactic = tactic
        self.out_type = OUT_TYPES[out_dtype]
        self.budget = budget.Budget.of(tactic)
        self.cluster = (tactic.cluster_m, tactic.cluster_n, 1)
        self.pair = tactic.tile_m == 256
        self.pair_size = 2 if self.pair else 1
        self.cta_group = tcgen05.CtaGroup.TWO if self.pair else tcgen05.CtaGroup.ONE
        self.mma_tile = (tactic.tile_m, tactic.tile_n, tactic.tile_k)
        # Scale factors come in blocks of 128 rows, and every CTA of a pair needs those of all N.
        self.sfb_tile = (budget.CTA_ROWS, max(tactic.tile_n, 128), tactic.tile_k)
        # What one warp stages for one TMA store: its 32 rows, 128 bytes of each (one 128-byte swizzle row).
        self.store_tile = (32, budget.STORE_ROW_BYTES * 8 // self.out_type.width)
        self.subtiles = tactic.tile_n // budget.SUBTILE
        self.store_subtiles = self.store_tile[1] // budget.SUBTILE
        self.store_blocks = tactic.tile_n // self.store_tile[1]

    @cute.jit
    def __call__(
        self,
        a: cute.Pointer,
        sfa: cute.Pointer,
        b: cute.Pointer,
        sfb: cute.Pointer,
        alpha: cute.Pointer,
        out: cute.Pointer,
        workspace: cute.Pointer,
        counters: cute.Pointer,
        m: cutlass.Int32,
        n: cutlass.Int32,
        k: cutlass.Int32,
        experts: cutlass.Int32,
        group: cutlass.Int32,
        splits: cutlass.Int32,
        slots: cutlass.Int32,
        max_clusters: cutlass.Int32,
        stream,
    ):
        """Launch on `stream`.

        Args:
            a, sfa: e2m1 [m, k] and its 128x4 scale factors; b, sfb: the same for [n, k].
            alpha: float32 [m, experts]. out: [m, n] of the output type.
            workspace: float32, `budget.workspace_floats`; counters: int32, `budget.output_tiles`, all zero before
                and after. Both are used only where a tile is divided between parts.
            group, splits, slots: the fields of `budget.Division`.
            max_clusters: clusters to launch at most.
        """
        k = cute.assume(k, 128)
        mma = self._mma(self.cta_group, self.mma_tile[:2])
        mma_sfb = self._mma(tcgen05.CtaGroup.ONE, self.sfb_tile[:2])
        cluster_vmnk = cute.tiled_divide(cute.make_layout(self.cluster), (mma.thr_id.shape,))
        cluster_sfb_vmnk = cute.tiled_divide(cute.make_layout(self.cluster), (mma_sfb.thr_id.shape,))

        stages = self.budget.ab_stages
        smem_a = sm100.make_smem_layout_a(mma, self.mma_tile, OPERAND, stages)
        smem_b = sm100.make_smem_layout_b(mma, self.mma_tile, OPERAND, stages)
        smem_sfa = blockscaled.make_smem_layout_sfa(mma, self.mma_tile, SCALE_BLOCK, stages)
        smem_sfb = blockscaled.make_smem_layout_sfb(mma, self.mma_tile, SCALE_BLOCK, stages)
        smem_out = sm100.make_smem_layout_epi(
            self.out_type, LayoutEnum.ROW_MAJOR, self.store_tile, budget.EPILOGUE_WARPS
        )

        op_a = sm100.cluster_shape_to_tma_atom_A(self.cluster, mma.thr_id)
        op_b = sm100.cluster_shape_to_tma_atom_B(self.cluster, mma.thr_id)
        op_sfb = sm100.cluster_shape_to_tma_atom_SFB(self.cluster, mma.thr_id)
        first = (None, None, None, 0)
        tma_a = cute.nvgpu.make_tiled_tma_atom_A(
            op_a, self._row_major(a, m, k), cute.slice_(smem_a, first), self.mma_tile, mma, cluster_vmnk.shape
        )
        tma_b = cute.nvgpu.make_tiled_tma_atom_B(
            op_b, self._row_major(b, n, k), cute.slice_(smem_b, first), self.mma_tile, mma, cluster_vmnk.shape
        )
        # Scale factors repeat 16 times along K in their logical layout; as 16-bit words TMA sees them once.
        tma_sfa = cute.nvgpu.make_tiled_tma_atom_A(
            op_a, self._scales(sfa, m, k), cute.slice_(smem_sfa, first), self.mma_tile, mma, cluster_vmnk.shape,
            internal_type=cutlass.Int16,
        )
        tma_sfb = cute.nvgpu.make_tiled_tma_atom_B(
            op_sfb, self._scales(sfb, n, k), cute.slice_(smem_sfb, first), self.sfb_tile, mma_sfb,
            cluster_sfb_vmnk.shape, internal_type=cutlass.Int16,
        )
        tma_out = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(),
            self._row_major(out, m, cute.assume(n, 128 // self.out_type.width)),
            cute.slice_(smem_out, (None, None, 0)),
            self.store_tile,
        )

        @cute.struct
        class Storage:
            a: cute.struct.Align[cute.struct.MemRange[OPERAND, cute.cosize(smem_a.outer)], 1024]
            b: cute.struct.Align[cute.struct.MemRange[OPERAND, cute.cosize(smem_b.outer)], 1024]
            out: cute.struct.Align[cute.struct.MemRange[self.out_type, cute.cosize(smem_out.outer)], 1024]
            sfa: cute.struct.Align[cute.struct.MemRange[SCALE, cute.cosize(smem_sfa)], 128]
            sfb: cute.struct.Align[cute.struct.MemRange[SCALE, cute.cosize(smem_sfb)], 128]
            ab_barriers: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            acc_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.budget.acc_stages]
            tmem: cutlass.Int32
            is_last: cutlass.Int32

        self.storage = Storage
        m_tiles = cute.ceil_div(m, budget.CTA_ROWS * self.cluster[0])
        n_tiles = cute.ceil_div(n, self.mma_tile[1] * self.cluster[1])
        clusters = cutlass.min(m_tiles * n_tiles // group * splits, max_clusters)
        self.kernel(
            mma, mma_sfb, cluster_vmnk, cluster_sfb_vmnk,
            tma_a, tma_b, tma_sfa, tma_sfb, tma_out,
            smem_a, smem_b, smem_sfa, smem_sfb, smem_out,
            alpha, workspace, counters,
            m, k // (experts * self.mma_tile[2]), experts, group, splits, slots, m_tiles, n_tiles,
        ).launch(
            grid=(*self.cluster[:2], clusters),
            block=(THREADS, 1, 1),
            cluster=self.cluster,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=self.tactic.pdl,
        )

    def _mma(self, group: tcgen05.CtaGroup, tile_mn: tuple[int, int]) -> cute.TiledMma:
        return sm100.make_blockscaled_trivial_tiled_mma(
            OPERAND, OPERAND, OperandMajorMode.K, OperandMajorMode.K, SCALE, SCALE_BLOCK, group, tile_mn
        )

    def _row_major(self, pointer: cute.Pointer, rows, columns) -> cute.Tensor:
        return cute.make_tensor(pointer, cute.make_layout((rows, columns), stride=(columns, 1)))

    def _scales(self, pointer: cute.Pointer, rows, k) -> cute.Tensor:
        atom = blockscaled.BlockScaledBasicChunk(SCALE_BLOCK).layout
        return cute.make_tensor(pointer, cute.tile_to_shape(atom, (rows, k), (2, 1)))

    @cute.kernel
    def kernel(
        self, mma: cute.TiledMma, mma_sfb: cute.TiledMma, cluster_vmnk: cute.Layout, cluster_sfb_vmnk: cute.Layout,
        tma_a: cpasync.TmaInfo, tma_b: cpasync.TmaInfo, tma_sfa: cpasync.TmaInfo, tma_sfb: cpasync.TmaInfo,
        tma_out: cpasync.TmaInfo,
        smem_a: cute.ComposedLayout, smem_b: cute.ComposedLayout, smem_sfa: cute.Layout, smem_sfb: cute.Layout,
        smem_out: cute.ComposedLayout, alpha: cute.Pointer, workspace: cute.Pointer, counters: cute.Pointer,
        m: cutlass.Int32, tiles_per_expert: cutlass.Int32, experts: cutlass.Int32, group: cutlass.Int32,
        splits: cutlass.Int32, slots: cutlass.Int32, m_tiles: cutlass.Int32, n_tiles: cutlass.Int32,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        # The grid's x and y are the cluster's. Taken from the block index, roles are uniform to the compiler; taken
        # from the cluster rank, ptxas predicated every MMA of (256, n)@(2, 1) and spilled (SASS of DSL 4.8.1).
        x, y, _ = cute.arch.block_idx()
        coord = (x % self.pair_size, x // self.pair_size, y, 0)
        coord_sfb = (0, x, y, 0)

        allocator = SmemAllocator()
        smem = allocator.allocate(self.storage)
        stage = (
            smem.a.get_tensor(smem_a.outer, swizzle=smem_a.inner),
            smem.b.get_tensor(smem_b.outer, swizzle=smem_b.inner),
            smem.sfa.get_tensor(smem_sfa),
            smem.sfb.get_tensor(smem_sfb),
        )

        # A stage is free once every CTA that multicasts into it has seen its consumers finish.
        multicasts = cute.size(cluster_vmnk, mode=[1]) + cute.size(cluster_vmnk, mode=[2]) - 1
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        ab = pipeline.PipelineTmaUmma.create(
            barrier_storage=smem.ab_barriers.data_ptr(),
            num_stages=self.budget.ab_stages,
            producer_group=one,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, multicasts),
            # Both CTAs of a pair deliver to the leader's barrier.
            tx_count=self.budget.stage_bytes * self.pair_size,
            cta_layout_vmnk=cluster_vmnk,
            defer_sync=True,
        )
        acc = pipeline.PipelineUmmaAsync.create(
            barrier_storage=smem.acc_barriers.data_ptr(),
            num_stages=self.budget.acc_stages,
            producer_group=one,
            # One elected lane per epilogue warp, of both CTAs in a pair.
            consumer_group=pipeline.CooperativeGroup(
                pipeline.Agent.Thread, budget.EPILOGUE_WARPS * self.pair_size
            ),
            cta_layout_vmnk=cluster_vmnk,
            defer_sync=True,
        )
        if warp == TMA_WARP:
            for tma in (tma_a, tma_b, tma_sfa, tma_sfb, tma_out):
                cpasync.prefetch_descriptor(tma.atom)
        if warp == 0:
            cute.arch.alloc_tmem(self.budget.tmem_allocation, smem.tmem.ptr, is_two_cta=self.pair)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=self.pair)
        cute.arch.mbarrier_init_fence()
        self._cluster_sync()
        tmem = cute.arch.retrieve_tmem_ptr(ACCUMULATOR, alignment=16, ptr_to_buffer_holding_addr=smem.tmem.ptr)
        if cutlass.const_expr(self.tactic.pdl):
            cute.arch.griddepcontrol_wait()

        active, count = None, experts
        if cutlass.const_expr(self.tactic.skip):
            active = allocator.allocate_tensor(cutlass.Int32, cute.make_layout(budget.MAX_SKIP_EXPERTS + 1), 4)
            count = self._list_active(alpha, m, experts, active)
            splits = cutlass.min(splits, group * count)
        work = Schedule(
            m_tiles, n_tiles, experts, count, active, group, splits, coord[1], coord[2],
            self.cluster[0] // self.pair_size, self.cluster[1],
        )
        if warp == TMA_WARP:
            self.tma_warp(
                ab, work, tiles_per_expert, mma, mma_sfb, cluster_vmnk, cluster_sfb_vmnk, coord, coord_sfb, stage,
                tma_a, tma_b, tma_sfa, tma_sfb,
            )
            if cutlass.const_expr(self.tactic.pdl):
                cute.arch.griddepcontrol_launch_dependents()
        if warp == MMA_WARP and coord[0] == 0:
            self.mma_warp(ab, acc, work, tiles_per_expert, mma, stage, smem_sfa, smem_sfb, tmem)
        if warp < MMA_WARP:
            out_staging = smem.out.get_tensor(smem_out.outer, swizzle=smem_out.inner)
            self.epilogue_warps(
                acc, work, mma, coord[0], tmem, alpha, m, tma_out, out_staging, workspace, slots, counters,
                smem.is_last.ptr,
            )

        # No CTA may leave, or free tensor memory, while its cluster can still signal or read it.
        self._cluster_sync()
        if warp == 0:
            cute.arch.dealloc_tmem(tmem, self.budget.tmem_allocation, is_two_cta=self.pair)

    @cute.jit
    def _list_active(self, alpha: cute.Pointer, m, experts, active: cute.Tensor) -> cutlass.Int32:
        """Write the experts that some row selects to `active`, ascending, and return how many.

        Every CTA reads all of alpha and so finds the same list. Without any, expert 0 stands in: its alphas are zero.
        """
        thread, lane = cute.arch.thread_idx()[0], cute.arch.lane_idx()
        for expert in cutlass.range(thread, experts, THREADS, unroll=1):
            used = cutlass.Int32(0)
            for row in cutlass.range(m, unroll=8):
                if cute.arch.load(alpha + cutlass.Int64(row) * experts + expert, cutlass.Float32) != 0.0:
                    used = cutlass.Int32(1)
            active[expert] = used
        cute.arch.sync_threads()
        if cute.arch.warp_idx() == 0:
            count = cutlass.Int32(0)
            for base in cutlass.range(0, experts, 32, unroll=1):
                used = cutlass.Int32(0)
                if base + lane < experts:
                    used = active[base + lane]
                ballot = cute.arch.vote_ballot_sync(used != 0)
                # Entries move down or stay, and this warp has read all that it overwrites.
                if used != 0:
                    active[count + cute.arch.popc(ballot & ((1 << lane) - 1))] = base + lane
                count += cute.arch.popc(ballot)
            if lane == 0:
                if count == 0:
                    active[0] = 0
                active[budget.MAX_SKIP_EXPERTS] = cutlass.max(count, 1)
        cute.arch.sync_threads()
        return active[budget.MAX_SKIP_EXPERTS]

    def _cluster_sync(self) -> None:
        if cutlass.const_expr(self.cluster == (1, 1, 1)):
            cute.arch.sync_threads()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def tma_warp(
        self, ab, work, tiles_per_expert, mma, mma_sfb, cluster_vmnk, cluster_sfb_vmnk, coord, coord_sfb, stage,
        tma_a, tma_b, tma_sfa, tma_sfb,
    ):
        """Keep the ring of A, B and scale factor stages full, K tile after K tile."""
        tile_m, tile_n, tile_k = self.mma_tile
        mine, mine_sfb = mma.get_slice(coord[0]), mma_sfb.get_slice(0)
        # A is shared along the cluster's N, B along its M. Multicast divides the load among those who share it.
        a = self._load(tma_a, mine.partition_A, (tile_m, tile_k), stage[0], cluster_vmnk, coord, mode=2)
        b = self._load(tma_b, mine.partition_B, (tile_n, tile_k), stage[1], cluster_vmnk, coord, mode=1)
        sfa = self._load(tma_sfa, mine.partition_A, (tile_m, tile_k), stage[2], cluster_vmnk, coord, mode=2)
        sfb = self._load(
            tma_sfb, mine_sfb.partition_B, self.sfb_tile[1:], stage[3], cluster_sfb_vmnk, coord_sfb, mode=1
        )
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.budget.ab_stages)
        first_part, parts, turn = work.turns
        for part in cutlass.range(first_part, parts, turn, unroll=1):
            first_tile, end_tile = work.tiles(part)
            for tile in cutlass.range(first_tile, end_tile, unroll=1):
                tile_row, tile_column, first, last = work.at(tile, part)
                # The 128-row scale tile of B covers two N tiles of 64.
                scale_column = tile_column * tile_n // self.sfb_tile[1]
                for i in cutlass.range(first, last, unroll=1):
                    first_k = work.expert(i) * tiles_per_expert
                    for k_tile in cutlass.range(first_k, first_k + tiles_per_expert, unroll=1):
                        ab.producer_acquire(state)
                        barrier = ab.producer_get_barrier(state)
                        for (atom, source, target, mask), row in (
                            (a, tile_row), (b, tile_column), (sfa, tile_row), (sfb, scale_column)
                        ):
                            cute.copy(
                                atom, source[None, row, k_tile], target[None, state.index],
                                tma_bar_ptr=barrier, mcast_mask=mask,
                            )
                        state.advance()
        ab.producer_tail(state)

    def _load(self, tma, partition, tile, target, cluster, coord, mode: int):
        """(atom, source by row tile and K tile, target by stage, multicast mask) of one operand's TMA loads."""
        atom, tensor = tma
        source = partition(cute.local_tile(tensor, tile, (None, None)))
        target, source = cpasync.tma_partition(
            atom, coord[mode], cute.make_layout(cute.size(cluster, mode=[mode])),
            cute.group_modes(target, 0, 3), cute.group_modes(source, 0, 3),
        )
        mask = None
        if cute.size(cluster) > 1:
            mask = cpasync.create_tma_multicast_mask(cluster, coord, mcast_mode=mode)
        return atom, cute.filter_zeros(source), cute.filter_zeros(target), mask

    @cute.jit
    def mma_warp(self, ab, acc, work, tiles_per_expert, mma, stage, smem_sfa, smem_sfb, tmem):
        """Accumulate each expert's K tiles in one accumulator stage and commit it once."""
        a, b = mma.make_fragment_A(stage[0]), mma.make_fragment_B(stage[1])
        accumulators = self._accumulators(mma, tmem)
        one_stage = (None, None, None, 0)
        sfa_tmem = cute.make_tensor(
            cute.recast_ptr(tmem + self.budget.sfa_column, dtype=SCALE),
            blockscaled.make_tmem_layout_sfa(mma, self.mma_tile, SCALE_BLOCK, cute.slice_(smem_sfa, one_stage)),
        )
        sfb_layout = blockscaled.make_tmem_layout_sfb(
            mma, self.mma_tile, SCALE_BLOCK, cute.slice_(smem_sfb, one_stage)
        )
        sfb_tmem = cute.make_tensor(cute.recast_ptr(tmem + self.budget.sfb_column, dtype=SCALE), sfb_layout)
        copy_sfa, sfa_source, sfa_target = self._scale_copy(stage[2], sfa_tmem)
        copy_sfb, sfb_source, sfb_target = self._scale_copy(stage[3], sfb_tmem)

        full = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.budget.ab_stages)
        empty = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.budget.acc_stages)
        first_part, parts, turn = work.turns
        for part in cutlass.range(first_part, parts, turn, unroll=1):
            first_tile, end_tile = work.tiles(part)
            for tile in cutlass.range(first_tile, end_tile, unroll=1):
                _, tile_column, first, last = work.at(tile, part)
                sfb = sfb_tmem
                if cutlass.const_expr(self.mma_tile[1] == 64):
                    # 32 rows a column: the second N tile of a scale tile starts two columns on.
                    column = self.budget.sfb_column + tile_column % 2 * 2
                    sfb = cute.make_tensor(cute.recast_ptr(tmem + column, dtype=SCALE), sfb_layout)
                for _ in cutlass.range(first, last, unroll=1):
                    acc.producer_acquire(empty)
                    accumulator = accumulators[None, None, None, empty.index]
                    for k_tile in cutlass.range(tiles_per_expert, unroll=1):
                        ab.consumer_wait(full)
                        at = (None, None, None, None, full.index)
                        cute.copy(copy_sfa, sfa_source[at], sfa_target)
                        cute.copy(copy_sfb, sfb_source[at], sfb_target)
                        mma.set(tcgen05.Field.ACCUMULATE, k_tile != 0)
                        at = (None, None, None, full.index)
                        cute.gemm(mma, accumulator, [a[at], sfa_tmem], [b[at], sfb], accumulator)
                        ab.consumer_release(full)
                        full.advance()
                    acc.producer_commit(empty)
                    empty.advance()

    def _accumulators(self, mma: cute.TiledMma, tmem: cute.Pointer) -> cute.Tensor:
        shape = cute.append(mma.partition_shape_C(self.mma_tile[:2]), self.budget.acc_stages)
        return cute.make_tensor(tmem, mma.make_fragment_C(shape).layout)

    def _scale_copy(self, staged: cute.Tensor, tmem: cute.Tensor):
        """(copy, source by stage, target) of the scale factors' way from shared to tensor memory."""
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.cta_group), SCALE)
        target = cute.filter_zeros(tmem)
        copy = tcgen05.make_s2t_copy(atom, target)
        part = copy.get_slice(0)
        source = tcgen05.get_s2t_smem_desc_tensor(copy, part.partition_S(cute.filter_zeros(staged)))
        return copy, source, part.partition_D(target)

    @cute.jit
    def epilogue_warps(
        self, acc, work, mma, pair_rank, tmem, alpha, m, tma_out, staging, workspace, slots, counters, is_last
    ):
        """Sum `alpha * partial` over experts in ascending order; store, or add up the tile's splits first."""
        thread = cute.arch.thread_idx()[0]
        # Thread t owns lane t: one row of the CTA's tile, in sub-tiles of `SUBTILE` columns.
        read, source = self._row_copy(tcgen05.Ld32x32bOp, self._accumulators(mma, tmem), thread)
        partial = [self._row_fragment() for _ in range(2)]
        total = self._running_sum(mma, tmem, thread)
        store = self._stores(tma_out, staging)

        full = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.budget.acc_stages)
        first_part, parts, turn = work.turns
        for part in cutlass.range(first_part, parts, turn, unroll=1):
            first_tile, end_tile = work.tiles(part)
            for tile in cutlass.range(first_tile, end_tile, unroll=1):
                tile_row, tile_column, first, last = work.at(tile, part)
                split, splits = work.split(tile, part)
                cta_row = tile_row * self.pair_size + pair_rank
                row = cta_row * budget.CTA_ROWS + thread
                has_row = row < m
                weights = alpha + cutlass.Int64(row) * work.experts
                ahead = cutlass.Float32(0.0)
                if has_row:
                    ahead = cute.arch.load(weights + work.expert(first), cutlass.Float32)
                total.clear()
                for i in cutlass.range(first, last, unroll=1):
                    weight = ahead
                    if has_row and i + 1 < last:
                        ahead = cute.arch.load(weights + work.expert(i + 1), cutlass.Float32)
                    acc.consumer_wait(full)
                    cute.copy(read, source[None, None, None, 0, 0, full.index], partial[0])
                    total.prefetch(0)
                    for j in cutlass.range_constexpr(self.subtiles):
                        cute.arch.fence_view_async_tmem_load()
                        if cutlass.const_expr(j + 1 < self.subtiles):
                            cute.copy(read, source[None, None, None, 0, j + 1, full.index], partial[(j + 1) % 2])
                            total.prefetch(j + 1)
                        else:
                            # The last read has landed in all lanes: hand the stage back before the arithmetic.
                            with cute.arch.elect_one():
                                acc.consumer_release(full)
                        total.add(j, weight, partial[j % 2])
                    total.flush()
                    full.advance()

                if splits == 1:
                    for j in cutlass.range_constexpr(self.subtiles):
                        self._store(
                            store, cta_row, tile_column * self.store_blocks + j // self.store_subtiles,
                            j % self.store_subtiles, total.read(j),
                        )
                else:
                    slot = tile_column * (work.m_tiles * self.cluster[0]) + cta_row
                    slices = workspace + cutlass.Int64(slot * slots) * (budget.CTA_ROWS * self.mma_tile[1])
                    for j in cutlass.range_constexpr(self.subtiles):
                        values = total.read(j)
                        if has_row:
                            cute.autovec_copy(values, self._slice(slices, split, j, thread))
                    if self._is_last_arriver(counters + slot, splits, is_last, thread):
                        self._sum_splits(store, cta_row, tile_column, slices, splits, thread, has_row)
        # Shared memory must outlive the stores that read it.
        with cute.arch.elect_one():
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _row_copy(self, op, columns: cute.Tensor, thread):
        """(copy, the thread's part by sub-tile and stage) between its row of tensor memory and registers."""
        tile = (budget.CTA_ROWS, budget.SUBTILE)
        tiled = cute.flat_divide(columns[(None, None), 0, 0, None], tile)
        copy = tcgen05.make_tmem_copy(
            cute.make_copy_atom(op(tcgen05.Repetition(budget.SUBTILE)), ACCUMULATOR), tiled[None, None, 0, 0, 0]
        )
        part = copy.get_slice(thread)
        return copy, part.partition_S(tiled) if op is tcgen05.Ld32x32bOp else part.partition_D(tiled)

    def _stores(self, tma_out, staging: cute.Tensor):
        """(atom, this warp's staging rows, TMA source, TMA target by row and column block)."""
        atom, tensor = tma_out
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        source, target = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(staging, 0, 2),
            cute.group_modes(cute.local_tile(tensor, self.store_tile, (None, None)), 0, 2),
        )
        return atom, staging[cute.arch.lane_idx(), None, warp], source[None, warp], target

    @cute.jit
    def _store(self, store, cta_row, block, i: cutlass.Constexpr[int], values: cute.Tensor):
        """Convert sub-tile i of a store block once and stage it; with the last one, store. TMA clips both bounds."""
        atom, staging_row, source, target = store
        if cutlass.const_expr(i == 0):
            with cute.arch.elect_one():
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()
        converted = cute.make_rmem_tensor(budget.SUBTILE, self.out_type)
        converted.store(cute.coalesce(values).load().to(self.out_type))
        cute.autovec_copy(converted, cute.local_tile(staging_row, (budget.SUBTILE,), (i,)))
        if cutlass.const_expr(i == self.store_subtiles - 1):
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
            with cute.arch.elect_one():
                cute.copy(atom, source, target[None, cta_row * budget.EPILOGUE_WARPS + warp, block])
                cute.arch.cp_async_bulk_commit_group()

    def _slice(self, slices: cute.Pointer, split, j: int, thread) -> cute.Tensor:
        """Where the thread keeps sub-tile j of a split: 16-byte pieces, adjacent across threads."""
        offset = split * (budget.CTA_ROWS * self.mma_tile[1]) + j * (budget.CTA_ROWS * budget.SUBTILE) + thread * 4
        layout = cute.make_layout((4, budget.SUBTILE // 4), stride=(1, 4 * budget.CTA_ROWS))
        return cute.make_tensor((slices + offset).align(16), layout)

    @cute.jit
    def _is_last_arriver(self, counter: cute.Pointer, splits, is_last: cute.Pointer, thread) -> cutlass.Boolean:
        """Publish this CTA's slice; true in the CTA that finds all others published, which also resets the counter."""
        flag = cute.make_tensor(is_last, cute.make_layout(1))
        cute.arch.fence_acq_rel_gpu()
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER, number_of_threads=EPILOGUE_THREADS)
        if thread == 0:
            arrived = cute.arch.atomic_add(counter, cutlass.Int32(1), sem="acq_rel", scope="gpu")
            flag[0] = arrived
            if arrived == splits - 1:
                cute.arch.store(counter, cutlass.Int32(0))
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER, number_of_threads=EPILOGUE_THREADS)
        cute.arch.fence_acq_rel_gpu()
        return flag[0] == splits - 1

    @cute.jit
    def _sum_splits(self, store, cta_row, tile_column, slices, splits, thread, has_row):
        """Add all splits' slices in ascending order and store the sum."""
        group = [self._row_fragment() for _ in range(SPLIT_GROUP)]
        total = self._row_fragment()
        for block in cutlass.range(self.store_blocks, unroll=1):
            for i in cutlass.range_constexpr(self.store_subtiles):
                j = block * self.store_subtiles + i
                total.fill(0.0)
                for first in cutlass.range(0, splits, SPLIT_GROUP, unroll=1):
                    # The loads of a group are all in flight at once.
                    for g in cutlass.range_constexpr(SPLIT_GROUP):
                        group[g].fill(0.0)
                        if has_row and first + g < splits:
                            cute.autovec_copy(self._slice(slices, first + g, j, thread), group[g])
                    for g in cutlass.range_constexpr(SPLIT_GROUP):
                        multiply_add(total, cutlass.Float32(1.0), group[g])
                self._store(store, cta_row, tile_column * self.store_blocks + block, i, total)

    def _running_sum(self, mma: cute.TiledMma, tmem: cute.Pointer, thread) -> RunningSum:
        in_registers = budget.register_columns(self.mma_tile[1]) // budget.SUBTILE
        registers = [self._row_fragment() for _ in range(in_registers)]
        if in_registers == self.subtiles:
            return RunningSum(registers)
        columns = self._accumulators(mma, tmem + self.budget.sum_column - in_registers * budget.SUBTILE)
        load, source = self._row_copy(tcgen05.Ld32x32bOp, columns, thread)
        store, target = self._row_copy(tcgen05.St32x32bOp, columns, thread)
        return RunningSum(registers, [self._row_fragment() for _ in range(2)], load, source, store, target)

    def _row_fragment(self) -> cute.Tensor:
        return cute.make_rmem_tensor(((budget.SUBTILE, 1), 1, 1), ACCUMULATOR)


@dataclass(frozen=True)
class RunningSum:
    """One row's fp32 running sum: leading sub-tiles in registers, the rest, for N tiles of 256, in tensor memory.

    256 fp32 registers a thread do not exist, so a 256-wide row keeps `budget.register_columns` of them and reads,
    updates and writes back the others once per expert, through tensor memory columns that the MMA does not use.
    """

    registers: list
    window: list = ()
    load: object = None
    source: object = None
    store: object = None
    target: object = None

    def clear(self) -> None:
        for r in self.registers:
            r.fill(0.0)
        if self.window:
            self.window[0].fill(0.0)
            for j in range(len(self.registers), cute.size(self.target, mode=[4])):
                cute.copy(self.store, self.window[0], self.target[None, None, None, 0, j, 0])
            self.flush()

    def prefetch(self, j: int) -> None:
        """Start reading sub-tile j; the caller fences."""
        if j >= len(self.registers):
            cute.copy(self.load, self.source[None, None, None, 0, j, 0], self.window[j % 2])

    def add(self, j: int, weight: cutlass.Float32, partial: cute.Tensor) -> None:
        """Sub-tile j, whose read has landed, += weight * partial."""
        if j < len(self.registers):
            multiply_add(self.registers[j], weight, partial)
        else:
            multiply_add(self.window[j % 2], weight, partial)
            cute.copy(self.store, self.window[j % 2], self.target[None, None, None, 0, j, 0])

    def flush(self) -> None:
        """Order this expert's writes before the next one's reads."""
        if self.window:
            cute.arch.fence_view_async_tmem_store()

    def read(self, j: int) -> cute.Tensor:
        if j < len(self.registers):
            return self.registers[j]
        self.prefetch(j)
        cute.arch.fence_view_async_tmem_load()
        return self.window[j % 2]


def multiply_add(total: cute.Tensor, weight: cutlass.Float32, partial: cute.Tensor) -> None:
    """total += weight * partial, one rounding per element; two elements an instruction (FFMA2)."""
    for i in range(0, cute.size(total), 2):
        total[i], total[i + 1] = cute.arch.fma_packed_f32x2(
            (partial[i], partial[i + 1]), (weight, weight), (total[i], total[i + 1])
        )


@dataclass(frozen=True)
class Schedule:
    """The persistent loop: which experts of which output tiles a cluster computes.

    The (tile, expert) units of every `group` tiles, tile by tile and along M first, are cut into `splits` equal parts,
    to within one unit; clusters take the parts in turn. Groups of one tile are split-K. One group of all tiles, with as
    many parts as clusters run, is stream-K: parts cross tiles, and every SM gets the same work.

    Attributes:
        m_tiles, n_tiles: output in units of clusters.
        experts, group, splits: as in `Fc2Kernel.__call__`; splits is at most the units of a group.
        count: experts computed per tile; active: which, or None for all.
        row, column: this CTA's MMA tile within the cluster.
        rows, columns: MMA tiles of a cluster.
    """

    m_tiles: cutlass.Int32
    n_tiles: cutlass.Int32
    experts: cutlass.Int32
    count: cutlass.Int32
    active: cute.Tensor | None
    group: cutlass.Int32
    splits: cutlass.Int32
    row: cutlass.Int32
    column: cutlass.Int32
    rows: int
    columns: int

    @property
    def turns(self) -> tuple[cutlass.Int32, cutlass.Int32, cutlass.Int32]:
        """(first, end, stride) of this cluster's parts."""
        parts = self.m_tiles * self.n_tiles // self.group * self.splits
        return cute.arch.block_idx()[2], parts, cute.arch.grid_dim()[2]

    def tiles(self, part) -> tuple[cutlass.Int32, cutlass.Int32]:
        """(first, end) of the tiles a part touches."""
        return self._begin(part) // self.count, cute.ceil_div(self._begin(part + 1), self.count)

    def at(self, tile, part):
        """(MMA tile row, MMA tile column, first, end) of this CTA; first and end count computed experts."""
        first = cutlass.max(self._begin(part) - tile * self.count, 0)
        last = cutlass.min(self._begin(part + 1) - tile * self.count, self.count)
        row = tile % self.m_tiles * self.rows + self.row
        column = tile // self.m_tiles * self.columns + self.column
        return row, column, first, last

    def expert(self, i) -> cutlass.Int32:
        """The i-th computed expert."""
        return i if self.active is None else self.active[i]

    def split(self, tile, part) -> tuple[cutlass.Int32, cutlass.Int32]:
        """(which, of how many) parts the tile's experts are divided into."""
        first, last = self._part(tile * self.count), self._part((tile + 1) * self.count - 1)
        return part - first, last - first + 1

    def _begin(self, part) -> cutlass.Int32:
        """The unit a part begins with."""
        units = self.group * self.count
        return part // self.splits * units + part % self.splits * units // self.splits

    def _part(self, unit) -> cutlass.Int32:
        """The last part that begins at the unit or before."""
        units = self.group * self.count
        return unit // units * self.splits + ((unit % units + 1) * self.splits - 1) // units
