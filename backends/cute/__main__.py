"""Command line of the CuTe backend; neither command needs a GPU.

    python -m backends.cute compile --arch sm_100a --all     compile into the kernel cache, for shipping
    python -m backends.cute inspect --json FILE              table of every kernel's resources
"""
from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from backends.cute import budget, cache
from backends.cute.backend import dsl_support
from backends.cute.budget import CuteTactic
from backends.problem import OUT_DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m backends.cute", description="Compile or inspect the SM100 kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("compile", "compile kernels into the cache"), ("inspect", "table of registers, memory, SASS")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--arch", choices=sorted(budget.ARCHS.values()), default="sm_100a")
        command.add_argument(
            "--out-dtype", choices=list(OUT_DTYPES), nargs="+", default=["bfloat16"], help="output types (bfloat16)"
        )
        command.add_argument("--all", action="store_true", help="every tactic, instead of the default ones")
        command.add_argument("--pdl", action="store_true", help="with programmatic dependent launch")
        if name == "compile":
            command.add_argument(
                "--directory", type=Path, help="default: $FC2_CACHE_DIR/cute or ~/.cache/fc2-dispatch/cute"
            )
            command.add_argument(
                "--machine", choices=["x86_64", "aarch64"], default=platform.machine(), help="CPU of the host to run on"
            )
        else:
            command.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    support = dsl_support()
    if not support:
        parser.exit(1, f"{support.reason}\n")
    kernels = [
        replace(kernel, pdl=arguments.pdl)
        for kernel in (budget.all_kernels() if arguments.all else default_kernels())
    ]
    jobs = [(kernel, out_dtype) for out_dtype in arguments.out_dtype for kernel in kernels]
    (compile_all if arguments.command == "compile" else inspect_all)(jobs, arguments)


def default_kernels() -> list[CuteTactic]:
    """The kernels `default_tactic` chooses from, for either K tile."""
    return [
        CuteTactic(tile_m, 128, tile_k, cluster_m, cluster_n, skip=skip)
        for tile_m, cluster_m, cluster_n, skip in ((128, 1, 1, True), (128, 1, 2, False), (256, 2, 1, False))
        for tile_k in budget.TILE_KS
    ]


def compile_all(jobs: list[tuple[CuteTactic, str]], arguments: argparse.Namespace) -> None:
    from backends.cute.compiler import compile_object

    kernels = cache.KernelCache(arguments.directory or cache.default_directory())
    begin = time.perf_counter()
    for kernel, out_dtype in tqdm(jobs, unit="kernel"):
        key = cache.kernel_key(kernel, out_dtype, arguments.arch, arguments.machine)
        kernels.find_or_make(key, lambda: compile_object(kernel, out_dtype, arguments.arch, arguments.machine))
    print(f"{len(jobs)} kernels for {arguments.arch} in {kernels.directory}, {time.perf_counter() - begin:.0f} s")


def inspect_all(jobs: list[tuple[CuteTactic, str]], arguments: argparse.Namespace) -> None:
    from backends.cute.resources import inspect

    rows = [inspect(kernel, out_dtype, arguments.arch).row() for kernel, out_dtype in tqdm(jobs, unit="kernel")]
    print(tabulate(rows, headers="keys"))
    if arguments.json:
        record = {
            "what": "compiled and disassembled without a GPU",
            "arch": arguments.arch,
            "dsl": metadata.version("nvidia-cutlass-dsl"),
            "kernels": rows,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
