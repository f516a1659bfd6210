"""`python -m bench`: compare FC2 implementations on the device at hand."""
from __future__ import annotations

import argparse
import sys
from typing import Optional, Sequence

from bench import options as command_line
from bench import shootout, tables
from bench.progress import Progress
from bench.records import Results, write_csv, write_json
from bench.timing import UnavailableMethod


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command. Returns 0; 1 where a contestant missed what it must keep; 130 where the run was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    command_line.add_arguments(parser)
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--json", metavar="FILE", help="everything, for `compare` and for other programs")
    outputs.add_argument("--csv", metavar="FILE", help="one line a row")
    arguments = parser.parse_args(argv)
    options = command_line.from_arguments(arguments, parser)
    try:
        with Progress() as progress:
            results = shootout.run(options, progress)
    except UnavailableMethod as error:
        parser.error(str(error))
    print(tables.render(results))
    _write(results, arguments)
    return 130 if results.interrupted else 0


def _write(results: Results, arguments: argparse.Namespace) -> None:
    for path, write in ((arguments.json, write_json), (arguments.csv, write_csv)):
        if path:
            with open(path, "w", encoding="utf-8", newline="") as stream:
                write(results, stream)


if __name__ == "__main__":
    sys.exit(main())
