"""FC2 shapes of published mixture-of-experts models: what the tuner, the tables and the shoot-out call by
name.

Sizes are those of the models' public configurations (`hidden_size`, `moe_intermediate_size`, experts, experts
per token); a tensor-parallel degree divides the intermediate size. gpt-oss at TP8 has I = 360, which is not a
multiple of a scale block, so FC2 does not admit it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """N, K and E of one model's FC2 on one rank.

    Attributes:
        name: as command lines take it.
        n: hidden size.
        intermediate: weights per expert on this rank (I).
        experts: routed experts (E).
        top_k: experts a token selects.
    """

    name: str
    n: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def k(self) -> int:
        return self.experts * self.intermediate


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("deepseek-v3-tp8", 7168, 256, 256, 8),
        Shape("deepseek-v3-tp4", 7168, 512, 256, 8),
        Shape("qwen3-235b-tp2", 4096, 768, 128, 8),
        Shape("qwen3-235b-tp4", 4096, 384, 128, 8),
        Shape("mixtral-8x7b-tp8", 4096, 1792, 8, 2),
        Shape("gpt-oss-120b-tp4", 2880, 720, 128, 4),
    )
}


def assumed_top_k(experts: int) -> int:
    """Experts a token is taken to select where nobody says: min(8, E / 4), at least 1.

    alpha's content is on the device and the host never reads it, so decisions need a stated assumption. This
    one gives 8 of 256 and 8 of 128 (DeepSeek-V3, Qwen3) and 2 of 8 (Mixtral).
    """
    return max(1, min(8, experts // 4))
