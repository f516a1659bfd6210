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
# Tokens up to which consumers wait for slots in the order of the items.
_ORDERED_TOKENS = 384
# Parts of a strip at most: the first adds the sums of the others one after the other.
_MOST_PARTS = 8


def parts(hidden: int, config: StreamConfig, multiprocessors: int) -> int:
    """CTAs that divide the items of a strip, as many as run at once."""
    return max(1, min(multiprocessors // strips(hidden, config), _MOST_PARTS))


def strips(hidden: int, config: StreamConfig) -> int:
    """Rounded up to whole clusters."""
    return -(-hidden // (config.rows * config.cluster)) * config.cluster


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
