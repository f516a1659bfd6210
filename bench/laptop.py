"""What a machine without a GPU can say truthfully: that kernels compute the right thing, and what is expected of GPUs.

Each kernel check is a process of its own: Triton's interpreter has to be chosen before triton is imported, and the
emulator of SM 9.0 and 10.0 belongs to the tests of a checkout.
"""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Mapping, Optional

from tabulate import tabulate

from backends import registry
from backends.problem import Fc2Problem
from bench.options import GPU_SHAPE
from bench.peers import is_published
from bench.shootout import Report
from dispatch.choice import choose
from dispatch.errors import UnavailableError
from dispatch.hardware import GPUS, floor_seconds
from dispatch.store import measured_for, shipped_for

MODELLED_MS = (1, 8, 32, 64, 128, 256, 384)
_SECONDS = 120.0
_ROOT = Path(__file__).resolve().parent.parent

_INTERPRETED = (
    "--device cpu --backends triton --n 128 --k 512 --experts 4 --alpha topk:2 --m 3,20 --iterations 1 --warmup 1"
)
# The pair of CTAs whose second half has rows, and a single CTA with a split: experts of 256 in one stage each.
_CUTE = """
from backends.cute.budget import CuteTactic
from tests.cute_emulation import run
for tactic, m in ((CuteTactic(tile_m=256, cluster_m=2), 200), (CuteTactic(tile_n=64, split_k=2), 9)):
    run(tactic, m, 128, 256, 4, alpha_kind="top_k")
    print(tactic, f"M={m}", sep="; ")
"""
# More than one expert, rows of out that end inside a tile, and fewer tokens than a group of 8 holds twice.
_HOPPER = """
from backends.hopper.tactic import default_tactic, stream_config
from backends.problem import Fc2Problem
from tests.hopper_emulation import run
problem = Fc2Problem(9, 96, 4 * 256, 4, b_layout="triton/fragments", capability=(9, 0))
run(stream_config(problem, default_tactic(problem), problem.m), problem.m, problem.n, "one_hot")
"""


@dataclass(frozen=True)
class Check:
    """What was run, and what came of it."""

    what: str
    outcome: str


def interpreted_triton() -> Check:
    """The Triton backend's default tactics under Triton's interpreter."""
    what = "triton, default tactics under its interpreter, M = 3 and 20, N = 128, K = 512"
    if importlib.util.find_spec("triton") is None:
        return Check(what, "not run: triton is not installed")
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "result.json")
        failure = _run(["-m", "bench", *_INTERPRETED.split(), "--json", path], {"TRITON_INTERPRET": "1"})
        if failure:
            return Check(what, f"not run: {failure}")
        with open(path, encoding="utf-8") as stream:
            record = json.load(stream)
    rows = record["rows"]
    if not rows:
        return Check(what, f"not run: {'; '.join(absent['reason'] for absent in record['absent'])}")
    worst = max(row["error_over_bar"] for row in rows)
    verdict = "right" if all(row["ok"] for row in rows) else "WRONG"
    return Check(what, f"{verdict}: {worst:.2f} of the accuracy bar, {len(rows)} results")


def emulated_cute() -> Check:
    """The CuTe kernel's PTX on the SM100 emulator, with its checks for races, deadlocks and bounds on."""
    return _emulated("cute, a 2-CTA tactic at M = 200 and a split one at M = 9, PTX on the SM 10.0 emulator", _CUTE)


def emulated_hopper() -> Check:
    """The Hopper backend's streaming kernel on the SM 9.0 emulator, likewise."""
    return _emulated("hopper, its kernel for routed alpha at M = 9, PTX on the SM 9.0 emulator", _HOPPER)


CHECKS = (interpreted_triton, emulated_cute, emulated_hopper)


def _emulated(what: str, script: str) -> Check:
    if not (_ROOT / "tests" / "cute_emulation.py").exists():
        return Check(what, "not run: the emulator is part of a checkout of the repository")
    if importlib.util.find_spec("cutlass") is None:
        return Check(what, "not run: nvidia-cutlass-dsl is not installed")
    failure = _run(["-c", script], {})
    return Check(what, f"FAILED: {failure}" if failure else "right, no race, deadlock or access out of bounds")


def _run(arguments: list[str], environment: Mapping[str, str]) -> str:
    """ "" when a Python process with these arguments ends well, else the last line it wrote."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)]), **environment}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=_ROOT, env=variables, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no result within {_SECONDS:.0f} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit status {done.returncode}")


def expectations() -> str:
    """What "auto" would take on each known GPU at the DeepSeek-V3 shape, for weights as `dispatch.prepare` leaves
    them, and how long it is expected to take."""
    shape = GPU_SHAPE
    base = Fc2Problem(1, shape.n, shape.k, shape.experts)
    lines = []
    for gpu in GPUS.values():
        table = shipped_for(gpu.device)
        measured_by = "published" if table and all(is_published(entry) for entry in table.entries) else "measured"
        for m in MODELLED_MS:
            problem = replace(base, m=m, capability=gpu.device.capability)
            try:
                decision = choose(problem, gpu.device, measured_for(gpu.device))
                prepared = registry.get(decision.backend).prepared_layout(problem)
                if prepared:
                    decision = choose(replace(problem, b_layout=prepared), gpu.device, measured_for(gpu.device))
            except UnavailableError as error:
                lines.append((gpu.name, m, str(error).splitlines()[-1].strip(), "", "", ""))
                continue
            expected = _microseconds(decision.seconds)
            floor = _microseconds(floor_seconds(problem, gpu))
            source = measured_by if decision.source == "measured" else decision.source
            lines.append((gpu.name, m, decision.tactic.brief, source, expected, floor))
    headers = ("GPU", "M", "auto takes", "chosen by", "expected us", "dense floor us")
    return tabulate(
        lines, headers, disable_numparse=True, colalign=("left", "right", "left", "left", "right", "right")
    )


def _microseconds(seconds: Optional[float]) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e6:.1f}"


def render(report: Report) -> str:
    """The checks and the expectations, as text; takes some 20 s."""
    report("checking kernels", 0.0)
    with ThreadPoolExecutor(min(len(CHECKS), os.cpu_count() or 1)) as pool:
        running = [pool.submit(check) for check in CHECKS]
        for done, _ in enumerate(as_completed(running), 1):
            report("checking kernels", 0.95 * done / len(CHECKS))
    checks = [check.result() for check in running]
    report("expectations", 0.95)
    return "\n".join(
        (
            "Kernels checked on this CPU:",
            *(f"  {check.what}: {check.outcome}" for check in checks),
            "",
            f"Expected on GPUs at N={GPU_SHAPE.n} K={GPU_SHAPE.k} E={GPU_SHAPE.experts}, from the package's tables and",
            "the model fitted to them, not measured here.",
            "Published times are another implementation's. `python -m bench model` shows how well the model fits.",
            "",
            expectations(),
        )
    )
