"""The shoot-out itself: all contestants on the same inputs, timed in turn, checked on the buffers that were timed."""
from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Callable, Iterator, Optional, Sequence

import torch

import dispatch
from backends import registry
from backends.device import DeviceInfo
from backends.interface import Operand
from backends.operand import Nvfp4Tensor
from backends.problem import Fc2Problem
from bench.clocks import ClockReader, Clocks
from bench.contestants import Contestant, absent_backends, line_up
from bench.cupti import KernelTrace
from bench.environment import ceilings, describe, roofline
from bench.options import Options
from bench.records import CTRL_C, Absent, Results, Row
from bench.stats import summarize
from bench.timing import Runner, choose_method, make_runner
from dispatch.check import Reference, errors, references
from dispatch.hardware import Gpu, floor_seconds
from dispatch.inputs import (
    WEIGHT_STD,
    AlphaForm,
    TokenSet,
    copy_operand,
    generator,
    random_operand,
    rotation,
    token_sets,
)
from dispatch.timing import Flush, interleave

#: Fewer samples than these make no row when a run is interrupted or its budget is small.
LEAST_ITERATIONS = 5
#: A clock reading costs about a millisecond, in which the GPU idles: one for every so many samples.
_CLOCK_EVERY = 10

Report = Callable[[str, float], None]
Keep = Callable[[Results], None]


@dataclass
class _Entry:
    """A contestant while it is being measured.

    Attributes:
        launches, outs: a call and its output for every input set.
        estimate: seconds of a call, about.
        calls: calls in one sample of the runner.
    """

    contestant: Contestant
    problem: Fc2Problem
    launches: list[Callable[[], None]]
    outs: list[torch.Tensor]
    estimate: float = 0.0
    runner: Optional[Runner] = None
    calls: int = 1
    clocks: Optional[Clocks] = None


def run(
    options: Options, report: Report = lambda text, share: None, keep: Keep = lambda results: None
) -> Results:
    """Measure everything the options ask for.

    A first KeyboardInterrupt ends the measuring; what there is by then is checked and returned, marked as interrupted.
    So is what there is when the device fails.

    Args:
        report: told what is being done, and the share of the whole that is done.
        keep: given what there is after each token count, so that a killed process loses one token count at most.

    Raises:
        UnavailableMethod: the timing method does not work here.
    """
    method = choose_method(options.timer, options.device)
    results = Results(describe(options.device))
    try:
        with torch.no_grad():
            for row_or_absent in _measure(options, method, results, report, keep):
                (results.rows if isinstance(row_or_absent, Row) else results.absent).append(row_or_absent)
    except KeyboardInterrupt:
        results.interrupted = CTRL_C
    except RuntimeError as error:  # such as an illegal access, after which the device answers nothing more
        results.interrupted = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return results


def _measure(
    options: Options, method: str, results: Results, report: Report, keep: Keep
) -> Iterator[Row | Absent]:
    device, shape = options.device, options.shape
    info = DeviceInfo.of(device)
    yield from absent_backends(options.backends, info)
    report("measuring the device's ceilings", 0.0)
    measured = ceilings(device)
    gpu = roofline(info, measured)
    flush = Flush(device) if options.cold and device.type == "cuda" else None
    clocks = ClockReader(device)
    results.environment.update(
        shape=shape.name,
        seed=options.seed,
        ceilings_measured=measured,
        ceilings=gpu and {"read_bandwidth": gpu.read_bandwidth, "mma_flops": gpu.mma_flops, "source": gpu.source},
        clocks=clocks.reason or "read through NVML",
    )
    report("generating weights", 0.0)
    source = generator(device, options.seed)
    weights = random_operand(shape.n, shape.k, WEIGHT_STD, source)
    forms = _weight_forms(weights, options, info)
    settings = [(form, m) for form in options.alphas for m in options.ms]
    seen: set[Absent] = set()
    for index, (alpha_form, m) in enumerate(settings):
        stage = _Stage(options, method, info, gpu, flush, clocks, forms, weights)
        progress = lambda text, share, at=index: report(text, (at + share) / len(settings))  # noqa: E731
        for found in stage.measure(alpha_form, m, source, progress):
            if isinstance(found, Row) or found not in seen:
                yield found
            if isinstance(found, Absent):
                seen.add(found)
        keep(results)
        if stage.interrupted:
            raise KeyboardInterrupt


def _weight_forms(b: Nvfp4Tensor, options: Options, info: DeviceInfo) -> dict[str, list[Operand]]:
    """Copies of the weights in every form that some backend reads, by `b_layout`."""
    names = [name for name in options.backends if registry.get(name).is_supported(info)]
    prepared = {}
    for name in names:
        plain = Fc2Problem(1, *b.shape, options.shape.experts, b_layout=b.layout, capability=info.capability)
        layout = registry.get(name).prepared_layout(plain)
        if layout:
            prepared[layout] = name
    count = options.copies or _copies(b, len(prepared), "torch" in names, options)
    forms: dict[str, list[Operand]] = {b.layout: [b, *(copy_operand(b) for _ in range(count - 1))]}
    for layout, name in prepared.items():
        forms[layout] = [registry.get(name).prepare(copy) for copy in forms[b.layout]]
    return forms


def _copies(b: Nvfp4Tensor, prepared: int, cached: bool, options: Options) -> int:
    """As many copies as half the free memory takes, up to 4; the torch baseline adds 2 bytes a value to each."""
    if options.device.type != "cuda" or not options.cold:
        return 1
    each = b.nbytes * (1 + prepared) + (2 * b.shape[0] * b.shape[1] if cached else 0)
    return max(1, min(4, torch.cuda.mem_get_info(options.device)[0] // 2 // each))


@dataclass
class _Stage:
    """One token count with one form of alpha."""

    options: Options
    method: str
    info: DeviceInfo
    gpu: Optional[Gpu]
    flush: Optional[Flush]
    clocks: ClockReader
    forms: dict[str, list[Operand]]
    weights: Nvfp4Tensor
    interrupted: bool = False

    def measure(
        self, alpha_form: AlphaForm, m: int, source: torch.Generator, report: Report
    ) -> Iterator[Row | Absent]:
        report(f"M={m} {alpha_form}: inputs and reference", 0.0)
        sets = self._token_sets(alpha_form, m, source)
        expected = references(sets, self.weights)
        entries = []
        for contestant, problem in self._contestants(m, alpha_form, sets[0]):
            if isinstance(contestant, Absent):
                yield contestant
                continue
            report(f"M={m} {alpha_form}: first run of {contestant.label}", 0.05)
            entry = self._entry(contestant, problem, sets)
            try:
                entry.estimate = _first_runs(entry.launches)
                entries.append(entry)
            except (RuntimeError, dispatch.Fc2Error) as error:
                yield Absent(f"{contestant.label} at M={m}", str(error).strip().splitlines()[0])
        samples, warmup = self._time(entries, f"M={m} {alpha_form}", report)
        for entry in entries:
            taken = samples[entry.contestant.label]
            if len(taken) >= min(LEAST_ITERATIONS, self.options.iterations):
                yield self._row(entry, alpha_form, sets, expected, taken, warmup)

    def _token_sets(self, alpha_form: AlphaForm, m: int, source: torch.Generator) -> list[TokenSet]:
        k, experts = self.weights.shape[1], self.options.shape.experts
        first = token_sets(alpha_form, m, k, experts, source, 1)
        if not self.options.cold or self.options.device.type != "cuda":
            return first
        touched = self.weights.nbytes * first[0].active_experts / experts + first[0].a.nbytes
        count = rotation(touched, self.options.device, len(self.forms[self.weights.layout]))
        return first + token_sets(alpha_form, m, k, experts, source, count - 1)

    def _contestants(
        self, m: int, alpha_form: AlphaForm, tokens: TokenSet
    ) -> Iterator[tuple[Contestant | Absent, Fc2Problem]]:
        options, shape = self.options, self.options.shape
        for form, operands in self.forms.items():
            problem = Fc2Problem(
                m,
                shape.n,
                shape.k,
                shape.experts,
                options.out_dtype,
                b_layout=form,
                device_type=self.info.type,
                capability=self.info.capability,
            )
            try:
                favourite = dispatch.explain(tokens.a, operands[0], tokens.alpha, out_dtype=options.out_dtype).tactic
            except dispatch.UnavailableError:
                favourite = None
            found, absent = line_up(problem, self.info, options, alpha_form, favourite)
            yield from ((entry, problem) for entry in (*found, *absent))

    def _entry(self, contestant: Contestant, problem: Fc2Problem, sets: Sequence[TokenSet]) -> _Entry:
        copies, tactic, dtype = self.forms[contestant.form], contestant.tactic, self.options.out_dtype
        outs = [torch.empty((problem.m, problem.n), dtype=dtype, device=self.options.device) for _ in sets]
        launches = []
        for index, (tokens, out) in enumerate(zip(sets, outs)):
            b = copies[index % len(copies)]
            launches.append(
                lambda tokens=tokens, b=b, out=out: dispatch.fc2(
                    tokens.a, b, tokens.alpha, tactic.backend, out_dtype=dtype, out=out, tactic=tactic
                )
            )
        return _Entry(contestant, problem, launches, outs)

    def _time(self, entries: Sequence[_Entry], title: str, report: Report) -> tuple[dict[str, list[float]], int]:
        """Samples in seconds by label, of calls into poisoned outputs, and the warm-up rounds before them."""
        options, device = self.options, self.options.device
        samples: dict[str, list[float]] = {entry.contestant.label: [] for entry in entries}
        by_label = {entry.contestant.label: entry for entry in entries}
        with KernelTrace() if self.method == "cupti" else contextlib.nullcontext() as trace:
            for entry in entries:
                entry.runner, entry.calls = make_runner(
                    self.method, entry.launches, device, entry.estimate, self.flush, trace
                )
            a_round = sum(entry.estimate * entry.calls for entry in entries)
            rounds = min(options.iterations, max(LEAST_ITERATIONS, int(options.budget / max(a_round, 1e-9))))
            warmup = options.warmup if rounds == options.iterations else min(options.warmup, max(1, rounds // 5))
            total = rounds * max(1, len(entries))

            def after(label: str, seconds: float) -> None:
                samples[label].append(seconds)
                if len(samples[label]) % _CLOCK_EVERY == 1:
                    seen = self.clocks.read()
                    by_label[label].clocks = seen.merge(by_label[label].clocks) if seen else None
                report(f"{title}: {label}", 0.1 + 0.9 * sum(map(len, samples.values())) / total)

            runners = {label: entry.runner for label, entry in by_label.items()}
            try:
                interleave(runners, warmup, warmup=0)
                for entry in entries:
                    for out in entry.outs:
                        out.fill_(torch.nan)
                interleave(runners, rounds, warmup=0, after=after)
            except KeyboardInterrupt:
                self.interrupted = True
        return samples, warmup

    def _row(
        self,
        entry: _Entry,
        alpha_form: AlphaForm,
        sets: Sequence[TokenSet],
        expected: Sequence[Reference],
        seconds: Sequence[float],
        warmup: int,
    ) -> Row:
        problem, runner = entry.problem, entry.runner
        # Methods that time single calls may not have come round to every set.
        ran = range(len(sets))
        if runner.method != "graph":
            ran = sorted({(warmup + index) % len(sets) for index in range(len(seconds))})
        found = errors([entry.outs[i] for i in ran], [expected[i] for i in ran])
        active = sum(tokens.active_experts for tokens in sets) / len(sets)
        pairs = sum(tokens.pairs for tokens in sets) / len(sets)
        busy = getattr(runner, "busy", None)
        return Row(
            problem=problem,
            alpha=str(alpha_form),
            active_experts=active,
            pairs=pairs,
            tactic=entry.contestant.tactic.to_json(),
            label=entry.contestant.label,
            timer=runner.method,
            l2="uncontrolled" if self.info.type != "cuda" else ("cold" if self.options.cold else "warm"),
            warmup=warmup,
            iterations=len(seconds) * entry.calls,
            time=summarize([second * 1e6 for second in seconds]),
            busy_us=summarize([b * 1e6 for b in busy[-len(seconds) :]]).median if busy else None,
            error_over_bar=found.over_bar,
            relative_error=found.relative,
            reproducible=_repeats(entry, ran[0]),
            floor_us=self.gpu and floor_seconds(problem, self.gpu, active, pairs) * 1e6,
            dense_floor_us=self.gpu and floor_seconds(problem, self.gpu) * 1e6,
            auto=entry.contestant.auto,
            clocks=entry.clocks,
        )


def _first_runs(launches: Sequence[Callable[[], None]]) -> float:
    """Run each launch once, the first one twice: compiles, fills caches, allocates; seconds of the second time."""
    for launch in launches:
        launch()
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    synchronize()
    start = time.perf_counter()
    launches[0]()
    synchronize()
    return time.perf_counter() - start


def _repeats(entry: _Entry, index: int) -> bool:
    """Whether one more call gives the bits that the timed call left."""
    out = entry.outs[index]
    before = out.clone()
    out.fill_(torch.nan)
    entry.launches[index]()
    return torch.equal(before.view(torch.uint8), out.view(torch.uint8))
