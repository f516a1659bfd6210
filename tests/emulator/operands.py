"""Operands that are the same in every active lane, and the shared-memory places that addresses name."""

from __future__ import annotations

from . import tma
from .memory import OFFSET_MASK, PARAM_WINDOW, RANK_SHIFT, SHARED_WINDOW, space_of
from .report import Fault
from .values import uniform


def one(value, mask, what: str) -> int:
    out = uniform(value, mask)
    if out is None:
        raise Fault(f"{what} differs between the lanes of the warp")
    return int(out)


def signed_coordinate(value, mask) -> int:
    v = one(value, mask, "TMA coordinate")
    return v - (1 << 32) if v >> 31 else v


def shared_place(address: int) -> tuple[int, int]:
    """(rank, offset) of a shared address, generic or not."""
    address = address - SHARED_WINDOW if address >= SHARED_WINDOW else address
    return address >> RANK_SHIFT, address & OFFSET_MASK


def tensor_map(w, address: int) -> tma.TensorMap:
    space, at = space_of(address)
    if at % 64:
        raise Fault(f"tensor map at {address:#x} is not 64-byte aligned")
    if space == "param" or address >= PARAM_WINDOW and space != "shared":
        at = address - PARAM_WINDOW
        return tma.TensorMap.decode(w.machine.params[at : at + 64])
    if space == "shared":
        rank, offset = shared_place(at)
        return tma.TensorMap.decode(w.cta.cluster.smem(rank).bytes[offset : offset + 64].tobytes())
    buffer = w.machine.memory.find(at, 128, "tensor map read")
    return tma.TensorMap.decode(buffer.bytes[at - buffer.base :][:64].tobytes())
