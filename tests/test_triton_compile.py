"""Every tactic compiles for SM 8.0, 9.0 and 10.0 without a GPU, and its machine code is what it is meant to be."""
from __future__ import annotations

import pytest

pytest.importorskip("triton")

from backends import Fc2Problem  # noqa: E402
from backends.triton import tactic as rules  # noqa: E402
from backends.triton.offline import compile_for  # noqa: E402


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_every_tactic_compiles(capability):
    problem = Fc2Problem(24, 7168, 65536, 256, capability=capability)
    for tactic in rules.tactics(problem):
        for name, kernel in compile_for(problem, tactic, capability).items():
            ptx = kernel.asm["ptx"]
            assert f".target sm_{capability[0] * 10 + capability[1]}" in ptx
            assert ".local" not in ptx, (tactic, name)
            if name == "fc2_tiled":
                assert "mma" in ptx, tactic
