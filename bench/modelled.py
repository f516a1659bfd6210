"""`python -m bench model`: the model's predictions against the times it was fitted to, and with each problem left out.

Nothing is measured here. A prediction with its problem left out comes from a model that has not seen any row of that M,
which is what it faces where nothing was measured.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Optional, Sequence

from tabulate import tabulate

from bench import plots
from dispatch.calibrate import fitted, gpu_of_table, leave_one_out, summary
from dispatch.hardware import GPUS, Gpu, floor_seconds
from dispatch.measured import Entry, Table
from dispatch.model import Model
from dispatch.store import shipped_tables


@dataclass(frozen=True)
class Predicted:
    """One measured row and what is expected of it, in microseconds.

    Attributes:
        entry: the row.
        us: measured.
        fitted: by the model fitted to all rows.
        left_out: by what is known without any row of this problem; None where nothing is.
        floor: no kernel can be faster, every expert read and multiplied.
    """

    entry: Entry
    us: float
    fitted: Optional[float]
    left_out: Optional[float]
    floor: float


def predictions(table: Table) -> list[Predicted]:
    """Every measured row of a table, by shape, M and tactic."""
    gpu = gpu_of_table(table)
    model = Model(gpu.device.sm_count, gpu.read_bandwidth, gpu.mma_flops, fitted(table).model)
    unseen = {
        (result.problem, tactic): seconds
        for result in leave_one_out(table)
        for tactic, seconds in result.predicted.items()
    }
    rows = []
    for entry in sorted((e for e in table.entries if e.seconds), key=_order):
        expected = (
            model.predict(entry.problem, entry.tactic, entry.alpha),
            unseen.get((entry.problem, entry.tactic)),
        )
        fit, left = (None if seconds is None else seconds * 1e6 for seconds in expected)
        rows.append(Predicted(entry, entry.seconds * 1e6, fit, left, floor_seconds(entry.problem, gpu) * 1e6))
    return rows


def _order(entry: Entry) -> tuple:
    p = entry.problem
    return (p.n, p.k, p.experts, p.b_layout, entry.alpha, p.m, str(entry.tactic))


def render(table: Table, rows: Sequence[Predicted]) -> str:
    """Where the rows and the ceilings come from, the fitted constants, a table, and the leave-one-out summary."""
    gpu = gpu_of_table(table)
    sources = ", ".join(sorted({row.entry.source for row in rows}))
    parts = [
        f"{table.gpu}: {len(rows)} measured rows ({sources}); ceilings: {gpu.source}.\n"
        "Predictions are modelled: fixed + max(bytes / bandwidth / memory, flops / rate * wave factor / compute)"
    ]
    for name, family in (fitted(table).model or {}).items():
        tiles = ", ".join(f"{tile} {share:.2f}" for tile, share in sorted(family.compute.items()))
        parts[0] += (
            f"\n  {name}: fixed {family.fixed * 1e6:.1f} us, memory {family.memory:.2f}, compute by tile: {tiles}"
        )
    lines = [
        (
            "N={0.n} K={0.k} E={0.experts}".format(row.entry.problem),
            row.entry.problem.m,
            row.entry.alpha,
            row.entry.tactic.brief,
            row.entry.source,
            f"{row.us:.1f}",
            *_with_error(row.fitted, row.us),
            *_with_error(row.left_out, row.us),
            f"{row.floor:.1f}",
        )
        for row in rows
    ]
    headers = (
        "shape",
        "M",
        "alpha",
        "tactic",
        "source",
        "measured us",
        "model us",
        "error",
        "left out us",
        "error",
        "floor us",
    )
    parts.append(tabulate(lines, headers, disable_numparse=True, colalign=["left", "right", *["left"] * 3, *["right"] * 6]))
    parts.append(summary(leave_one_out(table)))
    return "\n\n".join(parts)


def _with_error(predicted: Optional[float], measured: float) -> tuple[str, str]:
    return ("-", "-") if predicted is None else (f"{predicted:.1f}", f"{100 * (predicted / measured - 1):+.1f}%")


def write_plot(pages: Sequence[tuple[Gpu, Sequence[Predicted]]], path: str) -> None:
    """Predicted over measured time for each GPU: fitted to the row, and with its problem left out."""
    from matplotlib.figure import Figure

    figure = Figure((6.5 * len(pages), 5.5), layout="constrained", dpi=110)
    for axes, (gpu, rows) in zip(figure.subplots(1, len(pages), squeeze=False)[0], pages):
        for name, marker, points in (
            ("fitted to it", "o", [(row.us, row.fitted) for row in rows if row.fitted]),
            ("its problem left out", "x", [(row.us, row.left_out) for row in rows if row.left_out]),
        ):
            if points:
                axes.plot(*zip(*points), marker, markersize=5, label=name, fillstyle="none")
        ends = [min(row.us for row in rows) * 0.8, max(row.us for row in rows) * 1.25]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.fill_between(
            ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="black", alpha=0.08, label="within 10%"
        )
        axes.set(xscale="log", yscale="log", xlabel="measured, us", ylabel="modelled, us", title=f"{gpu.device.name}")
        plots.plain_log_ticks(axes.xaxis)
        plots.plain_log_ticks(axes.yaxis)
        axes.legend(fontsize=8)
    figure.savefig(path)


def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 where no table is there to compare with."""
    parser = argparse.ArgumentParser(prog="python -m bench model", description=__doc__)
    parser.add_argument("--device", choices=sorted(GPUS), help="default every GPU with a table")
    parser.add_argument("--plot", metavar="FILE", help="PNG of modelled over measured time (needs matplotlib)")
    arguments = parser.parse_args(argv)
    tables = shipped_tables()
    gpus = [gpu for name, gpu in GPUS.items() if gpu.device.name in tables and arguments.device in (None, name)]
    if not gpus:
        print(
            f"no measured table for {arguments.device or 'any GPU'}; there are: {', '.join(tables)}", file=sys.stderr
        )
        return 2
    if arguments.plot:
        try:
            plots.require_matplotlib()
        except ImportError as error:
            parser.error(str(error))
    pages = []
    for gpu in gpus:
        table = tables[gpu.device.name]
        rows = predictions(table)
        print(render(table, rows) + "\n")
        pages.append((gpu, rows))
    if arguments.plot:
        write_plot(pages, arguments.plot)
    return 0
