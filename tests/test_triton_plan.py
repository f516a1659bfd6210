"""The Triton kernels that list and gather tokens, under the interpreter, against the same by definition."""

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
    """In a process of its own: Triton's library decides when it is imported whether to be interpreted.
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
    plan.list_tokens[(experts,)](
        alpha, counts, token_of, weight_of, alpha_t, tokens, columns, EXPERTS=experts, BLOCK=128, OVERLAP=False
    )  # fmt: skip
    for e in range(experts):
        chosen = alpha[:, e].nonzero().flatten()
        count, padded = len(chosen), -(-len(chosen) // 16) * 16
        assert counts[e] == count and token_of[e, :count].tolist() == chosen.tolist()
        assert torch.equal(weight_of[e, :count], alpha[chosen, e]) and bool((token_of[e, count:padded] == -1).all())
        assert bool((token_of[e, padded:] == 1 << 30).all()) and bool(weight_of[e, count:].isnan().all())
    assert torch.equal(alpha_t[:, :tokens], alpha.T) and not alpha_t[:, tokens:].any()

    # The slots that the "hopper" backend's own kernel makes, less their lists and the places of the pieces.
    wanted = emulation.slots(a, alpha)
    gathered = torch.full((*wanted.shape[:3], 8, 8, 16), emulation.POISON, dtype=torch.int32)  # ... piece token word
    plan.gather_tokens[(experts, 2)](
        a.data.view(torch.int32), a.scale, counts, token_of, gathered, tokens,
        EXPERTS=experts, EXPERTS_PADDED=8, INNER=inner, A_SWIZZLED=layout == "128x4", ROWS=8, HAS_DENSE=False, OVERLAP=False,
    )  # fmt: skip
    pieces = wanted[..., 16:].view(*wanted.shape[:3], 8, 8, 16)
    for token in range(8):
        for piece in range(8):
            assert torch.equal(gathered[..., piece, token, :], pieces[..., token, piece ^ token % 2, :])


if __name__ == "__main__":
    for case in itertools.product(("ragged", "zero", "one_expert"), ("128x4", "linear")):
        check(*case)
