"""Results of a shoot-out as values, and their JSON and CSV forms."""
from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Iterable, Mapping, Optional, TextIO

from backends.problem import Fc2Problem
from bench.clocks import Clocks
from bench.stats import Summary

SCHEMA = 1
#: Why a run ended that its user stopped.
CTRL_C = "Ctrl-C"
#: What a file says that was written before the run's end, and is all there is if the process is killed.
UNFINISHED = "the end of its process"


@dataclass(frozen=True)
class Row:
    """One contestant at one problem.

    Attributes:
        problem: what was computed; `b_layout` tells plain weights from prepared ones.
        alpha: its form, such as "topk:8".
        active_experts, pairs: experts that some token selected, and nonzeros of alpha; means over the rotated inputs.
        tactic: the tactic's JSON record, backend included.
        label: the tactic and the form of b, for people.
        timer: the method that timed it; see `bench.timing`.
        l2: "cold" or "warm"; "uncontrolled" on a CPU.
        warmup, iterations: calls before and during the timing.
        time: microseconds a call.
        busy_us: median time in which a kernel was running; None where the method does not know.
        error_over_bar, relative_error: see `dispatch.check.Errors`; measured on the results of the timed calls.
        reproducible: whether a repeated call gave the same bits.
        floor_us: no kernel can be faster for this alpha on this GPU; None where the GPU's ceilings are not known.
        dense_floor_us: the same when every expert is read and multiplied, whatever alpha says.
        auto: whether backend="auto" takes this tactic for this problem.
        clocks: SM clock, temperature and throttling seen while it was timed.
    """

    problem: Fc2Problem
    alpha: str
    active_experts: float
    pairs: float
    tactic: Mapping[str, Any]
    label: str
    timer: str
    l2: str
    warmup: int
    iterations: int
    time: Summary
    busy_us: Optional[float]
    error_over_bar: float
    relative_error: float
    reproducible: bool
    floor_us: Optional[float]
    dense_floor_us: Optional[float]
    auto: bool = False
    clocks: Optional[Clocks] = None

    @property
    def ok(self) -> bool:
        """Within the accuracy bar and reproducible."""
        return self.error_over_bar <= 1.0 and self.reproducible

    @property
    def throttled(self) -> bool:
        return self.clocks is not None and bool(self.clocks.throttling)

    @property
    def tflops(self) -> float:
        """2*M*N*K over the median, whatever the kernel skipped: how published figures count."""
        return self.problem.flops / self.time.median / 1e6

    @property
    def needed_bytes(self) -> float:
        """Bytes that this alpha makes necessary: selected experts' weights with scale factors, A, alpha, out."""
        share = self.active_experts / self.problem.experts
        return self.problem.bytes - self.problem.weight_bytes * (1.0 - share)

    @property
    def gbps(self) -> float:
        """`needed_bytes` over the median, in 10^9 bytes a second."""
        return self.needed_bytes / self.time.median / 1e3

    @property
    def percent_of_floor(self) -> Optional[float]:
        """100 when the call takes no longer than the floor of this alpha."""
        return None if self.floor_us is None else 100.0 * self.floor_us / self.time.median

    @property
    def setting(self) -> tuple:
        """What rows must share to be competitors."""
        p = self.problem
        return (p.n, p.k, p.experts, p.m, str(p.out_dtype), self.alpha, self.l2)

    @property
    def key(self) -> tuple:
        """What tells rows of one file apart and finds the same row in another."""
        return (*self.setting, self.problem.b_layout, json.dumps(self.tactic, sort_keys=True), self.timer)

    def to_json(self) -> dict[str, Any]:
        record = {
            **{name: value for name, value in vars(self).items() if name not in ("time", "problem", "clocks")},
            "problem": self.problem.to_json(),
            "tactic": dict(self.tactic),
            "median_us": self.time.median,
            "p10_us": self.time.p10,
            "p90_us": self.time.p90,
            "samples": self.time.count,
            "clocks": self.clocks and self.clocks.to_json(),
        }
        # For readers that do not want to compute them; `from_json` does not read these.
        record.update(ok=self.ok, throttled=self.throttled, tflops=self.tflops, gbps=self.gbps)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Row:
        """The inverse of `to_json`. Raises KeyError or ValueError for a record of something else."""
        names = set(cls.__dataclass_fields__) - {"time", "problem", "clocks"}
        return cls(
            problem=Fc2Problem.from_json(record["problem"]),
            time=Summary(record["median_us"], record["p10_us"], record["p90_us"], record["samples"]),
            clocks=Clocks.from_json(record["clocks"]) if record.get("clocks") else None,
            **{name: record[name] for name in names},
        )


@dataclass(frozen=True)
class Absent:
    """A backend or tactic that did not take part, and why.

    Attributes:
        tactic: its JSON record where one tactic failed, rather than a backend being unavailable.
    """

    label: str
    reason: str
    tactic: Optional[Mapping[str, Any]] = None


@dataclass
class Results:
    """A shoot-out's outcome.

    Attributes:
        environment: GPU, versions, date, command and measured ceilings, as JSON values.
        interrupted: why the run stopped before its end: `CTRL_C` or an error; "" if it did not.
    """

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    interrupted: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "interrupted": self.interrupted,
            "absent": [asdict(absent) for absent in self.absent],
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Results:
        """Raises ValueError for a file of another kind or schema."""
        if not isinstance(record, Mapping) or record.get("schema") != SCHEMA or "rows" not in record:
            raise ValueError(f"not a shoot-out result of schema {SCHEMA}")
        try:
            rows = [Row.from_json(row) for row in record["rows"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a row of the result misses or misnames something: {error!r}") from error
        absent = [Absent(**entry) for entry in record.get("absent", ())]
        return cls(dict(record["environment"]), rows, absent, str(record.get("interrupted", "")))


def competitors(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows by `setting`, in order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting, []).append(row)
    return groups


def fastest(rows: Iterable[Row]) -> Optional[Row]:
    """The fastest row whose result is right; None where none is."""
    return min((row for row in rows if row.ok), key=lambda row: row.time.median, default=None)


def regrets(rows: Iterable[Row]) -> dict[tuple, float]:
    """By key, for rows that auto chose: how much longer they take than the fastest right row with that form of b."""
    found = {}
    for group in competitors(rows).values():
        for row in group:
            best = fastest(other for other in group if other.problem.b_layout == row.problem.b_layout)
            if row.auto and best is not None:
                found[row.key] = row.time.median / best.time.median - 1.0
    return found


def write_json(results: Results, stream: TextIO) -> None:
    json.dump(results.to_json(), stream, indent=1)
    stream.write("\n")


def save(results: Results, path: str) -> None:
    """Write the JSON form to a file, in one step: whenever the process is killed, the file is whole."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        write_json(results, stream)
    os.replace(temporary, path)


def save_unfinished(results: Results, path: str) -> None:
    """`save`, marked as unfinished."""
    save(replace(results, interrupted=results.interrupted or UNFINISHED), path)


def read_results(path: str) -> Results:
    """Raises OSError, or ValueError naming the file where it is not a result."""
    with open(path, encoding="utf-8") as stream:
        try:
            return Results.from_json(json.load(stream))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def write_csv(results: Results, stream: TextIO) -> None:
    """One line a row: the JSON record with problem, tactic and clocks flattened, and the device's name."""
    records = []
    for row in results.rows:
        record = row.to_json()
        problem, clocks, tactic = record.pop("problem"), record.pop("clocks") or {}, record.pop("tactic")
        device = results.environment.get("device", "")
        record = {"device": device, **problem, **record, "backend": tactic["backend"], "tactic": json.dumps(tactic)}
        record.update({f"clocks_{name}": value for name, value in clocks.items()})
        records.append(record)
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(stream, columns, restval="")
    writer.writeheader()
    writer.writerows(records)
