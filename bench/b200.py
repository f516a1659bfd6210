"""`python -m bench b200`: what to run on a B200, once, to send one file back.

First every tactic of the CuTe backend is checked on the chip against float64, each in a process that may crash or hang
without harm; then those that passed are timed at the published tables' token counts and set beside the published times.
`python -m bench import FILE` makes the file the measured table that the package ships.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Iterator, Mapping, Sequence

from tabulate import tabulate

from backends import registry
from backends.device import DeviceInfo
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from bench import options as command_line
from bench import shootout, tables
from bench.contestants import BASELINE
from bench.environment import describe
from bench.options import Options
from bench.outputs import check_directory
from bench.peers import published_entries
from bench.progress import Progress
from bench.records import CTRL_C, Absent, Results, Row, save, save_unfinished
from bench.shootout import Keep, Report
from dispatch.tune import WorkerDied, WorkerProcess

CAPABILITIES = ((10, 0), (10, 3))
#: Ragged and whole tiles, of one CTA and of a pair.
CHECKED_MS = (1, 8, 127, 128, 129, 200, 256, 257)
TIMED_MS = (1, 8, 16, *range(32, 385, 32), 512)
#: Fields that name a published configuration; other fields of a tactic are ours to choose.
PUBLISHED_FIELDS = ("tile_m", "tile_n", "cluster_m", "cluster_n", "split_k")
# Making a full-size problem and its float64 reference takes seconds; a kernel that has not answered by then hangs.
_SETUP_SECONDS = 300.0


def check_tactics(
    problems: Sequence[tuple[Fc2Problem, str]],
    tactics: Sequence[Tactic],
    device: str,
    patience: float,
    report: Report,
) -> Iterator[tuple[Tactic, str]]:
    """Each failing tactic and why, "M=129 dense: ...", as it is found; tactics that are right everywhere do not come.

    Args:
        problems: with the form of alpha.
        patience: seconds a tactic may take to compile and run at one problem.
        report: told what is being done, and the share that is done.
    """
    failed: set[Tactic] = set()
    worker = None
    total, done = len(problems) * len(tactics), 0
    try:
        for problem, alpha in problems:
            ready = False
            for tactic in tactics:
                report(f"M={problem.m} {alpha}: checking {tactic.brief}", done / total)
                done += 1
                if tactic in failed or not registry.get(tactic.backend).can_implement(problem, tactic):
                    continue
                worker = worker or WorkerProcess()
                try:
                    if not ready:
                        setup = {
                            "do": "setup",
                            "problem": problem.to_json(),
                            "alpha": alpha,
                            "device": device,
                            "backends": [],
                        }
                        _ask(worker, setup, _SETUP_SECONDS, "inputs could not be made")
                        ready = True
                except WorkerDied as death:
                    raise RuntimeError(f"inputs for M={problem.m} could not be made: {death}") from death
                try:
                    answer = list(worker.ask({"do": "check", "tactic": tactic.to_json()}, patience))[-1]
                    reason = answer.get("failed", "")
                except WorkerDied as death:
                    worker.close()
                    worker, ready, reason = None, False, str(death)
                if reason:
                    failed.add(tactic)
                    yield tactic, f"M={problem.m} {alpha}: {reason}"
    finally:
        if worker is not None:
            worker.close()


def _ask(worker: WorkerProcess, request: Mapping, seconds: float, what: str) -> None:
    answer = list(worker.ask(request, seconds))[-1]
    if "failed" in answer:
        raise RuntimeError(f"{what}: {answer['failed']}")


def beside_published(rows: Sequence[Row]) -> str:
    """The published configurations: times published before and after, and the best of ours with the same fields."""
    lines = []
    for entry in sorted(published_entries(), key=lambda e: (e.source, str(e.tactic), e.problem.m)):
        wanted = {name: getattr(entry.tactic, name) for name in PUBLISHED_FIELDS}
        ours = [
            row
            for row in rows
            if row.ok
            and _dimensions(row.problem) == _dimensions(entry.problem)
            and all(row.tactic.get(name) == value for name, value in wanted.items())
        ]
        best = min(ours, key=lambda row: row.time.median, default=None)
        before = entry.notes.get("before_us")
        lines.append(
            (
                entry.source,
                entry.tactic.brief,
                entry.problem.m,
                "" if before is None else f"{before:.1f}",
                f"{entry.seconds * 1e6:.1f}",
                "" if best is None else f"{best.time.median:.1f}",
                "" if best is None else f"{entry.seconds * 1e6 / best.time.median:.2f}",
                "" if best is None else f"{best.alpha} {best.label}",
            )
        )
    headers = ("source", "configuration", "M", "before us", "published us", "ours us", "speed-up", "ours is")
    return tabulate(lines, headers, disable_numparse=True)


def _dimensions(problem: Fc2Problem) -> tuple[int, int, int, int]:
    return (problem.m, problem.n, problem.k, problem.experts)


def measure(options: Options, checked_ms: Sequence[int], patience: float, report: Report, keep: Keep) -> Results:
    """Check all tactics of the options' backends but the baseline, then time those that passed.

    The first quarter of the progress is the checks'. Ctrl-C in it leaves the failures found by then, and no rows.
    """
    info, shape = DeviceInfo.of(options.device), options.shape
    problems = [
        Fc2Problem(
            m, shape.n, shape.k, shape.experts, options.out_dtype, device_type=info.type, capability=info.capability
        )
        for m in checked_ms
    ]
    tactics = [
        tactic
        for name in options.backends
        if name != BASELINE
        for tactic in dict.fromkeys(t for problem in problems for t in registry.get(name).tactics(problem))
    ]
    points = [(problem, str(form)) for form in options.alphas for problem in problems]
    failures: dict[Tactic, str] = {}

    def with_checks(results: Results) -> Results:
        checked = {
            "tactics": len(tactics),
            "failed": len(failures),
            "ms": list(checked_ms),
            "alphas": [str(f) for f in options.alphas],
        }
        failed = [Absent(t.brief, reason, t.to_json()) for t, reason in failures.items()]
        return replace(
            results, environment={**results.environment, "checked": checked}, absent=[*results.absent, *failed]
        )

    try:
        for tactic, reason in check_tactics(
            points, tactics, str(options.device), patience, lambda text, share: report(text, share / 4)
        ):
            failures[tactic] = reason
    except KeyboardInterrupt:
        return with_checks(Results(describe(options.device), interrupted=CTRL_C))
    passed = [tactic for tactic in tactics if tactic not in failures]
    baseline = registry.get(BASELINE).tactics(problems[0]) if BASELINE in options.backends else ()
    return with_checks(
        shootout.run(
            replace(options, tactics=(*passed, *baseline)),
            lambda text, share: report(text, 0.25 + 0.75 * share),
            lambda results: keep(with_checks(results)),
        )
    )


def main(argv: Sequence[str]) -> int:
    """Returns 0; 1 where a tactic or the device failed; 2 where this is no B200; 130 where interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench b200", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_arguments(parser)
    parser.add_argument("--out", default="fc2-b200.json", help="the file to send back (default fc2-b200.json)")
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds until a tactic counts as hanging (120)"
    )
    parser.add_argument(
        "--checked-m", type=command_line.integers, default=CHECKED_MS, help="token counts of the check"
    )
    parser.add_argument("--rehearse", action="store_true", help="run the procedure on whatever device this is")
    parser.set_defaults(m=TIMED_MS, backends="cute,torch", alpha=None)
    arguments = parser.parse_args(argv)
    options = command_line.from_arguments(arguments, parser)
    check_directory(arguments.out, parser)
    if not arguments.alpha:
        options = replace(options, alphas=(*options.alphas, command_line.AlphaForm("dense")))
    info = DeviceInfo.of(options.device)
    if info.capability not in CAPABILITIES and not arguments.rehearse:
        print(
            f"this needs an SM 10.0 or 10.3 GPU; {info.name} is {info.arch} (--rehearse runs it all the same)",
            file=sys.stderr,
        )
        return 2
    with Progress() as progress:
        results = measure(
            options,
            arguments.checked_m,
            arguments.patience,
            progress,
            lambda results: save_unfinished(results, arguments.out),
        )
    save(results, arguments.out)
    print(tables.render(results))
    checked = results.environment["checked"]
    if results.rows:
        passed = checked["tactics"] - checked["failed"]
        print("\n" + beside_published(results.rows))
        print(f"\n{passed} of {checked['tactics']} tactics are right at M = {checked['ms']}")
    print(f"written to {arguments.out}: please send this file back")
    if results.interrupted:
        return 130 if results.interrupted == CTRL_C else 1
    return int(checked["failed"] > 0)
