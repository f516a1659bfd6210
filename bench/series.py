"""From rows to what is drawn: curves over M, and the matrix of tactics by M. Pure values, no plotting."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence

from bench.records import Row, fastest
from bench.stats import geomean


@dataclass(frozen=True)
class Curve:
    """The fastest row of one kind at each M, in ascending M.

    Attributes:
        name: of the backend, and the form of the weights; the tactic where the kind misses the accuracy bar.
        backend: for the colour.
        kind: "right", "prepared" (right, on prepared weights) or "misses bar".
    """

    name: str
    backend: str
    kind: str
    rows: tuple[Row, ...]


def panels(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows that belong in one plot: same weights, alpha form, output type and cache state; every M."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        p = row.problem
        found.setdefault((p.n, p.k, p.experts, row.alpha, str(p.out_dtype), row.l2), []).append(row)
    return found


def curves(rows: Sequence[Row]) -> list[Curve]:
    """One curve a backend and kind, in order of first appearance."""
    kinds: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        backend = row.tactic["backend"]
        if not row.ok:
            key = (row.label, backend, "misses bar")
        elif "/" in row.problem.b_layout:
            key = (f"{backend}, prepared weights", backend, "prepared")
        else:
            key = (backend, backend, "right")
        best = kinds.setdefault(key, {})
        m = row.problem.m
        if m not in best or row.time.median < best[m].time.median:
            best[m] = row
    return [Curve(*key, tuple(best[m] for m in sorted(best))) for key, best in kinds.items()]


@dataclass(frozen=True)
class Matrix:
    """Times of tactics (rows) by M (columns) over the fastest right time at that M; None where one was not measured.

    Attributes:
        left_out: tactics that were measured and are not shown.
    """

    labels: tuple[str, ...]
    ms: tuple[int, ...]
    ratios: tuple[tuple[float | None, ...], ...]
    left_out: int


def matrix(rows: Sequence[Row], most: int = 40) -> Matrix:
    """Tactics whose results are right, the best on (geometric) average first."""
    ms = sorted({row.problem.m for row in rows})
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.ok:
            times.setdefault(row.label, {})[row.problem.m] = row.time.median
    best = {m: f.time.median for m in ms if (f := fastest(row for row in rows if row.problem.m == m)) is not None}
    ratios = {label: {m: us / best[m] for m, us in of.items()} for label, of in times.items()}
    order = sorted(ratios, key=lambda label: (geomean(list(ratios[label].values())), label))
    shown = tuple(order[:most])
    cells = tuple(tuple(ratios[label].get(m) for m in ms) for label in shown)
    return Matrix(shown, tuple(ms), cells, len(order) - len(shown))
