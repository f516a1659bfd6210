"""The machine: warps with divergence, CTAs, clusters, and the scheduler that orders warps and asynchronous work.

Asynchronous work (bulk copies, tensor-core operations, commits) is queued as closures. `eager` runs each at issue, `lazy`
only when no warp can run, `random` interleaves. The tensor pipe of a CTA is a FIFO; bulk copies finish in any order.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Callable

import numpy as np
import torch

from .barriers import ClusterBarrier, Mbarrier, NamedBarrier
from .memory import (DYNAMIC_SMEM_OFFSET, LOCAL_WINDOW, OFFSET_MASK, PARAM_WINDOW, RANK_SHIFT, SHARED_WINDOW, GlobalMemory,
                     SharedMemory)
from .report import Deadlock, EmulatorError, Fault
from .tmem import TensorMemory
from .translate import BLOCKED, EXIT, HOLD, NAMESPACE, Program
from .values import LANES, _ndarray

NAMESPACE.update(BLOCKED=BLOCKED, HOLD=HOLD, EXIT=EXIT)
READY, WAITING, DONE = range(3)
_QUANTUM = 256  # blocks a warp runs before another gets a turn


class Warp:
    """32 lanes with one register list. `mask` None means that all 32 lanes are active."""

    def __init__(self, cta: Cta, index: int, threads: int) -> None:
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
        self.specials: dict[str, object] = {}
        self.clock = None  # vector clock, see checks
        if self.check:
            self.check.start_warp(self)

    @property
    def name(self) -> str:
        return f"CTA {self.cta.ctaid} (cluster rank {self.cta.rank}) warp {self.index}"

    # -- running -------------------------------------------------------------------------------------------------
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
        """Handle a block's result when lanes are apart or the block did not complete; False stops the warp's turn."""
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

    # -- addresses and special registers ---------------------------------------------------------------------------
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
            linear = self.index * 32 + LANES
            bx, by, bz = launch.block
            value = (linear % bx, linear // bx % by, linear // (bx * by))[a]
            return int(value[0]) if (value == value[0]).all() else value
        if register == "laneid":
            return LANES
        if register == "SP" or register == "SPL":
            return 0
        if register.startswith("lanemask_"):
            kind = register[9:]
            return {"eq": 1 << LANES, "lt": (1 << LANES) - 1, "le": (2 << LANES) - 1, "gt": 0xFFFFFFFF & ~((2 << LANES) - 1),
                    "ge": 0xFFFFFFFF & ~((1 << LANES) - 1)}[kind]
        cluster_grid = tuple(g // c for g, c in zip(launch.grid, launch.cluster))
        table = {
            "ntid": lambda: launch.block[a], "ctaid": lambda: cta.ctaid[a], "nctaid": lambda: launch.grid[a],
            "clusterid": lambda: cta.ctaid[a] // launch.cluster[a], "nclusterid": lambda: cluster_grid[a],
            "cluster_ctaid": lambda: cta.ctaid[a] % launch.cluster[a], "cluster_nctaid": lambda: launch.cluster[a],
            "cluster_ctarank": lambda: cta.rank, "cluster_nctarank": lambda: len(cta.cluster.ctas),
            "is_explicit_cluster": lambda: int(launch.cluster != (1, 1, 1)), "warpid": lambda: self.index,
            "nwarpid": lambda: len(cta.warps), "smid": lambda: cta.linear % self.machine.num_sms,
            "nsmid": lambda: self.machine.num_sms, "gridid": lambda: 1,
            "dynamic_smem_size": lambda: launch.dynamic_smem, "total_smem_size": lambda: cta.smem.end - DYNAMIC_SMEM_OFFSET,
        }
        if register not in table:
            raise EmulatorError(f"line {self.line}: unknown special register %{name}")
        return table[register]()


class Cta:
    def __init__(self, cluster: Cluster, rank: int, ctaid: tuple[int, int, int]) -> None:
        machine = cluster.machine
        self.cluster, self.rank, self.ctaid = cluster, rank, ctaid
        gx, gy, _gz = machine.launch.grid
        self.linear = ctaid[0] + gx * (ctaid[1] + gy * ctaid[2])
        self.smem = SharedMemory(rank, machine.smem_end)
        self.tmem = TensorMemory(self)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.pipe: deque = deque()  # tensor-core operations in issue order
        self.warps: list[Warp] = []
        self.inbound = 0

    def start(self) -> None:
        bx, by, bz = self.cluster.machine.launch.block
        threads = bx * by * bz
        self.warps = [Warp(self, i, min(32, threads - 32 * i)) for i in range(-(-threads // 32))]

    @property
    def peer(self) -> Cta:
        """The other CTA of the pair: rank with its lowest bit flipped."""
        return self.cluster.ctas[self.rank ^ 1]

    def live_threads(self) -> int:
        return sum(int(w.live.sum()) for w in self.warps)

    def finished(self) -> bool:
        return all(w.state == DONE for w in self.warps)

    def mbarrier(self, offset: int, what: str) -> Mbarrier:
        found = self.mbarriers.get(offset)
        if found is None:
            raise Fault(f"{what} on shared offset {offset:#x} of CTA {self.rank}, where no mbarrier is initialized")
        return found

    def named_barrier(self, number: int) -> NamedBarrier:
        if not 0 <= number < 16:
            raise Fault(f"named barrier {number} does not exist (0..15)")
        return self.named.setdefault(number, NamedBarrier(self, number))

    def warp_done(self, warp: Warp) -> None:
        if self.cluster.check:
            self.cluster.check.exit_warp(warp)
        for barrier in self.named.values():
            if barrier.everyone:
                barrier.settle()
        self.cluster.barrier.settle()
        if self.finished():
            self.tmem.check_released()
            if self.cluster.finished():
                self.cluster.machine.cluster_done(self.cluster)


class Cluster:
    def __init__(self, machine: Machine, number: int, origin: tuple[int, int, int]) -> None:
        self.machine, self.number, self.origin = machine, number, origin
        self.check = machine.new_checker(self) if machine.checks else None
        cx, cy, cz = machine.launch.cluster
        self.ctas: list[Cta] = []
        self.barrier = ClusterBarrier(self)
        for rank in range(cx * cy * cz):
            at = (rank % cx, rank // cx % cy, rank // (cx * cy))
            self.ctas.append(Cta(self, rank, tuple(o + d for o, d in zip(origin, at))))
        for cta in self.ctas:
            cta.start()
        self.pending = 0  # asynchronous operations in flight

    def smem(self, rank: int) -> SharedMemory:
        if rank >= len(self.ctas):
            raise Fault(f"shared address names CTA rank {rank} of a cluster of {len(self.ctas)}")
        return self.ctas[rank].smem

    def finished(self) -> bool:
        return all(cta.finished() for cta in self.ctas)

    def mbarrier(self, address: int, what: str) -> Mbarrier:
        rank, offset = address >> RANK_SHIFT, address & OFFSET_MASK
        if rank >= len(self.ctas):
            raise Fault(f"{what} on CTA rank {rank} of a cluster of {len(self.ctas)}")
        cta = self.ctas[rank]
        if cta.finished() and len(self.ctas) > 1:
            raise Fault(f"{what} on shared memory of CTA {cta.ctaid} (cluster rank {rank}), which has exited")
        return cta.mbarrier(offset, what)


class Machine:
    """Runs one launch."""

    def __init__(self, launch, program: Program, params: bytes, memory: GlobalMemory, *, schedule: str, seed: int,
                 num_sms: int, checks: bool, concurrent: int | None) -> None:
        self.launch, self.program, self.params, self.memory = launch, program, params, memory
        self.functions = program.functions
        self.schedule, self.seed, self.num_sms, self.checks = schedule, seed, num_sms, checks
        self.rng = random.Random(seed)
        self.ticks = 0
        self.counters: Counter = Counter()
        self.high_water: Counter = Counter()
        self.unordered: list = []
        self.pipes: list[deque] = []
        self.events = 0
        self.ready: deque[Warp] = deque()
        self.warp_instructions: Counter = Counter()  # by warp index, summed over CTAs
        self.foreign: dict = {}  # knowledge of other clusters carried by a barrier, see checks
        self.atomics: dict = {}  # clocks published through an atomic's address
        self.global_lines: dict[int, int] = {}
        for buffer in memory.buffers:
            buffer.shadow = None
        self._place_symbols()
        cluster_size = launch.cluster[0] * launch.cluster[1] * launch.cluster[2]
        limit = max(1, num_sms // cluster_size)
        self.concurrent = min(limit, concurrent or (4 if schedule == "random" else 1))
        self.queue = deque(self._cluster_origins())
        if schedule == "random":
            shuffled = list(self.queue)
            self.rng.shuffle(shuffled)
            self.queue = deque(shuffled)
        self.active: list[Cluster] = []

    def new_checker(self, cluster: Cluster):
        from .checks import Checker

        return Checker(cluster)

    def _place_symbols(self) -> None:
        kernel = self.program.kernel
        self.symbols: dict[str, tuple[str, int]] = {p.name: ("param", PARAM_WINDOW + p.offset) for p in kernel.params}
        end, local, dynamic = DYNAMIC_SMEM_OFFSET, 0, []
        for variable in kernel.variables.values():
            if variable.space == "shared":
                if variable.size == 0:
                    dynamic.append(variable)
                    continue
                end = -(-end // variable.align) * variable.align
                self.symbols[variable.name] = ("shared", end)
                end += variable.size
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.symbols[variable.name] = ("local", local)
                local += variable.size
            else:
                data = np.zeros(variable.size + 256, np.uint8)
                base = -(-data.ctypes.data // 256) * 256
                if variable.data:
                    data[base - data.ctypes.data:][:variable.size] = np.frombuffer(variable.data, np.uint8)
                self.memory.register(variable.name, base, variable.size, data)
                self.symbols[variable.name] = ("global", base)
        for variable in dynamic:
            end = -(-end // variable.align) * variable.align
            self.symbols[variable.name] = ("shared", end)
        self.smem_end = end + self.launch.dynamic_smem
        self.local_bytes = local
        self.high_water["shared memory bytes"] = self.smem_end - DYNAMIC_SMEM_OFFSET

    def _cluster_origins(self):
        (gx, gy, gz), (cx, cy, cz) = self.launch.grid, self.launch.cluster
        if gx % cx or gy % cy or gz % cz:
            raise Fault(f"grid {self.launch.grid} is not a multiple of the cluster {self.launch.cluster}")
        number = 0
        for z in range(0, gz, cz):
            for y in range(0, gy, cy):
                for x in range(0, gx, cx):
                    yield number, (x, y, z)
                    number += 1

    # -- asynchronous work -------------------------------------------------------------------------------------------
    def submit(self, cluster: Cluster, run: Callable[[], None], pipe: deque | None = None) -> None:
        if self.schedule == "eager":
            run()
            self.events += 1
            return
        cluster.pending += 1

        def work() -> None:
            cluster.pending -= 1
            run()

        work.cluster, work.origin = cluster, self.current
        if pipe is None:
            self.unordered.append(work)
        else:
            if not pipe:
                self.pipes.append(pipe)
            pipe.append(work)

    def _run_async(self, index: int) -> None:
        self.events += 1
        if index < len(self.unordered):
            work = self.unordered.pop(index)
        else:
            pipe = self.pipes[index - len(self.unordered)]
            work = pipe.popleft()
            if not pipe:
                self.pipes.remove(pipe)
        self.current = work.origin
        work()
        cluster = work.cluster
        if cluster.pending == 0 and cluster.finished():
            self.cluster_done(cluster)

    def wake(self, waiters: list) -> None:
        self.events += 1
        for w in waiters:
            self.wake_one(w)
        waiters.clear()

    def wake_one(self, w: Warp) -> None:
        if w.state == WAITING:
            w.state = READY
            self.ready.append(w)

    def cluster_done(self, cluster: Cluster) -> None:
        if cluster.pending:
            return
        if cluster in self.active:
            self.active.remove(cluster)
            if cluster.check:
                cluster.check.cluster_end()
            self._finish(cluster)

    def _finish(self, cluster: Cluster) -> None:
        lengths = self.program.lengths
        for cta in cluster.ctas:
            for w in cta.warps:
                self.warp_instructions[w.index] += sum(c * n for c, n in zip(w.counts, lengths) if c)

    # -- the loop ----------------------------------------------------------------------------------------------------
    def run(self) -> None:
        self.current: Warp | None = None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with np.errstate(all="ignore"):
                self._loop()
        except Fault as fault:
            raise fault.locate(self.current, self.program.kernel, self) from None
        except EmulatorError:
            raise
        except Exception as error:
            where = Fault(f"internal error: {error!r}").locate(self.current, self.program.kernel, self)
            raise EmulatorError(str(where)) from error
        finally:
            torch.set_num_threads(threads)

    def _loop(self) -> None:
        ready, rng, randomly, idle = self.ready, self.rng, self.schedule == "random", 0
        while True:
            while len(self.active) < self.concurrent and self.queue:
                cluster = Cluster(self, *self.queue.popleft())
                self.active.append(cluster)
                ready.extend(w for cta in cluster.ctas for w in cta.warps)
            if not self.active:
                return
            pending = len(self.unordered) + len(self.pipes)
            if randomly and pending and (not ready or rng.random() < 0.3):
                self._run_async(rng.randrange(pending))
                continue
            if ready:
                if randomly:
                    at = rng.randrange(len(ready))
                    ready.rotate(-at)
                w = ready.popleft()
                self.current = w
                before = self.events
                w.run(rng.choice((1, 3, 10, 40)) if randomly else _QUANTUM)
                if w.state == READY:
                    ready.append(w)
                if self.events != before:
                    idle = 0
                continue
            if pending:
                self._run_async(0)
                continue
            idle += 1
            timed = [w for c in self.active for cta in c.ctas for w in cta.warps if w.state == WAITING and w.timed]
            if idle > 3 or not timed:
                raise Deadlock.describe(self)
            for w in timed:
                w.timed_out = True
                self.wake_one(w)
