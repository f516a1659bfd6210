"""`python -m bench compare old.json new.json`: what changed beyond noise, with an exit code for CI."""
from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Sequence

from tabulate import tabulate

from bench.records import Results, Row, read_results
from bench.stats import change, geomean

SAME, REGRESSION, UNUSABLE = 0, 1, 2


@dataclass(frozen=True)
class Comparison:
    """Two files, row by row.

    Attributes:
        pairs: (old, new, relative change, "slower" | "faster" | "same") of rows in both, in the old file's order.
        broken: new rows whose result became wrong or not reproducible.
        missing: old rows that the new file lacks.
        added: new rows that the old file lacks.
    """

    pairs: tuple[tuple[Row, Row, float, str], ...]
    broken: tuple[Row, ...]
    missing: tuple[Row, ...]
    added: tuple[Row, ...]

    @property
    def exit_code(self) -> int:
        """0 nothing got worse, 1 something did (slower, wrong, or gone), 2 the files have no row in common."""
        if not self.pairs:
            return UNUSABLE
        worse = self.broken or self.missing or any(verdict == "slower" for *_, verdict in self.pairs)
        return REGRESSION if worse else SAME


def compare(old: Results, new: Results, margin: float) -> Comparison:
    """Match rows by problem, alpha, cache state, form of the weights, tactic and timer.

    Args:
        margin: relative change below which nothing counts; see `bench.stats.change`.
    """
    before, after = ({row.key: row for row in results.rows} for results in (old, new))
    common = [key for key in before if key in after]
    return Comparison(
        tuple((before[key], after[key], *change(before[key].time, after[key].time, margin)) for key in common),
        tuple(after[key] for key in common if before[key].ok and not after[key].ok),
        tuple(row for key, row in before.items() if key not in after),
        tuple(row for key, row in after.items() if key not in before),
    )


def disagreements(one: Results, other: Results, percent: float, us: float) -> tuple[int, list[str]]:
    """Rows of two timing methods that measured the same: how many, and those that do not agree.

    They agree when the medians differ by no more than the sum of a relative tolerance and an absolute one, for what a
    method adds to every call.
    """
    methods = {row.key[:-1]: row for row in other.rows}  # the timer is the key's last part
    common, found = 0, []
    for row in one.rows:
        match = methods.get(row.key[:-1])
        if match is None:
            continue
        common += 1
        first, second = row.time.median, match.time.median
        if abs(first - second) > percent / 100 * min(first, second) + us:
            found.append(
                f"M={row.problem.m} {row.alpha} {row.label}: {row.timer} {first:.1f} us, {match.timer} {second:.1f} us"
            )
    return common, found


def _report_agreement(one: Results, other: Results, percent: float, us: float) -> int:
    common, found = disagreements(one, other, percent, us)
    print("\n".join([*found, f"{common - len(found)} of {common} rows agree within {percent:g}% + {us:g} us"]))
    return UNUSABLE if not common else int(bool(found))


def render(comparison: Comparison, show_all: bool = False) -> str:
    """A table of what changed, and a summary."""
    rows = [
        (
            {"slower": "-", "faster": "+", "same": ""}[verdict],
            new.problem.m,
            new.alpha,
            new.label,
            f"{old.time.median:.1f}",
            f"{new.time.median:.1f}",
            f"{100 * relative:+.1f}%",
            "throttled" if old.throttled or new.throttled else "",
        )
        for old, new, relative, verdict in comparison.pairs
        if show_all or verdict != "same"
    ]
    parts = []
    if rows:
        parts.append(
            tabulate(rows, ("", "M", "alpha", "tactic", "old us", "new us", "change", ""), disable_numparse=True)
        )
    for title, found in (
        ("result wrong or not reproducible now", comparison.broken),
        ("in the old file only", comparison.missing),
        ("in the new file only", comparison.added),
    ):
        parts += [f"{title}: M={row.problem.m} {row.alpha} {row.label} ({row.timer}, {row.l2} L2)" for row in found]
    verdicts = [verdict for *_, verdict in comparison.pairs]
    summary = (
        f"{len(verdicts)} rows in both files: {verdicts.count('slower')} slower, {verdicts.count('faster')} faster"
    )
    if verdicts:
        ratio = geomean([new.time.median / old.time.median for old, new, *_ in comparison.pairs])
        summary += f"; geometric mean of new/old {ratio:.3f}"
    return "\n".join([*parts, summary])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Compare two results of the shoot-out. Exit code: 0 nothing got worse; 1 a row is slower beyond "
        "noise, wrong, or gone; 2 the files cannot be compared.",
    )
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--margin", type=float, default=3.0, help="percent below which no change counts (default 3)")
    parser.add_argument(
        "--agree",
        nargs=2,
        type=float,
        metavar=("PERCENT", "US"),
        help="instead: do two timing methods agree? rows match whatever timed them, and may differ by PERCENT plus US",
    )
    parser.add_argument("--all", action="store_true", help="show unchanged rows too")
    arguments = parser.parse_args(argv)
    try:
        old, new = read_results(arguments.old), read_results(arguments.new)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    devices = {results.environment["device"] for results in (old, new)}
    if len(devices) > 1:
        print(f"measured on different devices: {', '.join(sorted(devices))}", file=sys.stderr)
        return UNUSABLE
    if arguments.agree:
        return _report_agreement(old, new, *arguments.agree)
    comparison = compare(old, new, arguments.margin / 100)
    if not comparison.pairs:
        print("no row in common: problem, alpha, L2, form of the weights, tactic and timer must match", file=sys.stderr)
        return UNUSABLE
    print(render(comparison, arguments.all))
    return comparison.exit_code
