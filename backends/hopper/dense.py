"""Dense alpha on SM 9.0: every expert meets every token, on the warpgroup instructions.

A cluster of two CTAs takes a tile of neighbouring rows of B and up to 176 tokens, and walks K in stages of 128:

- the activations are decoded to float16 once per call, in the order in which clusters come to need them, the first by
  `lists`, and are copied through the L2: both CTAs need them, each fetches half of them and multicasts it to both;
- each CTA streams its own rows' prepared weights. Groups of four warps decode 64 rows each in registers, the left
  operand, and multiply: while some steps of 16 values of K are multiplied, the next are decoded. The partial sum of a
  chunk of 256 and the running total, `total += alpha * partial`, are both float32 registers.

Four more warps serve them: two keep the ring of stages full, two decode activations until all are. Tiles and shares of
them: `dense_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass.memory import SmemAllocator

from backends.hopper import instructions as ins
from backends.hopper import wgmma
from backends.hopper.decode import decode_task
from backends.hopper.dense_plan import AHEAD, CLUSTER, TASK_TOKENS, VOTES_BYTES, DenseKernelTile
from backends.hopper.form import is_dense
from backends.hopper.stream_plan import BLOCK_DATA, BLOCK_ROWS, BLOCK_SCALES
from backends.hopper.work import Work

_OUT_TYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float32": cutlass.Float32}
#: Bytes of half a chunk of a block of prepared weights.
_HALF_BYTES = BLOCK_DATA // 2
#: Bytes of a token's slice of 64 float16 values: one row of the 128-byte swizzle.
_SLICE_BYTES = 128
#: Slices of a chunk, and steps of 16 values of K of a slice.
_SLICES, _STEPS = 4, 4
_GROUP_THREADS = 128
# Registers of a thread, by the number of multiplying groups: of the warps that copy and decode, and of those that multiply.
_REGISTERS = {2: (40, 232), 4: (56, 104)}


class DenseKernel:
    """One instance per compiled kernel; sizes and the division of the work are run-time arguments."""

    #: Integers of `__call__`.
    INTEGERS = 16

    def __init__(self, tile: DenseKernelTile) -> None:
        self.tile = tile
        self.out_type = _OUT_TYPES[tile.out_dtype]
        self.blocks = tile.cta_rows // BLOCK_ROWS
        self.stage_bytes = tile.data_bytes + tile.aside_bytes
        self.slice_bytes = tile.tokens * _SLICE_BYTES
        #: Types and alignments in bytes of the pointers of `__call__`.
        self.pointers = (
            (cutlass.Int32, 4), (cutlass.Int32, 16), (cutlass.Uint8, 4), (cutlass.Int32, 16), (cutlass.Int32, 16),
            (cutlass.Float32, 16), (cutlass.Float16, 16), (cutlass.Float16, 16), (cutlass.Float32, 16), (cutlass.Int32, 4), (self.out_type, 2),
        )  # fmt: skip

    @cute.jit
    def __call__(
        self,
        alpha: cute.Pointer,
        a_data: cute.Pointer,
        a_scale: cute.Pointer,
        w_data: cute.Pointer,
        w_scale: cute.Pointer,
        alpha_t: cute.Pointer,
        acts: cute.Pointer,
        first_acts: cute.Pointer,
        parts: cute.Pointer,
        counters: cute.Pointer,
        out: cute.Pointer,
        tokens: cutlass.Int32,
        hidden: cutlass.Int32,
        experts: cutlass.Int32,
        expert_chunks: cutlass.Int32,
        row_tiles: cutlass.Int32,
        chunks: cutlass.Int32,
        clusters: cutlass.Int32,
        full: cutlass.Int32,
        streamed: cutlass.Int32,
        aligned: cutlass.Int32,
        cost: cutlass.Int32,
        slots: cutlass.Int32,
        columns: cutlass.Int32,
        walks: cutlass.Int32,
        steps: cutlass.Int32,
        ahead: cutlass.Int32,
        stream,
    ):
        """Launch on `stream`. Nothing is written unless alpha is dense (`form`).

        Args:
            alpha: float32 [tokens, experts], as its bits.
            a_data: [tokens, K/8] words.
            w_data, w_scale: prepared weights (`backends.triton.layout`).
            alpha_t: float32 [experts, columns], zero past the last token.
            acts: workspace, `DenseTiling.acts_bytes`, the decoded activations as in `decode`.
            first_acts: of `lists.ListKernel`.
            parts: workspace, `DenseTiling.parts_floats`.
            counters: `DenseTiling.counters`, of `lists.ListKernel`.
            out: [tokens, hidden].
            expert_chunks: chunks of an expert.
            others: `DenseTiling.work`.
        """
        self.kernel(
            alpha, a_data, a_scale, w_data, w_scale, alpha_t, acts, first_acts, parts, counters, out, tokens, hidden, experts,
            expert_chunks,
            Work(row_tiles, chunks, clusters, full, streamed, aligned, cost, slots, columns, walks, steps, ahead),
        ).launch(
            grid=(CLUSTER, clusters, 1),
            block=(_GROUP_THREADS * (self.tile.groups + 1), 1, 1),
            cluster=(CLUSTER, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, alpha: cute.Pointer, a_data: cute.Pointer, a_scale: cute.Pointer, w_data: cute.Pointer, w_scale: cute.Pointer,
        alpha_t: cute.Pointer, acts: cute.Pointer, first_acts: cute.Pointer, parts: cute.Pointer,
        counters: cute.Pointer, out: cute.Pointer, tokens: cutlass.Int32, hidden: cutlass.Int32, experts: cutlass.Int32,
        expert_chunks: cutlass.Int32, work: Work,
    ):  # fmt: skip
        cute.arch.griddepcontrol_launch_dependents()
        tile = self.tile
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        rank, number, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        ring = Ring(
            smem.allocate(tile.stages * tile.acts_bytes, 1024).toint(),
            smem.allocate(tile.stages * self.stage_bytes, 128).toint(),
            smem.allocate_array(cutlass.Int64, tile.stages),
            smem.allocate_array(cutlass.Int64, tile.stages),
        )
        votes = smem.allocate(VOTES_BYTES, 16).toint()
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(tile.stages):
                    cute.arch.mbarrier_init(ring.full + i, 2)
                    cute.arch.mbarrier_init(ring.empty + i, CLUSTER * tile.warps)
            cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()
        dense = is_dense(alpha, tokens, experts, votes, 4 * (tile.groups + 1), warp, lane)
        # Where there is nothing to do, one cluster stays until the kernel before is complete: whoever waits for this kernel
        # waits for that.
        if dense | (number == 0):
            cute.arch.griddepcontrol_wait()
        cute.arch.cluster_wait()
        if dense:
            copy_registers, registers = _REGISTERS[tile.groups]
            ready, taken, flags = counters, counters + work.chunks, counters + work.chunks + 1
            # Clusters wait for shares after their own: those must belong to blocks that started before, or a GPU that is
            # shared with others might never have room for them.
            cluster = work.clusters - 1 - number
            if warp < 4:
                cute.arch.setmaxregister_decrease(copy_registers)
                if warp == 0:
                    with cute.arch.elect_one():
                        self.copy_weights(ring, w_data, w_scale, alpha_t, hidden, expert_chunks, work, rank, cluster)
                if warp == 1:
                    with cute.arch.elect_one():
                        self.copy_activations(ring, acts, first_acts, ready, work, rank, cluster)
                if warp >= 2:
                    self.decode_activations(a_data, a_scale, acts, ready, taken, tokens, work)
            else:
                cute.arch.setmaxregister_increase(registers)
                self.multiply(ring, parts, flags, out, tokens, hidden, work, rank, cluster, warp - 4)
            # No CTA may leave while its peer still signals its barriers.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def copy_weights(self, ring, w_data, w_scale, alpha_t, hidden, expert_chunks, work, rank, cluster):
        """One thread: the CTA's weights half a chunk at a time, scale factors with the first half, alpha with the second.

        Those that multiply decode ahead: after the last chunk they look at one more, and any weights will do.
        """
        weights = w_data.toint(), w_scale.toint(), ((hidden + 127) // 128 * 4).to(cutlass.Int64)
        stage, phase = cutlass.Int32(0), cutlass.Int32(1)
        for segment in cutlass.range(work.segments(cluster), unroll=1):
            tile, first, last = work.segment(cluster, segment)
            row = (tile % work.row_tiles * CLUSTER + rank) * self.blocks
            column = tile // work.row_tiles * self.tile.tokens
            for chunk in cutlass.range(first, last, unroll=1):
                self.copy_half(ring, stage, phase, 0, weights, chunk, row)
                stage, phase = self.after(stage, phase)
                aside, barrier = self.copy_half(ring, stage, phase, 1, weights, chunk, row)
                line = (chunk // expert_chunks * work.columns + column).to(cutlass.Int64) * 4
                policy = cutlass.Int64(ins.EVICT_LAST)
                self.copy(aside, alpha_t.toint() + line, 4 * self.tile.tokens, barrier, policy)
                stage, phase = self.after(stage, phase)
        self.copy_half(ring, stage, phase, 0, weights, cutlass.Int32(0), cutlass.Int32(0))
        self.copy_nothing(ring, *self.after(stage, phase))

    @cute.jit
    def copy_half(self, ring, stage, phase, half, weights, chunk, row):
        """A stage's weights, and of the first half scale factors; where its aside is, and its barrier."""
        data, scales, blocks = weights
        policy = cutlass.Int64(ins.EVICT_FIRST)
        words, barrier = ring.weights + stage * self.stage_bytes, (ring.full + stage).toint()
        aside = words + self.tile.data_bytes
        aside_bytes = 4 * self.tile.tokens if half else self.blocks * BLOCK_SCALES
        cute.arch.mbarrier_wait(ring.empty + stage, phase)
        cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.data_bytes + aside_bytes)
        for near in cutlass.range_constexpr(0, self.blocks, 4):
            # Rows past the end of B repeat its last 128.
            block = chunk * blocks + cutlass.min(row + near, blocks - 4)
            for i in cutlass.range_constexpr(4):
                source = data + ((block + i) * 2 + half) * _HALF_BYTES
                self.copy(words + (near + i) * _HALF_BYTES, source, _HALF_BYTES, barrier, policy)
            if cutlass.const_expr(half == 0):
                self.copy(aside + near * BLOCK_SCALES, scales + block * BLOCK_SCALES, 4 * BLOCK_SCALES, barrier, policy)
        return aside, barrier

    @cute.jit
    def copy_nothing(self, ring, stage, phase):
        """A stage that is waited for, and not looked at."""
        cute.arch.mbarrier_wait(ring.empty + stage, phase)
        cute.arch.mbarrier_arrive(ring.full + stage)

    def copy(self, target, source, size: int, barrier, policy, ctas: int = 1) -> None:
        ins.copy_bulk(target, cutlass.Int64(source), cutlass.Int32(size), cutlass.Int32(barrier), ctas, policy)

    @cute.jit
    def copy_activations(self, ring, acts, first_acts, ready, work, rank, cluster):
        """One thread: this CTA's half of every slice of activations, into both CTAs, once its chunk is decoded."""
        policy = cutlass.Int64(ins.EVICT_LAST)
        half = self.slice_bytes // CLUSTER
        stage, phase = cutlass.Int32(0), cutlass.Int32(1)
        for segment in cutlass.range(work.segments(cluster), unroll=1):
            tile, first, last = work.segment(cluster, segment)
            column = tile // work.row_tiles * self.tile.tokens + rank * (self.tile.tokens // CLUSTER)
            for chunk in cutlass.range(first, last, unroll=1):
                count = ins.counted((ready + chunk).toint())
                while count * TASK_TOKENS < work.columns:
                    count = ins.counted((ready + chunk).toint())
                ins.fence_async()
                base, place = acts.toint(), chunk
                if count >= AHEAD:
                    base, place = first_acts.toint(), count - AHEAD
                for near in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_wait(ring.empty + stage, phase)
                    cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.tile.acts_bytes)
                    barrier = (ring.full + stage).toint()
                    for i in cutlass.range_constexpr(2):
                        target = ring.acts + stage * self.tile.acts_bytes + i * self.slice_bytes + rank * half
                        slice_ = (place * _SLICES + 2 * near + i).to(cutlass.Int64)
                        source = base + (slice_ * work.columns + column) * _SLICE_BYTES
                        self.copy(target, source, half, barrier, policy, CLUSTER)
                    stage, phase = self.after(stage, phase)
        self.copy_nothing(ring, stage, phase)
        self.copy_nothing(ring, *self.after(stage, phase))

    @cute.jit
    def decode_activations(self, a_data, a_scale, acts, ready, taken, tokens, work):
        """One of the warps of all CTAs that take tasks, a chunk of a few tokens each, until none is left.

        Tasks are taken in order, never assigned: they get done however many CTAs a shared GPU has room for at once.
        """
        lane = cute.arch.lane_idx()
        tasks = work.walks * work.steps * (work.columns // TASK_TOKENS)
        task = ins.take(taken.toint(), lane)
        while task < tasks:
            following = ins.take(taken.toint(), lane)  # asked for before this one is done
            chunk, needed, first = work.task(task)
            if needed:
                decode_task(
                    a_data, a_scale, acts.toint(), first, tokens, work.columns, chunk, work.chunks, self.tile.a_swizzled
                )
                cute.arch.sync_warp()
                if lane == 0:
                    ins.count_up((ready + chunk).toint())
            task = following

    @cute.jit
    def multiply(self, ring, parts, flags, out, tokens, hidden, work, rank, cluster, warp):
        """A multiplying warp: 16 rows of its group's 64, all tokens of the tile.

        A turn of the tensor cores multiplies `steps` steps of 16 values of K; each step's operand is one word of
        prepared weights of every thread, decoded. While one turn is decoded, the one before is at the tensor cores.
        """
        tile, steps = self.tile, self.tile.steps
        turns = _STEPS // steps  # of a slice
        count = _SLICES * turns  # of a chunk
        lane = cute.arch.lane_idx()
        # Blocks of 32 rows serve two warps; the second's scale factors lie a byte lower.
        words_at = ins.fixed(ring.weights + warp // 2 * _HALF_BYTES + warp % 2 * 512 + lane * 16)
        scales_at = ins.fixed(ring.weights + tile.data_bytes + warp // 2 * BLOCK_SCALES + lane * 16)
        alpha_at = ins.fixed(ring.weights + tile.data_bytes + lane % 4 * 8)
        full_at = ring.full.toint()
        # A lane for each CTA of the cluster gives stages back to it; -1 in the others.
        empty_at = ins.in_cluster(ring.empty.toint(), lane % CLUSTER)
        empty_at = ins.fixed(ins.select(cutlass.Int32(lane < CLUSTER), empty_at, cutlass.Int32(-1)))
        turned = warp % 2 * 8
        right = wgmma.descriptor(ring.acts)
        total = cute.make_rmem_tensor(tile.tokens // 2, cutlass.Float32)
        # What the chunk before leaves to the next: its first operand, the words to be decoded after it, scale factors.
        ahead = cute.make_rmem_tensor(4 * steps, cutlass.Int32)
        codes = cute.make_rmem_tensor(4, cutlass.Int32)
        factors = cute.make_rmem_tensor(4, cutlass.Int32)
        stage, second, phase = cutlass.Int32(0), cutlass.Int32(1), cutlass.Int32(0)
        ins.wait(full_at, phase)
        ins.wait(full_at + 8, phase)
        scales, words = ins.load4(scales_at), ins.load4(words_at)
        self.keep(ahead, self.decode(words, scales, 0, turned))
        if cutlass.const_expr(turns == 1):
            words = ins.load4(words_at + 1024)
        self.keep(codes, words)
        self.keep(factors, scales)
        for segment in cutlass.range(work.segments(cluster), unroll=1):
            total.fill(0.0)
            number, first, last = work.segment(cluster, segment)
            for chunk in cutlass.range(first, last, unroll=1):
                following, following_phase = self.after(second, phase)
                after, after_phase = self.after(following, following_phase)
                words, scales = [codes[i] for i in range(4)], [factors[i] for i in range(4)]
                operand, sums = [ahead[i] for i in range(4 * steps)], None
                here, alphas = alpha_at + second * self.stage_bytes, []
                early = self.early_alpha()
                for turn in cutlass.range_constexpr(count):
                    sums = wgmma.multiply(sums, operand, right + self.place(turn, stage, second), tile.tokens)
                    if cutlass.const_expr(turn > 0):
                        wgmma.wait(1)
                    if cutlass.const_expr(turn == count // 2):
                        self.release(empty_at, stage)
                    if cutlass.const_expr(turn == count - 3):
                        alphas = self.load_alpha(here, 0, early)
                    # The next turn's operand; after the last, the next chunk's first.
                    operand = self.decode(words, scales, (turn + 1) % count, turned)
                    if cutlass.const_expr((turn + 2) % turns == 0):
                        slice_ = (turn + 2) // turns  # past the last: the next chunk's
                        if cutlass.const_expr(slice_ == _SLICES):
                            ins.wait(full_at + following * 8, following_phase)
                            scales = ins.load4(scales_at + following * self.stage_bytes)
                        place = (stage, second, following)[slice_ // 2] * self.stage_bytes
                        words = ins.load4(words_at + place + slice_ % 2 * 1024)
                # Besides its purpose this wait ends a basic block: else ptxas moves the decoding behind the sums.
                ins.wait(full_at + after * 8, after_phase)
                sums, operand = wgmma.finish(sums, operand)
                for j in cutlass.range_constexpr(tile.tokens // 8):
                    if cutlass.const_expr(8 * j >= early):
                        alphas += self.load_alpha(here, 8 * j, 8 * j + 8)
                    for i in cutlass.range_constexpr(4):
                        total[4 * j + i] = total[4 * j + i] + alphas[j][i % 2] * sums[4 * j + i]
                self.release(empty_at, second)
                self.keep(ahead, operand)
                self.keep(codes, words)
                self.keep(factors, scales)
                stage, second, phase = following, after, after_phase
            self.deliver(parts, flags, out, tokens, hidden, work, rank, cluster, warp, lane, number, first, last, total)

    def early_alpha(self) -> int:
        """Tokens whose alpha is loaded two turns before a chunk's last, as registers have room; the others' follow with the
        additions. Fewer of them there, or a turn later, M = 256 takes 0.9 to 1.4% more (H200, 2026-11-26).
        """
        tokens = self.tile.tokens
        return 16 if tokens <= 64 else tokens if tokens <= 128 else 64

    def load_alpha(self, address, first: int, end: int) -> list:
        """A thread's two of every eight tokens."""
        return [ins.load2(address + 4 * token, cutlass.Float32) for token in range(first, end, 8)]

    def place(self, turn, first, second):
        """Where a turn's activations begin in the ring, in the descriptor's units of 16 bytes."""
        turns = _STEPS // self.tile.steps
        stage = (first, second)[turn // (2 * turns)] * (self.tile.acts_bytes // 16)
        return stage + turn // turns % 2 * (self.slice_bytes // 16) + turn % turns * (2 * self.tile.steps)

    @cute.jit
    def after(self, stage, phase):
        """The next place in the ring."""
        stage += 1
        if stage == self.tile.stages:
            stage, phase = cutlass.Int32(0), phase ^ 1
        return stage, phase

    def decode(self, words, scales, turn, turned) -> list:
        """A turn's left operand: four registers for each step.

        Args:
            words: of the turn's slice. scales: of rows g and g + 8 of the warp after turning, of the chunk's slices.
        """
        steps = self.tile.steps
        part, slice_ = turn % (_STEPS // steps) * steps, turn // (_STEPS // steps)
        factors = ins.scale_pair(scales[slice_], turned)
        return [register for word in words[part : part + steps] for register in ins.decode_weights(word, factors)]

    def keep(self, target: cute.Tensor, values: list) -> None:
        for i, value in enumerate(values):
            target[i] = value

    def release(self, empty_at, stage):
        """Give a stage back to both CTAs, which both write into it."""
        cute.arch.sync_warp()
        ins.arrive_if(empty_at >= 0, empty_at + stage * 8)

    @cute.jit
    def deliver(self, parts, flags, out, tokens, hidden, work, rank, cluster, warp, lane, number, first, last, total):
        """The warp's sums of a tile, or of the chunks that the cluster has of it.

        The cluster with the first chunk adds the others' sums in their order and writes the result; the others leave
        theirs, each thread for the same thread of that cluster, and count up.
        """
        tile = self.tile
        warps, size = CLUSTER * tile.warps, 16 * tile.tokens
        place = rank * tile.warps + warp
        shared = number - work.full * work.clusters
        flag = (flags + (shared * warps + place)).toint()
        theirs = (parts + (((shared * work.slots).to(cutlass.Int64) * warps + place) * size + lane * 4)).toint()
        if first > 0:
            theirs += (work.place(cluster, shared) - 1).to(cutlass.Int64) * (warps * size * 4)
            for i in cutlass.range_constexpr(tile.tokens // 8):
                ins.store_global4(theirs + 512 * i, [total[4 * i + j] for j in range(4)])
            cute.arch.sync_warp()
            if lane == 0:
                ins.count_up(flag)
        else:
            if last < work.chunks:
                others = work.contributors(shared) - 1
                while ins.counted(flag) < others:
                    pass
                for _ in cutlass.range(others, unroll=1):
                    for i in cutlass.range_constexpr(tile.tokens // 8):
                        for j, value in enumerate(ins.load_global4(theirs + 512 * i)):
                            total[4 * i + j] = total[4 * i + j] + value
                    theirs += warps * size * 4
            row = (number % work.row_tiles * CLUSTER + rank) * tile.cta_rows + warp * 16
            self.store(out, tokens, hidden, number // work.row_tiles * tile.tokens, row, lane, total)

    @cute.jit
    def store(self, out, tokens, hidden, token, row, lane, total):
        """A warp's 16 rows from `row` on, and the tokens of a tile from `token` on, rounded."""
        width = self.out_type.width // 8
        step = 8 * hidden.to(cutlass.Int64) * width
        by_element = True
        if cutlass.const_expr(width == 2):
            by_element = (out.toint() | hidden.to(cutlass.Int64) * width) % 8 != 0
        if by_element:
            row += lane // 4
            token += lane % 4 * 2
            line = out.toint() + (token.to(cutlass.Int64) * hidden + row) * width
            for j in cutlass.range_constexpr(self.tile.tokens // 8):
                for i in cutlass.range_constexpr(4):
                    wanted = (token + (8 * j + i % 2) < tokens) & (row + i // 2 * 8 < hidden)
                    target = line + i % 2 * (step // 8) + i // 2 * 8 * width
                    ins.store_rounded_if(wanted, target, total[4 * j + i] * 65536.0, self.out_type)
                line += step
        else:
            # Four rows of a token a lane, so that four lanes fill a sector: transposed, lane 4m + t has rows 2t and 2t + 1 of
            # both halves of the 16; neighbours then exchange one half of them.
            odd = lane % 2
            row += odd * 8 + lane % 4 // 2 * 4
            token += lane // 4
            line = out.toint() + (token.to(cutlass.Int64) * hidden + row) * width
            for j in cutlass.range_constexpr(self.tile.tokens // 8):
                sums = [total[4 * j + i] * 65536.0 for i in range(4)]
                low = ins.transpose(ins.round_pair(sums[0], sums[1], self.out_type))
                high = ins.transpose(ins.round_pair(sums[2], sums[3], self.out_type))
                theirs = cute.arch.shuffle_sync_bfly(ins.select(odd, low, high), 1)
                values = (ins.select(odd, theirs, low), ins.select(odd, high, theirs))
                ins.store_global2_if((token + 8 * j < tokens) & (row < hidden), line, values)
                line += step


@dataclass(frozen=True)
class Ring:
    """Shared memory addresses of the stages, and their barriers."""

    acts: cutlass.Int32
    weights: cutlass.Int32
    full: cute.Pointer
    empty: cute.Pointer
