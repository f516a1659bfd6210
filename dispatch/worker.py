"""The process that runs tuning candidates: one that crashes, hangs or poisons the GPU takes nobody with it.

`python -m dispatch.worker` reads requests from stdin and answers on what was stdout, JSON objects one a line:

- `{"do": "setup", "problem", "alpha", "device", "backends"}` makes inputs and the float64 reference;
- `{"do": "check", "tactic"}` compiles and runs one tactic, twice, compares with the reference and bitwise, and
  captures it as it is to be timed;
- `{"do": "race", "tactics", "rounds", "seconds"}` times tactics in turn and answers with one `sample` after
  the other;
- `{"do": "compile", "problem", "tactic", "device", "backends"}` only compiles, so that a process that times finds
  the kernel in the backend's cache.

Every request ends with `{"ok": ...}` or `{"failed": reason}`, with `"ended": true` if the process ends with
it. Before a tactic runs in a race, `{"running": index}` says so: whoever finds the process dead knows whom to
blame.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, Iterator, Mapping, Optional, Sequence

import torch

from backends import registry
from backends.interface import Fc2Backend, Operand
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch import check, inputs
from dispatch.measured import OUT_OF_MEMORY
from dispatch.model import active_share
from dispatch.timing import GraphRunner, HostRunner, Launch, Runner, cold_sets

#: In a race: after so many rounds, a tactic whose fastest sample is slower than so many times the best is not timed
#: further.
_SCREENING = {1: 3.0, 4: 1.3}
# Share of the free device memory that copies of the weights may take.
_MEMORY_SHARE = 0.5
_SEED = 20260825


class Weights:
    """B of one shape on the device, with copies to rotate through; kept between problems, since making it
    takes seconds."""

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.plain = inputs.random_operand(n, k, inputs.WEIGHT_STD, inputs.generator(device, _SEED))
        self._layout = ""
        self._copies: list[Operand] = []

    def arranged(self, layout: str, count: int) -> list[Operand]:
        """Up to `count` copies in a layout, as many as a share of the free memory holds, one at least."""
        if layout != self._layout:
            self._copies = []  # free their memory first
            self._copies, self._layout = [self._arrange(layout)], layout
        first, device = self._copies[0], self.plain.device
        room = 1
        if device.type == "cuda":
            room = int(torch.cuda.mem_get_info(device)[0] * _MEMORY_SHARE // max(1, first.nbytes))
        for _ in range(min(count - len(self._copies), room)):
            self._copies.append(replace(first, data=first.data.clone(), scale=first.scale.clone()))
        return self._copies[:count]

    def _arrange(self, layout: str) -> Operand:
        owner, _, form = layout.partition("/")
        if not form:
            return self.plain.to_layout(layout)
        prepared = registry.get(owner).prepare(self.plain)
        if prepared.layout != layout:
            raise ValueError(
                f"backend {owner!r} prepares {prepared.layout!r}, and the problem has {layout!r}"
            )
        return prepared


@dataclass
class Bench:
    """Inputs on the device for one problem and form of alpha, and what is right for the first set."""

    problem: Fc2Problem
    device: torch.device
    sets: Sequence[inputs.TokenSet]
    weights: Sequence[Operand]
    outs: Sequence[torch.Tensor]
    reference: check.Reference
    runners: dict[Tactic, Runner] = field(default_factory=dict)
    pool: Optional[tuple[int, int]] = None

    @classmethod
    def of(cls, problem: Fc2Problem, alpha: str, weights: Weights) -> Bench:
        device = weights.plain.device
        source = inputs.generator(device, _SEED + problem.m)
        touched = problem.weight_bytes * active_share(problem, alpha) + problem.m * problem.k * 9 // 16
        # Two sets at least: a call must not find what it read itself a moment ago.
        copies = weights.arranged(problem.b_layout, cold_sets(device, touched))
        count = max(2, len(copies))
        sets = inputs.token_sets(
            inputs.AlphaForm.parse(alpha), problem.m, problem.k, problem.experts, source, count
        )
        reference = check.references(sets[:1], weights.plain)[0]
        sets = [replace(s, a=s.a.to_layout(problem.a_layout)) for s in sets]
        outs = [torch.empty((problem.m, problem.n), dtype=problem.out_dtype, device=device) for _ in sets]
        # One memory pool for the graphs of all tactics, or the last ones would find no room beside the others'.
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        return cls(problem, device, sets, copies, outs, reference, pool=pool)

    def launches(self, backend: Fc2Backend, tactic: Tactic) -> list[Launch]:
        """One call per input set."""
        return [
            lambda i=i, s=s: backend.run(
                self.problem, tactic, s.a, self.weights[i % len(self.weights)], s.alpha, self.outs[i]
            )
            for i, s in enumerate(self.sets)
        ]

    def check(self, backend: Fc2Backend, tactic: Tactic) -> dict:
        """Run the tactic twice on the first set, then make it ready to be timed: `ok` if both results are right and
        equal, else what is wrong."""
        support = backend.can_implement(self.problem, tactic)
        if not support:
            return {"failed": support.reason}
        launch, out = self.launches(backend, tactic)[0], self.outs[0]
        first: Optional[torch.Tensor] = None
        for _ in range(2):
            out.fill_(float("nan"))
            if not backend.is_compiled(self.problem, tactic):
                backend.compile(self.problem, tactic)
            launch()
            over_bar = check.errors([out], [self.reference]).over_bar
            if not over_bar <= 1.0:
                return {"failed": f"wrong result: {over_bar:.3g} times the accuracy bar"}
            if first is not None and not torch.equal(first, out):
                return {"failed": "two runs on the same inputs differ"}
            first = out.clone()
        self.runner(backend, tactic)
        return {"ok": True}

    def runner(self, backend: Fc2Backend, tactic: Tactic) -> Runner:
        """The tactic as deployed: in a CUDA graph, over all input sets; on a CPU by the host's clock."""
        if tactic in self.runners:
            return self.runners[tactic]
        if not backend.is_compiled(self.problem, tactic):
            backend.compile(self.problem, tactic)
        launches = self.launches(backend, tactic)
        for launch in launches:
            launch()
        on_gpu = self.device.type == "cuda"
        runner = GraphRunner(launches, self.device, self.pool) if on_gpu else HostRunner(launches)
        self.runners[tactic] = runner
        return runner


class Worker:
    """The requests, as methods that yield answers."""

    def __init__(self) -> None:
        self._bench: Optional[Bench] = None
        self._weights: Optional[Weights] = None

    def setup(self, request: Mapping[str, Any]) -> Iterator[dict]:
        device = _prepare_process(request)
        self._bench = None  # its memory is needed
        problem = Fc2Problem.from_json(request["problem"])
        if self._weights is None or self._weights.plain.shape != (problem.n, problem.k):
            self._weights = None
            self._weights = Weights(problem.n, problem.k, device)
        self._bench = Bench.of(problem, request["alpha"], self._weights)
        yield {"ok": True, "sets": len(self._bench.sets)}

    def compile(self, request: Mapping[str, Any]) -> Iterator[dict]:
        _prepare_process(request)
        backend, tactic = _backend_and_tactic(request["tactic"])
        problem = Fc2Problem.from_json(request["problem"])
        if not backend.is_compiled(problem, tactic):
            backend.compile(problem, tactic)
        yield {"ok": True}

    def check(self, request: Mapping[str, Any]) -> Iterator[dict]:
        yield self._bench.check(*_backend_and_tactic(request["tactic"]))

    def race(self, request: Mapping[str, Any]) -> Iterator[dict]:
        deadline = time.monotonic() + request["seconds"]
        runners: dict[int, Runner] = {}
        for index, record in enumerate(request["tactics"]):
            yield {"running": index}
            runners[index] = self._bench.runner(*_backend_and_tactic(record))
        samples: dict[int, list[float]] = {index: [] for index in runners}
        for turn in range(-1, request["rounds"]):  # the first round warms up
            for index in list(runners) if turn % 2 else reversed(runners):
                yield {"running": index}
                sample = runners[index]()
                if turn >= 0:
                    samples[index].append(sample)
                    yield {"sample": [index, sample]}
            if turn + 1 in _SCREENING:
                limit = _SCREENING[turn + 1] * min(min(samples[index]) for index in runners)
                runners = {i: r for i, r in runners.items() if min(samples[i]) <= limit}
            if turn + 1 >= max(_SCREENING) and time.monotonic() > deadline:
                break
        method = "graph" if self._bench.device.type == "cuda" else "host"
        yield {"ok": True, "timer": method, "l2": "cold" if method == "graph" else "warm"}


def _prepare_process(request: Mapping[str, Any]) -> torch.device:
    """Register the backends that only the parent knows, and take the device."""
    for module, cls, name in request["backends"]:
        if name not in registry.names():
            registry.register(getattr(importlib.import_module(module), cls)())
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _backend_and_tactic(record: Mapping[str, Any]) -> tuple[Fc2Backend, Tactic]:
    backend = registry.get(record["backend"])
    return backend, backend.tactic_type.from_json(record)


def serve() -> None:
    """Answer until stdin ends."""
    # What kernels and compilers print goes to stderr; the answers have the original stdout for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            for answer in getattr(worker, request["do"])(request):
                answers.write(json.dumps(answer) + "\n")
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            answers.write(json.dumps({"failed": OUT_OF_MEMORY}) + "\n")
        except Exception as error:
            ended = not _usable()
            answer = {"failed": f"{type(error).__name__}: {error}".strip()[:500], "ended": ended}
            answers.write(json.dumps(answer) + "\n")
            if ended:
                os._exit(1)


def _usable() -> bool:
    """Whether the CUDA context survived, which an illegal access destroys."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    serve()
