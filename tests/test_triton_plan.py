"""The kernels that list and gather tokens, under the interpreter, against the same by definition."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from tests.reference import make_alpha, make_operands

pytest.importorskip("triton")
pytest.importorskip("cutlass")


def test_lists_and_slots():
    """As the streaming kernel of the "hopper" backend takes them, with counters of the kernels that follow at zero.

    In a process of its own: Triton's library decides when it is imported whether to be interpreted.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", __name__], env=environment, check=True, timeout=300)


def check(kind: str, layout: str) -> None:
    from backends.triton import plan
    from tests import hopper_emulation as emulation

    tokens, experts, inner, columns = 21, 5, 512, 32
    a, _ = make_operands(tokens, 8, experts * inner, seed=3, layout=layout)
    alpha = make_alpha(kind, tokens, experts, torch.Generator().manual_seed(4))
    wide = 32
    counts = torch.full((experts,), -1, dtype=torch.int32)
    token_of = torch.full((experts, wide), 1 << 30, dtype=torch.int32)
    weight_of = torch.full((experts, wide), float("nan"))
    alpha_t = torch.full((experts, columns), float("nan"))
    counters = torch.full((1000,), 7, dtype=torch.int32)
    plan.list_tokens[(experts,)](
        alpha,
        counts,
        token_of,
        weight_of,
        alpha_t,
        counters,
        tokens,
        columns,
        999,
        EXPERTS=experts,
        BLOCK=128,
        OVERLAP=False,
    )
    expected = emulation.lists(alpha)
    for got, wanted in zip((counts, token_of, weight_of), expected):
        assert torch.equal(got.nan_to_num(-9), wanted.nan_to_num(-9)), "what is not written stays as it was"
    assert torch.equal(alpha_t[:, :tokens], alpha.T) and not alpha_t[:, tokens:].any()
    assert not counters[:999].any() and counters[999] == 7

    wanted = emulation.gathered(a, *expected, experts)
    gathered = torch.full_like(wanted, -5)
    plan.gather_tokens[(experts, 2)](
        a.data.view(torch.int32), a.scale, counts, token_of, weight_of, gathered, tokens,
        EXPERTS=experts, EXPERTS_PADDED=8, INNER=inner, A_SWIZZLED=layout == "128x4", ROWS=8, LISTED=True,
        HAS_DENSE=False, OVERLAP=False,
    )  # fmt: skip
    for e in range(experts):
        for group in range(-(-int(counts[e]) // 8)):
            present = min(int(counts[e]) - 8 * group, 8)
            words = 16 + 128 * present
            assert torch.equal(gathered[e, group, :, :words], wanted[e, group, :, :words])
            assert bool((gathered[e, group, :, words:] == -5).all()), "padding tokens are not written"
        assert bool((gathered[e, -(-int(counts[e]) // 8) :] == -5).all())


if __name__ == "__main__":
    for case in itertools.product(("ragged", "zero", "one_expert"), ("128x4", "linear")):
        check(*case)
