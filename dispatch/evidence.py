"""What the measured times of a GPU say about a problem: at its own token count, around it, or by the model.

Indexed once per table, so that a new problem costs microseconds.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import replace
from typing import Callable, Mapping, NamedTuple, Optional, Sequence

from backends import registry
from backends.interface import Fc2Backend
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.measured import OUT_OF_MEMORY, Entry, Table, wanted_alpha
from dispatch.model import ALPHA_ANY, ALPHA_DENSE, Model, top_k_of
from dispatch.shapes import assumed_top_k

#: Between two token counts, a tactic that was not measured at one of them is taken to be at least this many times
#: slower there than the best that was: the tuner leaves out what it expects to lose.
ABSENT = 1.25
# Tactics that the model tells apart and that are worth predicting around a token count, of hundreds.
_PROMISING = 4


class Estimate(NamedTuple):
    """What a tactic is expected to take.

    Attributes:
        seconds: the time.
        source: "measured" (this very problem), "interpolated" (measured around it, or with another output
            type or layout of a) or "model", which times of another GPU also come through.
        alpha: form of alpha that the time is for.
        evidence: where the shape was measured: "here" (at this m), "between" (at fewer and at more tokens),
            "near" (on one side only) or "", nowhere or not with this tactic.
        entry: the measurement itself, where it is here.
    """

    seconds: float
    source: str
    alpha: str
    evidence: str
    entry: Optional[Entry] = None


class Measured:
    """All that is known of one GPU, indexed for decisions. Not changed after construction.

    Args:
        shipped: the package's table.
        user: the user's own table; at a problem and form of alpha that it has, its times replace the shipped
            ones, since times of different runs do not compare to a percent.
        model: predictions for what was not measured.
        foreign: name of the GPU that the shipped times were carried over from, if that is not the device.
    """

    def __init__(
        self,
        shipped: Optional[Table] = None,
        user: Optional[Table] = None,
        model: Optional[Model] = None,
        foreign: str = "",
    ) -> None:
        self.shipped, self.user, self.model, self.foreign = shipped, user, model, foreign
        # shape -> m -> alpha form -> tactic -> entry
        self._index: dict[tuple, dict[int, dict[str, dict[Tactic, Entry]]]] = {}
        self._users: set[tuple[tuple, int, str]] = set()
        self._failures: dict[tuple, list[Entry]] = {}
        for table in (shipped, user):
            for entry in table.entries if table else ():
                if entry.seconds is not None:
                    self._add(entry, table is user)
                else:
                    self._failures.setdefault(_shape(entry.problem), []).append(entry)
        self._similar = {_loose(shape): shape for shape in self._index}
        self._views: dict[tuple[tuple, str], _View] = {}
        self._promising: dict[tuple, Promising] = {}

    def _add(self, entry: Entry, users: bool) -> None:
        shape, m = _shape(entry.problem), entry.problem.m
        forms = self._index.setdefault(shape, {}).setdefault(m, {})
        if users and (shape, m, entry.alpha) not in self._users:
            self._users.add((shape, m, entry.alpha))
            forms[entry.alpha] = {}
            forms.pop(ALPHA_ANY, None)
        tactics = forms.setdefault(entry.alpha, {})
        # Two sources may have timed the same: the faster run shows what the tactic can do.
        if entry.tactic not in tactics or entry.seconds < tactics[entry.tactic].seconds:
            tactics[entry.tactic] = entry

    def evidence(
        self, problem: Fc2Problem, alpha: str = "", allowed: Callable[[Tactic], bool] = lambda tactic: True
    ) -> Evidence:
        """What was measured at this problem and around it.

        Args:
            alpha: its form; default "routed", see `_form`.
            allowed: the tactics to look at.
        """
        shape = _shape(problem)
        view = self._views.get((shape, alpha))
        if view is None:
            view = self._views[shape, alpha] = self._view(problem, alpha)
        return Evidence(problem, view, allowed, self._failures.get(shape, ()))

    def _view(self, problem: Fc2Problem, alpha: str) -> _View:
        shape = _shape(problem)
        # Where this output type or layout of a was never measured, those of another one are close.
        known = shape if shape in self._index else self._similar.get(_loose(shape), shape)
        by_m = self._index.get(known, {})
        wanted = assumed_top_k(problem.experts)
        chosen = {m: self._form(known, m, alpha, wanted) for m in sorted(by_m)}
        if not alpha and not any(chosen.values()) and not any(ALPHA_ANY in forms for forms in by_m.values()):
            chosen = dict.fromkeys(chosen, ALPHA_DENSE)
        points = {m: {**by_m[m].get(ALPHA_ANY, {}), **by_m[m].get(form, {})} for m, form in chosen.items()}
        points = {m: dict(sorted(at.items(), key=lambda item: str(item[0]))) for m, at in points.items() if at}
        users = frozenset(m for m in points if (known, m, chosen[m]) in self._users)
        own = users if self.foreign else frozenset(points)
        return _View(problem, alpha or f"topk:{wanted}", points, known == shape, users, own, self.model)

    def _form(self, shape: tuple, m: int, alpha: str, wanted: int) -> str:
        """The form of alpha whose times count at a shape and m; "" where none does.

        By default a routed one: the user's own, who know their router, before shipped ones; then the one whose
        top k is nearest to the assumed one.
        """
        forms = self._index[shape][m]
        if alpha:
            return alpha if alpha in forms else ""
        routed = [form for form in forms if form not in (ALPHA_ANY, ALPHA_DENSE)]

        def distance(form: str) -> tuple:
            mine = (shape, m, form) in self._users
            return (not mine, abs(math.log(top_k_of(form, shape[2]) / wanted)), form)

        return min(routed, key=distance, default="")

    def promising(self, problem: Fc2Problem, backend: Fc2Backend) -> Promising:
        """What of a backend's list deserves a look at this many tokens, without a time of the shape.

        Listing and predicting all takes milliseconds, so it is done once for each range of a factor of two, at its
        ends; what is fastest there is then worth predicting at m itself.
        """
        high = 1 << (problem.m - 1).bit_length()
        key = (registry.generation, backend.name, high, problem.device_type, problem.capability, *_shape(problem))
        known = self._promising.get(key)
        if known is None:
            ends = [replace(problem, m=m) for m in (max(1, high // 2), high)]
            lists = [[t for t in backend.tactics(end) if backend.keeps_accuracy(t)] for end in ends]
            fastest = [self._fastest(end, tactics) for end, tactics in zip(ends, lists)]
            known = Promising(*(tuple(dict.fromkeys((*low, *high))) for low, high in (fastest, lists)))
            self._promising[key] = known
        return known

    def _fastest(self, problem: Fc2Problem, tactics: Sequence[Tactic]) -> list[Tactic]:
        """By the model; of those that it cannot tell apart, the first by name."""
        alpha = wanted_alpha(problem)
        ranked: dict[float, Tactic] = {}
        for tactic in sorted(tactics, key=str) if self.model else ():
            seconds = self.model.predict(problem, tactic, alpha)
            if seconds is not None:
                ranked.setdefault(round(seconds, 10), tactic)
        return [ranked[seconds] for seconds in sorted(ranked)[:_PROMISING]]


class Promising(NamedTuple):
    """Tactics of one backend: the fastest by the model, and all."""

    fastest: tuple[Tactic, ...]
    all: tuple[Tactic, ...]


class _Line(NamedTuple):
    """One tactic's times around a token count.

    Attributes:
        tactic, alpha: the tactic, and the form of alpha of its times.
        logs: of the time at each side; of its ratio to the model's where the model knows all tactics.
    """

    tactic: Tactic
    alpha: str
    logs: tuple[float, ...]


class _View:
    """The times of one shape and form of alpha.

    Attributes:
        problem: of the shape, at any m.
        alpha: the form asked for.
        points: entries by m, ascending, and tactic, in a fixed order.
        ms: the keys of points.
        exact: False where the entries are for another output type or layout of a.
        users: token counts whose times are the user's own.
        own: those whose times were taken on this GPU model.
        tactics: all that were measured at some m.
    """

    def __init__(
        self,
        problem: Fc2Problem,
        alpha: str,
        points: Mapping[int, Mapping[Tactic, Entry]],
        exact: bool,
        users: frozenset[int],
        own: frozenset[int],
        model: Optional[Model],
    ) -> None:
        self.problem, self.alpha, self.points, self.ms = problem, alpha, points, tuple(points)
        self.exact, self.users, self.own, self.model = exact, users, own, model
        self.tactics = frozenset(tactic for at in points.values() for tactic in at)
        self._lines: dict[tuple[int, ...], tuple[bool, list[_Line]]] = {}

    def lines(self, sides: tuple[int, ...]) -> tuple[bool, list[_Line]]:
        """All tactics measured at some token counts, and whether their logs are relative to the model.

        A tactic that was not measured at one of them counts there as the slowest that was, `ABSENT` times the
        fastest at least, and no faster, or closer to the model, than where it was measured. One that cannot run
        there says nothing by its absence, and misses the model as it does where it was measured.
        """
        known = self._lines.get(sides)
        if known is None:
            known = self._lines[sides] = self._compared(sides)
        return known

    def _compared(self, sides: tuple[int, ...]) -> tuple[bool, list[_Line]]:
        tactics = list(dict.fromkeys(tactic for m in sides for tactic in self.points[m]))
        entries = [[self.points[m].get(tactic) for m in sides] for tactic in tactics]
        alphas = [next(entry.alpha for entry in row if entry) for row in entries]
        bases = [[self._base(m, tactic, alpha) for m in sides] for tactic, alpha in zip(tactics, alphas)]
        modelled = all(base is not None for row in bases for base in row)
        absent = {}
        for m in sides:
            times = [entry.seconds for entry in self.points[m].values()]
            absent[m] = max(max(times), min(times) * ABSENT)
        lines = []
        for tactic, alpha, own, base in zip(tactics, alphas, entries, bases):
            scale = base if modelled else [1.0] * len(sides)
            known = [math.log(entry.seconds / unit) for entry, unit in zip(own, scale) if entry]
            at_least = [math.log(absent[m] / unit) for m, unit in zip(sides, scale)]
            logs = known if len(known) == len(sides) else [
                known[0] if entry or modelled and not self._possible(m, tactic) else max(known[0], least)
                for m, entry, least in zip(sides, own, at_least)
            ]
            lines.append(_Line(tactic, alpha, tuple(logs)))
        return modelled, lines

    def _possible(self, m: int, tactic: Tactic) -> bool:
        """Whether the tactic could have been measured there."""
        return bool(registry.get(tactic.backend).can_implement(replace(self.problem, m=m), tactic))

    def _base(self, m: int, tactic: Tactic, alpha: str) -> Optional[float]:
        return self.model.predict(replace(self.problem, m=m), tactic, alpha) if self.model else None


class Evidence:
    """What measurements say about one problem: at its own m, else at the nearest measured token counts around
    it, else at the nearest one.

    Attributes:
        problem: the problem.
        alpha: form of alpha asked for.
        kind: "here", "between" or "near", as in `Estimate`; "" where nothing was measured.
        exact, by_user: whether the entries are of this very shape, and the user's own at this m.
        failures: tactics that failed at this shape, with the reason; whatever m, but that memory may suffice
            for less.
    """

    def __init__(
        self,
        problem: Fc2Problem,
        view: _View,
        allowed: Callable[[Tactic], bool],
        failures: Sequence[Entry],
    ) -> None:
        self.problem, self.alpha, self.exact = problem, view.alpha, view.exact
        self._view, self._allowed = view, allowed
        self.by_user = problem.m in view.users
        self.failures = {
            e.tactic: e.failure
            for e in failures
            if e.problem.m <= problem.m or e.failure != OUT_OF_MEMORY
        }
        self._sides = self._around(problem.m)
        here = self._sides == (problem.m,)
        self.kind = "here" if here else ("", "near", "between")[len(self._sides)]

    def _around(self, m: int) -> tuple[int, ...]:
        """m itself, if it was measured, else the nearest below and the nearest above that were."""
        view = self._view
        if any(map(self._allowed, view.points.get(m, ()))):
            return (m,)
        at = bisect.bisect(view.ms, m)
        below = next((x for x in reversed(view.ms[:at]) if any(map(self._allowed, view.points[x]))), None)
        above = next((x for x in view.ms[at:] if any(map(self._allowed, view.points[x]))), None)
        return tuple(x for x in (below, above) if x is not None)

    def seen(self, tactic: Tactic) -> bool:
        """Whether the tactic was measured at any m of this shape."""
        return tactic in self._view.tactics

    @functools.cached_property
    def estimates(self) -> dict[Tactic, Estimate]:
        """Expected times of the allowed tactics that were measured there, in a fixed order; comparable.

        Between two token counts each tactic's time is taken to run straight in log time over log tokens, or,
        where the model knows all of the tactics, to miss the model by a factor that does. With `_View.lines` for
        what was not measured at one side, a tactic may win close to where it was measured, and never close to
        where others were.
        """
        m = self.problem.m
        own = self._view.own.issuperset(self._sides)
        if self.kind == "here":
            source = "model" if not own else "measured" if self.exact else "interpolated"
            return {
                t: Estimate(e.seconds, source, e.alpha, "here", e)
                for t, e in self._view.points[m].items()
                if self._allowed(t)
            }
        modelled, lines = self._view.lines(self._sides)
        source = "interpolated" if own and self.kind == "between" else "model"
        share = self._share() if self.kind == "between" else 0.0
        found = {}
        for tactic, alpha, logs in lines:
            if self._allowed(tactic):
                base = self._view.model.predict(self.problem, tactic, alpha) if modelled else 1.0
                seconds = base * math.exp(logs[0] * (1.0 - share) + logs[-1] * share)
                found[tactic] = Estimate(seconds, source, alpha, self.kind)
        return found

    def _share(self) -> float:
        low, high = map(math.log, self._sides)
        return (math.log(self.problem.m) - low) / (high - low)

    def estimate(self, tactic: Tactic) -> Optional[Estimate]:
        """The best knowledge of a tactic's time: from the times around, else the model's; None where there is
        none."""
        return self.estimates.get(tactic) or self.predicted(tactic)

    def predicted(self, tactic: Tactic) -> Optional[Estimate]:
        """The model's time of a tactic; None where it has none."""
        model = self._view.model
        seconds = model.predict(self.problem, tactic, self.alpha) if model else None
        return None if seconds is None else Estimate(seconds, "model", self.alpha, "")


def _shape(problem: Fc2Problem) -> tuple:
    return (problem.n, problem.k, problem.experts, problem.b_layout, problem.a_layout, problem.out_dtype)


def _loose(shape: tuple) -> tuple:
    return shape[:4]
