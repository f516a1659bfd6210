"""A warp: 32 lanes that run translated blocks, and what they see of the machine (divergence, special
registers)."""

from __future__ import annotations

from typing import Callable

import numpy as np

from .memory import DYNAMIC_SMEM_OFFSET, LOCAL_WINDOW, OFFSET_MASK, PARAM_WINDOW, RANK_SHIFT, SHARED_WINDOW
from .report import EmulatorError, Fault
from .opcodes import BLOCKED, EXIT, HOLD
from .values import LANES, _ndarray
from .wgmma import WarpState

READY, WAITING, DONE = range(3)


class Warp:
    """32 lanes with one register list. `mask` None means that all 32 lanes are active."""

    def __init__(self, cta, index: int, threads: int) -> None:
        self.cta, self.index = cta, index
        self.machine, self.check = cta.cluster.machine, cta.cluster.check
        program = self.machine.program
        self.R: list = list(program.zero_registers)
        self.pc = 0
        self.live = np.arange(32) < threads
        self.mask = None if threads >= 32 else self.live
        self.groups: dict[int, np.ndarray] = {}  # lanes waiting elsewhere: block -> mask
        self.held: dict[int, int] = {}  # groups that cannot run now: block -> HOLD or BLOCKED
        self.protect: frozenset = frozenset()
        self.state = READY
        self.waiting: Callable[[], str] | None = None
        self.timed = self.timed_out = False
        self.spin = -1
        self.line = 0
        self.counts = [0] * len(program.blocks)
        self.arrived: tuple | None = None  # named barrier already arrived at, waiting for its release
        self.cluster_generation = 0
        self.local = np.full((32, self.machine.local_bytes), 0xFF, np.uint8)
        self.bulk_open: list = []  # bulk stores of the group not yet committed
        self.bulk_groups: list[list] = []
        self.async_open: list = []  # the same for cp.async
        self.async_groups: list[list] = []
        self.wgmma = WarpState(self) if program.wgmma else None
        self.registers = self.machine.launch.registers  # per thread, where known
        self.specials: dict[str, object] = {}
        self.clock = None  # vector clock, see checks
        if self.check:
            self.check.start_warp(self)

    @property
    def name(self) -> str:
        return f"CTA {self.cta.ctaid} (cluster rank {self.cta.rank}) warp {self.index}"

    # -- running -------------------------------------------------------------------------------------------
    def run(self, quantum: int) -> None:
        functions, counts, registers, pc = self.machine.functions, self.counts, self.R, self.pc
        if self.held:
            self.held = {at: kind for at, kind in self.held.items() if kind == HOLD}
        for _ in range(quantum):
            counts[pc] += 1
            following = functions[pc](self, registers)
            if following >= 0 and not self.groups:
                pc = following
                continue
            self.pc = pc
            if not self._diverged(following):
                return
            pc = self.pc
        self.pc = pc

    def _diverged(self, following: int) -> bool:
        """Handle a block's result when lanes are apart or the block did not complete; False stops the warp's
        turn."""
        if following == EXIT:
            self._exit_lanes(self.mask)
            if self.state == DONE:
                return False
        elif following == BLOCKED or following == HOLD:
            if not self.groups:
                if following == HOLD:
                    raise Fault("lanes of the warp wait for each other at different .sync instructions")
                self.counts[self.pc] -= 1
                return False
            self.counts[self.pc] -= 1
            self._park(self.pc, self.mask)
            self.held[self.pc] = following
        else:
            if following not in self.groups and following < min(self.groups):
                self.pc = following
                return True
            self._park(following, self.mask)
        return self._pick()

    def _park(self, pc: int, mask: np.ndarray | None) -> None:
        mask = self.live if mask is None else mask
        if pc in self.groups:
            self.groups[pc] = self.groups[pc] | mask
            self.held.pop(pc, None)
        else:
            self.groups[pc] = mask

    def _pick(self) -> bool:
        runnable = [pc for pc in self.groups if pc not in self.held]
        if not runnable:
            if BLOCKED not in self.held.values():
                raise Fault("lanes of the warp wait for each other at different .sync instructions")
            self.pc = min(pc for pc, kind in self.held.items() if kind == BLOCKED)
            runnable = [self.pc]
            blocked = True
        else:
            blocked = False
        pc = min(runnable)
        mask = self.groups.pop(pc)
        self.held.pop(pc, None)
        self.pc = pc
        self.mask = None if mask.all() else mask
        live_in = self.machine.program.live_in
        self.protect = frozenset().union(*(live_in[g] for g in self.groups)) if self.groups else frozenset()
        if not blocked:
            self.state = READY
        return not blocked

    def branch(self, mask: np.ndarray | None, p: np.ndarray, taken: int, other: int) -> int:
        """A branch whose predicate differs between lanes."""
        active = p if mask is None else p & mask
        if not active.any():
            return other
        rest = ~p if mask is None else mask & ~p
        if not rest.any():
            return taken
        low, high = (taken, other) if (other == EXIT or (taken != EXIT and taken < other)) else (other, taken)
        low_mask, high_mask = (active, rest) if low == taken else (rest, active)
        if high == EXIT:
            self.mask = low_mask
            self._exit_lanes(high_mask)
            if not self.groups:
                self.protect = frozenset()
            return low
        self._park(high, high_mask)
        self.mask = low_mask
        live_in = self.machine.program.live_in
        groups = self.groups
        self.protect = live_in[high] if len(groups) == 1 else frozenset().union(*(live_in[g] for g in groups))
        return low

    def branch_indexed(self, mask, index, targets: tuple[int, ...]) -> int:
        if type(index) is not _ndarray:
            return targets[index]
        active = self.live if mask is None else mask
        chosen = {}
        for lane in np.flatnonzero(active).tolist():
            chosen.setdefault(targets[int(index[lane])], []).append(lane)
        first = min(chosen)
        for target, members in chosen.items():
            group = np.zeros(32, bool)
            group[members] = True
            if target == first:
                self.mask = group
            else:
                self._park(target, group)
        if self.groups:
            live_in = self.machine.program.live_in
            self.protect = frozenset().union(*(live_in[g] for g in self.groups))
        return first

    def _exit_lanes(self, mask: np.ndarray | None) -> None:
        self.live = np.zeros(32, bool) if mask is None else self.live & ~mask
        if not self.live.any():
            if self.wgmma and self.check:
                self.wgmma.exit()
            self.state = DONE
            self.cta.warp_done(self)

    def hold(self, mask: np.ndarray, membermask: int = -1) -> bool:
        """True when a .sync instruction must wait for lanes that are elsewhere."""
        if not self.groups:
            return False
        if membermask == -1 or membermask == 0xFFFFFFFF:
            return True
        wanted = (membermask >> LANES & 1).astype(bool) & self.live
        return bool((wanted & ~mask).any())

    def needs_all_lanes(self) -> None:
        raise Fault("an instruction of the whole warpgroup is executed by a part of the warp's 32 lanes")

    def wait(self, why: Callable[[], str], timed: bool = False) -> int:
        self.state, self.waiting, self.timed = WAITING, why, timed
        return BLOCKED

    def active_count(self, mask: np.ndarray | None) -> int:
        return 32 if mask is None else int(mask.sum())

    def acquire_load(self, space: str, address, scope: str, mask) -> None:
        if self.check:
            for a in self._addresses(address, mask):
                self.check.acquire_load(self, space, a, scope)

    def release_store(self, space: str, address, scope: str, mask) -> None:
        if self.check:
            for a in self._addresses(address, mask):
                self.check.release_store(self, space, a, scope)

    @staticmethod
    def _addresses(address, mask) -> list[int]:
        if type(address) is not _ndarray:
            return [address]
        return np.unique(address if mask is None else address[mask]).tolist()

    def trap(self, line: int) -> int:
        self.line = line
        raise Fault("trap: the kernel stopped itself (an assertion failed)")

    # -- addresses and special registers -------------------------------------------------------------------
    def symbol(self, name: str, offset: int):
        place = self.machine.symbols.get(name)
        if place is None:
            raise Fault(f"unknown symbol {name}")
        space, base = place
        if space == "shared":
            return self.cta.rank << RANK_SHIFT | base + offset
        return base + offset

    def mapa(self, address, rank, generic: bool):
        if type(rank) is not _ndarray and rank >= len(self.cta.cluster.ctas):
            raise Fault(f"mapa to CTA rank {rank} of a cluster of {len(self.cta.cluster.ctas)}")
        return address & (OFFSET_MASK if not generic else OFFSET_MASK | SHARED_WINDOW) | rank << RANK_SHIFT

    def is_space(self, address, space: str):
        shared = address >= SHARED_WINDOW
        if space.startswith("shared"):
            return shared
        local = (address >= LOCAL_WINDOW) & (address < SHARED_WINDOW)
        if space == "local":
            return local
        return address < PARAM_WINDOW if space == "global" else address != address

    def special(self, name: str):
        if name in ("clock", "clock64", "globaltimer", "clock_hi", "globaltimer_lo"):
            self.machine.ticks += 1
            return self.machine.ticks
        if name not in self.specials:
            self.specials[name] = self._special(name)
        return self.specials[name]

    def _special(self, name: str):
        cta, launch = self.cta, self.machine.launch
        register, _, axis = name.partition(".")
        a = "xyz".find(axis) if axis else 0
        if register == "tid":
            return self.machine.thread_index(self.index, a)
        if register == "laneid":
            return LANES
        if register == "SP" or register == "SPL":
            return 0
        if register.startswith("lanemask_"):
            kind = register[9:]
            return {
                "eq": 1 << LANES,
                "lt": (1 << LANES) - 1,
                "le": (2 << LANES) - 1,
                "gt": 0xFFFFFFFF & ~((2 << LANES) - 1),
                "ge": 0xFFFFFFFF & ~((1 << LANES) - 1),
            }[kind]
        cluster_grid = tuple(g // c for g, c in zip(launch.grid, launch.cluster))
        table = {
            "ntid": lambda: launch.block[a],
            "ctaid": lambda: cta.ctaid[a],
            "nctaid": lambda: launch.grid[a],
            "clusterid": lambda: cta.ctaid[a] // launch.cluster[a],
            "nclusterid": lambda: cluster_grid[a],
            "cluster_ctaid": lambda: cta.ctaid[a] % launch.cluster[a],
            "cluster_nctaid": lambda: launch.cluster[a],
            "cluster_ctarank": lambda: cta.rank,
            "cluster_nctarank": lambda: len(cta.cluster.ctas),
            "is_explicit_cluster": lambda: int(launch.cluster != (1, 1, 1)),
            "warpid": lambda: self.index,
            "nwarpid": lambda: len(cta.warps),
            "smid": lambda: cta.linear % self.machine.num_sms,
            "nsmid": lambda: self.machine.num_sms,
            "gridid": lambda: 1,
            "dynamic_smem_size": lambda: launch.dynamic_smem,
            "total_smem_size": lambda: cta.smem.end - DYNAMIC_SMEM_OFFSET,
        }
        if register not in table:
            raise EmulatorError(f"line {self.line}: unknown special register %{name}")
        return table[register]()
