"""Inputs to time with: quantized random operands, alpha in several forms, and copies to rotate through."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from backends.operand import E4M3_MAX, Nvfp4Tensor, scale_shape
from backends.quantize import E2M1_MAX, quantize_nvfp4
from dispatch.timing import cold_sets

#: Standard deviations of the normal values: activations after FC1's gate, and weights of a trained layer.
ACTIVATION_STD = 1.0
WEIGHT_STD = 0.02
# Values generated and quantized at a time; a float32 chunk is 32 MiB.
_CHUNK_VALUES = 1 << 23


@dataclass(frozen=True)
class AlphaForm:
    """How tokens select experts.

    Attributes:
        kind: "topk", every expert equally popular; "skewed", popularity falling as 1/rank (Zipf); "dense", all of them.
        top_k: experts a token selects; unused for "dense".
    """

    kind: str
    top_k: int = 8

    def __str__(self) -> str:
        return self.kind if self.kind == "dense" else f"{self.kind}:{self.top_k}"

    @classmethod
    def parse(cls, text: str) -> AlphaForm:
        """From "topk", "topk:8", "skewed:4" or "dense". Raises ValueError for anything else."""
        kind, colon, number = text.partition(":")
        counted = number.isdigit() and int(number) >= 1
        if kind not in ("topk", "skewed", "dense") or (colon and (kind == "dense" or not counted)):
            raise ValueError(f"alpha form is {text!r}; accepted: topk:8, skewed:8 (any positive count), dense")
        return cls(kind, int(number)) if colon else cls(kind)


@dataclass(frozen=True)
class TokenSet:
    """One set of token-side inputs. The operands' global scales are folded into alpha."""

    a: Nvfp4Tensor
    alpha: torch.Tensor

    @property
    def pairs(self) -> int:
        """(token, expert) pairs with a nonzero alpha."""
        return int(torch.count_nonzero(self.alpha))

    @property
    def active_experts(self) -> int:
        """Experts selected by at least one token."""
        return int((self.alpha != 0).any(dim=0).sum())


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def random_operand(rows: int, k: int, std: float, source: torch.Generator) -> Nvfp4Tensor:
    """Normal values quantized on the generator's device a few rows at a time, in the "128x4" layout.

    Quantization has two levels, as producers of NVFP4 have; the global scale maps 6 standard deviations to the largest
    representable value and is left for `global_factor` to account for, so the operand itself carries none.
    """
    device = source.device
    data = torch.empty((rows, k // 2), dtype=torch.uint8, device=device)
    scale = torch.empty(scale_shape(rows, k, "128x4"), dtype=torch.uint8, device=device)
    # A multiple of 128 rows: their scale factors are then one contiguous range of the "128x4" layout.
    step = max(1, _CHUNK_VALUES // k // 128) * 128
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = torch.randn((stop - start, k), generator=source, device=device).mul_(std)
        part = quantize_nvfp4(values, global_scale=global_factor(std))
        data[start:stop] = part.data
        scale[start : start + part.scale.shape[0]] = part.scale
    return Nvfp4Tensor(data, scale, "128x4")


def global_factor(std: float) -> float:
    """The dequantization factor `amax / (448 * 6)` of `random_operand`, with amax taken as 6 standard deviations."""
    return 6.0 * std / (E4M3_MAX * E2M1_MAX)


def random_alpha(form: AlphaForm, m: int, experts: int, source: torch.Generator) -> torch.Tensor:
    """float32 [m, experts]: routing weights that sum to one in each row, 0 where an expert was not selected.

    Raises:
        ValueError: more experts are to be selected than there are.
    """
    device = source.device
    if form.kind == "dense":
        return torch.softmax(torch.randn((m, experts), generator=source, device=device), dim=1)
    if form.top_k > experts:
        raise ValueError(f"alpha form {form} selects {form.top_k} experts a token and there are {experts}")
    # The largest of (log popularity + Gumbel noise) are a draw without replacement by popularity.
    uniform = torch.rand((m, experts), generator=source, device=device).clamp_(1e-20, 1.0 - 1e-7)
    keys = -torch.log(-torch.log(uniform))
    if form.kind == "skewed":
        rank = torch.randperm(experts, generator=source, device=device) + 1
        keys -= torch.log(rank.float())
    selected = keys.topk(form.top_k, dim=1).indices
    weights = torch.softmax(torch.randn((m, form.top_k), generator=source, device=device), dim=1)
    return torch.zeros((m, experts), device=device).scatter_(1, selected, weights)


def token_sets(
    form: AlphaForm, m: int, k: int, experts: int, source: torch.Generator, count: int
) -> list[TokenSet]:
    """`count` different sets of activations and alpha for m tokens."""
    factor = global_factor(ACTIVATION_STD) * global_factor(WEIGHT_STD)
    return [
        TokenSet(
            random_operand(m, k, ACTIVATION_STD, source), random_alpha(form, m, experts, source).mul_(factor)
        )
        for _ in range(count)
    ]


def copy_operand(b: Nvfp4Tensor) -> Nvfp4Tensor:
    """The same operand in other memory."""
    return replace(b, data=b.data.clone(), scale=b.scale.clone())


def rotation(bytes_touched: float, device: torch.device, weight_copies: int) -> int:
    """Input sets to rotate through so that none is in the L2 cache when its turn comes again.

    Args:
        bytes_touched: the fewest bytes a call can read: the selected experts' weights, and A.
        weight_copies: copies of B, which the sets take in turn; the result is a multiple of it.
    """
    return -(-max(cold_sets(device, bytes_touched), weight_copies) // weight_copies) * weight_copies
