"""The report page: one self-contained HTML file with plots and tables, readable without a network."""
from __future__ import annotations

import html
import json
from typing import Sequence

from tabulate import tabulate

from bench import plots, tables
from bench.records import Results, Row, competitors, fastest, regrets
from bench.series import panels

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; background: #fff;
  margin: 2em auto; max-width: 1280px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-top: 1px solid #ccc; padding-top: .8em }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; white-space: pre-wrap }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(560px, 1fr)); gap: 1em }
.plots figure { margin: 0 } .plots .wide { grid-column: 1 / -1 }
.plots svg { width: 100%; height: auto; font-family: system-ui, sans-serif }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .5em 0 1.5em }
th, td { padding: .2em .7em; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap }
.absent th, .absent td { text-align: left; white-space: normal } details { overflow-x: auto }
th { background: #f5f5f5 } .text { text-align: left } tr.best td { background: #e8f4ea; font-weight: 600 }
tr.wrong td { color: #999 } summary { cursor: pointer; margin: .6em 0 }
@media print { details > * { display: block } }
"""


def page(results: Results, with_published: bool = False) -> str:
    """The whole page. Raises ImportError where matplotlib is missing."""
    plots.require_matplotlib()
    device = html.escape(results.environment["device"])
    body = [f"<h1>FC2 shoot-out on {device}</h1>", f"<pre>{html.escape(tables.headline(results))}</pre>"]
    if results.interrupted:
        reason = html.escape(results.interrupted)
        body.append(f"<p><strong>Interrupted by {reason}: what follows had been measured by then.</strong></p>")
    for rows in panels(results.rows).values():
        body.append(f"<h2>{html.escape(plots.panel_title(rows[0], results))}</h2>")
        figures = (
            f'<figure{" class=wide" if wide else ""}>{svg}</figure>'
            for svg, wide in plots.svgs(rows, results, with_published)
        )
        lines = tables.summary(rows, regrets(rows))
        summary = _table(tables.SUMMARY_HEADERS, lines, [""] * len(lines))
        body.append(f"<details open><summary>Fastest right results</summary>{summary}</details>")
        body.append(f'<div class="plots">{"".join(figures)}</div>')
        body += [_competitors(group, results) for group in competitors(rows).values()]
    if results.absent:
        absent = [(a.label, a.reason) for a in results.absent]
        table = tabulate(absent, ("who", "why"), tablefmt="html")
        body.append(f'<h2>Did not run</h2><div class="absent">{table}</div>')
    body.append(f"<h2>How to read it</h2><pre>{html.escape(tables.LEGEND)}</pre>")
    environment = html.escape(json.dumps(results.environment, indent=1))
    body.append(f"<details><summary>Environment</summary><pre>{environment}</pre></details>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>FC2 shoot-out: {device}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _competitors(rows: Sequence[Row], results: Results) -> str:
    """One token count's rows; the fastest right row is marked by class, those that miss the bar are grey."""
    regret, best = regrets(results.rows), fastest(rows)
    lines = [tables.cells(row, rows, regret) for row in rows]
    kinds = ["best" if row is best else ("" if row.ok else "wrong") for row in rows]
    summary = f"<summary>{html.escape(tables.caption(rows[0]))}</summary>"
    return f"<details open>{summary}{_table(tables.HEADERS, lines, kinds)}</details>"


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    headers, lines = tables.filled(headers, lines)
    head = "".join(_cell(name, name, "th") for name in headers)
    body = (
        f'<tr class="{kind}">{"".join(_cell(name, text, "td") for name, text in zip(headers, line))}</tr>'
        for kind, line in zip(kinds, lines)
    )
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _cell(column: str, text: str, tag: str) -> str:
    css = ' class="text"' if column in tables.TEXT_COLUMNS else ""
    return f"<{tag}{css}>{html.escape(text)}</{tag}>"
