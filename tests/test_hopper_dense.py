"""The dense kernel of SM 9.0: its division of the work everywhere, the kernel itself on the emulator."""
from __future__ import annotations

import functools

import pytest
import torch

from backends.hopper import dense_plan
from backends.hopper.dense_plan import CHUNK, DenseKernelTile, DenseTiling, dense_tiling
from backends.triton import layout
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference

SHAPES = [(64, 7168, 65536), (128, 7168, 65536), (512, 7168, 65536), (512, 7168, 768), (1, 192, 256), (257, 2880, 5 * 512)]


# ---- the division of the work


@pytest.mark.parametrize("clusters", [1, 3, 7, 66])
@pytest.mark.parametrize("tokens, hidden, k", SHAPES)
def test_every_chunk_of_every_tile_is_computed_once(clusters, tokens, hidden, k):
    tiling = dense_tiling(tokens, hidden, k, clusters)
    assert tiling.token_tiles * tiling.kernel.tokens >= tokens and tiling.row_tiles * tiling.kernel.rows >= hidden
    computed = torch.zeros(tiling.whole + tiling.streamed, tiling.chunks, dtype=torch.int32)
    parts = set()
    for cluster in range(tiling.clusters):
        work = list(_segments(tiling, cluster))
        assert work, "a cluster without work would read what nobody copies"
        for tile, first, last, part in work:
            computed[tile, first:last] += 1
            assert part not in parts and 0 <= part < tiling.whole + tiling.streamed * tiling.slots
            parts.add(part)
    assert bool((computed == 1).all())
    lengths = [sum(last - first for _, first, last, _ in _segments(tiling, c)) for c in range(tiling.clusters)]
    assert max(lengths) - min(lengths) <= 1


def _segments(tiling: DenseTiling, cluster: int):
    """(tile, first chunk, end, part) of a cluster, as the docstring of `DenseTiling` says."""
    for turn in range(tiling.full):
        tile = cluster + turn * tiling.clusters
        yield tile, 0, tiling.chunks, tile
    begin, end = tiling.share(cluster)
    while begin < end:
        tile = begin // tiling.chunks
        stop = min(end, (tile + 1) * tiling.chunks)
        slot = cluster - tiling.owner(tile * tiling.chunks)
        yield tiling.whole + tile, begin % tiling.chunks, stop - tile * tiling.chunks, tiling.whole + tile * tiling.slots + slot
        begin = stop


@pytest.mark.parametrize("tokens", range(16, 513, 16))
def test_tiles_cover_the_tokens_and_shared_memory_fits(tokens):
    kernel = dense_plan.kernel_tile(tokens)
    assert kernel.tokens % 16 == 0 and dense_plan.kernel_tile(tokens - 15) == kernel
    assert 0 <= dense_tiling(tokens, 7168, 65536).columns - tokens < 16 * -(-tokens // dense_plan._WIDEST)
    weights = kernel.weight_chunks * (kernel.cta_rows * CHUNK * 9 // 16 + 4 * kernel.tokens)
    activations = kernel.act_slots * 128 * kernel.tokens
    barriers = 16 * (kernel.weight_chunks + kernel.act_slots)
    assert weights + activations + barriers <= 227 * 1024


# ---- the kernel


def _image(a, columns: int) -> torch.Tensor:
    """Activations as `DenseKernel` takes them: float16 [K/64, columns, 64], by the definition."""
    tokens, k = a.shape
    plain = a.dequantize().view(tokens, k // 64, 4, 16)  # token, slice, lane t, value
    image = torch.zeros(k // 64, columns, 8, 8, dtype=torch.float16)
    for unit in range(8):
        first = 8 * (unit // 4) + unit % 4
        pair = plain[:, :, :, [first, first + 4]].reshape(tokens, k // 64, 8) / 256
        for token in range(tokens):
            image[:, token, unit ^ token % 8] = pair[token].half()
    return image


@functools.lru_cache(maxsize=None)
def _compiled(kernel: DenseKernelTile):
    cutlass = pytest.importorskip("cutlass")
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream, make_ptr

    from backends.hopper.dense import DenseKernel
    from tests.emulator import compile_target

    instance = DenseKernel(kernel)
    pointers = [make_ptr(t, 0, cute.AddressSpace.gmem, assumed_align=align) for t, align in instance.pointers]
    integers = [cutlass.Int32(0)] * instance.INTEGERS
    with compile_target("sm_90a"):
        return instance, cute.compile(instance, *pointers, *integers, make_fake_stream())


def _emulate(tiling: DenseTiling, hidden: int, a, b, alpha: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out in float32, the kernel's part sums)."""
    cutlass = pytest.importorskip("cutlass")
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_ptr

    from tests.emulator import emulate

    (tokens, k), experts, tile = a.shape, alpha.shape[1], tiling.kernel
    prepared = layout.prepare(b)
    alpha_t = torch.zeros(experts, tiling.columns)
    alpha_t[:, :tokens] = alpha.T
    parts = torch.full((tiling.whole + tiling.streamed * tiling.slots, tile.tokens, tile.rows), float("nan"))
    counts = (alpha != 0).sum(0).int()
    buffers = dict(
        acts=_image(a, tiling.columns), w_data=prepared.data, w_scale=prepared.scale, alpha_t=alpha_t, counts=counts,
        parts=parts,
    )  # fmt: skip
    instance, function = _compiled(tile)
    pointers = [
        make_ptr(t, tensor.data_ptr(), cute.AddressSpace.gmem, assumed_align=align)
        for (t, align), tensor in zip(instance.pointers, buffers.values())
    ]
    integers = tiling.integers(tokens, hidden, experts, k)
    assert len(integers) == instance.INTEGERS
    emulate(function, *pointers, *map(cutlass.Int32, integers), 0, buffers=buffers, **options)
    out = torch.zeros(tiling.columns, tiling.row_tiles * tile.rows)
    for cluster in range(tiling.clusters):
        for number, _, _, part in _segments(tiling, cluster):
            column, row = number // tiling.row_tiles * tile.tokens, number % tiling.row_tiles * tile.rows
            out[column : column + tile.tokens, row : row + tile.rows] += parts[part] * 65536
    return out[:tokens, :hidden], parts


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    "m, n, experts, inner, clusters, kind",
    [(40, 500, 2, 512, 3, "dense"), (130, 300, 3, 256, 3, "dense"), (128, 192, 1, 256, 66, "dense"),
     (64, 260, 2, 256, 3, "dense"), (190, 260, 2, 256, 2, "dense"), (350, 200, 5, 256, 2, "dense"), (33, 1000, 3, 256, 2, "ragged")],
)  # fmt: skip
def test_meets_the_bar(m, n, experts, inner, clusters, kind, schedule):
    a, b = make_operands(m, n, experts * inner, m + n)
    alpha = make_alpha(kind, m, experts, torch.Generator().manual_seed(m))
    tiling = dense_tiling(m, n, experts * inner, clusters)
    out, parts = _emulate(tiling, n, a, b, alpha, schedule=schedule, seed=m)
    assert_meets_bar(out, *reference(a, b, alpha))
    if schedule != "eager":
        assert torch.equal(parts, _emulate(tiling, n, a, b, alpha)[1]), "the result must not depend on timing"


def test_routed_alpha_is_left_to_the_other_kernel():
    m, n, experts = 64, 192, 8
    a, b = make_operands(m, n, experts * 256, 5)
    alpha = torch.eye(experts).repeat(m // experts, 1)
    _, parts = _emulate(dense_tiling(m, n, experts * 256), n, a, b, alpha)
    assert bool(parts.isnan().all()), "nothing may be written where a quarter of alpha or less is nonzero"
