"""Where results go: the terminal, JSON, CSV, Markdown, an HTML page, a picture."""
from __future__ import annotations

import argparse
import os
import sys
from typing import Optional

from bench import plots, report, tables
from bench.records import Results, save, write_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("outputs")
    group.add_argument("--json", metavar="FILE", help="everything, for the other commands; written after every M")
    group.add_argument("--csv", metavar="FILE", help="one line a row")
    group.add_argument("--markdown", metavar="FILE", help="the tables")
    group.add_argument(
        "--html", metavar="FILE", help="one self-contained page with plots and tables (needs matplotlib)"
    )
    group.add_argument("--plot", metavar="FILE", help="the plots as one PNG (needs matplotlib)")
    group.add_argument("--published", action="store_true", help="show published B200 times of the same shape too")


def check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would fail only after minutes of measuring: a missing package, a directory that is not there."""
    if arguments.html or arguments.plot:
        try:
            plots.require_matplotlib()
        except ImportError as error:
            parser.error(str(error))
    for name in ("json", "csv", "markdown", "html", "plot"):
        check_directory(getattr(arguments, name), parser)


def check_directory(path: Optional[str], parser: argparse.ArgumentParser) -> None:
    """Refuse a path whose directory is not there."""
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        parser.error(f"{path}: its directory does not exist")


def emit(results: Results, arguments: argparse.Namespace) -> None:
    """Write the files asked for, and then print the tables, whose reader may have left; no plots without a row."""
    if arguments.json:
        save(results, arguments.json)
    if arguments.csv:
        with open(arguments.csv, "w", encoding="utf-8", newline="") as stream:
            write_csv(results, stream)
    if arguments.markdown:
        _write(arguments.markdown, tables.render(results, "github", arguments.published) + "\n")
    if arguments.html:
        _write(arguments.html, report.page(results, arguments.published))
    if arguments.plot and results.rows:
        plots.write_png(results, arguments.plot, arguments.published)
    elif arguments.plot:
        print("no row was measured, so there is nothing to plot", file=sys.stderr)
    print(tables.render(results, with_published=arguments.published))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
