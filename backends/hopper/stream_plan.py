"""What the streaming kernel is compiled for, and how it divides shared memory; pure values."""

from __future__ import annotations

from dataclasses import dataclass

from backends.hopper.dense_plan import STREAM_TOKENS, VOTES_BYTES

#: Rows per block of prepared weights, and a block's bytes per item (256 values of K): data, and scale factors.
BLOCK_ROWS, BLOCK_DATA, BLOCK_SCALES = 32, 4096, 512
#: Tokens per slot of activations, bytes of their numbers and alpha, with which it begins, of a token's values, and of all.
GROUP, LIST_BYTES, TOKEN_BYTES = 8, 64, 512
SLOT_BYTES = LIST_BYTES + GROUP * TOKEN_BYTES
#: Counters in front of those of the strips: the gathering's next task, and those done.
GATHER_COUNTERS = 2
# Width of a pass in groups of tokens -> least number of tokens that it pays for (H200, top-8 of 256 experts, 2026-11-23).
_WIDTHS = {1: 1, 2: 16, 3: 384, 4: 32}
#: Shared memory of a CTA on SM 9.0.
SMEM_BYTES = 227 * 1024
# Tokens up to which consumers wait for slots in the order of the items: without one M = 512 takes 131 us instead of 138, 384 takes
# 108 instead of 105, as barriers for all slots must be initialized (H100, 2026-11-26).
_ORDERED_TOKENS = 384
# Multiprocessors left to the blocks of the dense kernel, which look at alpha and leave.
_FREE = 4
# Items that a CTA could do while a helper begins and ends a strip (H100, 2026-11-26).
_STRIP_COST = 7
# Parts of a strip at most: the first adds the sums of the others one after the other.
_MOST_PARTS = 8


@dataclass(frozen=True)
class Division:
    """How the CTAs of a launch divide the items of all strips.

    Attributes:
        strips: rounded up to whole clusters.
        parts: CTAs that divide those items of a strip which no helper takes.
        helpers: CTAs that take a share of the items of each of several strips, one strip after the other.
        rounds: strips of a helper, at most.
        cost: items that `parts` CTAs could do in the time in which a helper begins and ends its strips.
    """

    strips: int
    parts: int
    helpers: int = 0
    rounds: int = 0
    cost: int = 0

    @property
    def integers(self) -> tuple[int, int, int, int]:
        """What the kernel takes."""
        return self.parts, self.helpers, self.rounds, self.cost

    @property
    def left(self) -> int:
        """Parts of a strip whose sums are left to the CTA that stores them."""
        return self.parts - 1 + (self.helpers > 0)


def division(hidden: int, config: StreamConfig, tokens: int, multiprocessors: int, helpers: bool = False) -> Division:
    """As many CTAs as run at once, where that pays; `helpers`: of a tactic."""
    strips = -(-hidden // (config.rows * config.cluster))
    parts = max(1, min(multiprocessors // (strips * config.cluster), _MOST_PARTS))
    idle = multiprocessors - strips * config.cluster * parts
    clusters = (idle - _FREE) // config.cluster
    if clusters <= 0 or parts == _MOST_PARTS or not (helpers or _helpers_pay(idle / multiprocessors, tokens)):
        return Division(strips * config.cluster, parts)
    rounds = -(-strips // clusters)
    return Division(
        strips * config.cluster, parts, -(-strips // rounds) * config.cluster, rounds, parts * rounds * _STRIP_COST
    )


def _helpers_pay(idle: float, tokens: int) -> bool:
    """Whether a share of idle multiprocessors is worth the sums that helpers leave in memory, on any GPU. H100, 2026-11-26, calls
    in a graph: a share of 0.39 (N = 5120) takes 9, 10, 21 and 21% off M = 16, 64, 256 and 512, 0.27 (N = 6144) -2, 2, 14 and 16%,
    0.15 (N = 7168) 1, -2, -6 and -4% off 64, 256, 384 and 512. An H200's memory is faster, so that the multiprocessors are what it
    waits for, and 0.15 takes 3 to 6% off: that is a tactic's to say. A call of up to four tokens is too short."""
    return tokens > 4 and idle > (0.25 if tokens > 64 else 0.33)


@dataclass(frozen=True)
class StreamConfig:
    """One compiled streaming kernel.

    Attributes:
        rows: of B per CTA, 32 or 64.
        phases: items in work at once, each by one warp per 32 rows.
        stages: items of weights in shared memory.
        slots: groups of 8 tokens of activations in shared memory; at least 4, which one pass takes together.
        tokens: most tokens of a launch, as the sums of all of them lie in shared memory.
        experts, chunks: E, and I / 256.
        out_dtype: "bfloat16", "float16" or "float32".
        a_swizzled: A's scale factors are in the "128x4" layout, else linear.
        cluster: CTAs with neighbouring rows that share every copy of activations, 1 or 2.
    """

    rows: int
    phases: int
    stages: int
    slots: int
    tokens: int
    experts: int
    chunks: int
    out_dtype: str
    a_swizzled: bool = True
    cluster: int = 1

    @property
    def blocks(self) -> int:
        return self.rows // BLOCK_ROWS

    @property
    def consumers(self) -> int:
        return self.blocks * self.phases

    @property
    def threads(self) -> int:
        return 32 * (self.consumers + 2)

    @property
    def few(self) -> bool:
        """It streams whatever alpha is."""
        return self.tokens <= STREAM_TOKENS

    @property
    def widths(self) -> tuple[int, ...]:
        """Groups of tokens that one pass over an item's weights can multiply; each has its own code."""
        return tuple(w for w in _WIDTHS if self.tokens >= _WIDTHS[w])

    @property
    def ordered(self) -> bool:
        """Whether items could wait for slots more than a ring of barriers apart: they must wait in order, then."""
        return self._slots_in_work > self.slot_barriers

    @property
    def stage_barriers(self) -> int:
        """Barriers that tell of arrived weights, whole rings: with fewer than items in work a consumer would wait for one two
        turns ahead, which it cannot tell from none."""
        return _rings(self.phases, self.stages)

    @property
    def slot_barriers(self) -> int:
        """Barriers that tell of arrived slots, whole rings: one, or as many as the items in work can have slots, where that
        gains more than it takes to initialize them."""
        return self.slots if self.tokens <= _ORDERED_TOKENS else _rings(self._slots_in_work, self.slots)

    @property
    def _slots_in_work(self) -> int:
        return self.phases * -(-self.tokens // GROUP)

    @property
    def stage_bytes(self) -> int:
        return self.blocks * (BLOCK_DATA + BLOCK_SCALES)

    def offsets(self) -> dict[str, int]:
        """Byte offset of each part of shared memory, and "end"."""
        sizes = {
            "weights": self.stages * self.stage_bytes,
            "activations": self.slots * SLOT_BYTES,
            "sums": self.tokens * self.rows * 4,
            "totals": 16,
            "share": 32,  # `share.FIELDS`
            "votes": VOTES_BYTES,
            "requests": 32 * 16,  # of slots (`StreamKernel._copy_slots`)
            "barriers": 8 * self.barriers["end"],
            "table": (self.experts + 2) * 8,
        }
        return _running(sizes)

    @property
    def barriers(self) -> dict[str, int]:
        """Index of the first barrier of each kind, and "end"."""
        sizes = {
            "weights_full": self.stage_barriers,
            "weights_empty": self.stages,
            "slot_full": self.slot_barriers,
            "slot_empty": self.slots,
            "acquired": self.consumers if self.ordered else 0,
        }
        return _running(sizes)


def _rings(least: int, ring: int) -> int:
    """The first multiple of `ring` that is not less."""
    return -(-least // ring) * ring


def _running(sizes: dict[str, int]) -> dict[str, int]:
    starts, total = {}, 0
    for name, size in sizes.items():
        starts[name] = total
        total += size
    return {**starts, "end": total}
