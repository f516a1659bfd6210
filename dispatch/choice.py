"""Which backend and tactic run a problem, and why: a value computed without touching tensors or a GPU.

How "auto" decides, in this order:

1. Rejected are backends that the device or the installed packages cannot run, tactics that cannot implement
   the problem, and tactics that failed while tuning this shape.
2. Inside a backend: the rule, if one applies (`_rules`), unless the user's own tuning of this very problem
   found something faster; else the best measured tactic at this m; else, between measured token counts, times
   interpolated per tactic; else the model, held against what was measured of the shape; else the backend's
   default tactic.
3. Between backends: the first in registry order stays unless another one is known to be faster.
4. "Faster" means by more than `TIE_MARGIN`. Inside the margin the incumbent (rule or default tactic) wins,
   then the fixed order of candidates: ranks with the same tables agree without talking.

alpha lies on the device and is never read here. Times are taken for rows with `assumed_top_k(experts)`
nonzeros, the usual routed case; where only dense times were measured, those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Iterable, Mapping, Optional, Sequence, Union

from backends import registry
from backends.device import DeviceInfo
from backends.interface import SUPPORTED, Fc2Backend, Support
from backends.problem import Fc2Problem, dtype_name
from backends.tactic import Tactic
from dispatch.errors import ArgumentError, ArgumentTypeError, UnavailableError
from dispatch.hardware import floor_seconds, gpu_of
from dispatch.measured import Estimate, Evidence, Measured

#: A time must be lower by more than this share to displace an incumbent. Published reports of ranks that
#: diverge on ties are about differences of 0.08 to 2%.
TIE_MARGIN = 0.02

#: Beyond the token counts that were measured, a tactic never measured at this shape must be predicted to be
#: faster by more than this share to displace those that were: several times the model's own error
#: (tests/test_model.py).
MODEL_MARGIN = 0.25

#: Knows nothing.
NOTHING = Measured()


@dataclass(frozen=True)
class Pin:
    """Some fields of a tactic that a caller fixes; the others stay open.

    Attributes:
        backend: whose tactic; "" where the fields alone say so.
        values: (field, value) in the order given.
    """

    backend: str
    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, tactic: Union[Tactic, Pin, Mapping[str, Any]]) -> Pin:
        """From a tactic, or a mapping of some of its fields, with "backend" or without. Raises
        ArgumentTypeError."""
        if isinstance(tactic, Pin):
            return tactic
        if isinstance(tactic, Tactic):
            tactic = tactic.to_json()
        if not isinstance(tactic, Mapping):
            raise ArgumentTypeError(
                f"tactic is {type(tactic).__name__}; it takes a Tactic, or a mapping of some fields of one such as "
                "{'backend': 'cute', 'tile_n': 64}"
            )
        values = dict(tactic)
        return cls(str(values.pop("backend", "")), tuple(values.items()))

    @classmethod
    def parse(cls, text: str) -> Pin:
        """From what `str(tactic)` prints, in whole or in part: "cute(tile_m=128,tile_n=64)", "cute" or
        "split_k=2".

        Raises:
            ArgumentError: the text is something else.
        """
        match = re.fullmatch(r"\s*(?:([A-Za-z_]\w*)\s*(?:\((.*)\))?|(.*=.*))\s*", text, re.DOTALL)
        if match is None:
            raise ArgumentError(
                f"tactic is {text!r}; it takes text such as 'cute(tile_m=128,tile_n=64)' or 'split_k=2'"
            )
        values = []
        for item in filter(None, (part.strip() for part in (match[2] or match[3] or "").split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not name.isidentifier():
                raise ArgumentError(f"tactic is {text!r}; {item!r} in it is not 'field=value'")
            number = int(value) if re.fullmatch(r"-?\d+", value) else value
            values.append((name, {"true": True, "false": False}.get(value.lower(), number)))
        return cls(match[1] or "", tuple(values))

    def to_json(self) -> dict[str, Any]:
        return {"backend": self.backend, **dict(self.values)} if self.backend else dict(self.values)

    def matches(self, tactic: Tactic) -> bool:
        return all(getattr(tactic, name) == value for name, value in self.values)

    def applied_to(self, tactic: Tactic) -> Tactic:
        """The tactic with the pinned fields replaced. Raises ValueError for an unknown field or a wrong
        type."""
        return type(tactic).from_json({**tactic.to_json(), **dict(self.values)})

    def __str__(self) -> str:
        shown = ",".join(f"{name}={value}" for name, value in self.values)
        return f"{self.backend}({shown})" if self.backend else shown


#: What `tactic=` takes.
TacticLike = Union[None, Tactic, Pin, Mapping[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One way to run the problem that was considered.

    Attributes:
        backend, tactic: what; tactic is None where the whole backend was rejected.
        estimate: its expected time, None where unknown.
        rejected: why it cannot be taken; "" where it could.
        incumbent: "rule" or "default" where it is the one that wins ties, else "".
    """

    backend: str
    tactic: Optional[Tactic]
    estimate: Optional[Estimate] = None
    rejected: str = ""
    incumbent: str = ""

    @property
    def seconds(self) -> float:
        return self.estimate.seconds if self.estimate else float("inf")

    @property
    def evidence(self) -> str:
        """Where it was measured: "here", "both sides", "one side" or, nowhere, ""."""
        return self.estimate.evidence if self.estimate else ""


@dataclass(frozen=True)
class Decision:
    """The backend and tactic chosen for a problem, and everything that was considered. Print it for a report.

    Attributes:
        problem, device: what was decided on.
        backend: name of the chosen backend.
        tactic: one of that backend's tactics.
        source: "forced" (the caller named the tactic), "rule", "measured" (this problem on this GPU),
            "interpolated" (between measured problems), "model" or "default".
        seconds: predicted time; None where nothing is known.
        alpha: form of alpha that predictions are for.
        candidates: all that were considered, rejected ones included; the chosen one is first.
        notes: what to know about this decision; a sentence each.
        warning: a sentence if this is a slow path that the caller can leave, else "".
    """

    problem: Fc2Problem
    device: DeviceInfo
    backend: str
    tactic: Tactic
    source: str
    seconds: Optional[float] = None
    alpha: str = ""
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    warning: str = ""

    @property
    def rejected(self) -> tuple[tuple[str, str], ...]:
        """(backend, reason) of every backend that cannot run the problem."""
        return tuple((c.backend, c.rejected) for c in self.candidates if c.tactic is None)

    @property
    def runner_up(self) -> Optional[Candidate]:
        """The fastest of the others with a known time; None if there is none."""
        others = [c for c in self.candidates[1:] if c.estimate and not c.rejected]
        return min(others, key=lambda c: c.seconds, default=None)

    @property
    def margin(self) -> Optional[float]:
        """Runner-up's time over the chosen one's, minus 1; None where either is unknown."""
        runner_up = self.runner_up
        return None if runner_up is None or self.seconds is None else runner_up.seconds / self.seconds - 1

    def line(self) -> str:
        """One line: problem, choice, source and predicted time."""
        p = self.problem
        time = "" if self.seconds is None else f", {_us(self.seconds)} predicted"
        return (
            f"fc2 m={p.m} n={p.n} k={p.k} experts={p.experts} {dtype_name(p.out_dtype)} a={p.a_layout} b={p.b_layout} "
            f"on {self.device.name}: {self.tactic} ({self.source}{time})"
        )

    def verdict(self, candidate: Candidate) -> str:
        """Why a candidate was not taken."""
        if candidate.rejected:
            return candidate.rejected
        if candidate.estimate is None:
            return "no time known"
        text = f"{_us(candidate.seconds)} {_origin(candidate.estimate)}"
        if self.seconds is None:
            return f"{text}; the chosen one has no known time and comes first in the fixed order"
        ratio = candidate.seconds / self.seconds - 1
        if abs(ratio) <= TIE_MARGIN:
            return f"{text}: a tie, and the chosen one comes first"
        if ratio > 0:
            return f"{text}: {ratio:.0%} slower"
        return f"{text}: {-ratio:.0%} less, but {_PRECEDENCE[self.source]}"

    def __str__(self) -> str:
        gpu = gpu_of(self.device)
        chosen = self.candidates[0].estimate if self.candidates else None
        lines = [self.line()]
        if chosen is not None:
            lines.append(f"  time: {_us(chosen.seconds)} {_origin(chosen)}, for alpha {chosen.alpha}")
        if gpu is not None:
            lines.append(
                f"  floor: {_us(floor_seconds(self.problem, gpu))} if every weight is read ({gpu.source})"
            )
        if self.margin is not None:
            lines.append(f"  runner-up: {self.runner_up.tactic}, {self.margin:+.1%}")
        lines += [f"  note: {text}" for text in (*self.notes, *([self.warning] if self.warning else []))]
        lost = sorted((c for c in self.candidates[1:] if c.estimate), key=lambda c: c.seconds)
        refused = [c for c in self.candidates[1:] if c.rejected]
        lines += [f"  not {c.tactic or c.backend}: {self.verdict(c)}" for c in (*lost[:_SHOWN], *refused)]
        if len(lost) > _SHOWN:
            lines.append(f"  not {len(lost) - _SHOWN} more, from {_us(lost[_SHOWN].seconds)} up")
        unknown = sum(not c.estimate and not c.rejected for c in self.candidates[1:])
        if unknown:
            lines.append(f"  not {unknown} more tactics, of which no time is known")
        return "\n".join(lines)


# Candidates with a known time that a printed decision lists.
_SHOWN = 6
_PRECEDENCE = {
    "forced": "the caller named the chosen one",
    "rule": "the rule holds until tuning on this GPU measures this problem",
    "measured": "not measured at this very problem, as the chosen one is",
    "interpolated": "with less evidence than the chosen one has",
    "model": "with less evidence than the chosen one has",
}


def choose(
    problem: Fc2Problem,
    device: DeviceInfo,
    measured: Measured = NOTHING,
    backend: str = "auto",
    tactic: TacticLike = None,
    *,
    complete: bool = False,
) -> Decision:
    """Decide who runs `problem` on `device`; the module's docstring says how.

    A named backend, and the fields of a tactic, are honoured or refused, never replaced.

    Args:
        measured: what is known of this GPU.
        backend: "auto" or a name.
        tactic: a tactic, or some fields of one; see `Pin.of`.
        complete: list every tactic in the decision's candidates, also those that could not have been taken.
            The decision is the same; it takes milliseconds instead of microseconds.

    Raises:
        ArgumentError: unknown backend, or a tactic that is not one of it.
        ArgumentTypeError: tactic is of a type that `Pin.of` does not take.
        UnavailableError: what was asked for cannot run; or nothing can. The message holds every reason.
    """
    pin = None if tactic is None else Pin.of(tactic)
    names = _names(backend, pin)
    evidence = measured.evidence(problem)
    rejected: list[Candidate] = []
    considered: list[Candidate] = []
    best: Optional[tuple[Candidate, str]] = None
    for name in names:
        chosen = registry.get(name)
        support = (
            chosen.is_automatic(device) if backend == "auto" and pin is None else chosen.is_supported(device)
        )
        if not support:
            rejected.append(Candidate(name, None, rejected=support.reason))
            continue
        candidates = _candidates(chosen, device, evidence, pin, complete)
        taken = _pick(candidates, evidence, pin)
        if taken is None:
            rejected.append(Candidate(name, None, rejected=candidates[0].rejected))
            rejected += candidates[1:]
            continue
        considered += candidates
        if best is None or _beats(taken[0], best[0]):
            best = taken
    if best is None:
        raise UnavailableError(_nothing_runs(names, rejected, backend, pin))
    taken, source = best
    others = [c for c in considered if c is not taken]
    return Decision(
        problem=problem,
        device=device,
        backend=taken.backend,
        tactic=taken.tactic,
        source=source,
        seconds=taken.estimate.seconds if taken.estimate else None,
        alpha=taken.estimate.alpha if taken.estimate else evidence.alpha,
        candidates=(taken, *others, *rejected),
        notes=_notes(taken, source, problem, measured),
        warning=_warning(taken, problem, device, rejected),
    )


def _names(backend: str, pin: Optional[Pin]) -> list[str]:
    """The backends to consider, in order."""
    known = registry.names()
    for name in (backend, pin.backend if pin else ""):
        if name not in ("", "auto", *known):
            raise ArgumentError(f"backend is {name!r}; known: {', '.join(['auto', *known])}")
    if pin is None:
        return known if backend == "auto" else [backend]
    if pin.backend and backend not in ("auto", pin.backend):
        raise ArgumentError(
            f"tactic belongs to backend {pin.backend!r} and backend is {backend!r}; name one backend, or leave it 'auto'"
        )
    if pin.backend or backend != "auto":
        return [pin.backend or backend]
    wanted = {name for name, _ in pin.values}
    having = [name for name in known if wanted <= {f.name for f in fields(registry.get(name).tactic_type)}]
    if not having:
        raise ArgumentError(
            f"tactic pins {', '.join(sorted(wanted))}; no backend's tactic has all of these fields"
        )
    return having


def _rules(problem: Fc2Problem, device: DeviceInfo, backend: Fc2Backend) -> list[Tactic]:
    """Tactics to prefer without a measurement, best first.

    On SM 10.0 and 10.3, from 128 tokens on: the CTA pair's (256,128) tile, with both CTAs sharing B
    (TensorRT-LLM pull requests 12686 and 13833, whose own choice it is from M = 160 on).
    """
    if backend.name != "cute" or device.capability not in ((10, 0), (10, 3)) or problem.m < 128:
        return []
    make = backend.tactic_type
    return [make(tile_m=256, tile_n=128, tile_k=tile_k, cluster_m=2, cluster_n=1) for tile_k in (256, 128)]


def _candidates(
    backend: Fc2Backend, device: DeviceInfo, evidence: Evidence, pin: Optional[Pin], complete: bool
) -> list[Candidate]:
    """What this backend could run, in the fixed order: rule, default, measured tactics by name, the backend's
    list.

    The backend's list is long, and only looked at where nothing stronger than the model can decide.
    """
    problem = evidence.problem
    default = backend.default_tactic(problem)
    if pin is not None:
        try:
            default = pin.applied_to(default)
        except ValueError as error:
            raise ArgumentError(f"tactic: {error}") from None
        complete = complete or len(pin.values) < len(fields(default))
    rules = _rules(problem, device, backend)
    timed = [t for t in evidence.timed if t.backend == backend.name]
    found: dict[Tactic, Candidate] = {}

    def consider(tactics: Iterable[Tactic], listed: bool = False) -> None:
        for tactic in tactics:
            if (pin is None or pin.matches(tactic)) and tactic not in found:
                found[tactic] = _assess(backend, tactic, evidence, pin is not None, listed)

    consider(rules)
    rule = next((c for c in found.values() if not c.rejected), None)
    if rule is not None:
        found[rule.tactic] = replace(rule, incumbent="rule")
    consider([default])
    if not found[default].incumbent:
        found[default] = replace(found[default], incumbent="default")
    consider(timed)
    possible = [c for c in found.values() if not c.rejected]
    modelled = evidence.model is not None and evidence.model.knows(backend.name)
    if complete or not possible or (modelled and rule is None and not _settled(possible, evidence)):
        consider(backend.tactics(problem), listed=True)
    return list(found.values())


def _assess(backend: Fc2Backend, tactic: Tactic, evidence: Evidence, forced: bool, listed: bool) -> Candidate:
    support = SUPPORTED if listed else backend.can_implement(evidence.problem, tactic)
    if support and not forced:
        support = backend.keeps_accuracy(tactic)
    if support and not forced and evidence.failures and tactic in evidence.failures:
        support = Support(False, f"failed while tuning this shape: {evidence.failures[tactic]}")
    if not support:
        return Candidate(backend.name, tactic, rejected=support.reason)
    return Candidate(backend.name, tactic, evidence.estimate(tactic))


def _pick(
    candidates: list[Candidate], evidence: Evidence, pin: Optional[Pin]
) -> Optional[tuple[Candidate, str]]:
    """The best of one backend's candidates with its source; None if all are rejected."""
    possible = [c for c in candidates if not c.rejected]
    if not possible:
        return None
    if pin is not None and len(possible) == 1:
        return possible[0], "forced"
    incumbent = next((c for c in possible if c.incumbent), None)
    pool = _best_known(possible, evidence)
    if incumbent is not None and incumbent.incumbent == "rule":
        fastest = _fastest(pool, incumbent)
        if fastest and fastest.evidence == "here" and evidence.by_user and _beats(fastest, incumbent):
            return fastest, "measured"
        return incumbent, "rule"
    if pool:
        fastest = _fastest(pool, incumbent)
        return fastest, fastest.estimate.source
    return incumbent or possible[0], "default"


def _best_known(possible: list[Candidate], evidence: Evidence) -> list[Candidate]:
    """Those whose times may be compared with each other, by the strongest evidence there is."""
    settled = _settled(possible, evidence)
    if settled:
        return settled
    near = [c for c in possible if c.evidence]
    limit = min((c.seconds for c in near), default=float("inf"))
    return [c for c in possible if c.estimate and (c.evidence or c.seconds * (1 + MODEL_MARGIN) < limit)]


def _settled(possible: list[Candidate], evidence: Evidence) -> list[Candidate]:
    """Those measured at this m, or, where the best tactics below and above are among them, on both sides of
    it."""
    here = [c for c in possible if c.evidence == "here"]
    if here:
        return here
    between = [c for c in possible if c.evidence == "both sides"]
    # Interpolation needs the winners of both sides in the race, or it would miss one of them.
    winners = evidence.winners({c.tactic for c in possible}) if between else set()
    return between if winners <= {c.tactic for c in between} else []


def pick_among(tactics: Sequence[Tactic], evidence: Evidence) -> Tactic:
    """What the evidence alone makes of tactics that can all run, without rules and incumbents; the first on a
    tie."""
    best: Optional[Candidate] = None
    for name in dict.fromkeys(tactic.backend for tactic in tactics):
        own = [
            Candidate(name, tactic, evidence.estimate(tactic)) for tactic in tactics if tactic.backend == name
        ]
        taken = _fastest(_best_known(own, evidence), None) or own[0]
        if best is None or _beats(taken, best):
            best = taken
    return best.tactic


def _fastest(pool: list[Candidate], incumbent: Optional[Candidate]) -> Optional[Candidate]:
    """Of those within the margin of the lowest time: the incumbent, else the first."""
    if not pool:
        return None
    limit = min(c.seconds for c in pool) * (1 + TIE_MARGIN)
    tied = [c for c in pool if c.seconds <= limit]
    return incumbent if incumbent in tied else tied[0]


def _beats(challenger: Candidate, incumbent: Candidate) -> bool:
    """Whether both times are known and the challenger's is lower by more than the margin."""
    return (
        bool(challenger.estimate and incumbent.estimate)
        and challenger.seconds * (1 + TIE_MARGIN) < incumbent.seconds
    )


def _nothing_runs(names: list[str], rejected: list[Candidate], backend: str, pin: Optional[Pin]) -> str:
    if len(names) == 1:
        asked = f"tactic {pin}" if pin is not None and pin.values else f"backend {names[0]!r}"
        return f"{asked} cannot run this call: {rejected[0].rejected}"
    reasons = "\n".join(f"  {c.backend}: {c.rejected}" for c in rejected if c.tactic is None)
    return f"no backend can run this call{f' with tactic {pin}' if pin else ''}:\n{reasons}"


def _notes(taken: Candidate, source: str, problem: Fc2Problem, measured: Measured) -> tuple[str, ...]:
    notes = []
    if source in ("default", "model") and problem.device_type == "cuda":
        sizes = f"--n {problem.n} --k {problem.k} --experts {problem.experts}"
        notes.append(f"this was not measured; `python -m dispatch tune {sizes}` does that")
    if measured.foreign and taken.estimate:
        notes.append(
            f"times are from {measured.foreign}, the nearest GPU with a table; tune to measure this one"
        )
    return tuple(notes)


def _warning(taken: Candidate, problem: Fc2Problem, device: DeviceInfo, rejected: list[Candidate]) -> str:
    if problem.device_type != "cuda":
        return ""
    lost = [c.backend for c in rejected if c.tactic is None]
    for name in (*lost, taken.backend):
        backend = registry.get(name)
        if "/" in problem.b_layout or not backend.is_automatic(device) or not backend.prepared_layout(problem):
            continue
        return (
            f"b is not prepared, and backend {name!r} needs or runs much faster with prepared weights: "
            "call b = dispatch.prepare(b, experts) once, at load"
        )
    if taken.backend == "torch" and rejected:
        reasons = "; ".join(f"{c.backend}: {c.rejected}" for c in rejected if c.tactic is None)
        return f"only the slow torch baseline can run this call ({reasons})"
    return ""


def _origin(estimate: Estimate) -> str:
    entry = estimate.entry
    if entry is None or estimate.source != "measured":
        return estimate.source
    return _MEASURED_BY.get(entry.source, f"published ({entry.source})")


# Sources of entries that are not publications; the shoot-out's come in by `python -m bench import`.
_MEASURED_BY = {"tuned": "measured by tuning", "shoot-out": "measured by the shoot-out"}


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
