"""What each cluster of the dense kernel computes, and when it comes to need which activations, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute

from backends.hopper.dense_plan import TASK_TOKENS, Shares


@dataclass(frozen=True)
class Work(Shares):
    """`Shares` with the DSL's integers, in the order of `DenseTiling.work`."""

    slots: cutlass.Int32
    columns: cutlass.Int32
    walks: cutlass.Int32
    steps: cutlass.Int32
    ahead: cutlass.Int32

    @cute.jit
    def segments(self, cluster):
        """Tiles that the cluster works at."""
        other = cluster - self.aligned * self.streamed
        count = self.full + 1
        if other >= 0:
            first, end = self.share(other)
            count = self.full + (end + self.rest - 1) // self.rest - first // self.rest
        return count

    @cute.jit
    def segment(self, cluster, index):
        """(tile, first chunk, end) of one of them."""
        other = cluster - self.aligned * self.streamed
        tile, low, high = cluster + index * self.clusters, cutlass.Int32(0), self.chunks
        if index >= self.full:
            if other < 0:
                tile = self.full * self.clusters + cluster % self.streamed
                low, high = self.bound(cluster // self.streamed), self.bound(cluster // self.streamed + 1)
            else:
                first, end = self.share(other)
                index -= self.full
                if self.aligned > 0:
                    # The rest of the first tile comes last: all others begin in step with each other.
                    index = (index + 1) % (self.segments(cluster) - self.full)
                tile = first // self.rest + index
                low = self.bound(self.aligned) + cutlass.max(first - tile * self.rest, 0)
                high = self.bound(self.aligned) + cutlass.min(end - tile * self.rest, self.rest)
                tile += self.full * self.clusters
        return tile, low, high

    @cute.jit
    def contributors(self, shared):
        """Clusters that have chunks of a streamed tile."""
        count = self.aligned
        if self.rest > 0:
            count += self.owner((shared + 1) * self.rest - 1) - self.owner(shared * self.rest) + 1
        return count

    @cute.jit
    def place(self, cluster, shared):
        """The cluster's place among them, in the order of K."""
        other = cluster - self.aligned * self.streamed
        place = cluster // self.streamed
        if other >= 0:
            place = self.aligned + other - self.owner(shared * self.rest)
        return place

    def task(self, number) -> tuple:
        """(Chunk, whether there is one, first token) of a task of decoding: a chunk of a few tokens, in the order of need."""
        blocks = self.columns // TASK_TOKENS
        chunk, needed = self.demanded(number // blocks)
        return chunk, needed, number % blocks * TASK_TOKENS

    @cute.jit
    def demanded(self, place):
        """(Chunk, whether there is one) at a place of the order in which chunks are needed: stretch by stretch in turns."""
        stretch = place % self.walks
        chunk, end = self.bound(stretch) + place // self.walks, self.chunks
        if stretch + 1 < self.walks:
            end = self.bound(stretch + 1)
        return chunk, chunk < end
