"""Compiling tuning candidates side by side, before one process times them.

A kernel takes seconds to compile and microseconds to run. Processes of `dispatch.worker` compile into the caches
that the backends keep on disk, where the process that times finds them. Compiling may launch kernels, so nothing
is timed meanwhile.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from backends.device import DeviceInfo
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.isolation import WorkerDied, WorkerProcess

#: Processes at most: beyond that the same helper kernels are compiled several times over.
MOST = 8
# Host memory of one process with torch, a CUDA context and a compiler; its share of the device's memory beside the
# weights that compiling by running takes.
_HOST_BYTES = 4 << 30
_DEVICE_BYTES = 1 << 30

Job = tuple[Fc2Problem, Tactic]


class Compilers:
    """Processes that compile; started at the first use, ended by `close`.

    Args:
        device: where the kernels will run.
        info: its description.
        backends: as `importable_backends` gives them.
        seconds: a compilation that takes longer is given up.
    """

    def __init__(
        self, device: str, info: DeviceInfo, backends: Sequence[tuple[str, str, str]], seconds: float
    ) -> None:
        self._device, self._info, self._backends, self._seconds = device, info, backends, seconds
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()

    def count(self, jobs: Sequence[Job]) -> int:
        """How many processes to use: by processors and memory, and no more than there are jobs."""
        limits = [MOST, len(jobs), (os.cpu_count() or 1) // 2, _available_memory() // _HOST_BYTES]
        if self._info.memory_bytes:
            largest = max(problem.weight_bytes for problem, _ in jobs)
            limits.append(self._info.memory_bytes // 2 // (_DEVICE_BYTES + 2 * largest))
        return max(1, min(limits))

    def compile(self, jobs: Sequence[Job], deadline: float, finished: Callable[[int], None]) -> int:
        """Compile until all is done or time is up.

        Args:
            deadline: of `time.monotonic`; what is not done by then is left to the process that times.
            finished: told after each job how many are done.

        Returns:
            how many were done. A job that fails counts: its failure will be found, and told, by the check.
        """
        if not jobs:
            return 0
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        done, lock = [0], threading.Lock()

        def work() -> None:
            worker = self._take()
            try:
                while time.monotonic() < deadline:
                    request = self._request(waiting.get_nowait())
                    try:
                        limit = min(self._seconds, max(1.0, deadline - time.monotonic()))
                        for _ in worker.ask(request, limit):
                            pass
                    except WorkerDied:
                        worker.close()
                        worker = WorkerProcess()
                    with lock:
                        done[0] += 1
                        finished(done[0])
            except queue.Empty:
                pass
            finally:
                self._idle.put(worker)

        count = self.count(jobs)
        with ThreadPoolExecutor(count) as pool:
            for future in [pool.submit(work) for _ in range(count)]:
                future.result()
        return done[0]

    def _take(self) -> WorkerProcess:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return WorkerProcess()

    def _request(self, job: Job) -> Mapping[str, Any]:
        problem, tactic = job
        return {
            "do": "compile",
            "problem": problem.to_json(),
            "tactic": tactic.to_json(),
            "device": self._device,
            "backends": self._backends,
        }

    def close(self) -> None:
        """End the processes."""
        while not self._idle.empty():
            self._idle.get().close()


def _available_memory() -> int:
    """Bytes of host memory that are free or can be freed."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    return _HOST_BYTES
