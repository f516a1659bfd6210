"""Measuring tactics on the GPU at hand, for later decisions. Only when asked: nothing else here tunes.

For each problem: the default tactic and the most promising others run in a process of their own
(`dispatch.worker`), are checked against a float64 reference, and those that pass are timed in turn, in CUDA
graphs, with a cold L2. All kernels of a shape are compiled before, side by side (`dispatch.precompile`). Results
are saved after each problem, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

import torch

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Operand
from backends.operand import Nvfp4Tensor
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch import environment, store
from dispatch.candidates import Point, coarse_to_fine, next_m, plan
from dispatch.choice import choose
from dispatch.errors import ArgumentError, UnavailableError
from dispatch.execute import forget_plans, problem_of
from dispatch.isolation import WorkerDied, WorkerProcess, importable_backends
from dispatch.measured import Entry, table_problem, wanted_alpha
from dispatch.model import top_k_of
from dispatch.precompile import Compilers, Job
from dispatch.timing import Timing

#: Of a shape's time, what compiling ahead may take: checks and races take a fraction of a second per kernel.
COMPILE_SHARE = 0.7
#: With fewer kernels to compile, starting processes for that takes longer.
FEW_JOBS = 4
#: Samples of a tactic, each over all input sets.
ROUNDS = 16
# Seconds a single compilation and run may take before the worker counts as hanging, and one step of a race.
CHECK_SECONDS = 180.0
RACE_SECONDS = 30.0
SETUP_SECONDS = 120.0
# How far a run may exceed its budget: the worker is stopped then.
GRACE_SECONDS = 3.0


class InputsFailed(Exception):
    """The inputs of a problem could not be made; the message says so, and why."""


@dataclass
class TuneReport:
    """What a tuning run did; print it for a summary.

    Attributes:
        entries: new measurements and failures.
        done, resumed, left: points measured now, found measured already, and not reached. A point whose share
            of the time did not suffice for all candidates is done, marked in the store, and measured anew by
            the next run.
        impossible: points that cannot be tuned here, with the reason.
        seconds: wall time.
        phases: seconds of it by what was done: "inputs" (with starting the process), "compile" (side by side), "check"
            (with compiling what was not), "race".
        path: the user's table.
        unsaved: why results are not in it; "" if they are.
    """

    entries: list[Entry] = field(default_factory=list)
    done: list[Point] = field(default_factory=list)
    resumed: list[Point] = field(default_factory=list)
    left: list[Point] = field(default_factory=list)
    impossible: list[tuple[Point, str]] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    path: str = ""
    unsaved: str = ""

    def __str__(self) -> str:
        lines = [
            f"tuned {len(self.done)} problems in {self.seconds:.0f} s; {len(self.resumed)} were tuned already, "
            f"{len(self.left)} not reached" + (" (run again to go on)" if self.left else "")
        ]
        if self.phases:
            lines.append("  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items()))
        lines += [
            f"  m={p.problem.m} n={p.problem.n} k={p.problem.k}: not tuned: {why}"
            for p, why in self.impossible
        ]
        for point in self.done:
            problem = table_problem(point.problem)
            own = [e for e in self.entries if e.problem == problem and e.alpha == point.alpha]
            times = sorted((e for e in own if e.seconds is not None), key=lambda e: e.seconds)
            p = point.problem
            head = f"  m={p.m} n={p.n} k={p.k} experts={p.experts} b={p.b_layout} alpha={point.alpha}: "
            if times:
                second = f", next {times[1].seconds / times[0].seconds - 1:+.1%}" if len(times) > 1 else ""
                head += f"{times[0].tactic} {times[0].seconds * 1e6:.2f} us{second}"
            else:
                head += "no tactic ran"
            lines.append(head)
            lines += [f"    failed: {e.tactic}: {e.failure}" for e in own if e.seconds is None]
        if self.entries:
            saved = (
                f"not saved ({self.unsaved}); in use in this process"
                if self.unsaved
                else f"saved to {self.path}"
            )
            lines.append(saved)
        return "\n".join(lines)


def autotune(
    what: Union[Fc2Problem, Iterable[Fc2Problem], Nvfp4Tensor],
    b: Optional[Operand] = None,
    alpha: Optional[torch.Tensor] = None,
    *,
    budget_s: float = 300.0,
    ms: Optional[Sequence[int]] = None,
    alphas: Optional[Sequence[str]] = None,
    backends: Optional[Sequence[str]] = None,
    device: Optional[torch.device | str] = None,
    candidates: int = 12,
    refine: bool = True,
    again: bool = False,
    progress: bool = True,
) -> TuneReport:
    """Measure tactics on this GPU and let later decisions use them, in this process at once and in others by
    the store.

    Args:
        what, b, alpha: operands as `fc2` takes them, of which only shapes and layouts matter; or problems.
        budget_s: wall time to keep within, in seconds. What was not reached is reported, and found by the
            next run.
        ms: token counts to tune instead of each problem's own.
        alphas: forms of alpha to time, "topk:8" or "dense". Default the one decisions are made for
            (`wanted_alpha`).
        backends: names to include; default those that "auto" may take.
        device: default the operands' device, else the current CUDA device, or the CPU where there is none.
        candidates: tactics to run per problem at most; each backend's default is always among them.
        refine: tune further token counts where winners change and the wrong one would cost over
            `candidates.BUCKET_REGRET`.
        again: measure anew what the store already holds.
        progress: show a progress bar on stderr.

    Returns:
        What was done. On Ctrl-C, finished problems are kept and KeyboardInterrupt is raised.

    Raises:
        ArgumentError: a problem, form of alpha or backend that does not fit.
        UnavailableError: called during a CUDA graph capture.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnavailableError("autotune was called during a CUDA graph capture; tune before")
    if isinstance(what, Nvfp4Tensor):
        device = what.device
        problems = [problem_of(what, b, alpha, torch.bfloat16)]
    else:
        problems = [what] if isinstance(what, Fc2Problem) else list(what)
    device = _device(device)
    info = DeviceInfo.of(device)
    problems = [replace(p, device_type=info.type, capability=info.capability) for p in problems]
    if ms is not None:
        problems = [replace(p, m=m) for p in problems for m in ms]
    points = [Point(p, form) for p in dict.fromkeys(problems) for form in alphas or (wanted_alpha(p),)]
    for point in points:
        _check(point)
    for name in backends or ():
        if name not in registry.names():
            raise ArgumentError(f"backend is {name!r}; known: {', '.join(registry.names())}")
    tuner = _Tuner(str(device), info, budget_s, backends, candidates, again)
    return tuner.run(points, refine, progress)


@dataclass(frozen=True)
class Regret:
    """What a decision cost at a problem that was measured only to judge it.

    Attributes:
        problem, alpha: the point.
        source: of the decision.
        chosen, seconds: what was decided, and its time.
        best, best_seconds: the fastest of all candidates.
    """

    problem: Fc2Problem
    alpha: str
    source: str
    chosen: Tactic
    seconds: float
    best: Tactic
    best_seconds: float

    @property
    def regret(self) -> float:
        """Time of the chosen over the best, minus 1."""
        return self.seconds / self.best_seconds - 1


def judge(
    problems: Sequence[Fc2Problem],
    *,
    ms: Sequence[int],
    budget_s: float = 300.0,
    backends: Optional[Sequence[str]] = None,
    device: Optional[torch.device | str] = None,
    candidates: int = 12,
    progress: bool = True,
) -> list[Regret]:
    """How good decisions are: time all candidates at these token counts and compare with what is decided
    without that.

    Nothing is stored. Arguments are as of `autotune`; problems whose chosen tactic did not run are left out.
    """
    device = _device(device)
    info = DeviceInfo.of(device)
    points = [
        Point(replace(p, m=m, device_type=info.type, capability=info.capability), wanted_alpha(p))
        for p in problems
        for m in ms
    ]
    tuner = _Tuner(str(device), info, budget_s, backends, candidates, again=True, keep=False)
    report = tuner.run(points, refine=False, progress=progress)
    known = store.measured_for(info)
    found = []
    for point in report.done:
        problem = table_problem(point.problem)
        times = {
            e.tactic: e.seconds for e in report.entries if e.problem == problem and e.seconds is not None
        }
        decision = choose(point.problem, info, known)
        if decision.tactic in times:
            best = min(times, key=lambda t: times[t])
            found.append(
                Regret(
                    point.problem,
                    point.alpha,
                    decision.source,
                    decision.tactic,
                    times[decision.tactic],
                    best,
                    times[best],
                )
            )
    return found


def _device(device: Optional[torch.device | str]) -> torch.device:
    """The device named, with its index, or the default one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check(point: Point) -> None:
    if point.problem.m < 1:
        raise ArgumentError(f"m is {point.problem.m}; tuning takes at least 1 token")
    try:
        top_k_of(point.alpha, point.problem.experts)
    except ValueError as error:
        raise ArgumentError(str(error)) from None


class _Tuner:
    """One run: the queue of points, the clock and the worker."""

    def __init__(
        self,
        device: str,
        info: DeviceInfo,
        budget_s: float,
        backends: Optional[Sequence[str]],
        candidates: int,
        again: bool,
        keep: bool = True,
    ) -> None:
        self.device, self.info, self.backends, self.limit, self.again = (
            device,
            info,
            backends,
            candidates,
            again,
        )
        self.started = time.monotonic()
        self.deadline = self.started + budget_s
        self.worker: Optional[WorkerProcess] = None
        self.set_up: Optional[Point] = None
        self.keep = keep
        self.compilers = Compilers(device, info, importable_backends(), CHECK_SECONDS)
        self.precompiled: set[Fc2Problem] = set()
        self.report = TuneReport(path=str(store.user_path(info.name)))
        # Times by (shape, alpha), then m: what refinement looks at.
        self.times: dict[tuple, dict[int, dict[Tactic, float]]] = {}

    def run(self, points: Sequence[Point], refine: bool, progress: bool) -> TuneReport:
        from tqdm import tqdm

        waiting = coarse_to_fine(points)
        try:
            # None: silent where standard error is not a terminal; a log wants no redrawn lines.
            with tqdm(total=len(waiting), disable=None if progress else True, unit="problem") as bar:
                while waiting:
                    point = waiting.pop(0)
                    known = self._known(point)
                    if known and not self.again:
                        self.report.resumed.append(point)
                        self._note(point, known)
                    elif self._seconds_left() <= 0:
                        self.report.left.append(point)
                    else:
                        bar.set_postfix_str(f"m={point.problem.m} {point.alpha}")
                        try:
                            self._compile_ahead(point, waiting, bar)
                            self._tune(point, len(waiting) + 1, bar)
                        except (InputsFailed, UnavailableError) as error:
                            if self._seconds_left() > 0:
                                self.report.impossible.append((point, str(error)))
                            else:
                                self.report.left.append(point)
                    bar.update()
                    if refine and not waiting and self._seconds_left() > 0:
                        waiting = self._between()
                        bar.total += len(waiting)
                        bar.refresh()
        finally:
            self._stop()
            self.compilers.close()
            self.report.seconds = time.monotonic() - self.started
            forget_plans()
        return self.report

    def _seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def _known(self, point: Point) -> list[Entry]:
        """The user's valid entries of a point, of the backends asked for; none if the point was cut short."""
        table = store.measured_for(self.info).user
        wanted = table_problem(point.problem)
        found = [
            e for e in (table.entries if table else ()) if e.problem == wanted and e.alpha == point.alpha
        ]
        found = [e for e in found if not self.backends or e.tactic.backend in self.backends]
        return [] if all("cut" in e.notes for e in found) else found

    def _between(self) -> list[Point]:
        """Further points, where a bucket between two tuned token counts is too coarse."""
        found = []
        for (shape, alpha), times in self.times.items():
            m = next_m(times)
            if m is not None:
                found.append(Point(replace(shape, m=m), alpha))
        return found

    def _note(self, point: Point, entries: Iterable[Entry]) -> None:
        times = self.times.setdefault((replace(point.problem, m=1), point.alpha), {})
        times[point.problem.m] = {e.tactic: e.seconds for e in entries if e.seconds is not None}

    def _compile_ahead(self, point: Point, waiting: Sequence[Point], bar: Any) -> None:
        """Compile for all points of this one's shape, if it is the first."""
        shape = replace(point.problem, m=1)
        if shape in self.precompiled:
            return
        self.precompiled.add(shape)
        same = [p for p in waiting if replace(p.problem, m=1) == shape]
        self._precompile([p for p in (point, *same) if self.again or not self._known(p)], len(waiting) + 1, bar)

    def _precompile(self, points: Sequence[Point], points_left: int, bar: Any) -> None:
        """Compile what is likely to be raced at the points of one shape, in most of their share of the time."""
        known = store.measured_for(self.info)
        jobs: dict[Job, None] = {}
        for point in points:
            for tactic in plan(point, self.info, known, self.backends, self.limit):
                if not registry.get(tactic.backend).is_compiled(point.problem, tactic):
                    jobs[point.problem, tactic] = None
        if len(jobs) < FEW_JOBS or self.compilers.count(list(jobs)) < 2:
            return
        deadline = time.monotonic() + COMPILE_SHARE * self._seconds_left() * len(points) / points_left
        if self.worker is None:
            self.worker = WorkerProcess()  # it imports what it needs meanwhile
        with self._phase("compile"):
            self.compilers.compile(
                list(jobs), deadline, lambda done: bar.set_postfix_str(f"compiled {done}/{len(jobs)}")
            )

    def _tune(self, point: Point, points_left: int, bar: Any) -> None:
        """Measure one point with a fair share of the time left, twice over for a slow one, and save it."""
        self._ready(point)
        share = min(self.deadline, time.monotonic() + 2 * self._seconds_left() / points_left)
        failures: dict[Tactic, str] = {}
        passed: list[Tactic] = []
        seen = self.times.get((replace(point.problem, m=1), point.alpha), {})
        winners = [min(times, key=lambda t: times[t]) for times in seen.values() if times]
        tactics = plan(point, self.info, store.measured_for(self.info), self.backends, self.limit, winners)
        cut = {}
        for index, tactic in enumerate(tactics):
            if time.monotonic() > share and passed:
                cut = {"cut": f"{index} of {len(tactics)}"}
                break
            bar.set_postfix_str(f"m={point.problem.m} {point.alpha}, checking {index + 1}/{len(tactics)}")
            with self._phase("check"):
                answer = self._attempt(point, {"do": "check", "tactic": tactic.to_json()}, CHECK_SECONDS)
            if "ok" in answer:
                passed.append(tactic)
            elif self._seconds_left() <= 0:  # the clock's fault, not the tactic's
                self.report.left.append(point)
                return
            else:
                failures[tactic] = answer["failed"]
        with self._phase("race"):
            samples, conditions = self._race(point, list(passed), failures, share)
        if passed and not samples and self._seconds_left() <= 0:
            self.report.left.append(point)
            return
        entries = self._entries(point, samples, failures, {**conditions, **cut})
        self.report.entries += entries
        self.report.done.append(point)
        self._note(point, entries)
        if self.keep:
            self.report.unsaved = store.save(self.info.name, entries) or self.report.unsaved
            store.remember(self.info, entries)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.report.phases[name] = self.report.phases.get(name, 0.0) + time.monotonic() - began

    def _attempt(self, point: Point, request: Mapping[str, Any], seconds: float) -> dict:
        """The final answer to a request; a worker that died is replaced at the next one."""
        self._ready(point)
        try:
            answer = {}
            for answer in self.worker.ask(request, min(seconds, self._seconds_left() + GRACE_SECONDS)):
                pass
        except WorkerDied as death:
            answer = {"failed": str(death), "ended": True}
        if answer.get("ended"):
            self._stop()
        return answer

    def _ready(self, point: Point) -> None:
        """Make sure of a worker that is set up for the point. Raises InputsFailed if there can be none."""
        if self.worker is None or self.set_up != point:
            with self._phase("inputs"):
                self._set_up(point)

    def _set_up(self, point: Point) -> None:
        if self.worker is None:
            self.worker = WorkerProcess()
        request = {
            "do": "setup",
            "problem": point.problem.to_json(),
            "alpha": point.alpha,
            "device": self.device,
            "backends": importable_backends(),
        }
        answer = {}
        try:
            for answer in self.worker.ask(request, min(SETUP_SECONDS, self._seconds_left() + GRACE_SECONDS)):
                pass
        except WorkerDied as death:
            answer = {"failed": str(death), "ended": True}
        if answer.get("ended"):
            self._stop()
        if "failed" in answer:
            raise InputsFailed(f"no inputs: {answer['failed']}")
        self.set_up = point

    def _race(
        self, point: Point, racing: list[Tactic], failures: dict[Tactic, str], share: float
    ) -> tuple[dict[Tactic, list[float]], dict[str, Any]]:
        """Samples of the tactics that passed; one that kills the worker is failed and the rest race again."""
        while racing:
            samples: dict[Tactic, list[float]] = {}
            running, answer = 0, {}
            request = {
                "do": "race",
                "tactics": [t.to_json() for t in racing],
                "rounds": ROUNDS,
                "seconds": max(1.0, min(share, self.deadline) - time.monotonic()),
            }
            self._ready(point)
            try:
                for answer in self.worker.ask(
                    request, min(RACE_SECONDS, self._seconds_left() + GRACE_SECONDS)
                ):
                    running = answer.get("running", running)
                    if "sample" in answer:
                        index, seconds = answer["sample"]
                        samples.setdefault(racing[index], []).append(seconds)
            except WorkerDied as death:
                answer = {"failed": str(death), "ended": True}
            if answer.get("ended"):
                self._stop()
            if "ok" in answer:
                return samples, {"timer": answer["timer"], "l2": answer["l2"]}
            if self._seconds_left() <= 0:
                break
            failures[racing.pop(running)] = answer["failed"]
        return {}, {}

    def _entries(
        self,
        point: Point,
        samples: Mapping[Tactic, Sequence[float]],
        failures: Mapping[Tactic, str],
        conditions: Mapping[str, Any],
    ) -> list[Entry]:
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
        problem = table_problem(point.problem)
        entries = []
        for tactic in (*samples, *failures):
            notes = {**environment.conditions(registry.get(tactic.backend)), **conditions, "date": date}
            if tactic in failures:
                entries.append(
                    Entry(problem, point.alpha, tactic, None, failure=failures[tactic], notes=notes)
                )
                continue
            timing = Timing(tuple(samples[tactic]), notes["timer"], notes["l2"])
            notes["samples"] = len(timing.samples)
            entries.append(Entry(problem, point.alpha, tactic, timing.median, timing.spread, notes=notes))
        return entries

    def _stop(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker, self.set_up = None, None
