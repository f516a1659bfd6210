"""NVFP4 operands: 4-bit e2m1 values with one e4m3 scale factor per 16 of them along K.

Layouts (the names TensorRT-LLM, FlashInfer and PyTorch use for them):

- data: [rows, K/2] bytes, the low nibble holds the even k;
- "linear" scale factors: [rows, K/16] bytes;
- "128x4" scale factors (`SWIZZLE_32_4_4` in PyTorch): rows padded to 128, K/16 padded to S, a multiple of 4, and the
  scale factor of row r, block s at byte `((r//128)*(S//4) + s//4)*512 + (r%32)*16 + ((r%128)//32)*4 + s%4`.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, Optional, Union

import torch

Layout = Literal["128x4", "linear"]
LAYOUTS = ("128x4", "linear")

#: Values that share a scale factor.
BLOCK = 16
#: The magnitudes of e2m1 by their 3-bit code; bit 3 is the sign.
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Largest finite e4m3 (fn variant) value.
E4M3_MAX = 448.0

# Decoding works in pieces of this many values, so that the int32 indices of the table look-up stay near 32 MiB.
_DECODE_VALUES = 1 << 24


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def scale_shape(rows: int, k: int, layout: Layout) -> tuple[int, int]:
    """Rows and columns of the scale factor bytes of a [rows, k] operand: padded for "128x4", exact for "linear"."""
    blocks = k // BLOCK
    return (rows, blocks) if layout == "linear" else (round_up(rows, 128), round_up(blocks, 4))


def swizzle_scale(linear: torch.Tensor) -> torch.Tensor:
    """Scale factor bytes from [rows, K/16] to the "128x4" order, as [padded rows, padded K/16]; padding is 0."""
    rows, blocks = linear.shape
    padded = linear.new_zeros((round_up(rows, 128), round_up(blocks, 4)))
    padded[:rows, :blocks] = linear
    return padded.view(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4).reshape(padded.shape)


def linear_scale(scale: torch.Tensor, rows: int, first: int, last: int) -> torch.Tensor:
    """Scale factor bytes of blocks [first, last) as [rows, last - first], from the "128x4" order.

    Args:
        scale: uint8, [padded rows, padded K/16] as `scale_shape` gives.
    """
    tiles = scale.view(scale.shape[0] // 128, scale.shape[1] // 4, 32, 4, 4)[:, first // 4 : -(-last // 4)]
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(scale.shape[0], -1)
    return plain[:rows, first % 4 : first % 4 + last - first]


@dataclass(frozen=True, eq=False)
class Nvfp4Tensor:
    """A [rows, K] matrix in NVFP4. Immutable, compared by identity; the tensors are used in place, never copied.

    Args:
        data: [rows, K/2], contiguous, uint8 or float4_e2m1fn_x2; kept as its uint8 view.
        scale: uint8 or float8_e4m3fn, contiguous, of any shape with the bytes that `layout` takes (`scale_shape`);
            kept as a uint8 view of that shape. Padding bytes may hold anything.
        layout: "128x4" or "linear".
        global_scale: what decoded values are multiplied with (torchao's and PyTorch's `amax/(448*6)`, not FlashInfer's
            and compressed-tensors' reciprocal of it: see `from_reciprocal`). None, a number, or a float32 tensor with
            one element, or with one element per expert for B.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape, size, layout or device that does not fit; the message says what does.
    """

    data: torch.Tensor
    scale: torch.Tensor
    layout: Layout = "128x4"
    global_scale: Optional[Union[float, torch.Tensor]] = None

    def __post_init__(self) -> None:
        data, scale = self.data, self.scale
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; accepted: {', '.join(map(repr, LAYOUTS))}")
        _check_bytes("data", data, (torch.uint8, torch.float4_e2m1fn_x2))
        _check_bytes("scale", scale, (torch.uint8, torch.float8_e4m3fn))
        if data.dim() != 2:
            raise ValueError(f"data has shape {list(data.shape)}; it takes [rows, K/2], two values a byte")
        rows, k = data.shape[0], data.shape[1] * 2
        if k == 0 or k % BLOCK:
            raise ValueError(f"data has shape {list(data.shape)}, so K = {k}; K must be a positive multiple of {BLOCK}")
        expected = scale_shape(rows, k, self.layout)
        if scale.numel() != expected[0] * expected[1]:
            raise ValueError(
                f"scale has {scale.numel()} bytes (shape {list(scale.shape)}); layout {self.layout!r} of a "
                f"[{rows}, {k}] operand takes {expected[0] * expected[1]} ({expected[0]} x {expected[1]}"
                + (", rows padded to 128 and K/16 to 4)" if self.layout == "128x4" else ", one per 16 values)")
                + _other_layout_hint(scale.numel(), rows, k, self.layout)
            )
        if scale.device != data.device:
            raise ValueError(f"scale is on {scale.device} and data on {data.device}; move both to one device")
        # Tensors that already have the kept form stay the same objects: caches may hold on to their identity.
        if data.dtype != torch.uint8:
            object.__setattr__(self, "data", data.view(torch.uint8))
        if scale.dtype != torch.uint8 or scale.shape != expected:
            object.__setattr__(self, "scale", scale.view(torch.uint8).view(expected))
        _check_global_scale(self.global_scale, data.device)

    @classmethod
    def from_reciprocal(
        cls, data: torch.Tensor, scale: torch.Tensor, layout: Layout, reciprocal: Union[float, torch.Tensor]
    ) -> Nvfp4Tensor:
        """An operand of a producer whose global scale is the quantization factor `(448*6)/amax`.

        FlashInfer's `nvfp4_quantize` and compressed-tensors' `weight_global_scale` are of this sense.
        """
        return cls(data, scale, layout, 1.0 / reciprocal)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, K), in values."""
        return (self.data.shape[0], self.data.shape[1] * 2)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @functools.cached_property
    def kind(self) -> tuple:
        """All of the operand that a decision may depend on, hashable; taken once, since calls look it up by this."""
        return _kind(self)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale factors."""
        return self.data.numel() + self.scale.numel()

    def to(self, device: torch.device | str) -> Nvfp4Tensor:
        """The same operand on another device."""
        moved = self.global_scale.to(device) if isinstance(self.global_scale, torch.Tensor) else self.global_scale
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), global_scale=moved)

    def to_layout(self, layout: Layout) -> Nvfp4Tensor:
        """The same values with the scale factors in another layout; the data bytes are shared."""
        if layout == self.layout:
            return self
        rows, k = self.shape
        if layout == "128x4":
            return replace(self, scale=swizzle_scale(self.scale), layout=layout)
        if layout == "linear":
            return replace(self, scale=linear_scale(self.scale, rows, 0, k // BLOCK).contiguous(), layout=layout)
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(map(repr, LAYOUTS))}")

    def empty(self) -> None:
        """Let go of the memory, which now holds something else: the operand keeps its K and has no rows."""
        object.__setattr__(self, "data", self.data.new_empty((0, self.data.shape[1])))
        object.__setattr__(self, "scale", self.scale.new_empty((0, self.scale.shape[1])))
        self.__dict__.pop("kind", None)

    def decode(
        self, columns: Optional[slice] = None, rows: Optional[slice] = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Values of a part of the matrix, without the global scale: exact in float32, bfloat16 and float16 alike.

        Args:
            columns: range of k, start and stop multiples of 16; None for all.
            rows: range of rows, start a multiple of 128; None for all.
            dtype: of the result.

        Returns:
            [rows, columns]. Temporary memory is near twice the result's plus 32 MiB.
        """
        row0, row1, _ = (rows or slice(None)).indices(self.shape[0])
        k0, k1, _ = (columns or slice(None)).indices(self.shape[1])
        if k0 % BLOCK or k1 % BLOCK or row0 % 128:
            raise ValueError(f"decode: columns {k0}:{k1} must be multiples of {BLOCK} and row {row0} one of 128")
        count, width = max(row1 - row0, 0), max(k1 - k0, 0)
        out = torch.empty((count, width), dtype=dtype, device=self.device)
        table = _byte_table(self.device, dtype)
        step = max(1, _DECODE_VALUES // max(width, 1) // 128) * 128
        for start in range(row0, row1, step):
            stop = min(start + step, row1)
            piece = self.data[start:stop, k0 // 2 : k1 // 2]
            values = table.index_select(0, piece.reshape(-1).int()).view(stop - start, width // BLOCK, BLOCK)
            scale = self._block_scale(start, stop, k0 // BLOCK, k1 // BLOCK).view(torch.float8_e4m3fn).to(dtype)
            torch.mul(values, scale.unsqueeze(-1), out=out[start - row0 : stop - row0].view(values.shape))
        return out

    def _block_scale(self, row0: int, row1: int, first: int, last: int) -> torch.Tensor:
        if self.layout == "linear":
            return self.scale[row0:row1, first:last].contiguous()
        return linear_scale(self.scale[row0 : round_up(row1, 128)], row1 - row0, first, last).contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix, [rows, K], with the global scale applied; exact in float32 when there is none."""
        values = self.decode(dtype=dtype)
        if self.global_scale is None:
            return values
        factor = torch.as_tensor(self.global_scale, dtype=torch.float32, device=self.device).reshape(-1)
        if self.shape[1] % factor.numel():
            raise ValueError(f"global_scale has {factor.numel()} elements, which do not divide K = {self.shape[1]}")
        by_expert = values.view(self.shape[0], factor.numel(), -1)
        return by_expert.mul_(factor.to(dtype)[None, :, None]).view(self.shape)

    def __repr__(self) -> str:
        return f"Nvfp4Tensor(shape={list(self.shape)}, layout={self.layout!r}, device={str(self.device)!r})"


@dataclass(frozen=True, eq=False)
class PreparedOperand:
    """An operand permuted by a backend's `prepare` into the order its kernels read fastest.

    Only backends that know that order can read it; `unprepare` of one gives the `Nvfp4Tensor` back, exactly. It is made to be
    used, not to be stored: versions may differ in the order.

    Attributes:
        backend: name of the backend whose order it is.
        form: that backend's name for the arrangement.
        shape: logical (rows, K).
        data, scale: uint8, arranged as `form` says.
        global_scale: as in `Nvfp4Tensor`.
    """

    backend: str
    form: str
    shape: tuple[int, int]
    data: torch.Tensor
    scale: torch.Tensor
    global_scale: Optional[Union[float, torch.Tensor]] = None

    @property
    def layout(self) -> str:
        """"backend/form": what `Fc2Problem.b_layout` says of this operand."""
        return f"{self.backend}/{self.form}"

    @property
    def device(self) -> torch.device:
        return self.data.device

    @functools.cached_property
    def kind(self) -> tuple:
        """As of `Nvfp4Tensor`."""
        return _kind(self)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale factors, padding included."""
        return self.data.numel() + self.scale.numel()

    def __repr__(self) -> str:
        return f"PreparedOperand(shape={list(self.shape)}, layout={self.layout!r}, device={str(self.device)!r})"


def _kind(operand: Nvfp4Tensor | PreparedOperand) -> tuple:
    scales = operand.global_scale.numel() if isinstance(operand.global_scale, torch.Tensor) else None
    return (type(operand), operand.shape, operand.layout, operand.device, scales)


@functools.lru_cache(maxsize=None)
def _byte_table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[256, 2]: the two e2m1 values of each byte, low nibble first. Read-only.

    Kept, since moving it to the device waits for the device, which a CUDA graph capture forbids.
    """
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=dtype)
    codes = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256)
    return torch.stack([codes[byte & 15], codes[byte >> 4]], dim=1).to(device)


def _check_bytes(name: str, tensor: object, accepted: tuple[torch.dtype, ...]) -> None:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; it takes a tensor of {names}")
    if tensor.dtype not in accepted:
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; it takes {names}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {list(tensor.stride())}); pass {name}.contiguous()")


def _other_layout_hint(numel: int, rows: int, k: int, layout: Layout) -> str:
    other = "linear" if layout == "128x4" else "128x4"
    height, width = scale_shape(rows, k, other)
    return f"; that is the size of layout {other!r}" if numel == height * width else ""


def _check_global_scale(scale: object, device: torch.device) -> None:
    if scale is None or (isinstance(scale, (int, float)) and not isinstance(scale, bool)):
        return
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"global_scale is {type(scale).__name__}; it takes None, a number or a float32 tensor")
    if scale.dtype != torch.float32 or scale.dim() > 1 or scale.numel() == 0:
        raise TypeError(
            f"global_scale is a {str(scale.dtype).removeprefix('torch.')} tensor of shape {list(scale.shape)}; "
            "it takes float32 with one element, or [experts] for b"
        )
    if scale.device != device:
        raise ValueError(f"global_scale is on {scale.device} and data on {device}; move both to one device")
