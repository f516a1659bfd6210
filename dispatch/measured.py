"""Measured times as values: entries, tables of one GPU model, and what they say about a problem.

Pure: no files (`dispatch.store`), no GPU. An entry that cannot be used keeps its record, so that writing a
table back loses nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, Collection, Iterable, Mapping, Optional, Sequence

from backends import registry
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.model import ALPHA_ANY, ALPHA_DENSE, Family, Model, top_k_of
from dispatch.shapes import assumed_top_k

SCHEMA = 1
#: The failure of a tactic that may yet run with fewer tokens.
OUT_OF_MEMORY = "out of device memory"
#: Fields of a record that make its problem; device type and capability are the table's.
PROBLEM_FIELDS = ("m", "n", "k", "experts", "out_dtype", "a_layout", "b_layout")


@dataclass(frozen=True)
class Entry:
    """One tactic's time on one problem.

    Attributes:
        problem: what was timed; device type and capability are left at the defaults.
        alpha: its form: "topk:8", "dense", or "any" where the kernel's time does not depend on it.
        tactic: what ran it.
        seconds: median of the samples; None if the tactic failed.
        spread: half the distance of the quartiles over the median.
        source: who measured: "tuned", or the publication, such as "pr12686".
        failure: why there is no time.
        notes: everything else of the record (timer, cache state, versions, date, fields of newer versions),
            as it was.
    """

    problem: Fc2Problem
    alpha: str
    tactic: Tactic
    seconds: Optional[float]
    spread: float = 0.0
    source: str = "tuned"
    failure: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rough(self) -> bool:
        """Whether the time is one host-clock reading of a tactic that was too slow to race: it holds launch overhead,
        tells to avoid the tactic, and is nothing to fit a model to."""
        return self.notes.get("l2") == "any"

    @property
    def key(self) -> tuple:
        """What a newer entry must share to replace this one."""
        p = self.problem
        return (
            p.m,
            p.n,
            p.k,
            p.experts,
            p.out_dtype,
            p.a_layout,
            p.b_layout,
            self.alpha,
            self.tactic,
            self.source,
        )

    def to_json(self) -> dict[str, Any]:
        problem = self.problem.to_json()
        record = {name: problem[name] for name in PROBLEM_FIELDS}
        record |= {"alpha": self.alpha, "tactic": self.tactic.to_json()}
        if self.seconds is None:
            record["failure"] = self.failure
        else:
            record |= {"us": round(self.seconds * 1e6, 3), "spread": round(self.spread, 4)}
        return {**record, "source": self.source, **self.notes}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Entry:
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing, of the wrong type or out of range; the message names it.
            LookupError: the tactic is for a backend that is not registered here, or is not one of its
                tactics.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"entry is {type(record).__name__}; it takes an object")
        rest = dict(record)
        problem = {name: rest.pop(name) for name in PROBLEM_FIELDS if name in rest}
        for name in ("m", "n", "k", "experts"):
            if type(problem.get(name)) is not int or problem[name] < 1:
                raise ValueError(f"{name} is {problem.get(name)!r}; it takes a positive int")
        for name in ("out_dtype", "a_layout", "b_layout"):
            if not isinstance(problem.get(name, ""), str):
                raise ValueError(f"{name} is {problem[name]!r}; it takes a string")
        tactic, alpha = rest.pop("tactic", None), rest.pop("alpha", None)
        if not isinstance(tactic, Mapping) or not isinstance(tactic.get("backend"), str):
            raise ValueError(f"tactic is {tactic!r}; it takes an object with a backend")
        if not isinstance(alpha, str):
            raise ValueError(f"alpha is {alpha!r}; it takes a form, such as 'topk:8'")
        top_k_of(alpha, problem["experts"])
        source, failure = rest.pop("source", "tuned"), rest.pop("failure", "")
        if not isinstance(source, str) or not isinstance(failure, str):
            raise ValueError("source and failure take strings")
        us, spread = rest.pop("us", None), rest.pop("spread", 0.0)
        if failure == "" and not (_is_number(us) and us > 0):
            raise ValueError(f"us is {us!r}; it takes a positive number of microseconds")
        if not (_is_number(spread) and spread >= 0):
            raise ValueError(f"spread is {spread!r}; it takes a number >= 0")
        tactic_type = registry.get(tactic["backend"]).tactic_type
        try:
            known_tactic = tactic_type.from_json(tactic)
        except ValueError as error:  # a field of another version is no damage
            raise LookupError(str(error)) from None
        return cls(
            Fc2Problem.from_json(problem),
            alpha,
            known_tactic,
            None if failure else us * 1e-6,
            float(spread),
            source,
            failure,
            rest,
        )


@dataclass(frozen=True)
class Table:
    """The measured entries of one GPU model.

    Attributes:
        gpu: the driver's name of the device, such as "NVIDIA H200".
        entries: the usable ones.
        unused: (record, reason) of those for backends or fields this version does not know: kept, not used.
        set_aside: (record, reason) of damaged ones: kept, not used, reported.
        model: fitted constants by family; None where none were fitted.
        extra: other fields of the file, as they were.
    """

    gpu: str
    entries: tuple[Entry, ...] = ()
    unused: tuple[tuple[Any, str], ...] = ()
    set_aside: tuple[tuple[Any, str], ...] = ()
    model: Optional[Mapping[str, Family]] = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Table:
        """A table from the text of its file; damaged entries are set aside.

        Raises:
            ValueError: not JSON, not a table, or of another schema.
        """
        record = json.loads(text)
        if not isinstance(record, dict) or not isinstance(record.get("gpu"), str):
            raise ValueError("not a table: it takes an object with 'gpu'")
        if record.get("schema") != SCHEMA:
            raise ValueError(f"schema is {record.get('schema')!r}; this version reads {SCHEMA}")
        if not isinstance(record.get("entries"), list):
            raise ValueError("not a table: 'entries' is not a list")
        entries, unused, set_aside = [], [], []
        for item in record["entries"]:
            try:
                entries.append(Entry.from_json(item))
            except (LookupError, ImportError) as error:
                unused.append((item, str(error.args[0])))
            except (ValueError, TypeError, OverflowError) as error:
                set_aside.append((item, str(error)))
        model = None
        try:
            if record.get("model") is not None:
                model = {name: Family.from_json(family) for name, family in record["model"].items()}
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            set_aside.append(({"model": record["model"]}, f"model: {error}"))
        earlier = record.get("set_aside")
        for item in earlier if isinstance(earlier, list) else ():
            known = isinstance(item, dict) and "record" in item
            set_aside.append((item["record"], str(item.get("reason"))) if known else (item, "unknown"))
        known = ("schema", "gpu", "entries", "model", "set_aside")
        extra = {name: value for name, value in record.items() if name not in known}
        return cls(record["gpu"], tuple(entries), tuple(unused), tuple(set_aside), model, extra)

    def text(self) -> str:
        """The file's content: JSON with one entry a line, so that a diff shows which measurement changed."""
        head = {"schema": SCHEMA, "gpu": self.gpu, **self.extra}
        if self.model is not None:
            head["model"] = {name: family.to_json() for name, family in self.model.items()}
        records = [entry.to_json() for entry in self.entries] + [record for record, _ in self.unused]
        lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        lines.append(' "entries": [')
        lines.append(",\n".join("  " + json.dumps(record) for record in records))
        lines.append(" ]" + ("," if self.set_aside else ""))
        if self.set_aside:
            lines.append(' "set_aside": [')
            items = ({"reason": reason, "record": record} for record, reason in self.set_aside)
            lines.append(",\n".join("  " + json.dumps(item) for item in items))
            lines.append(" ]")
        return "{\n" + "\n".join(line for line in lines if line) + "\n}\n"

    def merged(self, entries: Iterable[Entry]) -> Table:
        """The table with `entries` added; an entry of the same key is replaced."""
        new = {entry.key: entry for entry in entries}
        kept = [entry for entry in self.entries if entry.key not in new]
        return replace(self, entries=(*kept, *new.values()))


@dataclass(frozen=True)
class Estimate:
    """What a tactic is expected to take.

    Attributes:
        seconds: the time.
        source: "measured" (this very problem), "interpolated" (measured at fewer and at more tokens, or with
            another output type or layout of a) or "model".
        alpha: form of alpha that the time is for.
        evidence: where this tactic was measured: "here" (at this m), "both sides" or "one side" (of the same
            shape, at the nearest token counts that have it) or "", nowhere.
        entry: the measurement itself, where it is here.
    """

    seconds: float
    source: str
    alpha: str
    evidence: str
    entry: Optional[Entry] = None


class Measured:
    """What is known of one GPU: the shipped table, overlaid by the user's own, and the model fitted to the
    shipped one.

    Where the user measured a problem, only those entries speak for it: times of different runs are not
    compared. Immutable after construction and safe to share between threads.

    Args:
        shipped, user: tables; either may be None.
        model: constants of the GPU at hand.
        foreign: name of the GPU that `shipped` is for, when it is only a relative of the one at hand.
    """

    def __init__(
        self,
        shipped: Optional[Table] = None,
        user: Optional[Table] = None,
        model: Optional[Model] = None,
        foreign: str = "",
    ) -> None:
        self.shipped, self.user, self.model, self.foreign = shipped, user, model, foreign
        # Shape -> m -> alpha -> tactic -> entry.
        self._index: dict[tuple, dict[int, dict[str, dict[Tactic, Entry]]]] = {}
        self._users: set[tuple] = set()
        self._failures: dict[tuple, list[Entry]] = {}
        for table in (shipped, user):
            for entry in table.entries if table else ():
                if entry.seconds is not None:
                    self._add(entry, table is user)
                else:
                    self._failures.setdefault(_shape(entry.problem), []).append(entry)
        self._views: dict[tuple, tuple[dict[int, dict[Tactic, Entry]], dict[Tactic, None]]] = {}
        self._similar = {_loose(shape): shape for shape in self._index}

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

    def evidence(self, problem: Fc2Problem, alpha: Optional[str] = None) -> Evidence:
        """What was measured at this problem and around it.

        Args:
            alpha: its form; default the one that decisions are made for, or dense where only dense times
                exist.
        """
        shape = _shape(problem)
        forms = (alpha,) if alpha else (wanted_alpha(problem), ALPHA_DENSE)
        points, timed = self._of_forms(shape, forms)
        return Evidence(
            problem,
            forms[0],
            points,
            timed,
            exact=shape in self._index,
            by_user=any((shape, problem.m, form) in self._users for form in (forms[0], ALPHA_ANY)),
            failures={
                e.tactic: e.failure
                for e in self._failures.get(shape, ())
                if e.problem.m <= problem.m or e.failure != OUT_OF_MEMORY
            },
            model=self.model,
        )

    def _of_forms(
        self, shape: tuple, forms: tuple[str, ...]
    ) -> tuple[dict[int, dict[Tactic, Entry]], dict[Tactic, None]]:
        """Entries by ascending m and tactic in the first form that has any, and the tactics in a fixed
        order."""
        known = self._views.get((shape, forms))
        if known is None:
            # Where this output type or layout of a was never measured, those of another one are close.
            points = self._index.get(shape) or self._index.get(self._similar.get(_loose(shape)), {})
            resolved = {m: _of_form(points[m], forms) for m in sorted(points)}
            found = {tactic for entries in resolved.values() for tactic in entries}
            timed = dict.fromkeys(sorted(found, key=str))
            known = self._views[shape, forms] = (resolved, timed)
        return known


@dataclass(frozen=True)
class Evidence:
    """What measurements say about one problem.

    Attributes:
        problem: the problem.
        alpha: form of alpha asked for.
        points: entries of the same shape by m, ascending, and tactic.
        timed: tactics among them, in a fixed order.
        exact: False where the entries are for another output type or layout of a.
        by_user: whether those at this m are the user's own measurements.
        failures: tactics that failed at this shape, with the reason; whatever m, but that memory may suffice
            for less.
        model: for what was not measured.
    """

    problem: Fc2Problem
    alpha: str
    points: Mapping[int, Mapping[Tactic, Entry]]
    timed: Mapping[Tactic, None]
    exact: bool
    by_user: bool
    failures: Mapping[Tactic, str]
    model: Optional[Model]

    @property
    def here(self) -> Mapping[Tactic, Entry]:
        """Entries of exactly this m."""
        return self.points.get(self.problem.m, {})

    def winners(self, among: Collection[Tactic]) -> set[Tactic]:
        """The fastest of some tactics at the nearest token counts below and above this m that measured any of
        them."""
        own = {m: {t: e.seconds for t, e in at.items() if t in among} for m, at in self.points.items()}
        return {min(own[m], key=lambda t: own[m][t]) for m in self._around([m for m in own if own[m]])}

    def _around(self, ms: Sequence[int]) -> list[int]:
        """Of ascending token counts the nearest below and the nearest above this problem's."""
        return [m for m in ms if m < self.problem.m][-1:] + [m for m in ms if m > self.problem.m][:1]

    def estimate(self, tactic: Tactic) -> Optional[Estimate]:
        """The best knowledge of a tactic's time; None where there is none."""
        if tactic not in self.timed:
            base = self._predict(self.problem, tactic, self.alpha)
            return None if base is None else Estimate(base, "model", self.alpha, "")
        entry = self.here.get(tactic)
        if entry is not None:
            return Estimate(
                entry.seconds, "measured" if self.exact else "interpolated", entry.alpha, "here", entry
            )
        near = self._around([m for m, entries in self.points.items() if tactic in entries])
        known = [self.points[m][tactic] for m in near]
        alpha = known[0].alpha
        base = self._predict(self.problem, tactic, alpha)
        # What the model misses at the neighbours, it is taken to miss here in proportion. Without a model
        # this is interpolation of the times, straight in log time over log tokens.
        predictions = [self._predict(replace(self.problem, m=m), tactic, alpha) for m in near]
        if base is None or None in predictions:
            base, predictions = 1.0, [1.0] * len(known)
        residuals = [math.log(entry.seconds / prediction) for entry, prediction in zip(known, predictions)]
        if len(known) == 1:
            return Estimate(base * math.exp(residuals[0]), "model", alpha, "one side")
        low, high = (math.log(m) for m in near)
        share = (math.log(self.problem.m) - low) / (high - low)
        seconds = base * math.exp(residuals[0] * (1 - share) + residuals[1] * share)
        return Estimate(seconds, "interpolated", alpha, "both sides")

    def _predict(self, problem: Fc2Problem, tactic: Tactic, alpha: str) -> Optional[float]:
        return self.model.predict(problem, tactic, alpha) if self.model else None


def table_problem(problem: Fc2Problem) -> Fc2Problem:
    """The problem as entries hold it: device type and capability belong to the table."""
    return replace(problem, device_type="cuda", capability=None)


def wanted_alpha(problem: Fc2Problem) -> str:
    """The form of alpha that decisions are made for: top-k with the k usual for E experts."""
    return f"topk:{assumed_top_k(problem.experts)}"


def _of_form(forms: Mapping[str, Mapping[Tactic, Entry]], wanted: Iterable[str]) -> dict[Tactic, Entry]:
    """Entries of the first of the wanted forms that has any, with those of kernels that do not depend on
    alpha."""
    for alpha in wanted:
        found = {**forms.get(ALPHA_ANY, {}), **forms.get(alpha, {})}
        if found:
            return found
    return {}


def _shape(problem: Fc2Problem) -> tuple:
    return (problem.n, problem.k, problem.experts, problem.b_layout, problem.a_layout, problem.out_dtype)


def _loose(shape: tuple) -> tuple:
    return shape[:4]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
