"""Results as text: one table per token count, for terminals and for Markdown."""
from __future__ import annotations

from typing import Sequence

from tabulate import tabulate

from bench.peers import published
from bench.records import Results, Row, competitors, fastest, regrets
from bench.series import panels

HEADERS = ("", "backend and tactic", "us", "p10", "p90", "x torch", "TFLOPS", "GB/s", "% floor", "error", "notes")
SUMMARY_HEADERS = ("M", "fastest", "us", "x torch", "TFLOPS", "GB/s", "% floor", "auto")
TEXT_COLUMNS = ("", "backend and tactic", "notes", "fastest")

LEGEND = """\
us: median of a call; p10, p90: the middle 80% of the samples. x torch: how much faster than the faster torch row.
TFLOPS: 2*M*N*K over the time, whatever was skipped. GB/s: the bytes this alpha makes necessary (weights of the selected
experts with scale factors, A, alpha, out, each once) over the time. % floor: 100 at the time below which no kernel can
go for this alpha. error: largest |out - ref| over the accuracy bar, against float64; right when at most 1.
* fastest right result; auto: what backend="auto" takes, with its regret; prepared: weights permuted by prepare()."""


def render(results: Results, style: str = "simple", with_published: bool = False) -> str:
    """Everything a reader of a terminal needs.

    Args:
        style: tabulate's: "simple", "github" for Markdown.
        with_published: append the published B200 times of the same shape and M.

    Returns:
        a paragraph on where it was measured, the tables, a summary over M, who was absent and why, and the legend.
    """
    regret = regrets(results.rows)
    heading = "### " if style == "github" else ""
    details, summaries = [], []
    for rows in competitors(results.rows).values():
        lines = [cells(row, rows, regret) for row in rows]
        lines += _published_cells(rows[0]) if with_published else []
        details.append(f"{heading}{caption(rows[0])}\n\n{_table(HEADERS, lines, style)}")
    for rows in panels(results.rows).values():
        lines = summary(rows, regret)
        if len(lines) > 1:
            title = f"{heading}Fastest right results, alpha {rows[0].alpha}"
            summaries.append(f"{title}\n\n{_table(SUMMARY_HEADERS, lines, style)}")
    # A file is read from its beginning, a terminal from its end.
    parts = [headline(results), *(summaries + details if style == "github" else details + summaries)]
    if results.absent:
        absent = tabulate([(a.label, a.reason) for a in results.absent], ("did not run", "reason"), tablefmt=style)
        parts.append(absent)
    if results.interrupted:
        parts.append(f"Interrupted by {results.interrupted}: the tables hold what had been measured by then.")
    if results.rows:
        parts.append(f"```\n{LEGEND}\n```" if style == "github" else LEGEND)
    return "\n\n".join(parts)


def filled(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines without the columns that are empty."""
    shown = [column for column in range(len(headers)) if any(line[column] for line in lines)]
    return [headers[column] for column in shown], [[line[column] for column in shown] for line in lines]


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]], style: str) -> str:
    headers, lines = filled(headers, lines)
    align = ["left" if header in TEXT_COLUMNS else "right" for header in headers]
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True, colalign=align)


def summary(rows: Sequence[Row], regret: dict[tuple, float]) -> list[list[str]]:
    """A line of `SUMMARY_HEADERS` for each token count: its fastest right row, and what auto loses on those weights."""
    lines = []
    for group in competitors(rows).values():
        best = fastest(group)
        if best is None:
            continue
        _, _, us, _, _, speedup, tflops, gbps, percent, _, _ = cells(best, group, regret)
        same_weights = (row for row in group if row.problem.b_layout == best.problem.b_layout)
        lost = next((f"+{100 * regret[row.key]:.1f}%" for row in same_weights if row.key in regret), "")
        lines.append([str(best.problem.m), best.label, us, speedup, tflops, gbps, percent, lost])
    return lines


def headline(results: Results) -> str:
    env = results.environment
    lines = [f"{env['device']}, torch {env['versions']['torch']}, {env['date']}"]
    measured, used = env.get("ceilings_measured"), env.get("ceilings")
    if used:
        lines.append(
            f"floors from {used['read_bandwidth'] / 1e12:.2f} TB/s and {used['mma_flops'] / 1e12:.0f} TFLOP/s "
            f"({used['source']})"
        )
    if measured:
        lines.append(
            f"measured in this run: {measured['read_bandwidth'] / 1e12:.2f} TB/s read by a sum, "
            f"{measured['bf16_flops'] / 1e12:.0f} TFLOP/s in a bfloat16 product"
        )
    if env["device"].startswith("CPU"):
        lines.append("No GPU here: a small preset on the CPU, whose times say nothing about a GPU.")
    return "\n".join(lines)


def caption(row: Row) -> str:
    """What the rows of a table share."""
    p = row.problem
    text = f"M={p.m}  N={p.n} K={p.k} E={p.experts}  alpha {row.alpha}: "
    text += f"{row.active_experts:.0f} of {p.experts} experts selected"
    if row.floor_us is not None:
        text += f", floor {row.floor_us:.1f} us (dense {row.dense_floor_us:.1f})"
    l2 = "" if row.l2 == "uncontrolled" else f", {row.l2} L2"
    return f"{text}; {row.timer}{l2}, {row.iterations} iterations"


def cells(row: Row, rows: Sequence[Row], regret: dict[tuple, float]) -> list[str]:
    torch_time = min((r.time.median for r in rows if r.tactic["backend"] == "torch"), default=None)
    best = fastest(rows)
    return [
        "*" if best is not None and row.key == best.key else "",
        row.label,
        f"{row.time.median:.1f}",
        f"{row.time.p10:.1f}",
        f"{row.time.p90:.1f}",
        "" if torch_time is None else f"{torch_time / row.time.median:.2f}",
        digits(row.tflops),
        digits(row.gbps),
        "" if row.percent_of_floor is None else digits(row.percent_of_floor),
        digits(row.error_over_bar),
        notes(row, rows[0], regret),
    ]


def _published_cells(row: Row) -> list[list[str]]:
    """Lines for the published times of this problem: a time and what follows from it alone."""
    p = row.problem
    lines = []
    for peer in published(p.n, p.k, p.experts):
        if p.m in peer.us:
            us = peer.us[p.m]
            lines.append(
                [
                    "",
                    peer.name,
                    f"{us:.1f}",
                    *[""] * 3,
                    digits(p.flops / us / 1e6),
                    *[""] * 3,
                    f"{peer.gpu}, not measured here",
                ]
            )
    return lines


def notes(row: Row, first: Row, regret: dict[tuple, float]) -> str:
    """What else a reader must know of a row."""
    found = []
    if row.auto:
        found.append(f"auto +{100 * regret[row.key]:.1f}%" if row.key in regret else "auto")
    if row.error_over_bar > 1:
        found.append("misses the accuracy bar")
    if not row.reproducible:
        found.append("NOT reproducible")
    if row.timer != first.timer:
        found.append(f"timed with {row.timer}")
    if row.throttled:
        found.append("throttled: " + ", ".join(row.clocks.throttling))
    return "; ".join(found)


def digits(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value != value or value in (float("inf"), float("-inf")):
        return "inf"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
