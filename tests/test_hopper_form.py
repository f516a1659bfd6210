"""Which form a call takes on SM 9.0, on the emulator."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("cutlass")

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_ptr
from cutlass.memory import SmemAllocator

from backends.hopper import form
from backends.hopper.dense_plan import VOTES_BYTES
from tests import hopper_emulation as emulation
from tests.emulator import compile_target, emulate


class Asking:
    """A block of some warps that writes what each of its threads is told."""

    def __init__(self, warps: int) -> None:
        self.warps = warps

    @cute.jit
    def __call__(self, alpha: cute.Pointer, out: cute.Pointer, tokens: Int32, experts: Int32):
        self.kernel(alpha, out, tokens, experts).launch(grid=(1, 1, 1), block=(32 * self.warps, 1, 1))

    @cute.kernel
    def kernel(self, alpha: cute.Pointer, out: cute.Pointer, tokens: Int32, experts: Int32):
        votes = SmemAllocator().allocate(VOTES_BYTES, 16).toint()
        warp, thread = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.thread_idx()[0]
        dense = form.is_dense(alpha, tokens, experts, votes, self.warps, warp, cute.arch.lane_idx())
        cute.make_tensor(out + thread, cute.make_layout(1))[0] = Int32(dense)


@functools.lru_cache(maxsize=None)
def compiled(warps: int):
    pointers = [make_ptr(Int32, 0, cute.AddressSpace.gmem, assumed_align=4)] * 2
    with compile_target("sm_90a"):
        return cute.compile(Asking(warps), *pointers, Int32(0), Int32(0), options="--gpu-arch sm_90a")


def answer(alpha: torch.Tensor, warps: int) -> bool:
    """What all threads of a block find."""
    buffers = dict(alpha=alpha, out=torch.full((32 * warps,), -1, dtype=torch.int32))
    pointers = [make_ptr(Int32, t.data_ptr(), cute.AddressSpace.gmem, assumed_align=4) for t in buffers.values()]
    emulate(compiled(warps), *pointers, *map(cutlass.Int32, alpha.shape), buffers=buffers, schedule="random")
    (value,) = set(buffers["out"].tolist())
    return bool(value)


@pytest.mark.parametrize("warps", [3, 12, 20])
@pytest.mark.parametrize("m, experts", [(1, 4), (7, 3), (17, 5), (130, 256), (40, 300), (512, 1000)])
def test_more_than_a_quarter(m, experts, warps) -> None:
    """Of what is looked at, whatever the rest: exactly a quarter is not more, one nonzero further is."""
    generator = torch.Generator().manual_seed(m)
    places = emulation.looked_at(torch.zeros(m, experts)).nonzero()
    places = places[torch.randperm(len(places), generator=generator)]
    limit = len(places) // 4
    for filling in (0.0, 2.0):
        alpha = torch.full((m, experts), filling)
        alpha[emulation.looked_at(alpha)] = -0.0
        alpha[tuple(places[:limit].T)] = -1e-40
        assert not answer(alpha, warps)
        alpha[tuple(places[: limit + 1].T)] = float("nan")
        assert answer(alpha, warps)
