"""Every tactic compiles for SM 8.0, 9.0 and 10.0 without a GPU, and its machine code is what it is meant to be."""
from __future__ import annotations

import pytest

pytest.importorskip("triton")

from backends import Fc2Problem  # noqa: E402
from backends.triton import tactic as rules  # noqa: E402
from backends.triton.offline import compile_for  # noqa: E402
from bench import hopper_sass  # noqa: E402

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
#: The kernels that multiply, and the tensor core instruction each is written for.
MULTIPLIES = {"fc2_tiled": "mma", "fc2_few": "mma.sync", "fc2_routed": "mma.sync", "fc2_warpgroup": "wgmma"}


def _check(problem, capability):
    tactics = rules.tactics(problem)
    assert rules.default_tactic(problem) in tactics
    for tactic in tactics:
        for name, kernel in compile_for(problem, tactic, capability).items():
            ptx = kernel.asm["ptx"]
            assert f".target sm_{capability[0] * 10 + capability[1]}" in ptx
            assert ".local" not in ptx, (tactic, name)
            assert MULTIPLIES.get(name, "") in ptx, (tactic, name)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_tiled_tactic_compiles(capability):
    _check(Fc2Problem(24, 7168, 65536, 256, capability=capability), capability)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("m", [8, 24])
def test_every_tactic_for_prepared_weights_compiles(capability, m):
    _check(Fc2Problem(m, 7168, 65536, 256, b_layout=rules.PREPARED, capability=capability), capability)


def test_wide_experts_compile():
    """Experts of several 256-value chunks, linear scale factors, an odd number of experts."""
    problem = Fc2Problem(24, 7168, 257 * 512, 257, a_layout="linear", b_layout=rules.PREPARED, capability=(9, 0))
    assert set(compile_for(problem, rules.default_tactic(problem), (9, 0))) >= {"list_tokens", "gather_tokens", "fc2_routed", "finish"}


@pytest.mark.parametrize("m", [16, 32, 64])
def test_the_dense_kernel_hardly_spills(m):
    """The order in which a word's fields are decoded once made it 357 accesses of local memory at 32 tokens."""
    problem = Fc2Problem(m, 7168, 65536, 256, b_layout=rules.PREPARED, capability=(9, 0))
    kernels = hopper_sass.triton_kernels(problem, (9, 0))
    name, tactic, cubin, words = next(found for found in kernels if found[0] == "fc2_warpgroup")
    assert hopper_sass.describe(name, tactic, cubin, words)["LDL/STL"] <= 8
