"""Whether a result is right: an independent float64 computation and the elementwise accuracy bar."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch

from backends.operand import Nvfp4Tensor
from backends.quantize import power_of_two
from dispatch.inputs import TokenSet

#: Significand bits with the leading one, and the exponent of the smallest normal value, of output types that round.
PRECISION = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}
#: What float32 accumulation in any order may add, relative to the sum of the terms' magnitudes.
ACCUMULATION = 2.0**-18
# Values of B decoded to float64 at a time: 128 MiB.
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Reference:
    """float64 results of one token set: `value` [M, N], and `magnitude` [M, N], the sum of |alpha * a * b|."""

    value: torch.Tensor
    magnitude: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """How far results are from their references.

    Attributes:
        over_bar: the largest `|out - ref| / (half an ulp + 2^-18 * S)`; at most 1 when right, infinite for a NaN.
        relative: `||out - ref|| / ||ref||`, the worst of the sets.
    """

    over_bar: float
    relative: float

    @property
    def ok(self) -> bool:
        return self.over_bar <= 1.0


def references(sets: Sequence[TokenSet], b: Nvfp4Tensor) -> list[Reference]:
    """The references of all sets in one pass over b, on its device.

    Products of alpha, a and b are exact in float64 but for the last bits; b is decoded a few experts at a time. Cost:
    two float64 GEMMs of the problem's size.
    """
    experts = sets[0].alpha.shape[1]
    n, k = b.shape
    inner = k // experts
    rows = [token_set.a.shape[0] for token_set in sets]
    value = torch.zeros((sum(rows), n), dtype=torch.float64, device=b.device)
    magnitude = torch.zeros_like(value)
    alpha = torch.cat([token_set.alpha for token_set in sets]).double()
    step = max(1, _CHUNK_VALUES // (inner * max(n, sum(rows))))
    for first in range(0, experts, step):
        last = min(first + step, experts)
        columns = slice(first * inner, last * inner)
        a = torch.cat([token_set.a.decode(columns, dtype=torch.float64) for token_set in sets])
        a = (a.view(sum(rows), last - first, inner) * alpha[:, first:last, None]).view(sum(rows), -1)
        weights = b.decode(columns, dtype=torch.float64)
        value.addmm_(a, weights.t())
        magnitude.addmm_(a.abs_(), weights.abs_().t())
    return [Reference(*pair) for pair in zip(value.split(rows), magnitude.split(rows))]


def errors(outs: Sequence[torch.Tensor], expected: Sequence[Reference]) -> Errors:
    """The worst errors of several results against their references."""
    over_bar = relative = 0.0
    for out, reference in zip(outs, expected):
        difference = (out.double() - reference.value).abs_()
        relative = _worse(relative, (difference.norm() / reference.value.norm().clamp_min(1e-300)).item())
        # A sum that crosses a power of two is rounded with the larger spacing.
        rounding = half_ulp(torch.maximum(reference.value.abs(), out.double().abs()), out.dtype)
        bar = rounding + ACCUMULATION * reference.magnitude
        # Where no token selected anything the bar is 0 and so must the result be.
        ratio = torch.where(difference == 0, 0.0, difference / bar)
        over_bar = _worse(over_bar, ratio.max().item() if ratio.numel() else 0.0)
    return Errors(over_bar, relative)


def half_ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of each float64 value in the output type; 0 for float32."""
    if dtype not in PRECISION:
        return torch.zeros_like(value)
    bits, smallest = PRECISION[dtype]
    _, exponent = torch.frexp(value)  # the leading one has weight 2^(exponent - 1)
    leading = torch.where(value == 0, smallest, exponent - 1).clamp_min(smallest)
    return power_of_two(leading - bits)


def _worse(x: float, y: float) -> float:
    return max(x, y) if y == y else float("inf")
