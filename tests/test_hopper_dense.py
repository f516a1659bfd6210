"""The dense kernel of SM 9.0: its division of the work everywhere, the kernel itself on the emulator."""

from __future__ import annotations

import pytest
import torch

from backends.hopper import dense_plan
from backends.hopper.dense_plan import DecodeConfig, DenseTiling, dense_tiling
from backends.problem import dtype_name
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference

SHAPES = [
    (64, 7168, 65536),
    (128, 7168, 65536),
    (512, 7168, 65536),
    (512, 7168, 768),
    (1, 192, 256),
    (257, 2880, 5 * 512),
]


# ---- the division of the work


@pytest.mark.parametrize("clusters", [1, 3, 7, 66])
@pytest.mark.parametrize("tokens, hidden, k", SHAPES)
def test_every_chunk_of_every_tile_is_computed_once(clusters, tokens, hidden, k):
    tiling = dense_tiling(tokens, hidden, k, clusters=clusters)
    assert tiling.token_tiles * tiling.kernel.tokens >= tokens and tiling.row_tiles * tiling.kernel.rows >= hidden
    computed = torch.zeros(tiling.whole + tiling.streamed, tiling.chunks, dtype=torch.int32)
    for cluster in range(tiling.clusters):
        work = list(_segments(tiling, cluster))
        assert work, "a cluster without work would read what nobody copies"
        for tile, first, last in work:
            computed[tile, first:last] += 1
            if first > 0:
                # The first of a tile finds the others' sums in the order of K, and their work was begun by blocks before.
                owner = tiling.owner((tile - tiling.whole) * tiling.chunks)
                assert 1 <= cluster - owner <= tiling.slots
    assert bool((computed == 1).all())
    lengths = [sum(last - first for _, first, last in _segments(tiling, c)) for c in range(tiling.clusters)]
    assert max(lengths) - min(lengths) <= 1


def _segments(tiling: DenseTiling, cluster: int):
    """(tile, first chunk, end) of a cluster, as the docstring of `DenseTiling` says."""
    for turn in range(tiling.full):
        yield cluster + turn * tiling.clusters, 0, tiling.chunks
    begin, end = tiling.share(cluster)
    while begin < end:
        tile = begin // tiling.chunks
        stop = min(end, (tile + 1) * tiling.chunks)
        yield tiling.whole + tile, begin % tiling.chunks, stop - tile * tiling.chunks
        begin = stop


@pytest.mark.parametrize("tokens", range(16, 513, 16))
def test_tiles_cover_the_tokens_and_shared_memory_fits(tokens):
    kernel = dense_plan.kernel_tile(tokens)
    assert kernel.tokens % 16 == 0 and dense_plan.kernel_tile(tokens - 15) == kernel
    assert 0 <= dense_tiling(tokens, 7168, 65536).columns - tokens < 16 * -(-tokens // dense_plan._WIDEST)
    stage = kernel.cta_rows * 128 // 2 + max(kernel.cta_rows * 16, 4 * kernel.tokens) + kernel.tokens * 256
    # Two are waited for together, and the next two are then on their way.
    assert kernel.stages >= 4 and kernel.stages * (stage + 16) <= 227 * 1024


# ---- the kernels


@pytest.fixture(scope="module")
def emulation():
    pytest.importorskip("cutlass")
    from tests import hopper_emulation

    return hopper_emulation


@pytest.mark.parametrize("scales", ["128x4", "linear"])
@pytest.mark.parametrize("tokens", [5, 130])
def test_decoded_activations(tokens, scales, emulation):
    experts, k = 3, 3 * 256
    a, _ = make_operands(tokens, 8, k, seed=tokens, layout=scales)
    tiling = dense_tiling(tokens, 256, k)
    counts = torch.full((experts,), tokens, dtype=torch.int32)
    acts = torch.full((k // 64 * tiling.columns * 32,), -1, dtype=torch.int32)
    flags = torch.full((tiling.flags + 1,), 7, dtype=torch.int32)
    buffers = dict(a_data=a.data, a_scale=a.scale, counts=counts, acts=acts, flags=flags)
    integers = (tokens, tiling.columns, experts, tiling.chunks, tiling.flags)
    emulation.launch(DecodeConfig(scales == "128x4"), buffers, integers)
    assert torch.equal(acts, emulation.image(a, tiling.columns).view(torch.int32).reshape(-1))
    assert bool((flags[:-1] == 0).all()) and flags[-1] == 7
    # A routed call leaves everything as it is.
    acts.fill_(-1)
    counts.fill_(tokens // 8)
    emulation.launch(DecodeConfig(scales == "128x4"), buffers, integers)
    assert bool((acts == -1).all())


def test_a_scale_factor_that_is_no_number_makes_its_products_none(emulation):
    a, _ = make_operands(8, 8, 256, seed=1, layout="linear")
    a.scale[3, 5] = 0x7F
    acts = torch.zeros(4 * 16, 8, 8, dtype=torch.float16)
    buffers = dict(
        a_data=a.data, a_scale=a.scale, counts=torch.full((1,), 8, dtype=torch.int32), acts=acts,
        flags=torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    emulation.launch(DecodeConfig(False), buffers, (8, 16, 1, 1, 1))
    bad = acts.view(4, 16, 64).isnan().nonzero()
    assert {(q, token) for q, token, _ in bad.tolist()} == {(1, 3)} and len(bad) == 16


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    "m, n, experts, inner, clusters, kind",
    [(40, 500, 2, 512, 3, "dense"), (130, 300, 3, 256, 3, "dense"), (128, 192, 1, 256, 66, "dense"),
     (64, 260, 2, 256, 3, "dense"), (190, 260, 2, 256, 2, "dense"), (350, 200, 5, 256, 2, "dense"), (33, 1000, 3, 256, 2, "ragged")],
)  # fmt: skip
def test_meets_the_bar(m, n, experts, inner, clusters, kind, schedule, emulation):
    a, b = make_operands(m, n, experts * inner, m + n)
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(m))
    tiling = dense_tiling(m, n, experts * inner, clusters=clusters)
    out = emulation.dense(tiling, n, a, b, alpha, schedule=schedule, seed=m)
    assert_meets_bar(out, *reference(a, b, alpha))
    if schedule != "eager":
        assert torch.equal(out, emulation.dense(tiling, n, a, b, alpha)), "the result must not depend on timing"


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
def test_output_types(out_dtype, emulation):
    m, n, experts = 70, 777, 3
    a, b = make_operands(m, n, experts * 256, 9)
    alpha = make_alpha("dense", m, experts, torch.Generator().manual_seed(m))
    tiling = dense_tiling(m, n, experts * 256, dtype_name(out_dtype), 3)
    assert tiling.full == 1 and tiling.streamed == 1, "a tile of its own for each cluster, and one for all three"
    assert_meets_bar(emulation.dense(tiling, n, a, b, alpha, out_dtype), *reference(a, b, alpha))


def test_routed_alpha_is_left_to_the_other_kernel(emulation):
    m, n, experts = 64, 192, 8
    a, b = make_operands(m, n, experts * 256, 5)
    alpha = torch.eye(experts).repeat(m // experts, 1)
    out = emulation.dense(dense_tiling(m, n, experts * 256), n, a, b, alpha)
    assert bool(out.isnan().all()), "nothing may be written where a quarter of alpha or less is nonzero"
