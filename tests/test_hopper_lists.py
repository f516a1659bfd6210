"""The kernel that lists tokens on SM 9.0, on the emulator, against the same by definition."""

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
    [(1, 3, 256, 3), (21, 5, 512, 3), (40, 9, 256, 2), (300, 17, 256, 4)],  # with and without stretches of K walked at once
)
def test_lists_and_first_activations(m, experts, inner, clusters, kind, scales) -> None:
    """Counters of the kernels that follow are reset; what is not to be written stays as it was."""
    a, _ = make_operands(m, 8, experts * inner, seed=3, layout=scales)
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(4))
    alpha[0, 1] = -0.0
    tiling = dense_tiling(m, 700, experts * inner, a_swizzled=scales == "128x4", clusters=clusters)
    assert tiling.ahead > 0
    before, expected = 5, emulation.lists(alpha)
    buffers = dict(
        alpha=alpha, a_data=a.data, a_scale=a.scale, counts=torch.full_like(expected[0], 1 << 30),
        token_of=torch.full_like(expected[1], 1 << 30), weight_of=torch.full_like(expected[2], float("nan")),
        alpha_t=torch.full((experts, tiling.columns), float("nan")),
        acts=torch.full((experts * inner // 64, tiling.columns, 8, 8), float("nan"), dtype=torch.float16),
        counters=torch.full((before + tiling.counters + 1,), 7, dtype=torch.int32),
    )  # fmt: skip
    emulation.launch(
        ListConfig(scales == "128x4"), buffers, (m, experts, before, before + tiling.counters, *tiling.work),
        schedule="random", seed=m,
    )  # fmt: skip
    for name, wanted in zip(("counts", "token_of", "weight_of"), expected):
        assert torch.equal(buffers[name].nan_to_num(-9), wanted.nan_to_num(-9)), name
    assert torch.equal(buffers["alpha_t"][:, :m], alpha.T) and not buffers["alpha_t"][:, m:].any()
    acts, counters = emulation.beginning(tiling, a)
    assert torch.equal(buffers["acts"].view(torch.int16), acts.view(torch.int16))
    assert buffers["counters"].tolist() == [0] * before + counters.tolist() + [7]
