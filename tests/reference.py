"""The float64 reference, the accuracy bar and the input generators that all backend tests share."""
from __future__ import annotations

import torch

from backends import Nvfp4Tensor, quantize_nvfp4

#: Significand bits, the leading one included, and the exponent of the smallest normal value, by rounded output type.
PRECISION = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}


def reference(a: Nvfp4Tensor, b: Nvfp4Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out in float64 and S = sum |alpha*a*b| over each element's terms, both [M, N] on the operands' device."""
    m, k = a.shape
    experts = alpha.shape[1]
    exact = torch.zeros((m, b.shape[0]), dtype=torch.float64, device=alpha.device)
    magnitude = torch.zeros_like(exact)
    left, right = a.dequantize().double(), b.dequantize().double()
    for e in range(experts):
        columns = slice(e * (k // experts), (e + 1) * (k // experts))
        weight = alpha[:, e : e + 1].double()
        exact += weight * (left[:, columns] @ right[:, columns].T)
        magnitude += weight.abs() * (left[:, columns].abs() @ right[:, columns].abs().T)
    return exact, magnitude


def half_ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of `value` (float64) in `dtype`; 0 for float32, where 2^-18*S covers it.

    Relative to the value this is between 2^-9 and 2^-8 in bfloat16, and between 2^-12 and 2^-11 in float16.
    """
    if dtype == torch.float32:
        return torch.zeros_like(value)
    bits, smallest = PRECISION[dtype]
    _, exponent = torch.frexp(value)  # the leading one has weight 2^(exponent - 1); exponent 0 for 0
    leading = torch.where(value == 0, smallest, exponent - 1).clamp_min(smallest)
    return torch.ldexp(torch.ones_like(value), leading - bits)


def assert_meets_bar(out: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Elementwise |out - exact| <= half ulp + 2^-18 * S; a NaN or an unwritten poison value fails."""
    # A sum that crosses a power of two is rounded with the larger spacing.
    allowed = half_ulp(torch.maximum(exact.abs(), out.double().abs()), out.dtype) + 2.0**-18 * magnitude
    error = (out.double() - exact).abs()
    bad = ~(error <= allowed)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements miss the bar; first at [{row}, {column}]: "
            f"got {out[row, column].item()}, exact {exact[row, column].item()}, allowed {allowed[row, column].item()}"
        )


ALPHA_KINDS = ("dense", "zero", "one_hot", "one_expert", "top_k", "ragged")


def make_alpha(kind: str, m: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [m, experts] with both signs: dense, all zero, one-hot rows, one expert for all rows, top-k (8 or fewer),
    or a random number from 0 to all of nonzeros in each row."""
    values = torch.randn((m, experts), generator=generator)
    order = torch.rand((m, experts), generator=generator).argsort(dim=1).argsort(dim=1)
    if kind == "dense":
        return values
    if kind == "one_expert":
        return values * (torch.arange(experts) == experts // 2)
    kept = {
        "zero": torch.zeros(m, 1),
        "one_hot": torch.ones(m, 1),
        "top_k": torch.full((m, 1), min(8, max(1, experts // 2))),
        "ragged": torch.randint(0, experts + 1, (m, 1), generator=generator),
    }[kind]
    return values * (order < kept)


def make_operands(
    m: int, n: int, k: int, seed: int, layout: str = "128x4", device: torch.device | str = "cpu"
) -> tuple[Nvfp4Tensor, Nvfp4Tensor]:
    """Quantized normal a [m, k] and b [n, k] whose scale padding, if any, decodes to NaN."""
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for rows in (m, n):
        x = quantize_nvfp4(torch.randn((rows, k), generator=generator), layout=layout)
        pair.append(poison_padding(x).to(device))
    return pair[0], pair[1]


def poison_padding(x: Nvfp4Tensor) -> Nvfp4Tensor:
    """x with 0x7F (NaN) in the scale bytes that belong to no value."""
    if x.layout == "linear":
        return x
    rows, k = x.shape
    used = Nvfp4Tensor(torch.zeros_like(x.data), torch.ones((rows, k // 16), dtype=torch.uint8), "linear")
    return Nvfp4Tensor(x.data, torch.where(used.to_layout("128x4").scale == 1, x.scale, 0x7F), "128x4", x.global_scale)
