"""The dense kernel of SM 9.0: its division of the work everywhere, the kernel itself on the emulator."""

from __future__ import annotations

import collections

import pytest
import torch

from backends.hopper import dense_plan
from backends.hopper.dense_plan import DenseTiling, dense_tiling
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
    computed = torch.zeros(tiling.full * tiling.clusters + tiling.streamed, tiling.chunks, dtype=torch.int32)
    parts, owners = collections.defaultdict(list), {}
    for cluster in range(tiling.clusters):
        work = list(_segments(tiling, cluster))
        assert work, "a cluster without work would read what nobody copies"
        for tile, first, last in work:
            computed[tile, first:last] += 1
            if first > 0:
                # The first of a tile finds the others' sums in the order of K, and their work was begun by blocks before.
                parts[tile].append((first, cluster))
            elif last < tiling.chunks:
                owners[tile] = cluster
    assert bool((computed == 1).all())
    for tile, waited in parts.items():
        in_order = [cluster for _, cluster in sorted(waited)]
        assert in_order == sorted(in_order) and owners[tile] < in_order[0] and len(in_order) <= tiling.slots
    lengths = [sum(last - first for _, first, last in _segments(tiling, c)) for c in range(tiling.clusters)]
    aligned = tiling.aligned * tiling.streamed
    assert max(lengths[:aligned], default=0) - min(lengths[:aligned], default=0) <= 1
    assert max(lengths[aligned:], default=0) - min(lengths[aligned:], default=0) <= 1
    # Rests are shorter by what going from one to the next costs: less than three chunks each.
    rests = max((len(list(_segments(tiling, c))) for c in range(aligned, tiling.clusters)), default=0)
    assert max(lengths) - min(lengths) <= 1 + 3 * rests


def _segments(tiling: DenseTiling, cluster: int):
    """(tile, first chunk, end) of a cluster, as the docstring of `Shares` says."""
    for turn in range(tiling.full):
        yield cluster + turn * tiling.clusters, 0, tiling.chunks
    if cluster < tiling.aligned * tiling.streamed:
        part, tile = divmod(cluster, tiling.streamed)
        yield tiling.full * tiling.clusters + tile, tiling.bound(part), tiling.bound(part + 1)
        return
    begin, end = tiling.share(cluster - tiling.aligned * tiling.streamed)
    while begin < end:
        tile = begin // tiling.rest
        stop = min(end, (tile + 1) * tiling.rest)
        start = tiling.bound(tiling.aligned) - tile * tiling.rest
        yield tiling.full * tiling.clusters + tile, start + begin, start + stop
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


@pytest.fixture(autouse=True)
def little_ahead(monkeypatch):
    """Small problems leave activations to the dense kernel, too."""
    monkeypatch.setattr(dense_plan, "_AHEAD", 1)


@pytest.mark.parametrize("scales", ["128x4", "linear"])
@pytest.mark.parametrize("tokens, ahead", [(17, 1), (17, 0), (130, 2), (130, 9)])
def test_decoded_activations(tokens, ahead, scales, emulation, monkeypatch):
    """All that are not decoded ahead, and no others."""
    monkeypatch.setattr(dense_plan, "_AHEAD", ahead)
    experts, k = 3, 3 * 256
    a, b = make_operands(tokens, 300, k, seed=tokens, layout=scales)
    tiling = dense_tiling(tokens, 300, k, a_swizzled=scales == "128x4", clusters=2)
    alpha = make_alpha("dense", tokens, experts, torch.Generator().manual_seed(1))
    out, acts = emulation.dense(tiling, 300, a, b, alpha)
    expected = emulation.image(a, tiling.columns).view(tiling.chunks, -1)
    places = emulation.beginning(tiling, a)[2]
    assert bool(places) == (ahead > 0) and (len(places) == 3) == (ahead == 9), "of three chunks"
    expected[list(places)] = float("nan")
    assert torch.equal(acts.view(torch.int16), expected.view(torch.int16).reshape(acts.shape))
    assert_meets_bar(out, *reference(a, b, alpha))


def test_a_scale_factor_that_is_no_number_makes_its_products_none(emulation, monkeypatch):
    monkeypatch.setattr(dense_plan, "_AHEAD", 0)
    a, b = make_operands(8, 64, 256, seed=1, layout="linear")
    a.scale[3, 5] = 0x7F
    out, acts = emulation.dense(dense_tiling(8, 64, 256, a_swizzled=False), 64, a, b, torch.ones(8, 1))
    bad = acts.view(4, 16, 64).isnan().nonzero()
    assert {(q, token) for q, token, _ in bad.tolist()} == {(1, 3)} and len(bad) == 16
    assert out.isnan().all(1).tolist() == [token == 3 for token in range(8)]


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
    out, _ = emulation.dense(tiling, n, a, b, alpha, schedule=schedule, seed=m)
    assert_meets_bar(out, *reference(a, b, alpha))
    if schedule != "eager":
        assert torch.equal(out, emulation.dense(tiling, n, a, b, alpha)[0]), "the result must not depend on timing"


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
def test_output_types(out_dtype, emulation):
    m, n, experts = 70, 777, 3
    a, b = make_operands(m, n, experts * 256, 9)
    alpha = make_alpha("dense", m, experts, torch.Generator().manual_seed(m))
    tiling = dense_tiling(m, n, experts * 256, dtype_name(out_dtype), clusters=3)
    assert tiling.full == 1 and tiling.streamed == 1, "a tile of its own for each cluster, and one for all three"
    assert_meets_bar(emulation.dense(tiling, n, a, b, alpha, out_dtype)[0], *reference(a, b, alpha))


def test_routed_alpha_is_left_to_the_other_kernel(emulation):
    m, n, experts = 64, 192, 8
    a, b = make_operands(m, n, experts * 256, 5)
    alpha = torch.eye(experts).repeat(m // experts, 1)
    out, acts = emulation.dense(dense_tiling(m, n, experts * 256), n, a, b, alpha)
    assert bool(out.isnan().all() & acts.isnan().all()), (
        "nothing may be written where a quarter of alpha or less is nonzero"
    )
