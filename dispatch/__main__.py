"""`python -m dispatch`: the environment, decisions for any known GPU, tuning, fitting the model to a table."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Optional, Sequence

import torch

from backends import registry
from backends.device import DeviceInfo
from backends.problem import OUT_DTYPES, Fc2Problem
from dispatch import calibrate, environment, store
from dispatch.api import preparer
from dispatch.choice import choose
from dispatch.errors import ArgumentError, Fc2Error
from dispatch.hardware import GPUS
from dispatch.measured import Table
from dispatch.pins import Pin
from dispatch.ranges import integers
from dispatch.shapes import SHAPES
from dispatch.tune import ROUNDS, autotune, judge

#: `--b-layout` of weights as `dispatch.prepare` leaves them on the device, and that of those it starts from.
PREPARED, PLAIN = "prepared", "128x4"
#: Token counts that `tune` takes where none are named.
DEFAULT_MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Fc2Error, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; finished problems are saved, and the same command goes on from there",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dispatch", description=__doc__)
    parser.set_defaults(run=_environment)
    commands = parser.add_subparsers(title="commands")

    explain = commands.add_parser("explain", help="what fc2 would run, and why; needs no GPU")
    _shape_arguments(explain)
    explain.add_argument("--m", type=integers, required=True, help="token counts, such as 64 or 1,8,32:384:32")
    explain.add_argument("--device", help=f"a GPU to decide for: {', '.join(GPUS)}; default the one at hand")
    explain.add_argument("--backend", default="auto")
    explain.add_argument("--tactic", help="a tactic or some of its fields, such as 'cute(tile_n=64)'")
    explain.set_defaults(run=_explain)

    tune = commands.add_parser("tune", help="measure tactics on this GPU for later decisions")
    _shape_arguments(tune)
    tune.add_argument(
        "--m", type=integers, default=DEFAULT_MS, help="token counts, such as 1,8,32:384:32 (default %(default)s)"
    )
    tune.add_argument(
        "--alpha", type=_words, help="forms of alpha, such as topk:8,dense; default the usual top-k"
    )
    tune.add_argument(
        "--budget", type=float, default=300.0, help="seconds to keep within (default %(default)s)"
    )
    tune.add_argument("--backends", type=_words, help="backends to include; default those that auto may take")
    tune.add_argument(
        "--candidates", type=int, default=12, help="tactics per problem at most (default %(default)s)"
    )
    tune.add_argument("--plain", action="store_true", help="also tune weights that are not prepared")
    tune.add_argument("--again", action="store_true", help="measure anew what is tuned already")
    tune.add_argument("--no-refine", action="store_true", help="only the token counts given")
    tune.set_defaults(run=_tune)

    judge_ = commands.add_parser(
        "judge", help="time candidates at token counts and compare with what is decided without that"
    )
    _shape_arguments(judge_)
    judge_.add_argument(
        "--m", type=integers, default=(5, 23, 77, 150, 333), help="token counts (default %(default)s)"
    )
    judge_.add_argument(
        "--budget", type=float, default=300.0, help="seconds to keep within (default %(default)s)"
    )
    judge_.add_argument(
        "--backends", type=_words, help="backends to include; default those that auto may take"
    )
    judge_.add_argument(
        "--candidates", type=int, default=12, help="tactics per problem at most (default %(default)s)"
    )
    judge_.add_argument("--plain", action="store_true", help="also weights that are not prepared")
    judge_.set_defaults(run=_judge)

    fit = commands.add_parser(
        "fit", help="fit the model to a table, write its constants and show how far to trust it"
    )
    fit.add_argument("table", type=Path)
    fit.set_defaults(run=_fit)

    ship = commands.add_parser("ship", help="make the user's table of this GPU a shipped one, with its model")
    ship.add_argument("table", type=Path, help="a tuned table, such as the one that `tune` names")
    ship.set_defaults(run=_ship)
    return parser


def _shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", type=_words, help=f"{', '.join(SHAPES)}, or all; instead of --n, --k and --experts"
    )
    for name, text in (("--n", "hidden size"), ("--k", "K over all experts"), ("--experts", "experts")):
        parser.add_argument(name, type=int, help=text)
    parser.add_argument("--out-dtype", choices=list(OUT_DTYPES), default="bfloat16")
    parser.add_argument(
        "--b-layout",
        default=PREPARED,
        help="of the weights: 128x4, linear, backend/form, or as dispatch.prepare leaves them (default %(default)s)",
    )


def _problems(arguments: argparse.Namespace, m: int) -> list[Fc2Problem]:
    sizes = (arguments.n, arguments.k, arguments.experts)
    if (arguments.shape is None) == (None in sizes):
        raise ArgumentError("name the sizes: either --shape, or all of --n, --k and --experts")
    if arguments.shape is not None:
        names = list(SHAPES) if arguments.shape == ["all"] else arguments.shape
        unknown = [name for name in names if name not in SHAPES]
        if unknown:
            raise ArgumentError(f"--shape {unknown[0]!r} is unknown; known: {', '.join(SHAPES)}")
        shapes = [(SHAPES[name].n, SHAPES[name].k, SHAPES[name].experts) for name in names]
    else:
        shapes = [sizes]
    for n, k, experts in shapes:
        if min(m, n, k, experts) < 1 or k % experts or k // experts % 16:
            raise ArgumentError(
                f"m={m} n={n} k={k} experts={experts}: k / experts must be a positive multiple of 16"
            )
    dtype = OUT_DTYPES[arguments.out_dtype]
    layout = PLAIN if arguments.b_layout == PREPARED else arguments.b_layout
    return [Fc2Problem(m, n, k, experts, dtype, b_layout=layout) for n, k, experts in shapes]


def _device(name: Optional[str]) -> DeviceInfo:
    if name is None:
        return DeviceInfo.of("cuda" if torch.cuda.is_available() else "cpu")
    if name not in GPUS:
        raise ArgumentError(f"--device {name!r} is unknown; known: {', '.join(GPUS)}")
    return GPUS[name].device


def _environment(arguments: argparse.Namespace) -> int:
    for name, value in environment.describe().items():
        print(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")
    device = _device(None)
    print(f"\nbackends on {device.name}:")
    for name in registry.names():
        backend = registry.get(name)
        support = backend.is_supported(device)
        automatic = backend.is_automatic(device)
        state = "no" if not support else "yes" if automatic else "only by name"
        reason = support.reason or automatic.reason
        kernel = environment.kernel_fingerprint(type(backend))
        print(f"  {name}: {state}{f': {reason}' if reason else ''} (kernel {kernel})")
    print("\nmeasured tables in the package:")
    for table in store.shipped_tables().values():
        own = replace(table, entries=tuple(e for e in table.entries if "kernel" in e.notes))
        changed = store.fresh(own)[1]
        since = f"; {changed} times are of other versions of the kernels or their compilers" if changed else ""
        print(f"  {_counts(table)}; model {'fitted' if table.model else 'none'}{since}")
    used = store.shipped_for(device)
    print(f"  for {device.name}: {used.gpu if used else 'none'}")
    settings = environment.settings()
    print(f"\ncache: {settings.cache_dir}")
    for path in sorted(settings.cache_dir.glob("*.json")):
        table = store.load(path)
        if table is not None:
            lost = f"{store.fresh(table)[1]} stale, {len(table.set_aside)} damaged, {len(table.unused)} unused"
            print(f"  {path.name}: {_counts(table)}; {lost}")
    print(
        f"\nFC2_BACKEND={settings.backend} FC2_TACTIC={settings.tactic} FC2_CACHE_DIR={settings.cache_dir} "
        f"FC2_LOG={int(settings.log)}"
    )
    return 0


def _counts(table: Table) -> str:
    shapes = {(e.problem.n, e.problem.k, e.problem.experts) for e in table.entries}
    sources = sorted({e.source for e in table.entries})
    return (
        f"{table.gpu}: {len(table.entries)} times of {len(shapes)} shapes ({', '.join(sources) or 'empty'})"
    )


def _explain(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    pin = Pin.parse(arguments.tactic) if arguments.tactic else None
    for problem in (replace(p, m=m) for p in _problems(arguments, max(arguments.m)) for m in arguments.m):
        problem = replace(problem, device_type=device.type, capability=device.capability)
        known = store.measured_for(device)
        backend = pin.backend if pin and pin.backend else arguments.backend
        if arguments.b_layout == PREPARED and backend in ("auto", *registry.names()):
            found = preparer(problem, device, backend)
            problem = replace(problem, b_layout=found[1]) if found else problem
        print(choose(problem, device, known, arguments.backend, pin))
    return 0


def _as_deployed(arguments: argparse.Namespace) -> list[Fc2Problem]:
    """The problems with weights as the backends of this device prepare them."""
    problems = []
    for problem in _problems(arguments, max(arguments.m)):
        layouts = []
        if arguments.b_layout == PREPARED:
            layouts = prepared_layouts(problem, _device(None), arguments.backends)
        if arguments.plain or not layouts:
            layouts.append(problem.b_layout)
        problems += [replace(problem, b_layout=layout) for layout in layouts]
    return problems


def _judge(arguments: argparse.Namespace) -> int:
    results = judge(
        _as_deployed(arguments),
        ms=arguments.m,
        budget_s=arguments.budget,
        backends=arguments.backends,
        candidates=arguments.candidates,
    )
    for r in results:
        p = r.problem
        print(
            f"m={p.m} n={p.n} k={p.k} experts={p.experts} b={p.b_layout} {r.alpha}: {r.chosen} ({r.source}) "
            f"{r.seconds * 1e6:.2f} us, best {r.best} {r.best_seconds * 1e6:.2f} us, regret {r.regret:.1%}"
        )
    if results:
        worst = max(r.regret for r in results)
        print(
            f"regret over {len(results)} problems: geomean {calibrate.geomean_regret(results):.1%}, worst {worst:.1%}"
        )
    return 0 if results else 1


def _tune(arguments: argparse.Namespace) -> int:
    device = _device(None)
    problems = _as_deployed(arguments)
    print(
        f"{len(problems)} shapes x {len(arguments.m)} token counts on {device.name}, {ROUNDS} samples per tactic"
    )
    report = autotune(
        problems,
        ms=arguments.m,
        alphas=arguments.alpha,
        budget_s=arguments.budget,
        backends=arguments.backends,
        candidates=arguments.candidates,
        refine=not arguments.no_refine,
        again=arguments.again,
    )
    print(report)
    return 0 if report.done or report.resumed else 1


def prepared_layouts(problem: Fc2Problem, device: DeviceInfo, backends: Optional[Sequence[str]]) -> list[str]:
    """The layouts that weights of this shape have once the backends of the device have prepared them."""
    problem = replace(problem, device_type=device.type, capability=device.capability)
    runnable = [registry.get(n) for n in backends or registry.names() if registry.get(n).is_automatic(device)]
    return [layout for layout in dict.fromkeys(b.prepared_layout(problem) for b in runnable) if layout]


def _fit(arguments: argparse.Namespace) -> int:
    table = calibrate.fitted(_read(arguments.table))
    store.write(arguments.table, table)
    for name, family in table.model.items():
        print(f"{name}: {family.to_json()}")
    print(calibrate.summary(calibrate.leave_one_out(table)))
    return 0


def _ship(arguments: argparse.Namespace) -> int:
    tuned = _read(arguments.table)
    path = store.SHIPPED / store.file_name(tuned.gpu)
    table = (store.load(path) or Table(tuned.gpu)).merged(tuned.entries)
    store.write(path, calibrate.fitted(table))
    print(f"{path}: {_counts(table)}")
    print(calibrate.summary(calibrate.leave_one_out(table)))
    return 0


def _read(path: Path) -> Table:
    try:
        return Table.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentError(f"{path}: {error}") from None


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    sys.exit(main())
