"""The Hopper backend without a GPU: its rules, and the small kernels around its main ones, emulated from their PTX."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import backends
from backends import DeviceInfo, Fc2Problem
from backends.hopper import tactic as rules
from backends.hopper.dense_plan import dense_tiling
from backends.hopper.stream_plan import SMEM_BYTES
from backends.hopper.tactic import PASS_TOKENS, HopperTactic, stream_config
from backends.triton.tactic import PREPARED
from tests.reference import make_operands

TARGET = Fc2Problem(128, 7168, 65536, 256, b_layout=PREPARED, capability=(9, 0))


@pytest.mark.parametrize(
    "problem, tactic, reason",
    [
        (replace(TARGET, b_layout="128x4"), HopperTactic(), "it reads weights from prepare"),
        (replace(TARGET, capability=(8, 0)), HopperTactic(), "machine code for SM 9.0"),
        (replace(TARGET, experts=512), HopperTactic(), "K / E = 65536/512 is not a multiple of 256"),
        (TARGET, HopperTactic(rows=48), "rows is 48; it takes 32 or 64"),
        (TARGET, HopperTactic(phases=9), "phases is 9"),
        (TARGET, HopperTactic(slots=3), "slots is 3; it takes 4 to"),
        (TARGET, HopperTactic(cluster=4), "cluster is 4; it takes 1 or 2"),
        (replace(TARGET, k=256 * 40000, experts=40000), HopperTactic(), "E is 40000"),
    ],
)
def test_each_broken_rule_has_its_reason(problem, tactic, reason):
    support = rules.can_implement(problem, tactic)
    assert not support and reason in support.reason


def test_other_devices_are_refused_with_the_reason():
    backend = backends.get("hopper")
    for device in (DeviceInfo("cpu", "CPU", None, 0), DeviceInfo("cuda", "B200", (10, 0), 148)):
        assert "SM 9.0" in backend.is_supported(device).reason


@pytest.mark.parametrize("m", [1, 64, 65, 256, 257, 512, 513, 1024])
@pytest.mark.parametrize("n, k, experts", [(7168, 65536, 256), (4096, 14336, 8), (2880, 96 * 768, 96)])
def test_every_tactic_fits(m, n, k, experts):
    problem = replace(TARGET, m=m, n=n, k=k, experts=experts)
    tactics = rules.tactics(problem)
    assert tactics[0] == rules.default_tactic(problem)
    for tactic in tactics:
        for tokens in rules.passes(problem):
            config = stream_config(problem, tactic, tokens)
            assert config.tokens >= tokens and config.offsets()["end"] <= SMEM_BYTES
            assert config.phases <= config.stages and config.threads <= 1024


@pytest.mark.parametrize("n, rows", [(7168, 64), (4096, 32)])
def test_clusters_are_tried_from_192_tokens_on(n, rows):
    assert {t.cluster for t in rules.tactics(replace(TARGET, n=n, m=191))} == {1}
    for m in (192, 512, 700):
        default, *others = rules.tactics(replace(TARGET, n=n, m=m))
        assert default.cluster == 1 and rows in {t.rows for t in others if t.cluster == 2}


def test_names_of_tactics():
    """A cluster of one is not part of the name by which tables know the tactic."""
    assert str(HopperTactic(64, 5, 12)) == "hopper(rows=64,phases=5,slots=12)"
    assert str(HopperTactic(64, 5, 12, 2)) == "hopper(rows=64,phases=5,slots=12,cluster=2)"


def test_passes_make_up_the_call():
    assert [rules.passes(replace(TARGET, m=m)) for m in (1, PASS_TOKENS, 700, 1024)] == [[1], [512], [512, 188], [512]]


# ---- the small kernels


def _emulated(kernel, arguments: dict, constants: dict, grid: tuple[int, int, int]) -> None:
    """Compile a Triton kernel for SM 9.0 and run its PTX."""
    pytest.importorskip("cutlass")
    from backends.triton.offline import compile_kernel
    from tests.emulator import emulate_ptx

    kinds = {torch.int32: "*i32", torch.uint8: "*u8", torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    signature = {n: kinds[v.dtype] if isinstance(v, torch.Tensor) else "i32" for n, v in arguments.items()}
    compiled = compile_kernel(kernel, (9, 0), signature, constants, launch_pdl=True)
    spare = [torch.zeros(16, dtype=torch.uint8)] * 2  # what Triton passes for scratch memory it does not use
    emulate_ptx(
        compiled.asm["ptx"], compiled.metadata.name, [*arguments.values(), *spare], grid=grid,
        block=(32 * compiled.metadata.num_warps, 1, 1), smem=compiled.metadata.shared,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["128x4", "linear"])
@pytest.mark.parametrize("tokens", [5, 130])
def test_decoded_activations(tokens, layout):
    from backends.hopper.dense_prelude import BLOCK, decode_activations
    from tests.test_hopper_dense import _image

    experts, inner = 3, 256
    a, _ = make_operands(tokens, 8, experts * inner, seed=tokens, layout=layout)
    columns = dense_tiling(tokens, 256, experts * inner).columns
    acts = torch.full((experts * inner // 64 * columns * 32,), -1, dtype=torch.int32)
    counts = torch.full((experts,), tokens, dtype=torch.int32)
    arguments = dict(
        a_data=a.data.view(torch.int32), a_scale=a.scale, counts=counts, acts=acts, tokens=tokens, columns=columns
    )
    constants = dict(EXPERTS=experts, EXPERTS_PADDED=4, INNER=inner, A_SWIZZLED=layout == "128x4", BLOCK=BLOCK)
    grid = (experts * inner // 256, -(-columns // BLOCK), 1)
    _emulated(decode_activations, arguments, constants, grid)
    assert torch.equal(acts, _image(a, columns).view(torch.int32).reshape(-1))
    # A routed call leaves everything as it is.
    acts.fill_(-1)
    counts.fill_(tokens // 8)
    _emulated(decode_activations, arguments, constants, grid)
    assert bool((acts == -1).all())


@pytest.mark.parametrize("tokens, hidden", [(130, 300), (20, 520)])
def test_part_sums_are_added_in_the_order_of_k(tokens, hidden):
    from backends.hopper.dense_prelude import add_parts
    from tests.test_hopper_dense import _segments

    experts, k = 3, 768
    tiling = dense_tiling(tokens, hidden, k)
    tile = tiling.kernel
    parts = torch.randn(tiling.whole + tiling.streamed * tiling.slots, tile.tokens, tile.rows)
    totals = torch.zeros(tiling.token_tiles * tiling.row_tiles, tile.tokens, tile.rows)
    unused = set(range(len(parts)))
    for cluster in range(tiling.clusters):
        for index, _, _, part in _segments(tiling, cluster):
            totals[index] += parts[part]
            unused.discard(part)
    parts[list(unused)] = torch.nan
    out = torch.full((tokens, hidden), torch.nan)
    arguments = dict(
        parts=parts, counts=torch.full((experts,), tokens, dtype=torch.int32), out=out, tokens=tokens, hidden=hidden,
        chunks=tiling.chunks, row_tiles=tiling.row_tiles, clusters=tiling.clusters, whole=tiling.whole,
        streamed=tiling.streamed, slots=tiling.slots,
    )  # fmt: skip
    constants = dict(EXPERTS=experts, EXPERTS_PADDED=4, TOKENS=tile.tokens, ROWS=tile.rows, BLOCK=8)
    _emulated(add_parts, arguments, constants, (-(-hidden // 128), -(-tokens // 8), 1))
    by_place = totals.view(tiling.token_tiles, tiling.row_tiles, tile.tokens, tile.rows).permute(0, 2, 1, 3)
    whole = by_place.reshape(tiling.columns, tiling.row_tiles * tile.rows)
    assert torch.equal(out, whole[:tokens, :hidden] * 65536.0)


@pytest.mark.parametrize("m", [40, 700])
def test_launches_of_a_call(m, monkeypatch):
    """The order of the kernels of each pass, and as many values for each DSL kernel as it was compiled for."""
    pytest.importorskip("cutlass")
    from types import SimpleNamespace

    from backends.hopper import compiler, dense_prelude, launch
    from backends.triton import layout

    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert all(extent > 0 for extent in grid)
            return lambda *_, **__: order.append(self.name)

    for module, names in ((launch, ("list_tokens", "gather_tokens")), (dense_prelude, ("decode_activations", "add_parts"))):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    def launcher(config):
        kernel = compiler.kernel_of(config)

        def launched(*values):
            assert len(values) == len(kernel.pointers) + kernel.INTEGERS + 1 and all(type(v) is int for v in values)
            order.append(type(kernel).__name__)

        return launched

    problem = replace(TARGET, m=m, n=200, k=1280, experts=5)
    a, _ = make_operands(m, 8, problem.k, seed=0)
    out = torch.empty(m, problem.n, dtype=torch.bfloat16)
    prepared = layout.zeros(problem.n, problem.k, torch.device("cpu"))
    alpha = torch.ones(m, problem.experts)
    for first in range(0, m, PASS_TOKENS):
        rows = slice(first, first + PASS_TOKENS)
        config = stream_config(problem, HopperTactic(), min(PASS_TOKENS, m - first))
        launch.run(problem, config, launcher, a.data[rows], a.scale[rows], prepared, alpha[rows], out[rows])
    one = ["list_tokens", "gather_tokens", "decode_activations", "StreamKernel", "DenseKernel", "add_parts"]
    assert order == one * -(-m // PASS_TOKENS)
