"""The kernel that lists and gathers tokens on SM 9.0, on the emulator, against the same by definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass")
pytest.importorskip("triton")

from backends.hopper.tactic import ListConfig
from tests import hopper_emulation as emulation
from tests.reference import make_alpha, make_operands


@pytest.mark.parametrize("scales", ["128x4", "linear"])
@pytest.mark.parametrize("kind", ["ragged", "zero", "one_expert", "dense"])
@pytest.mark.parametrize(("m", "experts", "inner"), [(1, 3, 256), (8, 3, 256), (21, 5, 512), (300, 9, 256), (512, 2, 768)])
def test_lists_and_slots(m, experts, inner, kind, scales) -> None:
    """Counters are reset; what is not to be written stays as it was."""
    k, columns, zeros = experts * inner, m + 7, 1000
    a, _ = make_operands(m, 8, k, seed=3, layout=scales)
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(4))
    alpha[0, 1] = -0.0
    lists, slots = emulation.lists(alpha), emulation.slots(a, alpha)
    slots[emulation.late(alpha)] = -7
    buffers = dict(
        alpha=alpha, a_data=a.data, a_scale=a.scale, counts=torch.full_like(lists[0], 1 << 30),
        token_of=torch.full_like(lists[1], 1 << 30), weight_of=torch.full_like(lists[2], float("nan")),
        alpha_t=torch.full((experts, columns), float("nan")), gathered=torch.full_like(slots, -7),
        counters=torch.full((zeros + 1,), 7, dtype=torch.int32),
    )  # fmt: skip
    integers = (m, experts, inner // 256, columns, zeros)
    emulation.launch(ListConfig(scales == "128x4"), buffers, integers, schedule="random", seed=m)
    for name, wanted in zip(("counts", "token_of", "weight_of"), lists):
        assert torch.equal(buffers[name].nan_to_num(-9), wanted.nan_to_num(-9)), name
    assert torch.equal(buffers["alpha_t"][:, :m], alpha.T) and not buffers["alpha_t"][:, m:].any()
    assert torch.equal(buffers["gathered"], slots)
    assert not buffers["counters"][:zeros].any() and buffers["counters"][zeros] == 7
