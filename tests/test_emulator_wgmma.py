"""wgmma on the emulator: values against NumPy for every operand form, and every check shown to fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .emulator import Deadlock, Fault, LaunchReport, PtxError, Race, emulate_ptx
from .emulator.samples import Edit, apply
from .emulator.samples_sm90 import DESCRIPTOR, STAGE_BYTES, WarpgroupProblem, gemm_warpgroup, single_wgmma
from .test_emulator_mma import KINDS, values
from .test_emulator_ptx import SCHEDULES, every_schedule

SHARED_LEFT, REGISTER_LEFT = gemm_warpgroup(False), gemm_warpgroup(True)


@pytest.fixture(scope="module")
def problem() -> WarpgroupProblem:
    return WarpgroupProblem()


@every_schedule
@pytest.mark.parametrize("text,factor", [(SHARED_LEFT, 1), (REGISTER_LEFT, 2)], ids=["shared", "registers"])
def test_unmodified_kernel_is_clean_and_right(
    problem: WarpgroupProblem, text: str, factor: int, schedule: str, seed: int
) -> None:
    report = problem.run(text, schedule=schedule, seed=seed)
    want = factor * problem.expected
    np.testing.assert_allclose(problem.out.numpy(), want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert report.counters["wgmma.mma_async"] == 2 * 5 * 4
    assert report.counters["TMA load bytes"] == 2 * 5 * STAGE_BYTES


def test_results_are_bitwise_equal_across_seeds(problem: WarpgroupProblem) -> None:
    results = []
    for seed in range(4):
        problem.run(SHARED_LEFT, schedule="random", seed=seed)
        results.append(problem.out.clone())
    assert all((r == results[0]).all() for r in results)


FENCE = "wgmma.fence.sync.aligned;"
MUTATIONS = {
    # registers
    "no fence at all": (SHARED_LEFT, [Edit("fence")], r"without a wgmma.fence before the first one"),
    "the left operand is computed after the fence": (
        REGISTER_LEFT,
        [Edit("fence"), Edit("operands", "1024;", f"1024; {FENCE}")],
        r"uses register %a\d+, which the warp accessed at PTX line \d+ with no wgmma.fence between",
    ),
    "an accumulator is scaled after the fence": (
        SHARED_LEFT,
        [Edit("fence", FENCE, FENCE + " add.f32 %c3, %c3, %c3;")],
        r"uses register %c3, which the warp accessed at PTX line \d+ with no wgmma.fence between",
    ),
    "an accumulator is scaled while it is in flight": (
        SHARED_LEFT,
        [Edit("wait_tile", "aligned 1;", "aligned 1; add.f32 %c3, %c3, %c3;")],
        r"register %c3 is accessed while the wgmma.mma_async at PTX line \d+ is in flight",
    ),
    "an accumulator is cleared while it is in flight": (
        SHARED_LEFT,
        [Edit("wait_tile", "aligned 1;", "aligned 1; mov.b32 %c3, 0;")],
        r"register %c3 is accessed while",
    ),
    "a copy of an accumulator in flight is used": (
        SHARED_LEFT,
        [Edit("wait_tile", "aligned 1;", "aligned 1; mov.b32 %x, %c3; add.s32 %x, %x, %x;")],
        r"a copy of an accumulator register is used while the wgmma.mma_async at PTX line \d+ is in flight",
    ),
    "the last wait is missing": (
        SHARED_LEFT,
        [Edit("wait_last")],
        r"register %c\d+ is accessed while the wgmma.mma_async at PTX line \d+ is in flight",
    ),
    "the last wait leaves one group": (
        SHARED_LEFT,
        [Edit("wait_last", "aligned 0", "aligned 1")],
        r"register %c\d+ is accessed while the wgmma.mma_async",
    ),
    "the left operand is loaded while it is in flight": (
        REGISTER_LEFT,
        [Edit("wait_tile", "aligned 0", "aligned 1")],
        r"register %a0 is accessed while the wgmma.mma_async|bulk copy into shared memory",
    ),
    "the group is not committed": (
        SHARED_LEFT,
        [Edit("commit")],
        r"register %c\d+ is accessed while|bulk copy into shared memory",
    ),
    "the first one accumulates": (
        SHARED_LEFT,
        [Edit("first", "0;", "1;")],
        r"accumulates onto register %c0, which nothing has written",
    ),
    # shared memory and barriers
    "the stage is released before the wait": (
        SHARED_LEFT,
        [Edit("wait_tile")],
        r"bulk copy into shared memory .* by a wgmma of warpgroup 0 .* no wgmma.wait_group is known to",
    ),
    "the stage is released one tile early": (
        SHARED_LEFT,
        [Edit("wait_tile", "aligned 1;", "aligned 1; mov.b32 %previous, %slot;")],
        r"bulk copy into shared memory .* by a wgmma of warpgroup 0 .* no wgmma.wait_group is known to",
    ),
    "no wait for the loads": (
        SHARED_LEFT,
        [Edit("wait_full")],
        r"wgmma matrix A read of shared memory .* is not ordered after its write|nothing has written",
    ),
    "the full parity starts swapped": (
        SHARED_LEFT,
        [Edit("full_parity", "%phase, 0", "%phase, 1")],
        r"not ordered after its write|nothing has written|deadlock",
    ),
    "the full parity never flips": (
        SHARED_LEFT,
        [Edit("full_phase")],
        r"not ordered after its (write|access)|deadlock",
    ),
    "no wait for an empty stage": (
        SHARED_LEFT,
        [Edit("wait_empty")],
        r"two bulk copies of one phase|arrivals but only|bulk copy into shared memory|deadlock",
    ),
    "the stage is not released": (SHARED_LEFT, [Edit("release")], r"deadlock"),
    "half of the bytes are expected": (
        SHARED_LEFT,
        [Edit("expect", str(STAGE_BYTES), str(STAGE_BYTES // 2))],
        r"transaction-count mismatch|not ordered after its write|deadlock|nothing has written",
    ),
    "every tile multiplies stage 0": (
        SHARED_LEFT,
        [Edit("multiply_stage", "%slot", "0")],
        r"not ordered after its write|bulk copy into shared memory",
    ),
    "stages overlap": (
        SHARED_LEFT,
        [Edit("load_stage", str(STAGE_BYTES), "8192")],
        r"bulk copy into shared memory|not ordered after its write|nothing has written",
    ),
    # the warpgroup
    "one warp skips the product": (
        SHARED_LEFT,
        [
            Edit("mma2", "wgmma", "@!%skip wgmma"),
            Edit("operands", "1024;", "1024; setp.eq.s32 %skip, %warp, 2;"),
        ],
        r"the warps of a warpgroup must execute the same wgmma.mma_async|deadlock",
    ),
    "the warps name different operands": (
        SHARED_LEFT,
        [Edit("descriptor", "%stage, 4;", "%stage, 4; add.s32 %x, %x, %warp;")],
        r"the warps of a warpgroup must execute the same wgmma.mma_async|is not ordered after its write",
    ),
    "a part of the lanes executes it": (
        SHARED_LEFT,
        [
            Edit("mma1", "wgmma", "@%skip wgmma"),
            Edit("operands", "1024;", "1024; setp.lt.u32 %skip, %lane, 16;"),
        ],
        r"executed by a part of the warp's 32 lanes",
    ),
    "lanes name different operands": (
        SHARED_LEFT,
        [Edit("descriptor", "%stage, 4;", "%stage, 4; add.s32 %x, %x, %lane;")],
        r"matrix A descriptor differs between the lanes",
    ),
    "a descriptor of tcgen05": (
        SHARED_LEFT,
        [Edit("swizzle", str(DESCRIPTOR), str(DESCRIPTOR | 1 << 46))],
        r"has bits 0x400000000000 set, which wgmma does not define",
    ),
    "the operands lie outside shared memory": (
        SHARED_LEFT,
        [Edit("descriptor", "%stage, 4;", "%stage, 4; or.b32 %x, %x, 12288;")],
        r"out of bounds|nothing has written",
    ),
}


def with_skip(text: str) -> str:
    return text.replace(".reg .pred %p,", ".reg .pred %skip, %p,")


@pytest.mark.parametrize("schedule,seed", SCHEDULES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(problem: WarpgroupProblem, name: str, schedule: str, seed: int) -> None:
    text, edits, pattern = MUTATIONS[name]
    with pytest.raises(Fault, match=pattern) as caught:
        problem.run(apply(with_skip(text), *edits), schedule=schedule, seed=seed)
    message = str(caught.value)
    assert f"schedule={schedule!r}, seed={seed}" in message and "PTX line" in message


# -- one instruction ---------------------------------------------------------------------------------------
MASKS = {0: 0, 1: 7, 2: 3, 3: 1}  # swizzle of the descriptor -> address bits 7.. that are XORed into bits 4..


class Operand:
    """One operand in shared memory: [rows, 32 bytes of K] somewhere inside a swizzled, padded image."""

    def __init__(self, kind: str, rows: int, swizzle: int, mn_major: bool, rng: np.random.Generator) -> None:
        bits, make = KINDS[kind]
        size, k = bits // 8, 256 // bits
        self.codes = make(rng, rows * k).reshape(rows, k)
        self.values = values(self.codes, kind)
        pitch = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
        r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
        if not mn_major and swizzle == 0:  # blocks of 8 rows x 16 bytes
            lbo, sbo, start = 144, 320, 0
            at = r % 8 * 16 + r // 8 * sbo + c * size % 16 + c * size // 16 * lbo
        elif not mn_major:  # rows of `pitch` bytes; the instruction's 32 bytes are the last of them
            lbo, sbo, start = 16, 8 * pitch + 1024, pitch - 32
            at = r % 8 * pitch + r // 8 * sbo + c * size
        elif swizzle == 0:
            lbo, sbo, start = 256, 640, 0
            at = r % 8 * 2 + r // 8 * sbo + c % 8 * 16 + c // 8 * lbo
        else:
            width = pitch // 2
            sbo, start = 8 * pitch, 0
            lbo = 16 * pitch + 1024
            at = r % width * 2 + r // width * lbo + c % 8 * pitch + c // 8 * sbo
        at = at + start
        self.at = at ^ (at >> 7 & MASKS[swizzle]) << 4
        self.size, self.descriptor = size, swizzle << 62 | sbo >> 4 << 32 | lbo >> 4 << 16 | start >> 4
        self.span = -(-(int(self.at.max()) + size) // 1024) * 1024

    def place(self, image: np.ndarray, base: int) -> int:
        """Write the operand at `base`, a multiple of 1024; its descriptor there (the image is at 1024)."""
        data = np.ascontiguousarray(self.codes).view(np.uint8).reshape(*self.codes.shape, self.size)
        image[base + self.at[:, :, None] + np.arange(self.size)] = data
        return self.descriptor + (base + 1024 >> 4)


def run_single(
    a_kind: str, b_kind: str, n: int, *, a_swizzle: int | None, b_swizzle: int = 1, a_mn: bool = False,
    b_mn: bool = False, negate: tuple[int, int] = (1, 1), accumulate: bool = False, seed: int = 0,
    edits: tuple = (), **options: object,
) -> tuple[np.ndarray, np.ndarray, LaunchReport]:  # fmt: skip
    """(D, the expected D, report); `a_swizzle` None is a left operand in registers."""
    rng = np.random.default_rng(seed)
    left = a_swizzle is None
    a = Operand(a_kind, 64, a_swizzle or 0, a_mn, rng)
    b = Operand(b_kind, n, b_swizzle, b_mn, rng)
    image = np.zeros(a.span + b.span, np.uint8)  # the padding is zero, and written: only its place is wrong
    descriptors = a.place(image, 0), b.place(image, a.span)
    k = a.codes.shape[1]
    per = 4 // a.size
    fragments = np.zeros((128, 4 * per), a.codes.dtype)
    c, c_fragments = rng.standard_normal((64, n)).astype(np.float32), np.zeros((128, n // 2), np.float32)
    for thread in range(128):
        row, member = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for register in range(4):
            for i in range(per):
                column = member * per + i + (k // 2 if register >= 2 else 0)
                fragments[thread, register * per + i] = a.codes[row + 8 * (register % 2), column]
        for i in range(n // 2):
            c_fragments[thread, i] = c[row + 8 * (i // 2 % 2), i // 4 * 8 + member * 2 + i % 2]
    out = torch.full((128, n // 2), float("nan"))
    transposes = ([] if left else [int(a_mn)]) + [int(b_mn)] if a.size == 2 else []
    flags = ", ".join(str(x) for x in (*negate, *transposes))
    ptx = apply(single_wgmma(n, k, a_kind, b_kind, flags, left, accumulate), *edits)
    tensors = [torch.from_numpy(x) for x in (image, fragments.view(np.int32), c_fragments)]
    report = emulate_ptx(
        ptx,
        "k",
        [out, tensors[0], len(image), tensors[1], tensors[2], *descriptors],
        block=(128, 1, 1),
        smem=len(image),
        **options,
    )
    want = negate[0] * negate[1] * (a.values @ b.values.T) + (c if accumulate else 0)
    got = np.zeros((64, n), np.float32)
    for thread in range(128):
        row = thread // 32 * 16 + thread % 32 // 4
        for i in range(n // 2):
            got[row + 8 * (i // 2 % 2), i // 4 * 8 + thread % 4 * 2 + i % 2] = out[thread, i]
    return got, want, report


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=2**-23, atol=2**-40 * max(1, np.abs(want).max()))


class TestOneInstruction:
    @pytest.mark.parametrize("a_kind,b_kind", [("f16",) * 2, ("bf16",) * 2, ("tf32",) * 2, ("e4m3", "e5m2")])
    @pytest.mark.parametrize("a_swizzle", [None, 0, 1, 2, 3])
    @pytest.mark.parametrize("b_swizzle", [0, 1, 2, 3])
    def test_k_major(self, a_kind: str, b_kind: str, a_swizzle: int | None, b_swizzle: int) -> None:
        n = 24 + 40 * b_swizzle
        got, want, report = run_single(
            a_kind, b_kind, n, a_swizzle=a_swizzle, b_swizzle=b_swizzle, accumulate=b_swizzle % 2 == 0, seed=n
        )
        assert_close(got, want)
        assert report.counters["wgmma.mma_async"] == 1

    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    @pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
    @pytest.mark.parametrize("a_mn,b_mn", [(True, False), (False, True), (True, True)])
    def test_mn_major(self, kind: str, swizzle: int, a_mn: bool, b_mn: bool) -> None:
        got, want, _ = run_single(kind, kind, 128, a_swizzle=swizzle, b_swizzle=swizzle, a_mn=a_mn, b_mn=b_mn)
        assert_close(got, want)

    @pytest.mark.parametrize("n", [8, 40, 256])
    @pytest.mark.parametrize("negate", [(-1, 1), (1, -1), (-1, -1)])
    def test_sizes_and_negation(self, n: int, negate: tuple[int, int]) -> None:
        got, want, _ = run_single(
            "f16", "f16", n, a_swizzle=None, b_swizzle=1, b_mn=n % 64 == 0, negate=negate, accumulate=True
        )
        assert_close(got, want)

    @every_schedule
    @pytest.mark.parametrize(
        "tag,pattern",
        [
            ("proxy_fence", "no fence.proxy.async makes the generic write visible"),
            (
                "barrier",
                "wgmma matrix . read of shared memory .* is not ordered after its write|nothing has written",
            ),
            ("fence", "without a wgmma.fence"),
            ("commit", "is accessed while"),
            ("wait", "is accessed while"),
        ],
    )
    def test_what_is_missing_is_found(self, tag: str, pattern: str, schedule: str, seed: int) -> None:
        with pytest.raises(Fault, match=pattern):
            run_single("f16", "f16", 32, a_swizzle=1, edits=(Edit(tag),), schedule=schedule, seed=seed)

    def test_a_generic_store_to_an_operand_in_flight(self) -> None:
        overwrite = "commit_group.sync.aligned; st.shared.b32 [%smem + 96], 7;"
        with pytest.raises(Race, match="store to .* by a wgmma of warpgroup 0 .* no wgmma.wait_group"):
            run_single(
                "f16",
                "f16",
                32,
                a_swizzle=1,
                edits=(Edit("commit", "commit_group.sync.aligned;", overwrite),),
            )

    def test_exit_while_in_flight(self) -> None:
        stop = "commit_group.sync.aligned; exit;"
        with pytest.raises(Fault, match="exits while the wgmma.mma_async at PTX line"):
            run_single(
                "f16", "f16", 32, a_swizzle=1, edits=(Edit("commit", "commit_group.sync.aligned;", stop),)
            )

    def test_another_shape_on_registers_in_flight(self) -> None:
        more = "commit_group.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
        more += "{%c0, %c1, %c2, %c3}, %q, %qb, %more, 1, 1, 0, 0;"
        with pytest.raises(Fault, match="with another shape, and is still in flight"):
            run_single(
                "f16", "f16", 32, a_swizzle=1, edits=(Edit("commit", "commit_group.sync.aligned;", more),)
            )

    @pytest.mark.parametrize(
        "shape,flags,match",
        [
            ("m64n20k16.f32.f16.f16", "1, 1, 0, 0", "unsupported shape or types"),
            ("m64n264k16.f32.f16.f16", "1, 1, 0, 0", "unsupported shape or types"),
            ("m64n32k8.f32.f16.f16", "1, 1, 0, 0", "unsupported shape or types"),
            ("m64n32k16.f16.f16.f16", "1, 1, 0, 0", "unsupported shape or types"),
            ("m64n32k16.f32.f16.bf16", "1, 1, 0, 0", "unsupported shape or types"),
            ("m64n32k16.f32.f16.f16", "1, 1, 0", "wrong number of operands"),
            ("m64n32k16.f32.f16.f16", "2, 1, 0, 0", "immediates are 1 or -1"),
            ("m64n32k32.f32.e4m3.e4m3", "1, 1, 0, 1", "wrong number of operands"),
        ],
    )
    def test_other_forms_are_refused(self, shape: str, flags: str, match: str) -> None:
        text = single_wgmma(32, 16, "f16", "f16", "1, 1, 0, 0", False)
        text = text.replace("m64n32k16.f32.f16.f16", shape).replace("%more, 1, 1, 0, 0", f"%more, {flags}")
        with pytest.raises(PtxError, match=match):
            emulate_ptx(text, "k", [torch.zeros(1)] + [0] * 6)

    def test_a_warpgroup_takes_four_warps(self) -> None:
        text = single_wgmma(32, 16, "f16", "f16", "1, 1, 0, 0", False)
        image = torch.zeros(8192, dtype=torch.uint8)
        with pytest.raises(Fault, match="a warpgroup of 3 warps; it takes four"):
            emulate_ptx(
                text, "k", [torch.zeros(1), image, 8192, 0, 0, 0x4000004000010080, 0x4000004000010080],
                block=(96, 1, 1), smem=8192,
            )  # fmt: skip


@pytest.mark.parametrize("count", [20, 260, 30])
def test_register_counts_of_setmaxnreg(problem: WarpgroupProblem, count: int) -> None:
    with pytest.raises(PtxError, match="register count must be 24 to 256 in steps of 8"):
        problem.run(
            SHARED_LEFT.replace(
                "setmaxnreg.inc.sync.aligned.u32 240", f"setmaxnreg.inc.sync.aligned.u32 {count}"
            )
        )


class TestRegisterPool:
    """One warp keeps 24 registers a thread, four want 240: 984 per lane of the CTA."""

    @every_schedule
    def test_enough(self, problem: WarpgroupProblem, schedule: str, seed: int) -> None:
        problem.run(SHARED_LEFT, registers=200, schedule=schedule, seed=seed)
        assert not problem.out.isnan().any()

    @every_schedule
    def test_too_few_is_a_deadlock(self, problem: WarpgroupProblem, schedule: str, seed: int) -> None:
        with pytest.raises(
            Deadlock, match=r"setmaxnreg.inc from 192 to 240 registers; 24 \(per lane\) are free"
        ):
            problem.run(SHARED_LEFT, registers=192, schedule=schedule, seed=seed)

    def test_direction(self, problem: WarpgroupProblem) -> None:
        with pytest.raises(Fault, match="setmaxnreg.inc to 240 registers from 248"):
            problem.run(SHARED_LEFT, registers=248)
