"""Backends for tests of tuning: what they do wrong is a field of their tactic. Importable, as the tuner's
process needs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from backends import SUPPORTED, Fc2Backend, Support, Tactic
from backends.torch_baseline import TorchBackend, TorchTactic


@dataclass(frozen=True)
class StubTactic(Tactic):
    """
    Attributes:
        fault: "" or what goes wrong in `run`: "wrong", "nan", "random", "raise", "oom", "crash", "hang".
        delay_ms: time that a call takes on top.
    """

    backend = "stub"
    fault: str = ""
    delay_ms: int = 0


class StubBackend(Fc2Backend):
    """The torch baseline with faults and delays, on any device."""

    name = "stub"
    tactic_type = StubTactic
    #: What `tactics` offers.
    offered: tuple[StubTactic, ...] = (
        StubTactic(delay_ms=5),
        StubTactic(delay_ms=1),
        StubTactic("wrong"),
        StubTactic("nan"),
        StubTactic("random"),
        StubTactic("raise"),
        StubTactic("oom"),
        StubTactic("crash"),
    )

    def __init__(self):
        self.calls = 0

    def is_supported(self, device):
        return SUPPORTED

    def can_implement(self, problem, tactic):
        return Support(False, "delay_ms is negative") if tactic.delay_ms < 0 else SUPPORTED

    def tactics(self, problem):
        return list(self.offered)

    def default_tactic(self, problem):
        return StubTactic(delay_ms=5)

    def run(self, problem, tactic, a, b, alpha, out):
        time.sleep(tactic.delay_ms / 1000)
        TorchBackend().run(problem, TorchTactic(), a, b, alpha, out)
        if tactic.fault == "wrong":
            out[-1, -1] += out.abs().max() * 0.01 + 1
        elif tactic.fault == "nan":
            out[0, 0] = float("nan")
        elif tactic.fault == "random":
            self.calls += 1
            out.view(torch.int32)[0, 0] ^= self.calls & 1  # of float32: far inside the accuracy bar
        elif tactic.fault == "raise":
            raise RuntimeError("unspecified launch failure")
        elif tactic.fault == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory")
        elif tactic.fault == "crash":
            os.abort()
        elif tactic.fault == "hang":
            time.sleep(3600)


class CompilingBackend(StubBackend):
    """Compiles slowly, into files of a directory, each with the process that did it."""

    offered = tuple(StubTactic(delay_ms=delay) for delay in (1, 2, 3, 4, 5))

    @staticmethod
    def _path(problem, tactic):
        return Path(os.environ["STUB_KERNELS"]) / f"{problem.m}-{tactic.delay_ms}"

    def is_compiled(self, problem, tactic):
        return self._path(problem, tactic).exists()

    def compile(self, problem, tactic):
        if tactic.delay_ms == 4 and "STUB_COMPILER_CRASHES" in os.environ:
            os.abort()
        time.sleep(0.2)
        self._path(problem, tactic).write_text(str(os.getpid()))


class HangingBackend(StubBackend):
    """Its second tactic never returns."""

    offered = (StubTactic(delay_ms=5), StubTactic("hang"), StubTactic(delay_ms=1))
