"""Dense alpha on SM 9.0: every expert meets every token, on the warpgroup instructions.

A cluster of two CTAs takes a tile of neighbouring rows of B and up to 192 tokens, and walks K in chunks of 256:

- the activations, decoded to float16 once per call, are needed by both CTAs; each fetches half of them from the L2 and
  multicasts it to both;
- each CTA streams its own rows' prepared weights. Groups of four warps decode 64 rows each in registers, the left
  operand, and multiply: while one slice of 64 values of K is multiplied, the next is decoded. The partial sum of a chunk
  and the running total, `total += alpha * partial`, are both float32 registers.

Two warps of their own keep the two rings of shared memory full. Tiles and shares of them: `dense_plan.DenseTiling`.
"""
from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass.memory import SmemAllocator

from backends.hopper import dense_ptx as ptx
from backends.hopper.dense_plan import CHUNK, CLUSTER, GROUP_ROWS, DenseKernelTile

#: Bytes of prepared weights and scale factors of 128 rows and one chunk: four contiguous blocks of 32 rows each.
_PIECE_ROWS, _WEIGHT_BYTES, _SCALE_BYTES = 128, 16384, 2048
#: Bytes of a token's slice of 64 float16 values: one row of the 128-byte swizzle.
_SLICE_BYTES = 128
#: Slices of a chunk.
_SLICES = 4
_GROUP_THREADS = 128
# Named barrier 0 is __syncthreads.
_STAGGER_BARRIER = 1
# Registers of a thread: of the two copying warps' group, and by the number of multiplying groups.
_COPY_REGISTERS = 24
_REGISTERS = {2: 240, 4: 112}
# Cache policies of the L2 as the copy engine takes them (CUTLASS, TMA::CacheHintSm90).
_EVICT_FIRST, _EVICT_LAST = 0x12F0000000000000, 0x14F0000000000000


class DenseKernel:
    """One instance per compiled kernel; sizes and the division of the work are run-time arguments."""

    #: Types and alignments in bytes of the pointers of `__call__`.
    pointers = (
        (cutlass.Float16, 16), (cutlass.Int32, 16), (cutlass.Int32, 16), (cutlass.Float32, 16), (cutlass.Int32, 4),
        (cutlass.Float32, 16),
    )  # fmt: skip
    #: Integers of `__call__`.
    INTEGERS = 11

    def __init__(self, tile: DenseKernelTile) -> None:
        self.tile = tile
        self.pieces = tile.cta_rows // _PIECE_ROWS
        self.slice_bytes = tile.tokens * _SLICE_BYTES
        self.alpha_at = self.pieces * (_WEIGHT_BYTES + _SCALE_BYTES)
        self.stage_bytes = self.alpha_at + 4 * tile.tokens
        self.warps = 4 * tile.groups
        # Two groups in step would both leave the tensor cores idle while they add to their totals. One that starts half a
        # chunk later stays behind: 1 to 2% at 128 tokens and more (H200, November 2026).
        self.staggered = tile.groups == 2

    @cute.jit
    def __call__(
        self,
        acts: cute.Pointer,
        w_data: cute.Pointer,
        w_scale: cute.Pointer,
        alpha_t: cute.Pointer,
        counts: cute.Pointer,
        parts: cute.Pointer,
        tokens: cutlass.Int32,
        experts: cutlass.Int32,
        blocks: cutlass.Int32,
        chunks: cutlass.Int32,
        expert_chunks: cutlass.Int32,
        columns: cutlass.Int32,
        row_tiles: cutlass.Int32,
        clusters: cutlass.Int32,
        full: cutlass.Int32,
        streamed: cutlass.Int32,
        slots: cutlass.Int32,
        stream,
    ):
        """Launch on `stream`. Nothing is written unless more than a quarter of alpha is nonzero.

        Args:
            acts: of `dense_prelude.decode_activations`.
            w_data, w_scale: prepared weights (`backends.triton.layout`).
            alpha_t: float32 [experts, columns], zero past the last token.
            counts: int32 [experts], nonzeros of alpha.
            parts: float32 [whole + streamed * slots, tokens of a tile, rows of a tile], 2^-16 of the part sums.
            blocks: blocks of 32 rows that the prepared weights have.
            others: `DenseTiling.integers`.
        """
        self.kernel(
            acts, w_data, w_scale, alpha_t, counts, parts, tokens, experts, blocks,
            expert_chunks, columns, Work(row_tiles, chunks, clusters, full, streamed, slots),
        ).launch(
            grid=(CLUSTER, clusters, 1),
            block=(_GROUP_THREADS * (self.tile.groups + 1), 1, 1),
            cluster=(CLUSTER, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self, acts: cute.Pointer, w_data: cute.Pointer, w_scale: cute.Pointer, alpha_t: cute.Pointer,
        counts: cute.Pointer, parts: cute.Pointer, tokens: cutlass.Int32, experts: cutlass.Int32,
        blocks: cutlass.Int32, expert_chunks: cutlass.Int32, columns: cutlass.Int32, work: Work,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        pairs = cutlass.Int32(0)
        for e in cutlass.range(cute.arch.lane_idx(), experts, 32, unroll=8):
            pairs += cute.arch.load(counts + e, cutlass.Int32)
        if cute.arch.warp_redux_sync(pairs, "add") * 4 > tokens * experts:
            self.run(acts, w_data, w_scale, alpha_t, parts, blocks, expert_chunks, columns, work, warp)

    @cute.jit
    def run(self, acts, w_data, w_scale, alpha_t, parts, blocks, expert_chunks, columns, work, warp):
        rank, cluster, _ = cute.arch.block_idx()
        tile = self.tile
        smem = SmemAllocator()
        rings = Rings(
            smem.allocate(tile.act_slots * self.slice_bytes, 1024).toint(),
            smem.allocate(tile.weight_chunks * self.stage_bytes, 128).toint(),
            *(smem.allocate_array(cutlass.Int64, n) for n in (tile.act_slots,) * 2 + (tile.weight_chunks,) * 2),
        )
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(tile.act_slots):
                    cute.arch.mbarrier_init(rings.acts_full + i, 1)
                    cute.arch.mbarrier_init(rings.acts_empty + i, CLUSTER * self.warps)
                for i in cutlass.range_constexpr(tile.weight_chunks):
                    cute.arch.mbarrier_init(rings.weights_full + i, 1)
                    cute.arch.mbarrier_init(rings.weights_empty + i, self.warps)
            cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        if warp < 4:
            cute.arch.setmaxregister_decrease(_COPY_REGISTERS)
            if warp == 0:
                with cute.arch.elect_one():
                    self.copy_weights(rings, w_data, w_scale, alpha_t, blocks, expert_chunks, columns, work, rank, cluster)
            if warp == 1:
                with cute.arch.elect_one():
                    self.copy_activations(rings, acts, columns, work, rank, cluster)
        else:
            cute.arch.setmaxregister_increase(_REGISTERS[tile.groups])
            self.multiply(rings, parts, work, rank, cluster, warp - 4)
        # No CTA may leave while its peer still signals its barriers.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def copy_weights(self, rings, w_data, w_scale, alpha_t, blocks, expert_chunks, columns, work, rank, cluster):
        """One thread: the CTA's weights, scale factors and alpha, chunk by chunk."""
        policy = cutlass.Int64(_EVICT_FIRST)
        stage, phase = cutlass.Int32(0), cutlass.Int32(1)
        for segment in cutlass.range(work.segments(cluster), unroll=1):
            tile, first, last = work.segment(cluster, segment)
            row = (tile % work.row_tiles * CLUSTER + rank) * (self.tile.cta_rows // 32)
            column = tile // work.row_tiles * self.tile.tokens
            for chunk in cutlass.range(first, last, unroll=1):
                barrier, words = rings.weights_full + stage, rings.weights + stage * self.stage_bytes
                cute.arch.mbarrier_wait(rings.weights_empty + stage, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.stage_bytes)
                for piece in cutlass.range_constexpr(self.pieces):
                    # Rows past the end of B repeat its last 128.
                    block = chunk.to(cutlass.Int64) * blocks + cutlass.min(row + 4 * piece, blocks - 4)
                    ptx.bulk_copy(
                        words + piece * _WEIGHT_BYTES, w_data + block * 1024, _WEIGHT_BYTES, barrier.toint(), policy
                    )
                    scales = words + self.pieces * _WEIGHT_BYTES + piece * _SCALE_BYTES
                    ptx.bulk_copy(scales, w_scale + block * 128, _SCALE_BYTES, barrier.toint(), policy)
                weights = alpha_t + (chunk // expert_chunks) * columns + column
                ptx.bulk_copy(
                    words + self.alpha_at, weights, 4 * self.tile.tokens, barrier.toint(), cutlass.Int64(_EVICT_LAST)
                )
                stage += 1
                if stage == self.tile.weight_chunks:
                    stage, phase = cutlass.Int32(0), phase ^ 1

    @cute.jit
    def copy_activations(self, rings, acts, columns, work, rank, cluster):
        """One thread: this CTA's half of every slice of activations, into both CTAs."""
        policy = cutlass.Int64(_EVICT_LAST)
        half = self.slice_bytes // CLUSTER
        slot, phase = cutlass.Int32(0), cutlass.Int32(1)
        for segment in cutlass.range(work.segments(cluster), unroll=1):
            tile, first, last = work.segment(cluster, segment)
            column = tile // work.row_tiles * self.tile.tokens + rank * (self.tile.tokens // CLUSTER)
            for k in cutlass.range(first * _SLICES, last * _SLICES, unroll=1):
                cute.arch.mbarrier_wait(rings.acts_empty + slot, phase)
                cute.arch.mbarrier_arrive_and_expect_tx(rings.acts_full + slot, self.slice_bytes)
                line = k.to(cutlass.Int64) * columns + column
                ptx.bulk_multicast(
                    rings.acts + slot * self.slice_bytes + rank * half, acts + line * (_SLICE_BYTES // 2), half,
                    (rings.acts_full + slot).toint(), (1 << CLUSTER) - 1, policy,
                )  # fmt: skip
                slot, phase = self.after(slot, phase, 1)

    @cute.jit
    def multiply(self, rings, parts, work, rank, cluster, warp):
        """A multiplying warp: 16 rows of its group's 64, all tokens of the tile.

        `depth` slices are being multiplied while the next one is decoded, as many as registers allow. With 0 the two
        groups of warps take turns at the tensor cores.
        """
        count, depth = self.tile.tokens // 2, self.tile.depth
        lane = cute.arch.lane_idx()
        # Blocks of 32 rows serve two warps; the second's scale factors lie a byte lower.
        words_at = warp // 2 * 4096 + warp % 2 * 512 + lane * 16
        scales_at = self.pieces * _WEIGHT_BYTES + warp // 2 * 512 + lane * 16
        alpha_at = self.alpha_at + lane % 4 * 8
        turned = warp % 2 * 8
        descriptor = self.descriptor(rings.acts)
        total = cute.make_rmem_tensor(count, cutlass.Float32)
        ahead = cute.make_rmem_tensor(max(16 * depth, 1), cutlass.Int32)
        stage, phase = cutlass.Int32(0), cutlass.Int32(0)
        slot, act_phase = cutlass.Int32(0), cutlass.Int32(0)
        left = work.length(cluster)
        length = left
        group = warp // 4
        if cutlass.const_expr(self.staggered):
            if group == 1:
                cute.arch.barrier(barrier_id=_STAGGER_BARRIER, number_of_threads=2 * _GROUP_THREADS)
        cute.arch.mbarrier_wait(rings.weights_full, 0)
        factors = ptx.load_shared4(rings.weights + scales_at)
        for d in cutlass.range_constexpr(depth):
            words = ptx.load_shared4(rings.weights + words_at + 1024 * d)
            self.keep(ahead, 16 * d, self.decode(words, self.factors(factors[d], turned)))
        cute.arch.mbarrier_wait(rings.acts_full, 0)
        for segment in cutlass.range(work.segments(cluster), unroll=1):
            total.fill(0.0)
            tile, first, last = work.segment(cluster, segment)
            for chunk in cutlass.range(first, last, unroll=1):
                left -= 1
                here = rings.weights + stage * self.stage_bytes
                factors = ptx.load_shared4(here + scales_at)
                operands = [[ahead[16 * d + i] for i in range(16)] for d in range(depth)]
                places = [self.after(slot, act_phase, q) for q in range(_SLICES)]
                codes, sums = ptx.load_shared4(here + words_at + 1024 * depth), None
                for q in cutlass.range_constexpr(_SLICES):
                    if cutlass.const_expr(q >= depth):
                        if cutlass.const_expr(q > depth):
                            ptx.wait_multiply(depth)
                            self.release(rings.acts_empty + places[q - depth - 1][0], lane)
                        operands.append(self.decode(codes, self.factors(factors[q], turned)))
                    if cutlass.const_expr(depth <= q < _SLICES - 1):
                        codes = ptx.load_shared4(here + words_at + 1024 * (q + 1))
                    if cutlass.const_expr(q > 0):
                        cute.arch.mbarrier_wait(rings.acts_full + places[q][0], places[q][1])
                    right = descriptor + (places[q][0] * (self.slice_bytes // 16)).to(cutlass.Int64)
                    sums = ptx.multiply(sums, operands[q], right, self.tile.tokens)
                    if cutlass.const_expr(self.staggered and q == 1):
                        if left == length - 1:
                            if group == 0:
                                cute.arch.barrier_arrive(
                                    barrier_id=_STAGGER_BARRIER, number_of_threads=2 * _GROUP_THREADS
                                )
                # The next chunk's first slices are decoded before this one's sums are ready; after the last, its own.
                next_stage, next_phase = stage + 1, phase
                if next_stage == self.tile.weight_chunks:
                    next_stage, next_phase = cutlass.Int32(0), phase ^ 1
                slot, act_phase = self.after(slot, act_phase, _SLICES)
                following = here
                if left > 0:
                    cute.arch.mbarrier_wait(rings.weights_full + next_stage, next_phase)
                    following = rings.weights + next_stage * self.stage_bytes
                if cutlass.const_expr(depth > 0):
                    factors = ptx.load_shared4(following + scales_at)
                ready = []
                for d in cutlass.range_constexpr(depth):
                    codes = ptx.load_shared4(following + words_at + 1024 * d)
                    ptx.wait_multiply(depth - d)
                    self.release(rings.acts_empty + places[_SLICES - 1 - depth + d][0], lane)
                    ready += self.decode(codes, self.factors(factors[d], turned))
                alphas = []
                if cutlass.const_expr(depth > 1):
                    alphas = [ptx.load_shared2(here + alpha_at + 32 * j) for j in range(self.tile.tokens // 8)]
                # Besides its purpose this wait ends a basic block: else ptxas moves the decoding behind the sums.
                if left > 0:
                    cute.arch.mbarrier_wait(rings.acts_full + slot, act_phase)
                sums, ready = ptx.finish_multiply(sums, ready)
                self.keep(ahead, 0, ready)
                self.release(rings.acts_empty + places[_SLICES - 1][0], lane)
                for j in cutlass.range_constexpr(self.tile.tokens // 8):
                    alpha = alphas[j] if depth > 1 else ptx.load_shared2(here + alpha_at + 32 * j)
                    for i in cutlass.range_constexpr(4):
                        total[4 * j + i] = total[4 * j + i] + alpha[i % 2] * sums[4 * j + i]
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(rings.weights_empty + stage)
                stage, phase = next_stage, next_phase
            self.store(parts, work.part(cluster, tile), rank, warp, lane, total)

    @cute.jit
    def after(self, slot, phase, count: cutlass.Constexpr):
        """The place in the ring of activations `count` slices on."""
        slot += count
        if slot >= self.tile.act_slots:
            slot, phase = slot - self.tile.act_slots, phase ^ 1
        return slot, phase

    def descriptor(self, address):
        """Of K-major slices with 128-byte swizzle: groups of 8 tokens are 1024 bytes apart."""
        constant = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
        return cutlass.Int64(constant) | (address >> 4).to(cutlass.Int64)

    def factors(self, word, turned):
        """Scale factors of rows g and g + 8 of the warp, as float16 bits in the sides of a word."""
        return ptx.turn(word, turned) & 0x7F807F80

    def decode(self, words, factors) -> list:
        """The left operand of one slice: 16 registers."""
        return [register for word in words for register in ptx.decode_weights(word, factors)]

    def keep(self, target: cute.Tensor, at: int, values: list) -> None:
        for i, value in enumerate(values):
            target[at + i] = value

    @cute.jit
    def release(self, barrier, lane):
        """Give a slice of activations back to both CTAs, which both write into it."""
        if lane < CLUSTER:
            cute.arch.mbarrier_arrive(barrier, lane)

    @cute.jit
    def store(self, parts, part, rank, warp, lane, total):
        base = parts + part.to(cutlass.Int64) * (self.tile.tokens * self.tile.rows)
        base += lane % 4 * 2 * self.tile.rows + rank * self.tile.cta_rows + warp * 16 + lane // 4
        for j in cutlass.range_constexpr(self.tile.tokens // 8):
            for i in cutlass.range_constexpr(4):
                cute.arch.store(base + ((8 * j + i % 2) * self.tile.rows + i // 2 * 8), total[4 * j + i])


@dataclass(frozen=True)
class Rings:
    """Shared memory addresses of the two rings, and their barriers."""

    acts: cutlass.Int32
    weights: cutlass.Int32
    acts_full: cute.Pointer
    acts_empty: cute.Pointer
    weights_full: cute.Pointer
    weights_empty: cute.Pointer


@dataclass(frozen=True)
class Work:
    """What each cluster computes: `dense_plan.DenseTiling`, on the device."""

    row_tiles: cutlass.Int32
    chunks: cutlass.Int32
    clusters: cutlass.Int32
    full: cutlass.Int32
    streamed: cutlass.Int32
    slots: cutlass.Int32

    def share(self, cluster):
        units = self.streamed * self.chunks
        return cluster * units // self.clusters, (cluster + 1) * units // self.clusters

    def length(self, cluster):
        """Chunks of the cluster."""
        first, end = self.share(cluster)
        return self.full * self.chunks + end - first

    def segments(self, cluster):
        """Tiles that the cluster works at."""
        first, end = self.share(cluster)
        return self.full + (end + self.chunks - 1) // self.chunks - first // self.chunks

    @cute.jit
    def segment(self, cluster, index):
        """(tile, first chunk, end) of one of them."""
        first, end = self.share(cluster)
        shared = first // self.chunks + index - self.full
        tile = self.full * self.clusters + shared
        low = cutlass.max(first - shared * self.chunks, 0)
        high = cutlass.min(end - shared * self.chunks, self.chunks)
        if index < self.full:
            tile, low, high = cluster + index * self.clusters, cutlass.Int32(0), self.chunks
        return tile, low, high

    @cute.jit
    def part(self, cluster, tile):
        """Where the cluster's sum of a tile goes."""
        whole = self.full * self.clusters
        part = tile
        if tile >= whole:
            owner = ((tile - whole) * self.chunks + 1) * self.clusters - 1
            part = whole + (tile - whole) * self.slots + cluster - owner // (self.streamed * self.chunks)
        return part
