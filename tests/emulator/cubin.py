"""What the emulator reads from a cubin: how many registers per thread its kernels are launched with."""

from __future__ import annotations

import ctypes
import struct
from typing import Iterator

# A fatbin: {u32 magic, u16 version, u16 header bytes, u64}, then {u16, u16, u32 header bytes, ...} and a cubin.
_FATBIN = 0xBA55ED50
_SVAL, _REGCOUNT = 0x04, 0x2F  # format and attribute of an .nv.info record: {u32 symbol, u32 registers}


def registers(address: int) -> dict[str, int]:
    """Kernel name -> registers per thread, of the cubin or the fatbin's first at `address`; empty when it has
    none that is not compressed."""
    magic, _version, header = struct.unpack("<IHH", ctypes.string_at(address, 8))
    if magic == _FATBIN:
        address += header + struct.unpack("<I", ctypes.string_at(address + header + 4, 4))[0]
    if ctypes.string_at(address, 4) != b"\x7fELF":
        return {}
    (table,) = struct.unpack("<Q", ctypes.string_at(address + 0x28, 8))
    entry, count, names = struct.unpack("<HHH", ctypes.string_at(address + 0x3A, 6))
    table += address
    headers = [struct.unpack("<IIQQQQIIQQ", ctypes.string_at(table + entry * i, 64)) for i in range(count)]
    data = [
        ctypes.string_at(address + h[4], h[5]) if h[1] != 8 else b"" for h in headers
    ]  # 8: no bits in the file
    sections = {_text(data[names], h[0]): (h, d) for h, d in zip(headers, data)}
    if not {".symtab", ".strtab", ".nv.info"} <= sections.keys():
        return {}
    symbols, strings = sections[".symtab"][1], sections[".strtab"][1]
    return {
        _text(strings, struct.unpack_from("<I", symbols, 24 * symbol)[0]): number
        for symbol, number in _register_counts(sections[".nv.info"][1])
    }


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def _register_counts(info: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SVAL:
            if attribute == _REGCOUNT:
                yield struct.unpack_from("<II", info, at)
            at += size
