"""How the dense kernel of SM 9.0 divides a call. Pure values: no torch, no DSL."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

#: Values of K per chunk, the unit of the prepared weights; an expert is a multiple of it.
CHUNK = 256
#: Values of K per stage of shared memory: half a chunk, two slices of 64.
STAGE = 128
#: Rows of B that one group of four multiplying warps takes: the height of the warpgroup instruction.
GROUP_ROWS = 64
#: CTAs of a cluster: neighbouring row tiles that share the activations.
CLUSTER = 2
# Shared memory of a CTA, less room for barriers and alignment.
_SHARED_BYTES = 226 * 1024
# Four chunks in flight; narrow tiles would leave room for more.
_MAX_STAGES = 8
#: Tokens of a chunk that a warp decodes at a time.
TASK_TOKENS = 8
# Chunks of each stretch of K that are decoded before the dense kernel starts: its own warps' first come late, M = 256 took
# 3 to 5 us more without (H200, 2026-11-26).
_AHEAD = 4
# Tasks of that at most, about as many warps as run at once.
_AHEAD_TASKS = 1024
#: Tokens of a pass up to which it is streamed whatever alpha is: a kernel that has nothing to do takes 3 us of every call, and
#: dense ones of 16 tokens take 96 us instead of 104 on an H100, though 94 instead of 82 on an H200 (2026-11-26).
STREAM_TOKENS = 16
#: Bytes of shared memory in which a block counts how much of alpha is nonzero: a word for each of at most 32 warps.
VOTES_BYTES = 128
#: What the counter of a chunk's decoded tokens begins with where they were decoded ahead; its place is added.
AHEAD = 1 << 24
# Widest token tile. At 192, which registers would still hold, shared memory has only three stages: M = 384 took 670 us, in
# tiles of 128 506 (H100, 2026-11-25).
_WIDEST = 176


class DenseKernelTile(NamedTuple):
    """What selects the kernel that multiplies."""

    tokens: int  # per tile, a multiple of 16: the width of the warpgroup instruction
    groups: int  # of four warps that decode weights and multiply
    stages: int  # of 128 values of K in shared memory: weights, and decoded activations
    steps: int  # of 16 values of K that are decoded while as many before them are multiplied: 1, 2 or 4
    out_dtype: str  # "bfloat16", "float16" or "float32"
    a_swizzled: bool  # A's scale factors are in the "128x4" layout, else linear

    @property
    def cta_rows(self) -> int:
        return self.groups * GROUP_ROWS

    @property
    def rows(self) -> int:
        """Rows of B per tile, which is a cluster's."""
        return self.cta_rows * CLUSTER

    @property
    def warps(self) -> int:
        """Multiplying warps of a CTA."""
        return 4 * self.groups

    @property
    def data_bytes(self) -> int:
        """Weights of a stage, without scale factors."""
        return self.cta_rows * STAGE // 2

    @property
    def aside_bytes(self) -> int:
        """What comes with the weights: a chunk's scale factors with its first half, its expert's alpha with the second."""
        return max(self.cta_rows * CHUNK // 16, 4 * self.tokens)

    @property
    def acts_bytes(self) -> int:
        """Activations of a stage."""
        return self.tokens * STAGE * 2


def kernel_tile(tokens: int, out_dtype: str = "bfloat16", a_swizzled: bool = True) -> DenseKernelTile:
    """The kernel for a pass: as few token tiles as can be, and no wider than they must.

    Every token tile decodes all weights again, and its padding is multiplied like tokens. Up to 64 tokens, sums leave
    registers for 256 rows a CTA, which halves the traffic of activations.
    """
    tiles = -(-tokens // _WIDEST)
    width = -(-tokens // (16 * tiles)) * 16
    tile = DenseKernelTile(width, 4 if width <= 64 else 2, 0, 4 if 64 < width <= 128 else 2, out_dtype, a_swizzled)
    stages = _SHARED_BYTES // (tile.data_bytes + tile.aside_bytes + tile.acts_bytes)
    return tile._replace(stages=min(_MAX_STAGES, stages))


@dataclass(frozen=True)
class Shares:
    """How clusters divide the tiles of a pass: plain integers here, the DSL's in the kernel.

    Tiles are numbered token tile by token tile, row tiles of one token tile side by side. Every cluster first computes
    `full` whole tiles (cluster c: tiles c, c + clusters, ...). The `streamed` tiles that are left are cut along K into
    equal shares: of each, `aligned` clusters take one part (cluster c < aligned * streamed takes part c / streamed of
    tile c % streamed), and the clusters that remain divide the rests of all tiles among them (stream-K). Clusters so walk
    the same stretches of K at the same time: they find weights and activations in the L2, and the first activations that
    they need are few, and soon decoded.
    """

    row_tiles: int
    chunks: int  # of K
    clusters: int
    full: int
    streamed: int
    aligned: int
    cost: int  # of all streamed tiles, in chunks

    def bound(self, part: int) -> int:
        """First chunk of an aligned part; behind the last one, of the rest."""
        return (2 * part * self.cost + self.clusters) // (2 * self.clusters)

    @property
    def rest(self) -> int:
        """Chunks of a streamed tile behind its aligned parts."""
        return self.chunks - self.bound(self.aligned)

    @property
    def others(self) -> int:
        """Clusters that divide the rests."""
        return self.clusters - self.aligned * self.streamed

    def share(self, other: int) -> tuple[int, int]:
        """First and end of what one of those computes, in chunks of the rests, tile by tile."""
        units = self.streamed * self.rest
        return other * units // self.others, (other + 1) * units // self.others

    def owner(self, unit: int) -> int:
        """Which of those has a chunk of the rests."""
        return ((unit + 1) * self.others - 1) // (self.streamed * self.rest)


@dataclass(frozen=True)
class DenseTiling(Shares):
    """One pass."""

    kernel: DenseKernelTile
    token_tiles: int

    @property
    def columns(self) -> int:
        """Tokens, rounded up to whole tiles."""
        return self.token_tiles * self.kernel.tokens

    @property
    def walks(self) -> int:
        """Stretches of K that clusters begin at the same time."""
        return 1 if self.full or not self.aligned else self.aligned + 1

    @property
    def steps(self) -> int:
        """Chunks of the longest of them."""
        return self.chunks if self.walks == 1 else self.bound(1) + 1

    @property
    def ahead(self) -> int:
        """Places of the order in which chunks are needed that the listing kernel decodes; none for a pass that is streamed in any
        case."""
        if self.columns <= STREAM_TOKENS:
            return 0
        return min(self.walks * min(self.steps, _AHEAD), _AHEAD_TASKS * TASK_TOKENS // self.columns)

    @property
    def ahead_bytes(self) -> int:
        """Activations decoded ahead: float16 [ahead, 4, columns, 64]."""
        return self.ahead * CHUNK * self.columns * 2

    @functools.cached_property
    def slots(self) -> int:
        """Most clusters that the one with a tile's first chunk waits for."""
        if not self.rest:
            return max(self.aligned - 1, 0)
        tiles = range(self.streamed)
        most = max((self.owner((t + 1) * self.rest - 1) - self.owner(t * self.rest) for t in tiles), default=0)
        return self.aligned + most

    @property
    def acts_bytes(self) -> int:
        """Decoded activations: float16 [K/64, columns, 64]."""
        return self.chunks * CHUNK * self.columns * 2

    @property
    def parts_floats(self) -> int:
        """Sums of clusters without a tile's first chunk: float32 [streamed, slots, tile], in the order of registers."""
        return self.streamed * self.slots * self.kernel.tokens * self.kernel.rows

    @property
    def counters(self) -> int:
        """int32, zero before a call: chunks' decoded tokens, the decoding's next task, and finished part sums [streamed,
        CTA of the cluster, warp]."""
        return self.chunks + 1 + self.streamed * CLUSTER * self.kernel.warps

    @property
    def work(self) -> tuple[int, ...]:
        """The integers of `work.Work`."""
        return (
            self.row_tiles, self.chunks, self.clusters, self.full, self.streamed, self.aligned, self.cost, self.slots,
            self.columns, self.walks, self.steps, self.ahead,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # every call asks
def dense_tiling(
    tokens: int, hidden: int, k: int, out_dtype: str = "bfloat16", a_swizzled: bool = True, clusters: int = 66
) -> DenseTiling:
    """The tiling for one pass.

    Args:
        tokens: of the pass, at least 1.
        hidden: rows of B.
        k: a multiple of `CHUNK`.
        out_dtype, a_swizzled: as in `DenseKernelTile`.
        clusters: two multiprocessors each, 66 on an H100 SXM or H200; fewer are launched where there is less work.
    """
    kernel = kernel_tile(tokens, out_dtype, a_swizzled)
    token_tiles, row_tiles, chunks = -(-tokens // kernel.tokens), -(-hidden // kernel.rows), k // CHUNK
    tiles = token_tiles * row_tiles
    clusters = min(clusters, tiles * chunks)
    full = tiles // clusters
    if 0 < tiles % clusters * chunks < clusters:
        full -= 1  # a share would be empty
    streamed = tiles - full * clusters
    tiling = DenseTiling(row_tiles, chunks, clusters, full, streamed, 0, 0, kernel, token_tiles)
    aligned = clusters // max(streamed, 1)
    others = clusters - aligned * streamed
    # Going from one rest to the next takes a cluster 3.5 us, 2 to 2.5 chunks (H100, 2026-11-26).
    steps = streamed + others if others else 0
    cut = replace(tiling, aligned=aligned, cost=streamed * chunks + steps * (4 if kernel.groups == 4 else 5) // 2)
    return cut if others <= streamed * cut.rest else tiling  # no share may be empty
