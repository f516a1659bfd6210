"""Which backend and tactic run a problem, and why: a value computed without touching tensors or a GPU.

How "auto" decides, in this order:

1. Rejected are backends that the device or the installed packages cannot run, tactics that cannot implement
   the problem, and tactics that failed while tuning this shape.
2. A rule (`_rules`), where one applies, unless the user's own tuning of this very problem found something
   faster.
3. The best tactic measured at this m, of all backends.
4. Between token counts that were measured: the best of the times interpolated between the two nearest, see
   `Evidence.estimates`. Beyond them: the best at the nearest, unless the model promises far more.
5. Where the shape was not measured, the model, and where the model says nothing the default tactic of the
   first backend. Here another backend replaces the first one only if both have a predicted time.

"Faster" means by more than `TIE_MARGIN`. Inside the margin of the best, the first backend in registry order
wins, then its default tactic, then the first by name: ranks with the same tables agree without talking. It gives
way to another one there that is known to be faster if alpha is dense, which costs less where the assumption below
is wrong.

alpha lies on the device and is never read here. Times are taken for rows with `assumed_top_k(experts)`
nonzeros, the usual routed case, or with the number that the user's own tuning names; where only dense times
were measured, those.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Iterable, Iterator, Optional, Sequence

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Fc2Backend
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.errors import ArgumentError, UnavailableError
from dispatch.evidence import Estimate, Evidence, Measured
from dispatch.model import ALPHA_ANY, ALPHA_DENSE
from dispatch.pins import Pin, TacticLike
from dispatch.report import TIE_MARGIN, Candidate, Decision, Survey

#: Beyond the token counts that were measured, a tactic never measured at this shape must be predicted to be
#: faster by more than this share to displace those that were: several times the model's own error
#: (tests/test_model.py).
MODEL_MARGIN = 0.25

#: Knows nothing.
NOTHING = Measured()


def choose(
    problem: Fc2Problem,
    device: DeviceInfo,
    measured: Measured = NOTHING,
    backend: str = "auto",
    tactic: TacticLike = None,
) -> Decision:
    """Decide who runs `problem` on `device`; the module's docstring says how.

    A named backend, and the fields of a tactic, are honoured or refused, never replaced.

    Args:
        measured: what is known of this GPU.
        backend: "auto" or a name.
        tactic: a tactic, or some fields of one; see `Pin.of`.

    Raises:
        ArgumentError: unknown backend, or a tactic that is not one of it.
        ArgumentTypeError: tactic is of a type that `Pin.of` does not take.
        UnavailableError: what was asked for cannot run; or nothing can. The message holds every reason.
    """
    pin = None if tactic is None else Pin.of(tactic)
    automatic = backend == "auto" and pin is None
    names = _names(backend, pin)
    field = _Field(problem, device, measured, names, automatic, pin if pin and pin.values else None)
    taken = field.best()
    if taken is None:
        raise UnavailableError(field.nothing_runs(backend))
    chosen, source, estimate = taken
    look = functools.partial(_survey, field, chosen, source, estimate)
    return Decision(
        problem, device, chosen.backend, chosen, source, estimate, field.warning(chosen.backend), look
    )


def pick_among(tactics: Sequence[Tactic], measured: Measured, problem: Fc2Problem) -> Tactic:
    """What the times alone make of tactics that can all run, without rules and incumbents; the first on a tie."""
    evidence = measured.evidence(problem, allowed=frozenset(tactics).__contains__)
    known = evidence.estimates or {t: e for t in tactics if (e := evidence.predicted(t))}
    limit = min((e.seconds for e in known.values()), default=0.0) * (1 + TIE_MARGIN)
    return next((t for t in tactics if t in known and known[t].seconds <= limit), tactics[0])


#: A tactic that was taken, its source, and what is known of its time.
_Taken = tuple[Tactic, str, Optional[Estimate]]


class _Field:
    """Who takes part in one decision."""

    def __init__(
        self,
        problem: Fc2Problem,
        device: DeviceInfo,
        measured: Measured,
        names: Sequence[str],
        automatic: bool,
        pin: Optional[Pin],
    ) -> None:
        self.problem, self.device, self.measured, self.names, self.pin = problem, device, measured, names, pin
        self.backends: dict[str, Fc2Backend] = {}
        self.refused: dict[str, str] = {}
        for name in names:
            backend = registry.get(name)
            support = backend.is_automatic(device) if automatic else backend.is_supported(device)
            if support:
                self.backends[name] = backend
            else:
                self.refused[name] = support.reason
        self.defaults = {name: self._default(backend) for name, backend in self.backends.items()}
        self.evidence: Evidence = measured.evidence(problem, allowed=self.asked_for)
        self._reasons: dict[Tactic, str] = {}

    @functools.cached_property
    def if_dense(self) -> dict[Tactic, Estimate]:
        """Times at this m or around it with dense alpha, which decisions do not assume; as far as it was measured."""
        return self.measured.evidence(self.problem, ALPHA_DENSE, self.asked_for).estimates

    def _default(self, backend: Fc2Backend) -> Tactic:
        tactic = backend.default_tactic(self.problem)
        if self.pin is None:
            return tactic
        try:
            return self.pin.applied_to(tactic)
        except ValueError as error:
            raise ArgumentError(f"tactic: {error}") from None

    def asked_for(self, tactic: Tactic) -> bool:
        """Whether the tactic is of a backend that takes part, and has the fields that the caller pinned."""
        return tactic.backend in self.backends and (self.pin is None or self.pin.matches(tactic))

    def reason(self, tactic: Tactic) -> str:
        """Why a tactic cannot be taken unless the caller names it; "" if it can."""
        known = self._reasons.get(tactic)
        if known is None:
            known = self._reasons[tactic] = self._reason(tactic)
        return known

    def _reason(self, tactic: Tactic) -> str:
        backend = self.backends[tactic.backend]
        for support in (backend.can_implement(self.problem, tactic), backend.keeps_accuracy(tactic)):
            if not support:
                return support.reason
        failure = self.evidence.failures.get(tactic)
        return f"failed while tuning this shape: {failure}" if failure else ""

    def rules(self) -> Iterator[Tactic]:
        """Tactics to prefer without a measurement of the user's own, best first."""
        for backend in self.backends.values():
            yield from filter(self.asked_for, _rules(self.problem, self.device, backend))

    def listed(self, name: str) -> Iterator[Tactic]:
        """All tactics of a backend that were asked for: the default first, then the backend's own list."""
        yield self.defaults[name]
        yield from filter(self.asked_for, self.backends[name].tactics(self.problem))

    # The decision

    def best(self) -> Optional[_Taken]:
        """What is taken; None if nothing can run."""
        if self.pin is not None:
            known = (*self.rules(), *self.evidence.estimates, *(t for name in self.backends for t in self.listed(name)))
            implement = ((t, self.backends[t.backend].can_implement(self.problem, t)) for t in dict.fromkeys(known))
            possible = [tactic for tactic, support in implement if support]
            if len(possible) == 1:
                return possible[0], "forced", self.evidence.estimate(possible[0])
        return self._by_rule() or self._by_times() or self._by_model()

    def _by_rule(self) -> Optional[_Taken]:
        rule = next((tactic for tactic in self.rules() if not self.reason(tactic)), None)
        if rule is None:
            return None
        expected = self.evidence.estimate(rule)
        if self.evidence.kind == "here" and self.evidence.by_user and expected:
            fastest = self._fastest(self.evidence.estimates)
            if fastest and fastest[1].seconds * (1 + TIE_MARGIN) < expected.seconds:
                return fastest[0], "measured", fastest[1]
        return rule, "rule", expected

    def _by_times(self) -> Optional[_Taken]:
        """By the times at this m or around it."""
        known = self.evidence.estimates
        fastest = self._fastest(known)
        if fastest and self.evidence.kind == "near":
            limit = fastest[1].seconds / (1 + MODEL_MARGIN)
            unseen = ((t, e) for name in self.backends for t, e in self._predicted(name) if not self.evidence.seen(t))
            promised = {tactic: estimate for tactic, estimate in unseen if estimate.seconds < limit}
            fastest = self._fastest({**promised, **known})
        return fastest and (fastest[0], fastest[1].source, fastest[1])

    def _by_model(self) -> Optional[_Taken]:
        """Backend by backend, in order: the best predicted, else the default."""
        taken: Optional[_Taken] = None
        for name in self.backends:
            fastest = self._fastest(dict(self._predicted(name)))
            if taken is None:
                if fastest:
                    taken = (fastest[0], "model", fastest[1])
                else:
                    taken = self._first_possible(name)
            elif fastest and taken[2] and fastest[1].seconds * (1 + TIE_MARGIN) < taken[2].seconds:
                taken = (fastest[0], "model", fastest[1])
        return taken

    def _first_possible(self, name: str) -> Optional[_Taken]:
        default, backend = self.defaults[name], self.backends[name]
        if not self.reason(default):
            return default, "default", None
        listed = self.listed(name) if self.pin else self.measured.promising(self.problem, backend).all
        first = next((tactic for tactic in listed if not self.reason(tactic)), None)
        return first and (first, "default", None)

    def _predicted(self, name: str) -> Iterator[tuple[Tactic, Estimate]]:
        """What the model expects of a backend's tactics."""
        model = self.measured.model
        if model is None or not model.knows(name):
            return
        listed: Iterable[Tactic] = self.measured.promising(self.problem, self.backends[name]).fastest
        if self.pin is not None:  # those that the pin leaves may be among the less promising
            listed = self.listed(name)
        for tactic in dict.fromkeys((self.defaults[name], *listed)):
            estimate = self.evidence.predicted(tactic)
            if estimate is not None:
                yield tactic, estimate

    def _fastest(self, known: dict[Tactic, Estimate]) -> Optional[tuple[Tactic, Estimate]]:
        """Of the possible ones within the margin of the lowest time: the first in the fixed order."""
        limit, tied = float("inf"), []
        for tactic, estimate in sorted(known.items(), key=lambda item: item[1].seconds):
            if estimate.seconds > limit:
                break
            if not self.reason(tactic):
                limit = min(limit, estimate.seconds * (1 + TIE_MARGIN))
                tied.append(tactic)
        if not tied:
            return None
        first = self._better_if_dense(sorted(tied, key=self._order))
        return first, known[first]

    def _better_if_dense(self, tied: list[Tactic]) -> Tactic:
        """The first, unless others are known to be faster than it by more than the margin if alpha is dense: then the first
        of the best of those."""
        known = {tactic: self.if_dense[tactic].seconds for tactic in tied if tactic in self.if_dense}
        if len(tied) == 1 or tied[0] not in known:
            return tied[0]
        limit = min(known.values()) * (1 + TIE_MARGIN)
        return next(tactic for tactic, seconds in known.items() if seconds <= limit)

    def _order(self, tactic: Tactic) -> tuple:
        name = tactic.backend
        return (self.names.index(name), tactic != self.defaults[name], str(tactic))

    # What is said about it

    def nothing_runs(self, backend: str) -> str:
        """Why nothing runs, as a sentence or one a line."""
        reasons = {name: self.refused.get(name) or self.reason(self._first(name)) for name in self.names}
        if len(self.names) == 1:
            (name,) = self.names
            asked = f"tactic {self.pin}" if self.pin else f"backend {name!r}"
            return f"{asked} cannot run this call: {reasons[name]}"
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        return f"no backend can run this call{f' with tactic {self.pin}' if self.pin else ''}:\n{lines}"

    def _first(self, name: str) -> Tactic:
        return next((t for t in self.rules() if t.backend == name), self.defaults[name])

    def warning(self, taken: str) -> str:
        """A sentence if a slow path was taken that the caller can leave."""
        if self.problem.device_type != "cuda":
            return ""
        # A runnable backend whose default is refused here is lost, for all that matters to a warning.
        lost = {name: self.reason(self.defaults[name]) for name in self.backends if name != taken}
        for name in (*(name for name in lost if lost[name]), taken):
            if "/" not in self.problem.b_layout and self.backends[name].prepared_layout(self.problem):
                return (
                    f"b is not prepared, and backend {name!r} needs or runs much faster with prepared weights: "
                    "call b = dispatch.prepare(b, experts) once, at load"
                )
        reasons = {**self.refused, **lost}
        shown = "; ".join(f"{name}: {reasons[name]}" for name in self.names if reasons.get(name))
        if taken == "torch" and shown:
            return f"only the slow torch baseline can run this call ({shown})"
        return ""


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
            f"tactic belongs to backend {pin.backend!r} and backend is {backend!r}; name one, or leave it 'auto'"
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


def _survey(field: _Field, chosen: Tactic, source: str, estimate: Optional[Estimate]) -> Survey:
    """All candidates, the chosen one first, and the notes of a decision."""
    considered: list[Candidate] = []
    rejected = [Candidate(name, None, rejected=reason) for name, reason in field.refused.items()]
    rules = list(field.rules())
    rule = next((tactic for tactic in rules if not field.reason(tactic)), None)
    for name in field.backends:
        own = [t for t in (*rules, field.defaults[name], *field.evidence.estimates) if t.backend == name]
        candidates = []
        for tactic in dict.fromkeys((*own, *field.listed(name))):
            reason = field.reason(tactic)
            known = None if reason else field.evidence.estimate(tactic)
            incumbent = "rule" if tactic == rule else "default" if tactic == field.defaults[name] else ""
            candidates.append(Candidate(name, tactic, known, reason, "" if reason else incumbent))
        if all(c.rejected for c in candidates):
            rejected += [Candidate(name, None, rejected=candidates[0].rejected), *candidates[1:]]
        else:
            considered += candidates
    first = [c for c in considered if c.tactic == chosen]
    others = [c for c in considered if c.tactic != chosen]
    return Survey((*first, *others, *rejected), _notes(field, chosen, source, estimate))


def _notes(field: _Field, chosen: Tactic, source: str, estimate: Optional[Estimate]) -> tuple[str, ...]:
    notes: list[str] = []
    problem = field.problem
    if source in ("default", "model") and problem.device_type == "cuda":
        sizes = f"--n {problem.n} --k {problem.k} --experts {problem.experts}"
        notes.append(f"this was not measured; `python -m dispatch tune {sizes}` does that")
    if field.measured.foreign and estimate and estimate.source == "model":
        notes.append(f"times are carried over from {field.measured.foreign}, the nearest GPU with a table")
    if estimate and estimate.alpha not in (ALPHA_ANY, ALPHA_DENSE):
        notes += _dense_note(field, chosen)
    return tuple(notes)


def _dense_note(field: _Field, chosen: Tactic) -> list[str]:
    """What the chosen tactic costs if alpha is dense."""
    known = field.if_dense
    own, possible = known.get(chosen), [tactic for tactic in known if not field.reason(tactic)]
    if own is None:
        return []
    best = min(possible, key=lambda tactic: known[tactic].seconds)
    text = f"if alpha is dense it takes {own.seconds * 1e6:.1f} us ({own.source})"
    default = field.defaults[chosen.backend]
    if default in known and own.seconds * (1 + TIE_MARGIN) < known[default].seconds:
        text += f", the default {known[default].seconds * 1e6:.1f} us, which decides between them in a tie"
    if known[best].seconds * (1 + TIE_MARGIN) < own.seconds:
        text += f", and {best} {known[best].seconds * 1e6:.1f} us: name that one then"
    return [text]
