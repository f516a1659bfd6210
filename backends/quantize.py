"""Making NVFP4 operands: rounding to e2m1 and e4m3, and repacking expert-major weights."""
from __future__ import annotations

from typing import Literal, Optional, Sequence, Union

import torch

from backends.operand import BLOCK, E2M1_MAGNITUDES, E4M3_MAX, Layout, Nvfp4Tensor, swizzle_scale

#: Largest e2m1 magnitude.
E2M1_MAX = E2M1_MAGNITUDES[-1]
# Rows are quantized in pieces of this many values: their float64 working copies stay near 256 MiB.
_CHUNK_VALUES = 1 << 23


def quantize_nvfp4(
    x: torch.Tensor,
    *,
    layout: Layout = "128x4",
    global_scale: Optional[Union[float, torch.Tensor, Literal["amax"]]] = None,
) -> Nvfp4Tensor:
    """Quantize a matrix to NVFP4, on its own device.

    A block's scale factor is `amax/6` (over the global scale) rounded to the nearest e4m3, at least the smallest
    positive e4m3 when the block is not all zero; a value is rounded to the nearest e2m1 multiple of it, ties to the even
    code, saturating at 6. Both roundings are exact. A block with a NaN or an infinity gets a NaN scale factor.

    Args:
        x: [rows, K] of a floating type, K a multiple of 16.
        layout: of the scale factors.
        global_scale: None for one level of scaling; the dequantization factor to use, a number or a float32 scalar
            tensor; or "amax" to take `amax(|x|) / (448*6)`.

    Returns:
        An operand with `global_scale` set when there is one. Temporary memory is bounded (about 0.5 GiB).

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x is not [rows, K] with K a positive multiple of 16, or global_scale is not understood.
    """
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        got = str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x is {got}; it takes a bfloat16, float16, float32 or float64 tensor")
    if x.dim() != 2 or x.shape[1] == 0 or x.shape[1] % BLOCK:
        raise ValueError(f"x has shape {list(x.shape)}; it takes [rows, K] with K a positive multiple of {BLOCK}")
    rows, k = x.shape
    factor = _global_factor(x, global_scale)
    data = torch.empty((rows, k // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((rows, k // BLOCK), dtype=torch.uint8, device=x.device)
    _quantize_into(x, factor, data, scale)
    return Nvfp4Tensor(data, scale if layout == "linear" else swizzle_scale(scale), layout, factor)


def pack_experts(
    w2: Union[torch.Tensor, Sequence[Nvfp4Tensor]], *, layout: Layout = "128x4"
) -> Nvfp4Tensor:
    """Down-projection weights from expert-major to the hidden-major operand B of FC2.

    Args:
        w2: `[E, N, I]` weights of a floating type, quantized here with one level of scaling; or one `Nvfp4Tensor`
            [N, I] per expert, which keep their codes. Slices of stacked tensors are taken in place:
            `[Nvfp4Tensor(data[e], scale[e], "linear", global_scale[e]) for e in range(E)]`.
        layout: of the result's scale factors.

    Returns:
        [N, E*I]; expert e owns columns [e*I, (e+1)*I). `global_scale` is float32 [E] when the experts have one.
        Beside the result itself, memory holds one expert's working set and one more copy of the scale factors.

    Raises:
        TypeError, ValueError: an empty list, experts of unequal shape or on different devices, global scales on some
            experts only, or I not a multiple of 16.
    """
    if isinstance(w2, torch.Tensor) and w2.dim() != 3:
        raise ValueError(f"w2 has shape {list(w2.shape)}; it takes expert-major weights [E, N, I]")
    if len(w2) == 0:
        raise ValueError("w2 has no experts; it takes [E, N, I] or a list of one Nvfp4Tensor [N, I] per expert")
    experts = len(w2)
    rows, inner = w2[0].shape
    if inner == 0 or inner % BLOCK:
        raise ValueError(f"w2 has I = {inner} weights per expert; I must be a positive multiple of {BLOCK}")
    device = w2[0].device
    data = torch.empty((rows, experts * inner // 2), dtype=torch.uint8, device=device)
    scale = torch.empty((rows, experts * inner // BLOCK), dtype=torch.uint8, device=device)
    factor = None if isinstance(w2, torch.Tensor) else _stack_global_scales(w2)
    for e, expert in enumerate(w2):
        data_e = data[:, e * inner // 2 : (e + 1) * inner // 2]
        scale_e = scale[:, e * inner // BLOCK : (e + 1) * inner // BLOCK]
        if isinstance(w2, torch.Tensor):
            _quantize_into(expert, None, data_e, scale_e)
        else:
            if tuple(expert.shape) != (rows, inner) or expert.device != device:
                raise ValueError(
                    f"w2[{e}] is {list(expert.shape)} on {expert.device}; w2[0] is {[rows, inner]} on {device}: "
                    "all experts must agree"
                )
            data_e.copy_(expert.data)
            scale_e.copy_(expert.to_layout("linear").scale)
    return Nvfp4Tensor(data, scale if layout == "linear" else swizzle_scale(scale), layout, factor)


def _stack_global_scales(w2: Sequence[Nvfp4Tensor]) -> Optional[torch.Tensor]:
    for e, expert in enumerate(w2):
        if not isinstance(expert, Nvfp4Tensor):
            raise TypeError(f"w2[{e}] is {type(expert).__name__}; a list of experts takes Nvfp4Tensor")
        if (expert.global_scale is None) != (w2[0].global_scale is None):
            raise ValueError(f"w2[{e}] and w2[0] differ in having a global_scale; give one to all experts or to none")
    if w2[0].global_scale is None:
        return None
    scales = [torch.as_tensor(x.global_scale, dtype=torch.float32, device=x.device).reshape(-1) for x in w2]
    if any(s.numel() != 1 for s in scales):
        raise ValueError("every expert's global_scale must have one element")
    return torch.cat(scales)


def _global_factor(
    x: torch.Tensor, global_scale: Optional[Union[float, torch.Tensor, str]]
) -> Optional[torch.Tensor]:
    """The dequantization factor as a float32 scalar on x's device; no host synchronization."""
    if global_scale is None:
        return None
    if isinstance(global_scale, str):
        if global_scale != "amax":
            raise ValueError(f"global_scale is {global_scale!r}; it takes None, a number, a scalar tensor or 'amax'")
        amax = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32) if x.numel() else x.new_zeros(())
        factor = amax.float() / (E4M3_MAX * E2M1_MAX)
        return torch.where(factor > 0, factor, torch.ones_like(factor))  # an all-zero matrix keeps finite codes
    factor = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device)
    if factor.numel() != 1:
        raise ValueError(f"global_scale has shape {list(factor.shape)}; quantize_nvfp4 takes one factor for x")
    return factor.reshape(())


def _quantize_into(x: torch.Tensor, factor: Optional[torch.Tensor], data: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantize x [rows, K] into data [rows, K/2] and linear scale [rows, K/16] (views of uint8 tensors)."""
    rows, k = x.shape
    step = max(1, _CHUNK_VALUES // k)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        # float64 throughout: every comparison with a rounding border is then exact for inputs up to float32.
        blocks = x[start:stop].double().view(stop - start, k // BLOCK, BLOCK)
        magnitude = blocks.abs()
        unit = magnitude.amax(dim=-1) / E2M1_MAX
        global_unit = 1.0 if factor is None else factor.double()
        chosen = _round_e4m3(unit / global_unit)
        codes = _e2m1_codes(magnitude, (chosen * global_unit).unsqueeze(-1))
        codes |= torch.signbit(blocks).to(torch.uint8) << 3
        pairs = codes.view(stop - start, k // 2, 2)
        data[start:stop] = pairs[..., 0] | (pairs[..., 1] << 4)
        scale[start:stop] = chosen.float().to(torch.float8_e4m3fn).view(torch.uint8)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float64, by its bits; exponents of normal numbers, int32.

    torch.ldexp gives zeros on a CUDA device that is not the current one (torch 2.11, two H100, 2026-11-26).
    """
    return (exponent.long() + 1023 << 52).view(torch.float64)


def _round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nonnegative float64 to the nearest e4m3 value, ties to even, saturating; positive values stay positive.

    The type conversion of torch goes through float32 and would round twice.
    """
    _, exponent = torch.frexp(x)
    # Three bits behind the leading one; below 2^-6 the spacing stays 2^-9 (subnormals).
    quantum = power_of_two((exponent - 4).clamp_(min=-9))
    rounded = (torch.round(x / quantum) * quantum).clamp_(max=E4M3_MAX)
    rounded = torch.where((x > 0) & (rounded == 0), quantum, rounded)
    return torch.where(torch.isfinite(x), rounded, torch.nan)


def _e2m1_codes(magnitude: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The 3-bit code of `magnitude / unit` rounded to the nearest e2m1, ties to the even code. unit 0 gives 0."""
    codes = torch.zeros(magnitude.shape, dtype=torch.uint8, device=magnitude.device)
    for code in range(1, len(E2M1_MAGNITUDES)):
        border = (E2M1_MAGNITUDES[code - 1] + E2M1_MAGNITUDES[code]) / 2 * unit
        # On the border itself the even of the two codes wins.
        codes += magnitude > border if code % 2 else magnitude >= border
    return torch.where(unit > 0, codes, torch.zeros_like(codes))
