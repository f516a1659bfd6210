"""`python -m bench show FILE`: the tables and plots of an earlier run, also of one that was interrupted or killed."""
from __future__ import annotations

import argparse
import sys
from typing import Sequence

from bench import outputs
from bench.records import read_results


def main(argv: Sequence[str]) -> int:
    """Returns 0; 2 where the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench show", description=__doc__)
    parser.add_argument("file", help="what the shoot-out wrote with --json")
    outputs.add_arguments(parser)
    arguments = parser.parse_args(argv)
    outputs.check(arguments, parser)
    try:
        results = read_results(arguments.file)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    outputs.emit(results, arguments)
    return 0
