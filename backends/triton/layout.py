"""The prepared form of B: the order in which the threads of the fast kernels read it.

Rows come in blocks of 32 (two instructions of 16 rows), K in chunks of 256 (four quarters of 64). Rows are padded to 128 with zeros.
Chunks are outermost: programs that walk the experts together then read one contiguous piece of memory at a time.

- data: int32 [K/256, N/32, quarter 4, half 2, lane 32, step 4]. A word holds the 8 codes that lane 4g + t gives to one
  matrix instruction: rows g and g + 8 of the half, and four of its 16 values of K (`fragments.py` names them). Registers 0
  and 2 are row g, 1 and 3 row g + 8. `_registers` says how they come out of the word, each in four instructions at most.
- scale: int32 [K/256, N/32, lane 32, quarter 4], four scale factors each: rows g and g + 8 of both halves, for the 16
  values of lane t. A factor s is stored as bits 14..7 of the float16 64*s, which any non-negative e4m3 fits exactly. Half 0
  lies at bits 14..7 of the 16-bit sides, half 1 likewise after a rotation to the left by 8.

The size is that of the plain form, with N rounded up to 128: 0.5625 bytes per weight.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from backends.interface import Fc2Backend, Operand
from backends.operand import Nvfp4Tensor, PreparedOperand, linear_scale, round_up
from backends.problem import Fc2Problem
from backends.triton.tactic import PREPARED

#: Name of this arrangement in `PreparedOperand.form`.
FORM = "fragments"
#: Rows per block, values of K per chunk, and the multiple that rows are padded to (the tallest tile of a kernel).
ROWS, CHUNK, PADDING = 32, 256, 128

# Where the sign and the magnitude of a code stand in a float16, in both sides of a word: 0x8E008E00.
_FIELD = 0x8E008E00 - (1 << 32)
# Rows handled at a time: bounds the working memory to about 120 MB at K = 65536.
_STEP = 128


class ReadsFragments(Fc2Backend):
    """A backend whose kernels read this form."""

    def prepare(self, b: Nvfp4Tensor, in_place: bool = False) -> Operand:
        """B in this form; b itself where K is not a multiple of 256.

        Raises:
            ValueError: b has negative scale factors, or `in_place` and N is not a multiple of 128.
        """
        return b if b.shape[1] % CHUNK else prepare(b, in_place)

    def prepared_layout(self, problem: Fc2Problem) -> str:
        fast = replace(problem, b_layout=PREPARED)
        return PREPARED if self.can_implement(fast, self.default_tactic(fast)) else ""

    def unprepare(self, b: Operand) -> Nvfp4Tensor:
        if isinstance(b, PreparedOperand) and b.layout == PREPARED:
            return unprepare(b)
        return super().unprepare(b)


def prepare(b: Nvfp4Tensor, in_place: bool = False) -> PreparedOperand:
    """B permuted. Working memory on its device, beside the result, is about 120 MB at K = 65536.

    Args:
        in_place: write into b's own memory, with the original passing through the host's; b is emptied. Needs N to be a
            multiple of 128.

    Raises:
        ValueError: a negative scale factor, which this form cannot hold, or rows that leave no room for padding.
    """
    rows, k = b.shape
    if in_place and rows % PADDING:
        raise ValueError(f"b has N = {rows}; in_place needs a multiple of {PADDING}, or the padding has no room")
    if bool((_linear(b.scale, b, 0, rows) >= 128).any()):
        raise ValueError("b has negative scale factors, which the prepared form cannot hold; pass b as it is")
    blocks = round_up(rows, PADDING) // ROWS
    data_shape, scale_shape = (k // CHUNK, blocks, 4, 2, 32, 4), (k // CHUNK, blocks, 32, 4)
    if in_place:
        source = b.data.to("cpu", copy=True), b.scale.to("cpu", copy=True)
        data, scale = b.data.view(torch.int32).view(data_shape), b.scale.view(torch.int32).view(scale_shape)
        b.empty()
    else:
        source = b.data, b.scale
        data = torch.empty(data_shape, dtype=torch.int32, device=b.device)
        scale = torch.empty(scale_shape, dtype=torch.int32, device=b.device)
    for start in range(0, rows, _STEP):
        stop = min(start + _STEP, rows)
        part = slice(start // ROWS, (start + _STEP) // ROWS)
        codes, factors = source[0][start:stop].to(b.device), _linear(source[1], b, start, stop).to(b.device)
        data[:, part] = _pack_data(_padded(codes)).transpose(0, 1)
        scale[:, part] = _pack_scale(_padded(factors)).transpose(0, 1)
    return PreparedOperand("triton", FORM, (rows, k), data.view(torch.uint8), scale.view(torch.uint8), b.global_scale)


def _linear(scale: torch.Tensor, b: Nvfp4Tensor, start: int, stop: int) -> torch.Tensor:
    """Scale factor bytes of rows [start, stop), start a multiple of 128, in the "linear" layout."""
    if b.layout == "linear":
        return scale[start:stop]
    return linear_scale(scale[start : round_up(stop, 128)], stop - start, 0, scale.shape[1])


def zeros(rows: int, k: int, device: torch.device) -> PreparedOperand:
    """A prepared operand of zeros."""
    blocks = round_up(rows, PADDING) // ROWS
    data = torch.zeros((k // CHUNK, blocks, 4, 2, 32, 4), dtype=torch.int32, device=device)
    scale = torch.zeros((k // CHUNK, blocks, 32, 4), dtype=torch.int32, device=device)
    return PreparedOperand("triton", FORM, (rows, k), data.view(torch.uint8), scale.view(torch.uint8))


def unprepare(p: PreparedOperand) -> Nvfp4Tensor:
    """The exact inverse of `prepare`, with scale factors in the "128x4" layout."""
    rows, k = p.shape
    data = torch.empty((rows, k // 2), dtype=torch.uint8, device=p.device)
    scale = torch.empty((rows, k // 16), dtype=torch.uint8, device=p.device)
    for start in range(0, rows, _STEP):
        part = slice(start // ROWS, (start + _STEP) // ROWS)
        count = min(_STEP, rows - start)
        data[start : start + count] = _unpack_data(p.data.view(torch.int32)[:, part].transpose(0, 1))[:count]
        scale[start : start + count] = _unpack_scale(p.scale.view(torch.int32)[:, part].transpose(0, 1))[:count]
    return Nvfp4Tensor(data, scale, "linear", p.global_scale).to_layout("128x4")


def _padded(x: torch.Tensor) -> torch.Tensor:
    missing = -x.shape[0] % PADDING
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _pack_data(x: torch.Tensor) -> torch.Tensor:
    """[rows, K/2] bytes to [rows/32, K/256, quarter, half, lane, step] words."""
    rows, k = x.shape[0], x.shape[1] * 2
    # A 32-bit word of the plain form is 8 consecutive values: nibble i and i + 4 form slot pair i.
    plain = x.contiguous().view(torch.int32).view(rows // 32, 2, 2, 8, k // CHUNK, 4, 4, 2)  # block half r8 g chunk q t w
    registers = []
    for register in range(4):
        source = plain[:, :, register % 2].permute(0, 3, 4, 1, 2, 5, 6)  # block chunk q half g t w
        bits = torch.zeros((rows // 32, k // CHUNK, 4, 2, 8, 4, 2, 2), dtype=torch.int32, device=x.device)
        for step in range(2):
            pair = 2 * step + register // 2
            for side in range(2):
                code = source >> (4 * (pair + 4 * side))
                bits[..., step] |= (((code & 7) << 9) | (((code >> 3) & 1) << 15)) << (16 * side)
        registers.append(bits)
    return _word(*registers).view(rows // 32, k // CHUNK, 4, 2, 32, 4)


def _unpack_data(words: torch.Tensor) -> torch.Tensor:
    blocks, chunks = words.shape[:2]
    words = words.reshape(blocks, chunks, 4, 2, 8, 4, 2, 2)
    plain = torch.zeros((blocks, 2, 2, 8, chunks, 4, 4, 2), dtype=torch.int32, device=words.device)
    for register, bits in enumerate(_registers(words)):
        target = plain[:, :, register % 2].permute(0, 3, 4, 1, 2, 5, 6)
        for step in range(2):
            pair = 2 * step + register // 2
            for side in range(2):
                half = bits[..., step] >> (16 * side)
                target |= (((half >> 9) & 7) | (((half >> 15) & 1) << 3)) << (4 * (pair + 4 * side))
    return plain.view(blocks * 32, chunks * 32).view(torch.uint8).view(blocks * 32, chunks * CHUNK // 2)


def _registers(word: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Signs and magnitudes of the four registers, where they stand in a float16: what the kernels compute.

    Three words made of it by shifts would each need bits that another one needs, as a mask finds the same places in all; with
    exclusive ors, which cost a mask's instruction nothing, four shifts give 32 independent bits.
    """
    shared = word << 7
    return word & _FIELD, (word << 3) & _FIELD, (shared ^ (word << 10)) & _FIELD, (shared ^ _rotated(word, 12)) & _FIELD


def _word(r0: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, r3: torch.Tensor) -> torch.Tensor:
    """The word with these registers."""

    def moved(bits: torch.Tensor, down: int, *places: int) -> torch.Tensor:
        return (bits >> down) & sum(1 << place for place in places)

    # Bits 6 to 12, 15, 22 to 28 and 31 of the word stand in the first two registers. Without what they add to the others,
    # the rest come one after the other.
    word = r0 | ((r1 >> 3) & 0x11C011C0)
    _, _, known2, known3 = _registers(word)
    r2, r3 = r2 ^ known2, r3 ^ known3
    found = moved(r2, 7, 2, 18) | moved(r2, 10, 5, 21) | moved(r3, 7, 4, 20) | moved(r3, 12, 3, 19)
    _, _, known2, known3 = _registers(found)
    r2, r3 = r2 ^ known2, r3 ^ known3
    return word | found | moved(r2, 10, 0, 1, 16, 17) | (_rotated(r3, 20) & 0x60006000)


def _rotated(word: torch.Tensor, left: int) -> torch.Tensor:
    return (word << left) | ((word >> (32 - left)) & ((1 << left) - 1))


def _pack_scale(x: torch.Tensor) -> torch.Tensor:
    """[rows, K/16] e4m3 bytes to [rows/32, K/256, lane, quarter] words of four 8-bit float16 heads."""
    rows, blocks = x.shape
    bits = (x.contiguous().view(torch.float8_e4m3fn).to(torch.float16) * 64).view(torch.int16).to(torch.int32) >> 7
    head = bits.view(rows // 32, 2, 2, 8, blocks // 16, 4, 4).permute(0, 4, 3, 6, 5, 1, 2)  # block chunk g t q half r8
    low, high = head[..., 0, 0], head[..., 0, 1]
    low1, high1 = head[..., 1, 0], head[..., 1, 1]
    words = (low << 7) | (high << 23) | (low1 >> 1) | (high1 >> 1 << 16) | ((low1 & 1) << 31) | ((high1 & 1) << 15)
    return words.reshape(rows // 32, blocks // 16, 32, 4)


def _unpack_scale(words: torch.Tensor) -> torch.Tensor:
    blocks, chunks = words.shape[:2]
    words = words.reshape(blocks, chunks, 8, 4, 4)
    low, high = (words >> 7) & 0xFF, (words >> 23) & 0xFF
    low1 = ((words & 0x7F) << 1) | ((words >> 31) & 1)
    high1 = (((words >> 16) & 0x7F) << 1) | ((words >> 15) & 1)
    head = torch.stack([torch.stack([low, high], -1), torch.stack([low1, high1], -1)], -2)  # block chunk g t q half r8
    half = (head << 7).to(torch.int16).view(torch.float16)
    byte = (half.float() / 64).to(torch.float8_e4m3fn).view(torch.uint8)
    return byte.permute(0, 5, 6, 2, 1, 4, 3).reshape(blocks * 32, chunks * 16)
