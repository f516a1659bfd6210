"""Measured times as values: entries, and tables of one GPU model.

Pure: no files (`dispatch.store`), no GPU. What they say about a problem is `dispatch.evidence`'s. An entry that cannot be
used keeps its record, so that writing a table back loses nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, Iterable, Mapping, Optional

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


def table_problem(problem: Fc2Problem) -> Fc2Problem:
    """The problem as entries hold it: device type and capability belong to the table."""
    return replace(problem, device_type="cuda", capability=None)


def wanted_alpha(problem: Fc2Problem) -> str:
    """The form of alpha that decisions are made for: top-k with the k usual for E experts."""
    return f"topk:{assumed_top_k(problem.experts)}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
