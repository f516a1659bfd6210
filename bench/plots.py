"""The plots of a shoot-out, drawn with matplotlib (optional) on axes that the caller gives."""
from __future__ import annotations

import io
from typing import Mapping, Sequence

from bench.peers import PUBLISHED_GPU, best_published, measured_peers
from bench.records import Results, Row, regrets
from bench.series import Curve, curves, matrix, panels

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = {"cute": "#0072B2", "triton": "#D55E00", "torch": "#009E73"}
_OTHERS = ("#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = {"right": ("--", "o"), "prepared": ("-", "s"), "misses bar": (":", "x")}
_GREY = "#777777"


def require_matplotlib() -> None:
    """Raises ImportError that says how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}); pip install 'fc2-dispatch[bench]'") from None


def colour(backend: str) -> str:
    return _COLOURS.get(backend) or _OTHERS[sum(map(ord, backend)) % len(_OTHERS)]


def draw_time(axes, rows: Sequence[Row], device: str, with_published: bool = False) -> None:
    """Time over M: every backend's best, the floors, other implementations on this GPU, the published B200."""
    shown, far = _near(curves(rows))
    for curve in shown:
        line, marker = _LINES[curve.kind]
        ms = [row.problem.m for row in curve.rows]
        medians = [row.time.median for row in curve.rows]
        axes.plot(ms, medians, line, marker=marker, markersize=4, color=colour(curve.backend), label=curve.name)
        low, high = [row.time.p10 for row in curve.rows], [row.time.p90 for row in curve.rows]
        axes.fill_between(ms, low, high, color=colour(curve.backend), alpha=0.15, linewidth=0)
    floors = {row.problem.m: row for row in sorted(rows, key=lambda row: row.problem.m) if row.floor_us is not None}
    if floors:
        floor = [row.floor_us for row in floors.values()]
        axes.plot(list(floors), floor, color="black", linewidth=1, label="floor")
        if any(row.dense_floor_us > 1.01 * row.floor_us for row in floors.values()):
            dense = [row.dense_floor_us for row in floors.values()]
            axes.plot(
                list(floors), dense, color="black", linewidth=1, linestyle=(0, (1, 2)), label="floor, nothing skipped"
            )
    p = rows[0].problem
    ms = {row.problem.m for row in rows}
    for peer, marker in zip(measured_peers(device, p.n, p.k, p.experts, rows[0].alpha), "v^<>dP"):
        times = {m: us for m, us in peer.us.items() if min(ms) <= m <= max(ms)}
        axes.plot(
            list(times),
            list(times.values()),
            color=_GREY,
            linewidth=0.8,
            marker=marker,
            markersize=4,
            label=peer.name,
        )
    if with_published and (best := best_published(p.n, p.k, p.experts)):
        axes.plot(list(best), list(best.values()), "*", color="#CC79A7", label=f"best published, {PUBLISHED_GPU}")
    for curve in far:
        axes.plot(
            [], [], " ", label=f"not drawn: {curve.name}, from {min(row.time.median for row in curve.rows):.0f} us"
        )
    _over_m(axes, ms)
    axes.set(yscale="log", ylabel="time of a call, us", title="Time")
    plain_log_ticks(axes.yaxis)
    axes.legend(fontsize=7)


def _near(found: Sequence[Curve]) -> tuple[list[Curve], list[Curve]]:
    """Curves that fit one plot, and those always over ten times slower than the slowest point of the fastest."""
    slowest = min(max(row.time.median for row in curve.rows) for curve in found)
    near = [curve for curve in found if min(row.time.median for row in curve.rows) <= 10 * slowest]
    return near, [curve for curve in found if curve not in near]


def plain_log_ticks(axis) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_roofline(axes, rows: Sequence[Row], ceilings: Mapping[str, float] | None) -> None:
    """Useful arithmetic over useful bytes: what this alpha needs, not what a kernel did."""
    xs = []
    for curve in _near(curves(rows))[0]:
        points = [
            (_useful_flops(row) / row.needed_bytes, _useful_flops(row) / row.time.median / 1e6) for row in curve.rows
        ]
        xs += [x for x, _ in points]
        line, marker = _LINES[curve.kind]
        axes.plot(
            *zip(*points),
            line,
            linewidth=0.6,
            marker=marker,
            markersize=4,
            color=colour(curve.backend),
            label=curve.name,
        )
        for row, point in ((curve.rows[0], points[0]), (curve.rows[-1], points[-1])):
            axes.annotate(f"M={row.problem.m}", point, fontsize=6, textcoords="offset points", xytext=(4, -7))
    if ceilings:
        bandwidth, rate = ceilings["read_bandwidth"], ceilings["mma_flops"]
        ridge = rate / bandwidth
        ends = sorted({min(xs) / 2, ridge, max(2 * max(xs), 2 * ridge)})
        axes.plot(ends, [min(x * bandwidth, rate) / 1e12 for x in ends], color="black", linewidth=1, label="roofline")
    axes.set(xscale="log", yscale="log", title="Roofline", xlabel="FLOP a byte that alpha makes necessary")
    axes.set_ylabel("TFLOP/s of necessary work")
    plain_log_ticks(axes.xaxis)
    plain_log_ticks(axes.yaxis)
    axes.legend(fontsize=7)


def _useful_flops(row: Row) -> float:
    return 2.0 * row.pairs * row.problem.n * row.problem.intermediate


def draw_matrix(axes, rows: Sequence[Row]) -> None:
    """Heat map: time of each tactic over the fastest one at that M."""
    from matplotlib.colors import LogNorm

    shown = matrix(rows)
    cells = [[float("nan") if ratio is None else ratio for ratio in line] for line in shown.ratios]
    if not cells:
        axes.set_axis_off()
        return
    image = axes.imshow(cells, aspect="auto", cmap="viridis_r", norm=LogNorm(1.0, 4.0))
    axes.set_xticks(range(len(shown.ms)), shown.ms, fontsize=7)
    axes.set_yticks(range(len(shown.labels)), shown.labels, fontsize=7)
    if len(cells) * len(shown.ms) <= 400:
        for y, line in enumerate(shown.ratios):
            for x, ratio in enumerate(line):
                if ratio is not None:
                    ink = "white" if ratio > 2 else "black"
                    axes.text(
                        x,
                        y,
                        f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=ink,
                    )
    axes.figure.colorbar(image, ax=axes, label="time over the fastest", ticks=[1, 1.5, 2, 3, 4], format="{x:g}")
    left_out = f" (the best {len(shown.labels)}; {shown.left_out} left out)" if shown.left_out else ""
    axes.set(xlabel="M", title=f"Tactics whose results are right{left_out}")


def draw_regret(axes, rows: Sequence[Row]) -> None:
    """How much longer auto's choice takes than the fastest tactic measured, over M."""
    found = regrets(rows)
    by_form: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.key in found:
            form = "prepared weights" if "/" in row.problem.b_layout else "plain weights"
            by_form.setdefault(form, {})[row.problem.m] = 100.0 * found[row.key]
    for form, of in by_form.items():
        of = dict(sorted(of.items()))
        axes.plot(list(of), list(of.values()), marker="o", markersize=4, label=form)
    if not by_form:
        axes.text(0.5, 0.5, "auto's choice was not among the contestants", ha="center", transform=axes.transAxes)
        return
    _over_m(axes, {row.problem.m for row in rows})
    axes.set(ylabel="regret, %", title="auto over the fastest")
    axes.set_ylim(bottom=min(-0.5, axes.get_ylim()[0]), top=max(5.0, axes.get_ylim()[1]))
    axes.legend(fontsize=7)


def _over_m(axes, ms: set[int]) -> None:
    axes.set_xlabel("M, tokens")
    axes.grid(True, which="major", linewidth=0.3)
    if max(ms) >= 16 * min(ms):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")


def _draw_all(rows: Sequence[Row], results: Results, with_published: bool):
    """(function of axes, width, height in inches) of each plot of a panel."""
    tactics = len(matrix(rows).labels)
    return (
        (lambda axes: draw_time(axes, rows, results.environment["device"], with_published), 7.0, 4.6),
        (lambda axes: draw_roofline(axes, rows, results.environment.get("ceilings")), 7.0, 4.6),
        (lambda axes: draw_matrix(axes, rows), 14.0, max(3.0, 1.2 + 0.17 * tactics)),
        (lambda axes: draw_regret(axes, rows), 14.0, 3.0),
    )


def svgs(rows: Sequence[Row], results: Results, with_published: bool = False) -> list[tuple[str, bool]]:
    """Every plot of a panel as an `<svg>` element, and whether it is a wide one; text stays text."""
    import matplotlib
    from matplotlib.figure import Figure

    found = []
    for index, (draw, width, height) in enumerate(_draw_all(rows, results, with_published)):
        # Identifiers inside an SVG come from the salt: they must differ between the plots of one page.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{rows[0].key}{index}", "font.size": 9}):
            figure = Figure((width, height), layout="constrained")
            draw(figure.subplots())
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        text = stream.getvalue()
        found.append((text[text.index("<svg") :], width > 7.0))
    return found


def write_png(results: Results, path: str, with_published: bool = False) -> None:
    """All plots of all panels in one picture, four to a panel."""
    from matplotlib.figure import Figure

    groups = list(panels(results.rows).values())
    heights = [
        max(plot[2] for plot in _draw_all(rows, results, with_published)[start : start + 2])
        for rows in groups
        for start in (0, 2)
    ]
    figure = Figure((14.0, sum(heights) + 0.6), layout="constrained", dpi=110)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for number, rows in enumerate(groups):
        all_plots = _draw_all(rows, results, with_published)
        for half in (0, 1):
            pair = all_plots[2 * half : 2 * half + 2]
            ratios = (2, 1) if half else (1, 1)  # the names of tactics take half of the heat map's width
            places = parts[2 * number + half].subplots(1, 2, width_ratios=ratios)
            for axes, (draw, _, _) in zip(places, pair):
                draw(axes)
        parts[2 * number].suptitle(panel_title(rows[0], results), fontsize=10)
    figure.savefig(path)


def panel_title(row: Row, results: Results) -> str:
    p = row.problem
    dtype = str(p.out_dtype).removeprefix("torch.")
    device = results.environment["device"]
    return f"{device}: N={p.n}, K={p.k}, {p.experts} experts, alpha {row.alpha}, {dtype} out, {row.l2} L2"
