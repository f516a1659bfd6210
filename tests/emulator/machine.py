"""The machine: warps with divergence, CTAs, clusters, and the scheduler that orders warps and asynchronous
work.

Asynchronous work (bulk copies, tensor-core operations, commits) is queued as closures. `eager` runs each at
issue, `lazy` only when no warp can run, `random` interleaves. The tensor pipe of a CTA is a FIFO; bulk copies
finish in any order.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Callable

import numpy as np
import torch

from .barriers import ClusterBarrier, Mbarrier, NamedBarrier
from .memory import DYNAMIC_SMEM_OFFSET, OFFSET_MASK, PARAM_WINDOW, RANK_SHIFT, GlobalMemory, SharedMemory
from .report import Deadlock, EmulatorError, Fault
from .tmem import TensorMemory
from .translate import Program
from .values import LANES
from .warp import DONE, READY, WAITING, Warp
from .wgmma import Warpgroup

_QUANTUM = 256  # blocks a warp runs before another gets a turn


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
        self.warpgroups: dict[int, Warpgroup] = {}
        self.free_registers = 0  # per lane, given back by setmaxnreg.dec
        self.register_waiters: list[Warp] = []
        self.inbound = 0

    def start(self) -> None:
        bx, by, bz = self.cluster.machine.launch.block
        threads = bx * by * bz
        self.warps = [Warp(self, i, min(32, threads - 32 * i)) for i in range(-(-threads // 32))]

    def warpgroup(self, number: int) -> Warpgroup:
        """The warpgroup of warps 4 * number and the three after it."""
        if number not in self.warpgroups:
            self.warpgroups[number] = Warpgroup(self, number)
        return self.warpgroups[number]

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
            raise Fault(
                f"{what} on shared offset {offset:#x} of CTA {self.rank}, where no mbarrier is initialized"
            )
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

    def __init__(
        self,
        launch,
        program: Program,
        params: bytes,
        memory: GlobalMemory,
        *,
        schedule: str,
        seed: int,
        num_sms: int,
        checks: bool,
        concurrent: int | None,
    ) -> None:
        self.launch, self.program, self.params, self.memory = launch, program, params, memory
        self.functions = program.functions
        self.schedule, self.seed, self.num_sms, self.checks = schedule, seed, num_sms, checks
        self.rng = random.Random(seed)
        self.ticks = 0
        self.thread_indices: dict[tuple[int, int], object] = {}
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

    def thread_index(self, warp: int, axis: int):
        """%tid of a warp's lanes, the same in every CTA."""
        key = warp, axis
        if key not in self.thread_indices:
            linear = warp * 32 + LANES
            bx, by, _bz = self.launch.block
            value = (linear % bx, linear // bx % by, linear // (bx * by))[axis]
            self.thread_indices[key] = int(value[0]) if (value == value[0]).all() else value
        return self.thread_indices[key]

    def _place_symbols(self) -> None:
        kernel = self.program.kernel
        self.symbols: dict[str, tuple[str, int]] = {
            p.name: ("param", PARAM_WINDOW + p.offset) for p in kernel.params
        }
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
                    data[base - data.ctypes.data :][: variable.size] = np.frombuffer(variable.data, np.uint8)
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

    # -- asynchronous work ---------------------------------------------------------------------------------
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

    # -- the loop ------------------------------------------------------------------------------------------
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
            timed = [
                w for c in self.active for cta in c.ctas for w in cta.warps if w.state == WAITING and w.timed
            ]
            if idle > 3 or not timed:
                raise Deadlock.describe(self)
            for w in timed:
                w.timed_out = True
                self.wake_one(w)
