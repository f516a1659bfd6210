"""Run a CuTe DSL example file on the emulator: python -m tests.emulator [options] FILE [the file's own
arguments]"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import time

from .ptx import TARGETS
from .report import EmulatorError
from .stand_in import gpu_stand_in


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("--schedule", choices=("eager", "lazy", "random"), default="eager")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", choices=tuple(TARGETS), default="sm_100a")
    parser.add_argument("--num-sms", type=int, default=None)
    parser.add_argument("--concurrent", type=int, default=None, help="clusters resident at the same time")
    parser.add_argument("--no-checks", action="store_true", help="values only")
    parser.add_argument("file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    sys.argv = [options.file, *options.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(options.file)))
    start = time.perf_counter()
    try:
        with gpu_stand_in(
            options.schedule,
            options.seed,
            options.num_sms,
            not options.no_checks,
            options.concurrent,
            options.arch,
        ) as report:
            runpy.run_path(options.file, run_name="__main__")
    except EmulatorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        sys.stdout.flush()
    print(report)
    print(
        f"{len(report.launches)} launches, {report.instructions} warp instructions, "
        f"{sum(x.seconds for x in report.launches):.2f} s emulated, {time.perf_counter() - start:.2f} s "
        f"in all"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
