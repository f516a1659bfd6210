"""`python -m bench`: compare FC2 implementations on the device at hand.

Commands: none (the shoot-out), `show`, `compare`, `b200`, `import`, `model`; each takes --help.
"""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Optional, Sequence

from bench import laptop, outputs, shootout
from bench import options as command_line
from bench.progress import Progress
from bench.records import CTRL_C, Results, save_unfinished
from bench.timing import UnavailableMethod

#: Commands by name, each with the module that has its `main(argv) -> int`.
COMMANDS = {
    "show": "bench.show",
    "compare": "bench.compare",
    "b200": "bench.b200",
    "import": "bench.importing",
    "model": "bench.modelled",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Returns the exit code: see `exit_code`, and the commands."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_arguments(parser)
    outputs.add_arguments(parser)
    arguments = parser.parse_args(argv)
    options = command_line.from_arguments(arguments, parser)
    outputs.check(arguments, parser)
    keep = (lambda results: save_unfinished(results, arguments.json)) if arguments.json else (lambda results: None)
    try:
        with Progress() as progress:
            results = shootout.run(options, progress, keep)
    except UnavailableMethod as error:
        parser.error(str(error))
    outputs.emit(results, arguments)
    if options.device.type == "cpu" and not results.interrupted and _is_default(arguments):
        try:
            with Progress() as progress:
                text = laptop.render(progress)
        except KeyboardInterrupt:  # the times are out by now
            return 130
        print(f"\n{text}")
    return exit_code(results)


def exit_code(results: Results) -> int:
    """0; 130 after Ctrl-C, as shells have it; 1 when the device failed."""
    return {"": 0, CTRL_C: 130}.get(results.interrupted, 1)


def _is_default(arguments: argparse.Namespace) -> bool:
    """Whether the command line leaves open what to compute and who takes part."""
    return all(getattr(arguments, name) is None for name in ("shape", "m", "n", "k", "experts", "alpha", "backends"))


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
