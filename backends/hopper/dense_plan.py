"""How the dense kernel of SM 9.0 divides a call. Pure values: no torch, no DSL."""
from __future__ import annotations

import functools
from typing import NamedTuple

#: Values of K per chunk, the unit of the prepared weights; an expert is a multiple of it.
CHUNK = 256
#: Rows of B that one group of four multiplying warps takes: the height of the warpgroup instruction.
GROUP_ROWS = 64
#: CTAs of a cluster: neighbouring row tiles that share the activations.
CLUSTER = 2
#: Clusters of a launch: two multiprocessors of an H100 or H200 each. They decide the order of additions, hence a constant
#: and not a property of the device.
CLUSTERS = 66
# Shared memory of a CTA, less room for barriers and alignment.
_SHARED_BYTES = 226 * 1024
# Widest token tile: a thread holds two float32 sums of each of its tokens / 2 elements in its 240 registers.
_WIDEST = 192


class DenseKernelTile(NamedTuple):
    """What selects a compiled kernel."""

    tokens: int  # per tile, a multiple of 16: the width of the warpgroup instruction
    groups: int  # of four warps that decode weights and multiply
    act_slots: int  # slices of 64 values of K of decoded activations in shared memory
    weight_chunks: int  # chunks of weights in shared memory
    depth: int  # slices of 64 values of K being multiplied while the next is decoded

    @property
    def cta_rows(self) -> int:
        return self.groups * GROUP_ROWS

    @property
    def rows(self) -> int:
        """Rows of B per tile, which is a cluster's."""
        return self.cta_rows * CLUSTER


def kernel_tile(tokens: int) -> DenseKernelTile:
    """The kernel for a pass: as few token tiles as can be, and no wider than they must.

    Every token tile decodes all weights again, and its padding is multiplied like tokens: twice 96 for 192 tokens took
    277 us, twice 128 took 332 (N = 7168, K = 65536, H200, November 2026). Up to 64 tokens, sums leave registers for 256 rows
    a CTA, which halves the traffic of activations.
    """
    tiles = -(-tokens // _WIDEST)
    width = -(-tokens // (16 * tiles)) * 16
    if width <= 64:
        return DenseKernelTile(width, 4, 12, 3, 1)
    slots = (_SHARED_BYTES - 4 * (2 * GROUP_ROWS * CHUNK * 9 // 16 + 4 * width)) // (128 * width)
    return DenseKernelTile(width, 2, min(8, slots), 4, 2 if width <= 128 else 1 if width <= 176 else 0)


class DenseTiling(NamedTuple):
    """One pass. Tiles are numbered token tile by token tile, row tiles of one token tile side by side.

    Every cluster first computes `full` whole tiles (cluster c: tiles c, c + clusters, ...), all of which begin at the
    same K at the same time and so find activations and weights in the L2; what is left is cut into equal shares of
    chunks (stream-K), whose sums are added in order by a last kernel.
    """

    kernel: DenseKernelTile
    token_tiles: int
    row_tiles: int
    chunks: int  # of K
    clusters: int
    full: int
    slots: int  # most clusters that share a tile

    @property
    def columns(self) -> int:
        """Tokens, rounded up to whole tiles."""
        return self.token_tiles * self.kernel.tokens

    @property
    def whole(self) -> int:
        """Tiles that one cluster computes alone."""
        return self.full * self.clusters

    @property
    def streamed(self) -> int:
        """Tiles cut into shares."""
        return self.row_tiles * self.token_tiles - self.whole

    @property
    def acts_bytes(self) -> int:
        """Decoded activations: float16 [K/64, columns, 64]."""
        return self.chunks * CHUNK * self.columns * 2

    @property
    def parts_floats(self) -> int:
        """Part sums: float32 [whole + streamed * slots, tokens of a tile, rows of a tile]."""
        return (self.whole + self.streamed * self.slots) * self.kernel.tokens * self.kernel.rows

    def share(self, cluster: int) -> tuple[int, int]:
        """First and end of the cluster's share, in chunks of the streamed tiles."""
        units = self.streamed * self.chunks
        return cluster * units // self.clusters, (cluster + 1) * units // self.clusters

    def owner(self, unit: int) -> int:
        """The cluster whose share holds a chunk of the streamed tiles."""
        return ((unit + 1) * self.clusters - 1) // (self.streamed * self.chunks)

    def integers(self, tokens: int, hidden: int, experts: int, k: int) -> tuple[int, ...]:
        """The kernel's run-time integers, in the order of `DenseKernel.__call__`."""
        blocks = -(-hidden // 128) * 4
        return (
            tokens, experts, blocks, self.chunks, self.chunks // experts, self.columns, self.row_tiles, self.clusters,
            self.full, self.streamed, self.slots,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # every call asks
def dense_tiling(tokens: int, hidden: int, k: int, clusters: int = CLUSTERS) -> DenseTiling:
    """The tiling for one pass.

    Args:
        tokens: of the pass, at least 1.
        hidden: rows of B.
        k: a multiple of `CHUNK`.
        clusters: of the launch; fewer where there is less work.
    """
    kernel = kernel_tile(tokens)
    token_tiles, row_tiles, chunks = -(-tokens // kernel.tokens), -(-hidden // kernel.rows), k // CHUNK
    tiles = token_tiles * row_tiles
    clusters = min(clusters, tiles * chunks)
    full = tiles // clusters
    if 0 < tiles % clusters * chunks < clusters:
        full -= 1  # a share would be empty
    tiling = DenseTiling(kernel, token_tiles, row_tiles, chunks, clusters, full, 1)
    shared = (
        tiling.owner((tile + 1) * chunks - 1) - tiling.owner(tile * chunks) + 1 for tile in range(tiling.streamed)
    )
    return tiling._replace(slots=max(shared, default=1))
