"""Prepared weights of the Triton backend: the permutation everywhere, the kernels that read it on CUDA."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import dispatch
from backends import DeviceInfo, Fc2Problem, Nvfp4Tensor
from backends.triton import layout
from backends.triton.backend import TritonBackend
from backends.triton.tactic import (
    PREPARED,
    TritonTactic,
    can_implement,
    default_tactic,
    dense_tiling,
    specialization,
    tactics,
)
from tests.reference import ALPHA_KINDS, assert_meets_bar, make_alpha, make_operands, reference

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# ---- the permutation, on any device


@pytest.mark.parametrize("scale_layout", ["128x4", "linear"])
@pytest.mark.parametrize("rows", [1, 33, 128, 600])
def test_prepare_round_trips(rows, scale_layout):
    _, b = make_operands(1, rows, 512, 1, scale_layout)
    b.data.random_(0, 256)
    prepared = TritonBackend().prepare(b)
    assert prepared.layout == PREPARED and prepared.shape == b.shape
    back = TritonBackend().unprepare(prepared)
    assert back.layout == "128x4"
    assert torch.equal(back.data, b.data)
    assert torch.equal(back.to_layout("linear").scale, b.to_layout("linear").scale)


def test_every_scale_byte_round_trips():
    """All 127 non-negative finite e4m3 values, subnormals included, and NaN."""
    scale = torch.arange(128, dtype=torch.uint8).repeat(32, 1)
    b = Nvfp4Tensor(torch.zeros((32, 1024), dtype=torch.uint8), scale, "linear")
    assert torch.equal(layout.unprepare(layout.prepare(b)).to_layout("linear").scale, scale)


def test_global_scale_is_kept():
    _, b = make_operands(1, 32, 256, 2)
    factor = torch.tensor([0.5])
    b = Nvfp4Tensor(b.data, b.scale, b.layout, factor)
    assert layout.prepare(b).global_scale is factor
    assert layout.unprepare(layout.prepare(b)).global_scale is factor


def test_size_is_that_of_the_plain_form():
    _, b = make_operands(1, 256, 512, 3)
    assert layout.prepare(b).nbytes == b.nbytes == 256 * 512 * 9 // 16


@pytest.mark.parametrize("scale_layout", ["128x4", "linear"])
def test_prepare_in_place_writes_into_the_same_memory(scale_layout):
    _, b = make_operands(1, 640, 512, 7, scale_layout)
    expected = layout.prepare(b)
    kind, addresses = b.kind, (b.data.data_ptr(), b.scale.data_ptr())
    prepared = TritonBackend().prepare(b, in_place=True)
    assert torch.equal(prepared.data, expected.data) and torch.equal(prepared.scale, expected.scale)
    assert (prepared.data.data_ptr(), prepared.scale.data_ptr()) == addresses
    assert b.shape == (0, 512) and b.kind != kind and prepared.shape == (640, 512)
    a, _ = make_operands(1, 640, 512, 8)
    with pytest.raises(dispatch.ArgumentError, match="prepared in place"):
        dispatch.fc2(a, b, torch.ones(1, 2))


def test_prepare_in_place_needs_whole_blocks_of_rows():
    _, b = make_operands(1, 200, 512, 9)
    with pytest.raises(ValueError, match="N = 200; in_place needs a multiple of 128"):
        TritonBackend().prepare(b, in_place=True)
    assert b.shape == (200, 512)


def test_negative_scale_factors_are_refused():
    _, b = make_operands(1, 32, 256, 4, "linear")
    b.scale[3, 5] = 0x81
    with pytest.raises(ValueError, match="negative scale factors"):
        TritonBackend().prepare(b)


def test_other_k_stay_plain():
    _, b = make_operands(1, 32, 128, 5)
    assert TritonBackend().prepare(b) is b
    assert TritonBackend().unprepare(b) is b


def test_words_decode_as_the_kernels_do():
    """The masks and shifts of `fragments.py`, done by hand, give every value where the kernels expect it."""
    rows, k = 70, 512
    _, b = make_operands(1, rows, k, 6)
    p = layout.prepare(b)
    words = p.data.view(torch.int32).numpy().view(np.uint32).astype(np.uint64)  # chunk block quarter half lane step
    factors = p.scale.view(torch.int32).numpy().view(np.uint32).astype(np.uint64)  # chunk block lane quarter
    mask, low32 = np.uint64(0x8E008E00), np.uint64(0xFFFFFFFF)
    registers = [
        words & mask,
        (words << np.uint64(3)) & mask,
        (words << np.uint64(7) ^ words << np.uint64(10)) & mask,
        (words << np.uint64(7) ^ words << np.uint64(12) ^ words >> np.uint64(20)) & mask,
    ]
    values = np.zeros((words.shape[1] * 32, k))
    chunk, block, quarter, half, lane, step = np.indices(words.shape)
    for register, bits in enumerate(registers):
        for side in range(2):
            code = ((bits >> np.uint64(16 * side)) & np.uint64(0xFFFF)).astype(np.uint16).view(np.float16)
            scale = factors[chunk, block, lane, quarter]
            turned = np.where(half == 1, (scale << np.uint64(8) | scale >> np.uint64(24)) & low32, scale) & np.uint64(0x7F807F80)
            row8 = register % 2
            unit = ((turned >> np.uint64(16 * row8)) & np.uint64(0xFFFF)).astype(np.uint16).view(np.float16)
            row = block * 32 + half * 16 + row8 * 8 + lane // 4
            column = chunk * 256 + quarter * 64 + lane % 4 * 16 + step // 2 * 8 + step % 2 * 2 + register // 2 + 4 * side
            values[row, column] = code.astype(np.float64) * unit.astype(np.float64) * 256
    assert np.array_equal(values[:rows], b.dequantize().double().numpy())
    assert not values[rows:].any()


# ---- the rules


def _problem(m=4, n=192, experts=3, inner=256, **changes):
    fields = dict(b_layout=PREPARED, capability=(9, 0)) | changes
    return Fc2Problem(m, n, experts * inner, experts, **fields)


@pytest.mark.parametrize("m", [1, 8, 9, 128, 129, 512, 4096])
def test_default_can_run(m):
    problem = _problem(m)
    assert can_implement(problem, default_tactic(problem))
    assert default_tactic(problem).form == ("few" if m <= 8 else "gathered")
    assert default_tactic(problem) in tactics(problem)


def test_token_counts_share_kernels():
    tactic = default_tactic(_problem(300))
    same = {specialization(_problem(m, n=7168), tactic) for m in range(65, 129)}
    assert len(same) == 1
    assert specialization(_problem(1300, n=7168), tactic) != same.pop()


@pytest.mark.parametrize("tokens", [9, 16, 17, 64, 65, 200, 512])
@pytest.mark.parametrize("hidden", [72, 192, 7168])
def test_dense_units_fit_their_slots(tokens, hidden):
    """Every tile's units fall to at most `slots` programs, and all units to some program."""
    tiling = dense_tiling(tokens, hidden, 20 * 256)
    units = tiling.tiles * 20
    owner = [((unit + 1) * tiling.programs - 1) // units for unit in range(units)]
    for program in range(tiling.programs):
        share = range(program * units // tiling.programs, (program + 1) * units // tiling.programs)
        assert all(owner[unit] == program for unit in share)
    for tile in range(tiling.tiles):
        assert owner[tile * 20 + 19] - owner[tile * 20] < tiling.slots
    assert tiling.tokens * tiling.token_tiles >= tokens


@pytest.mark.parametrize(
    ("problem", "tactic", "reason"),
    [
        (_problem(9), TritonTactic("few", 64, 8, 256, 1, 16, 2), "M is 9"),
        (_problem(), TritonTactic("few", 64, 8, 128, 1, 16, 2), "block_k is 128"),
        (_problem(), TritonTactic("few", 128, 8, 256, 1, 16, 2), "block_n is 128"),
        (_problem(), TritonTactic("few", 64, 8, 256, 1, 2, 2), "num_warps is 2"),
        (_problem(), TritonTactic("few", 64, 8, 256, 1, 16, 9), "num_stages is 9"),
        (_problem(), TritonTactic("few", 64, 16, 256, 1, 16, 2), "block_m, split are 16, 1"),
        (_problem(), TritonTactic("gathered", 64, 32, 256, 4, 4, 1), "block_m is 32"),
        (_problem(), TritonTactic("gathered", 64, 8, 256, 4, 8, 1), "block_n, num_warps are 64, 8"),
        (_problem(), TritonTactic("gathered", 64, 8, 256, 9, 4, 1), "split is 9"),
        (_problem(), TritonTactic("gathered", 64, 8, 256, 4, 4, 3), "num_stages is 3; form 'gathered' takes 1"),
        (_problem(inner=384), TritonTactic("few", 64, 8, 256, 1, 16, 2), "multiples of 256"),
        (_problem(b_layout="128x4"), TritonTactic("few", 64, 8, 256, 1, 16, 2), "from prepare(b)"),
        (_problem(device_type="cpu", capability=None), TritonTactic("few", 64, 8, 256, 1, 16, 2), "NVIDIA GPUs"),
        (_problem(), TritonTactic(), "unprepare(b)"),
    ],
    ids=str,
)
def test_rejections_say_why(problem, tactic, reason):
    support = can_implement(problem, tactic)
    assert not support and reason in support.reason


# ---- the kernels


def _run(tactic, a, b, alpha, out_dtype=torch.bfloat16):
    backend = TritonBackend()
    m, n, k, experts = a.shape[0], b.shape[0], a.shape[1], alpha.shape[1]
    prepared = backend.prepare(b)
    problem = Fc2Problem(
        m, n, k, experts, out_dtype, a.layout, prepared.layout, "cuda", DeviceInfo.of("cuda").capability
    )
    tactic = tactic or backend.default_tactic(problem)
    support = backend.can_implement(problem, tactic)
    assert support, support.reason
    out = torch.full((m, n), float("nan"), dtype=out_dtype, device="cuda")
    backend.run(problem, tactic, a, prepared, alpha.cuda(), out)
    again = torch.full_like(out, 1.0)
    backend.run(problem, tactic, a, prepared, alpha.cuda(), again)
    assert torch.equal(out, again)
    return out


@needs_cuda
@pytest.mark.parametrize("layouts", ["128x4", "linear"])
@pytest.mark.parametrize(("n", "experts", "inner"), [(192, 3, 256), (8000, 1, 512), (72, 257, 256)], ids=str)
def test_kernels_meet_the_bar(n, experts, inner, layouts):
    generator = torch.Generator().manual_seed(7)
    a_all, b = make_operands(512, n, experts * inner, 8, layouts, "cuda")
    for m in (1, 7, 8, 9, 127, 128, 129, 200, 512):
        a = _rows(a_all, m)
        for kind in ALPHA_KINDS:
            alpha = make_alpha(kind, m, experts, generator)
            assert_meets_bar(_run(None, a, b, alpha), *reference(a, b, alpha.cuda()))


def _rows(x, count):
    linear = x.to_layout("linear")
    part = Nvfp4Tensor(linear.data[:count].contiguous(), linear.scale[:count].contiguous(), "linear")
    return part.to_layout(x.layout)


@needs_cuda
@pytest.mark.parametrize("m", [5, 100])
def test_every_tactic_meets_the_bar(m):
    generator = torch.Generator().manual_seed(9)
    a, b = make_operands(m, 320, 40 * 256, 10, "128x4", "cuda")
    problem = Fc2Problem(m, 320, 40 * 256, 40, b_layout=PREPARED, capability=DeviceInfo.of("cuda").capability)
    for kind in ("top_k", "dense", "one_expert"):
        alpha = make_alpha(kind, m, 40, generator)
        expected = reference(a, b, alpha.cuda())
        for tactic in tactics(problem):
            for out_dtype in (torch.bfloat16, torch.float32, torch.float16):
                scaled = alpha / 64 if out_dtype == torch.float16 else alpha
                target = reference(a, b, scaled.cuda()) if out_dtype == torch.float16 else expected
                assert_meets_bar(_run(tactic, a, b, scaled, out_dtype), *target)


@needs_cuda
@pytest.mark.parametrize("m", [3, 40])
def test_graph_replays_follow_alpha(m):
    """One captured graph serves routed, dense and empty alpha, written into the same tensor between replays."""
    generator = torch.Generator().manual_seed(11)
    a, b = make_operands(m, 192, 20 * 256, 12, "128x4", "cuda")
    backend = TritonBackend()
    prepared = backend.prepare(b)
    problem = Fc2Problem(m, 192, 20 * 256, 20, b_layout=PREPARED, capability=DeviceInfo.of("cuda").capability)
    alpha = make_alpha("dense", m, 20, generator).cuda()
    out = torch.empty((m, 192), dtype=torch.bfloat16, device="cuda")
    tactic = default_tactic(problem)
    backend.compile(problem, tactic)
    assert backend.is_compiled(problem, tactic)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.run(problem, tactic, a, prepared, alpha, out)
    for kind in ("top_k", "dense", "zero", "one_expert", "one_hot"):
        alpha.copy_(make_alpha(kind, m, 20, generator))
        out.fill_(float("nan"))
        graph.replay()
        assert_meets_bar(out, *reference(a, b, alpha))


@needs_cuda
def test_more_tokens_than_a_pass():
    a, b = make_operands(700, 128, 4 * 256, 13, "128x4", "cuda")
    alpha = make_alpha("top_k", 700, 4, torch.Generator().manual_seed(14))
    assert_meets_bar(_run(None, a, b, alpha), *reference(a, b, alpha.cuda()))
