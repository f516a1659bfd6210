"""The kernel that lists and gathers tokens on SM 9.0, on the emulator, against the same by definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from backends.hopper.dense_plan import dense_tiling
from backends.hopper.tactic import ListConfig
from tests import hopper_emulation as emulation
from tests.reference import make_alpha, make_operands


@pytest.mark.parametrize("scales", ["128x4", "linear"])
@pytest.mark.parametrize("kind", ["ragged", "zero", "one_expert", "dense"])
@pytest.mark.parametrize(
    ("m", "experts", "inner", "clusters"),
    [(1, 3, 256, 3), (8, 3, 256, 7), (21, 5, 512, 3), (300, 9, 256, 4), (512, 2, 768, 9)],
)
def test_lists_and_first_activations(m, experts, inner, clusters, kind, scales) -> None:
    """Of both forms, with the counters that the other kernels begin with; what is not to be written stays as it was."""
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(4))
    check(alpha, inner, clusters, scales, "random", m)


def check(alpha: torch.Tensor, inner: int, clusters: int, scales: str, schedule: str, seed: int) -> None:
    """The kernel on fresh activations, with a negative zero in alpha."""
    (m, experts), before = alpha.shape, 5
    a, _ = make_operands(m, 8, experts * inner, seed=3, layout=scales)
    alpha = alpha.clone()
    alpha[0, 1] = -0.0
    tiling = dense_tiling(m, 700, experts * inner, a_swizzled=scales == "128x4", clusters=clusters)
    lists, slots = emulation.lists(alpha), emulation.slots(a, alpha)
    slots[emulation.late(alpha)] = emulation.POISON
    first_acts, counters, _ = emulation.beginning(tiling, a)
    buffers = dict(
        alpha=alpha, a_data=a.data, a_scale=a.scale, counts=torch.full_like(lists[0], 1 << 30),
        token_of=torch.full_like(lists[1], 1 << 30), weight_of=torch.full_like(lists[2], float("nan")),
        alpha_t=torch.full((experts, tiling.columns), float("nan")), gathered=torch.full_like(slots, emulation.POISON),
        first_acts=torch.full_like(first_acts, float("nan")),
        counters=torch.full((before + tiling.counters + 1,), 7, dtype=torch.int32),
    )  # fmt: skip
    integers = (m, experts, inner // 256, before, before + tiling.counters, *tiling.work)
    emulation.launch(ListConfig(scales == "128x4"), buffers, integers, schedule=schedule, seed=seed)
    for name, wanted in zip(("counts", "token_of", "weight_of"), lists):
        assert torch.equal(buffers[name].nan_to_num(-9), wanted.nan_to_num(-9)), name
    assert torch.equal(buffers["alpha_t"][:, :m], alpha.T) and not buffers["alpha_t"][:, m:].any()
    assert torch.equal(buffers["gathered"], slots)
    assert torch.equal(buffers["first_acts"].view(torch.int16), first_acts.view(torch.int16))
    assert buffers["counters"].tolist() == [0] * before + counters.tolist() + [7]
