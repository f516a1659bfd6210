"""`python -m bench import FILE`: make a shoot-out's result part of the measured table that the package ships."""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from backends import registry
from backends.problem import Fc2Problem
from bench.contestants import BASELINE
from bench.peers import DISPLACED, is_published
from bench.records import Results, Row, read_results
from dispatch.calibrate import fitted, leave_one_out, summary
from dispatch.measured import Entry, Table
from dispatch.store import SHIPPED, file_name, load, write

#: `Entry.source` of what comes from here.
SOURCE = "shoot-out"


def entries(results: Results) -> tuple[list[Entry], list[str]]:
    """Entries for a table, and what was left out, a sentence each.

    A right row becomes a time, a wrong row of a kernel a failure. Left out are the baseline's wrong rows (weights
    cached in bfloat16: wrong by design), skewed alpha, warm caches, and rows taken under throttling, which would be
    compared with better ones.
    """
    found, left_out = [], []
    for row in results.rows:
        reason = _why_not(row)
        if reason:
            left_out.append(f"M={row.problem.m} {row.alpha} {row.label}: {reason}")
            continue
        found.append(_entry(row, results.environment))
    return found, left_out


def _why_not(row: Row) -> str:
    if row.tactic["backend"] == BASELINE and not row.ok:
        return "misses the accuracy bar, as it is known to"
    if row.alpha.startswith("skewed"):
        return "tables hold topk and dense alpha"
    if row.l2 != "cold":
        return f"L2 was {row.l2}"
    return "throttled" if row.throttled else ""


def _entry(row: Row, environment: Mapping[str, Any]) -> Entry:
    backend = row.tactic["backend"]
    tactic = registry.get(backend).tactic_type.from_json(row.tactic)
    p = row.problem
    problem = Fc2Problem(p.m, p.n, p.k, p.experts, p.out_dtype, p.a_layout, p.b_layout)
    notes = {
        "timer": row.timer,
        "l2": row.l2,
        "warmup": row.warmup,
        "iterations": row.iterations,
        "date": environment["date"],
        **environment.get("conditions", {}).get(backend, {}),
    }
    if not row.ok:
        reason = (
            "not reproducible"
            if row.error_over_bar <= 1
            else f"wrong result: {row.error_over_bar:.3g} times the accuracy bar"
        )
        return Entry(problem, row.alpha, tactic, None, source=SOURCE, failure=reason, notes=notes)
    # The table keeps half the distance of the quartiles; a tenth and nine tenths lie further apart, so this is no less.
    return Entry(problem, row.alpha, tactic, row.time.median * 1e-6, row.time.spread / 2, SOURCE, notes=notes)


def merged(table: Table, new: Iterable[Entry]) -> Table:
    """The table with new entries, fitted anew where its GPU's ceilings are known.

    Published entries of the shapes that were measured now stay in the file but no longer decide: a publication timed
    another kernel.
    """
    new = list(new)
    shapes = {_shape(entry) for entry in new if entry.seconds is not None}
    displaced = [entry for entry in table.entries if is_published(entry) and _shape(entry) in shapes]
    kept = tuple(entry for entry in table.entries if entry not in displaced)
    records = [*table.extra.get(DISPLACED, ()), *(entry.to_json() for entry in displaced)]
    extra = {**table.extra, DISPLACED: records} if records else table.extra
    table = replace(table, entries=kept, extra=extra).merged(new)
    try:
        return fitted(table)
    except ValueError:  # a GPU whose ceilings nobody has entered gets no model
        return table


def _shape(entry: Entry) -> tuple:
    p = entry.problem
    return (p.n, p.k, p.experts, p.out_dtype, entry.tactic.backend)


def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 where the file cannot be read or holds nothing for a table."""
    parser = argparse.ArgumentParser(prog="python -m bench import", description=__doc__)
    parser.add_argument("file", help="what the shoot-out, or `bench b200`, wrote with --json or --out")
    parser.add_argument(
        "--into", type=Path, default=SHIPPED, metavar="DIR", help="directory of tables (default the package's)"
    )
    arguments = parser.parse_args(argv)
    if not arguments.into.is_dir():
        parser.error(f"--into {arguments.into}: there is no such directory")
    try:
        results = read_results(arguments.file)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    new, left_out = entries(results)
    for reason in left_out:
        print(f"left out: {reason}")
    if not new:
        print(f"{arguments.file} holds nothing for a table", file=sys.stderr)
        return 2
    gpu = results.environment["device"]
    path = arguments.into / file_name(gpu)
    table = merged(load(path) or Table(gpu), new)
    write(path, table)
    times = sum(entry.seconds is not None for entry in new)
    print(f"{path}: {times} times and {len(new) - times} failures added; {len(table.entries)} entries now decide")
    try:
        print(summary(leave_one_out(table)))
    except ValueError as error:
        print(f"no model was fitted: {error}")
    return 0
