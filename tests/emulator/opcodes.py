"""The opcode table: which emitter handles an instruction, and what generated code may call."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Callable

import numpy as np

from . import numerics, values
from .ptx import Instr
from .report import PtxError

BLOCKED, HOLD, EXIT = -1, -2, -3

# Families that exist on one target only.
_TARGET_OF = {"tcgen05": "sm_100a", "clusterlaunchcontrol": "sm_100a", "wgmma": "sm_90a"}


@dataclass(frozen=True)
class Opcode:
    emit: Callable
    starts_block: bool
    ends_block: bool


OPCODES: dict[str, Opcode] = {}
NAMESPACE: dict[str, object] = {
    "np": np,
    "N": numerics,
    **{k: v for k, v in vars(values).items() if k[0] != "_"},
}
NAMESPACE.update(BLOCKED=BLOCKED, HOLD=HOLD, EXIT=EXIT)


def op(*names: str, starts_block: bool = False, ends_block: bool = False) -> Callable:
    """Register an emitter for opcodes that begin with one of `names` (dotted parts; the longest match
    wins)."""

    def register(function: Callable) -> Callable:
        for name in names:
            OPCODES[name] = Opcode(function, starts_block, ends_block)
        return function

    return register


def runtime(function: Callable) -> Callable:
    """Make a function callable from generated code."""
    NAMESPACE[function.__name__] = function
    return function


FAMILIES = (
    "isa_int",
    "isa_float",
    "isa_memory",
    "isa_warp",
    "isa_sync",
    "isa_async",
    "isa_bulk",
    "isa_tcgen05",
    "isa_clc",
    "isa_mma",
    "isa_wgmma",
)


def load_families() -> None:
    """Fill the table; a new opcode family is one more module here."""
    for name in FAMILIES:
        importlib.import_module(f".{name}", __package__)


def lookup(instr: Instr, target: str = "") -> Opcode:
    parts = instr.parts
    only = _TARGET_OF.get(parts[0])
    if target and only and only != target:
        raise PtxError(f"line {instr.line}: {parts[0]} exists on {only}, not on {target}: {instr.text}")
    for n in range(min(len(parts), 6), 0, -1):
        found = OPCODES.get(".".join(parts[:n]))
        if found:
            return found
    raise PtxError(f"line {instr.line}: unknown opcode: {instr.text}")


def modifiers(instr: Instr, skip: int, allowed: set[str]) -> set[str]:
    """The dotted parts after the first `skip`; one that is not in `allowed` is an error."""
    found = set(instr.parts[skip:])
    unknown = found - allowed
    if unknown:
        raise PtxError(f"line {instr.line}: unknown modifier .{sorted(unknown)[0]} in: {instr.text}")
    return found
