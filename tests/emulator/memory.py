"""Address spaces: global buffers with exact extents, shared memory per CTA, per-lane local memory,
parameters.

A shared address is `rank << 24 | offset`, also for the CTA's own variables, so that shared::cta and
shared::cluster addresses agree, `mapa` replaces the rank, and clearing bit 24 names the even CTA of a pair.
Generic addresses put shared, local and parameter space in windows above every host pointer; anything below is
global and is resolved through the registered buffers, never dereferenced blindly.
"""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np

from .report import Fault
from .opcodes import NAMESPACE, runtime
from .values import LANES, M32, _ndarray, f2i

SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 62, 1 << 61, 1 << 60
NAMESPACE.update(SHARED_WINDOW=SHARED_WINDOW, LOCAL_WINDOW=LOCAL_WINDOW)
RANK_SHIFT, OFFSET_MASK = 24, 0xFFFFFF
DYNAMIC_SMEM_OFFSET = 1024  # the hardware reserves 1 KiB per CTA; this also keeps 1024-byte alignment


@dataclass
class Buffer:
    """A registered range of global memory."""

    name: str
    base: int
    size: int
    owner: object = None  # keeps the memory alive

    def __post_init__(self) -> None:
        raw = (ctypes.c_uint8 * max(self.size, 1)).from_address(self.base)
        self.bytes = np.frombuffer(raw, np.uint8)[: self.size]
        self.loads = self.stores = 0  # bytes
        self.shadow = None


class GlobalMemory:
    """Registered buffers, found by address."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.bases: list[int] = []

    def register(self, name: str, base: int, size: int, owner: object = None) -> Buffer:
        at = bisect.bisect_left(self.bases, base)
        if at < len(self.bases) and self.bases[at] == base and self.buffers[at].size >= size:
            return self.buffers[at]
        buffer = Buffer(name, base, size, owner)
        if at < len(self.bases) and self.bases[at] == base:
            self.buffers[at] = buffer
        else:
            self.bases.insert(at, base)
            self.buffers.insert(at, buffer)
        return buffer

    def find(self, address: int, size: int, what: str) -> Buffer:
        at = bisect.bisect_right(self.bases, address) - 1
        if at >= 0:
            buffer = self.buffers[at]
            if address + size <= buffer.base + buffer.size:
                return buffer
            if (
                address < buffer.base + buffer.size
                or at + 1 == len(self.bases)
                or address - buffer.base < 1 << 30
            ):
                raise Fault(
                    f"{what} of {size} bytes at global address {address:#x} is out of bounds: "
                    f"{address - buffer.base} bytes into buffer '{buffer.name}' of {buffer.size} bytes"
                )
        raise Fault(
            f"{what} of {size} bytes at global address {address:#x}: no registered buffer is there "
            f"(pass its tensor in buffers=)"
        )


def _raw(values, size: int) -> list:
    """Register values to unsigned arrays or ints of the element's width."""
    out = []
    for v in values:
        if type(v) is _ndarray:
            out.append(v.view(np.uint32) if v.dtype == np.float32 else v)
        elif isinstance(v, np.floating):
            out.append(f2i(v))
        else:
            out.append(v)
    return out


_DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _present(columns: np.ndarray, size: int, signed: bool, cls: str) -> list:
    """Gathered elements [count, 32] to register values of class `cls`."""
    if cls == "f":
        return list(columns.view(np.float32))
    if cls == "q":
        return list(columns)
    if signed:
        return list(columns.view(columns.dtype.name[1:]).astype(np.int64) & M32)
    return list(columns.astype(np.int64))


def _present_scalar(value: int, size: int, signed: bool, cls: str) -> object:
    if cls == "f":
        return np.uint32(value).view(np.float32)
    if signed and value >> 8 * size - 1:
        value |= M32 & ~((1 << 8 * size) - 1)
    return value


def _active_addresses(address: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Addresses with the inactive lanes moved onto an active one, so that they cannot fault."""
    if mask is None:
        return address
    return np.where(mask, address, address[int(mask.argmax())])


def _check_alignment(address: int, step: int, what: str) -> None:
    if address % step:
        raise Fault(f"misaligned {what} of {step} bytes at address {address:#x}")


class SharedMemory:
    """One CTA's shared memory; offsets below `end` are valid."""

    def __init__(self, rank: int, end: int) -> None:
        self.rank, self.end = rank, end
        self.bytes = np.full(-(-end // 16) * 16, 0xFF, np.uint8)  # poison
        self.views = {size: self.bytes.view(dtype) for size, dtype in _DTYPES.items()}
        self.scalars = {
            size: memoryview(self.bytes).cast(code) for size, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))
        }

    def check(self, low: int, high: int, what: str) -> None:
        if low < DYNAMIC_SMEM_OFFSET or high > self.end:
            raise Fault(
                f"{what} at shared offset {low}..{high} of CTA {self.rank} is out of bounds: "
                f"the CTA has {DYNAMIC_SMEM_OFFSET}..{self.end}"
            )


def shared_load(w, address, size, count, signed, cls, mask):
    """ld.shared: `count` consecutive elements per lane."""
    cluster, step = w.cta.cluster, size * count
    if type(address) is not _ndarray:
        smem = cluster.smem(address >> RANK_SHIFT)
        offset = address & OFFSET_MASK
        if offset % step:
            _check_alignment(offset, step, "shared load")
        smem.check(offset, offset + step, "load")
        if w.check:
            w.check.shared_read(w, smem.rank, offset, step)
        view = smem.scalars[size]
        at = offset // size
        return [_present_scalar(view[at + i], size, signed, cls) for i in range(count)]
    address = _active_addresses(address.astype(np.int64), mask)
    out = None
    for rank, chosen, low, high in _by_rank(address):
        smem = cluster.smem(rank)
        offset = (address if chosen is None else address[chosen]) & OFFSET_MASK
        _check_lanes(smem, offset, low, high, step, "load")
        if w.check:
            w.check.shared_read_lanes(w, rank, offset, step)
        got = smem.views[size][(offset // size)[:, None] + np.arange(count)]
        if chosen is None:
            out = got
        else:
            out = np.zeros((32, count), got.dtype) if out is None else out
            out[chosen] = got
    return _present(np.ascontiguousarray(out.T), size, signed, cls)


def shared_store(w, address, values, size, mask):
    cluster, count = w.cta.cluster, len(values)
    step = size * count
    values = _raw(values, size)
    if type(address) is not _ndarray:
        if any(type(v) is _ndarray for v in values):  # the last active lane wins
            lane = 31 if mask is None else int(np.flatnonzero(mask)[-1])
            values = [int(v[lane]) if type(v) is _ndarray else v for v in values]
        smem = cluster.smem(address >> RANK_SHIFT)
        offset = address & OFFSET_MASK
        _check_alignment(offset, step, "shared store")
        smem.check(offset, offset + step, "store")
        view, at, width = smem.scalars[size], offset // size, (1 << 8 * size) - 1
        if w.check:
            same = all(view[at + i] == v & width for i, v in enumerate(values))
            w.check.shared_write(w, smem.rank, offset, step, same)
        for i, v in enumerate(values):
            view[at + i] = v & width
        return
    lanes = LANES if mask is None else np.flatnonzero(mask)
    address = address.astype(np.int64)[lanes]
    data = np.empty((len(lanes), count), _DTYPES[size])
    for i, v in enumerate(values):
        data[:, i] = v[lanes].astype(_DTYPES[size]) if type(v) is _ndarray else v & (1 << 8 * size) - 1
    for rank, chosen, low, high in _by_rank(address):
        smem = cluster.smem(rank)
        offset = (address if chosen is None else address[chosen]) & OFFSET_MASK
        part = data if chosen is None else data[chosen]
        _check_lanes(smem, offset, low, high, step, "store")
        at = (offset // size)[:, None] + np.arange(count)
        if w.check:
            w.check.shared_write_lanes(w, rank, offset, step, lambda: smem.views[size][at] == part)
        smem.views[size][at] = part


def _by_rank(address: np.ndarray):
    """Split per-lane shared addresses by CTA: (rank, lanes or None for all, lowest and highest offset)."""
    low, high = int(address.min()), int(address.max())
    if low >> RANK_SHIFT == high >> RANK_SHIFT:
        yield low >> RANK_SHIFT, None, low & OFFSET_MASK, high & OFFSET_MASK
        return
    ranks = address >> RANK_SHIFT
    for rank in np.unique(ranks).tolist():
        chosen = np.flatnonzero(ranks == rank)
        offsets = address[chosen] & OFFSET_MASK
        yield rank, chosen, int(offsets.min()), int(offsets.max())


def _check_lanes(smem: SharedMemory, offset: np.ndarray, low: int, high: int, step: int, what: str) -> None:
    if step > 1 and (offset & step - 1).any():
        _check_alignment(int(offset[(offset & step - 1) != 0][0]), step, f"shared {what}")
    if low < DYNAMIC_SMEM_OFFSET or high + step > smem.end:
        smem.check(low, high + step, what)


def global_load(w, address, size, count, signed, cls, mask):
    """ld.global: each lane's `count` consecutive elements."""
    step, memory = size * count, w.machine.memory
    if type(address) is not _ndarray:
        _check_alignment(address, step, "global load")
        buffer = memory.find(address, step, "load")
        buffer.loads += step
        at = address - buffer.base
        if w.check and buffer.shadow is not None:
            w.check.global_read(w, buffer, at, step)
        data = buffer.bytes[at : at + step].tobytes()
        return [
            _present_scalar(int.from_bytes(data[i * size : (i + 1) * size], "little"), size, signed, cls)
            for i in range(count)
        ]
    address = _active_addresses(address, mask).astype(np.int64)
    if (address & step - 1).any():
        _check_alignment(int(address[(address & step - 1) != 0][0]), step, "global load")
    active = w.active_count(mask)
    out = np.empty((32, step), np.uint8)
    for buffer, chosen in _by_buffer(memory, address, step, "load"):
        buffer.loads += step * active
        at = (address if chosen is None else address[chosen]) - buffer.base
        if w.check and buffer.shadow is not None:
            w.check.global_read_lanes(w, buffer, at, step)
        got = buffer.bytes[at[:, None] + np.arange(step)]
        if chosen is None:
            out = got
        else:
            out[chosen] = got
    return _present(np.ascontiguousarray(out.view(_DTYPES[size]).T), size, signed, cls)


def global_store(w, address, values, size, mask):
    count, memory = len(values), w.machine.memory
    step = size * count
    values = _raw(values, size)
    lanes = LANES if mask is None else np.flatnonzero(mask)
    if type(address) is not _ndarray:
        address, lanes = np.array([address]), lanes[-1:]
    else:
        address = address.astype(np.int64)[lanes]
    if (address & step - 1).any():
        _check_alignment(int(address[(address & step - 1) != 0][0]), step, "global store")
    data = np.empty((len(lanes), count), _DTYPES[size])
    for i, v in enumerate(values):
        data[:, i] = v[lanes].astype(_DTYPES[size]) if type(v) is _ndarray else v & (1 << 8 * size) - 1
    data = data.view(np.uint8)
    for buffer, chosen in _by_buffer(memory, address, step, "store"):
        buffer.stores += data.size if chosen is None else data[chosen].size
        at = (address if chosen is None else address[chosen]) - buffer.base
        index = at[:, None] + np.arange(step)
        part = data if chosen is None else data[chosen]
        if w.check:
            w.check.global_write_lanes(w, buffer, at, step, lambda: buffer.bytes[index] == part)
        buffer.bytes[index] = part


def _by_buffer(memory: GlobalMemory, address: np.ndarray, step: int, what: str):
    low, high = int(address.min()), int(address.max())
    at = bisect.bisect_right(memory.bases, low) - 1
    if at >= 0 and high + step <= memory.buffers[at].base + memory.buffers[at].size:
        yield memory.buffers[at], None
        return
    owners: dict[int, tuple[Buffer, list[int]]] = {}
    for lane, a in enumerate(address.tolist()):
        buffer = memory.find(a, step, what)
        owners.setdefault(id(buffer), (buffer, []))[1].append(lane)
    for buffer, chosen in owners.values():
        yield buffer, np.array(chosen)


def param_load(w, address, size, count, signed, cls, mask):
    data, at = w.machine.params, address & ~PARAM_WINDOW
    if at < 0 or at + size * count > len(data):
        raise Fault(f"load at parameter offset {at} is out of bounds")
    return [
        _present_scalar(
            int.from_bytes(data[at + i * size : at + (i + 1) * size], "little"), size, signed, cls
        )
        for i in range(count)
    ]


def local_load(w, address, size, count, signed, cls, mask):
    index = _local_index(w, address, size, count)
    got = np.ascontiguousarray(w.local[LANES[:, None], index]).view(_DTYPES[size])
    return _present(np.ascontiguousarray(got.T), size, signed, cls)


def local_store(w, address, values, size, mask):
    count = len(values)
    index = _local_index(w, address, size, count)
    data = np.empty((32, count), _DTYPES[size])
    for i, v in enumerate(_raw(values, size)):
        data[:, i] = v.astype(_DTYPES[size]) if type(v) is _ndarray else v & (1 << 8 * size) - 1
    lanes = LANES if mask is None else np.flatnonzero(mask)
    w.local[lanes[:, None], index[lanes]] = data.view(np.uint8)[lanes]


def _local_index(w, address, size: int, count: int) -> np.ndarray:
    base = np.broadcast_to(np.asarray(address), 32).astype(np.int64)
    if int(base.min()) < 0 or int(base.max()) + size * count > w.local.shape[1]:
        raise Fault(
            f"local access at {int(base.min())}..{int(base.max()) + size * count} is out of bounds: "
            f"the thread has {w.local.shape[1]} bytes"
        )
    return base[:, None] + np.arange(size * count)


_SPACES = {
    "shared": (shared_load, shared_store),
    "local": (local_load, local_store),
    "global": (global_load, global_store),
}


def space_of(address) -> tuple[str, object]:
    """Resolve a generic address (uniform, or per lane within one space) to (space, address in the space)."""
    first = int(address.max()) if type(address) is _ndarray else address
    if first >= SHARED_WINDOW:
        return "shared", address - SHARED_WINDOW
    if first >= LOCAL_WINDOW:
        return "local", address - LOCAL_WINDOW
    if first >= PARAM_WINDOW:
        return "param", address - PARAM_WINDOW
    return "global", address


@runtime
def load(w, space, address, size, count, signed, cls, mask):
    if space == "generic":
        space, address = space_of(_active_addresses(address, mask) if type(address) is _ndarray else address)
    if space == "param":
        return param_load(w, address, size, count, signed, cls, mask)
    return _SPACES[space][0](w, address, size, count, signed, cls, mask)


@runtime
def store(w, space, address, values, size, mask):
    if space == "generic":
        space, address = space_of(_active_addresses(address, mask) if type(address) is _ndarray else address)
    _SPACES[space][1](w, address, values, size, mask)


runtime(shared_load)
runtime(shared_store)
runtime(global_load)
runtime(global_store)
runtime(param_load)
