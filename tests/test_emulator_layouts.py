"""Descriptor and layout formulas of the emulator, by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .emulator import Fault, numerics, ptx, tma, tmem, umma, values
from .emulator.samples import FP4, SWIZZLE_128, aligned, tensor_map


def descriptor(start: int, lbo: int, sbo: int, swizzle: int) -> umma.SmemDescriptor:
    return umma.SmemDescriptor.decode(start >> 4 | lbo >> 4 << 16 | sbo >> 4 << 32 | 1 << 46 | swizzle << 61)


class TestNumerics:
    def test_e2m1_values(self) -> None:
        positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        assert numerics.decode_table("e2m1").tolist() == positive + [-v for v in positive]

    def test_fp8_values_agree_with_torch(self) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        for name, dtype in (
            ("e4m3", torch.float8_e4m3fn),
            ("e5m2", torch.float8_e5m2),
            ("ue8m0", torch.float8_e8m0fnu),
        ):
            np.testing.assert_array_equal(
                numerics.decode_table(name), codes.view(dtype).float().numpy(), err_msg=name
            )

    def test_fp6_extremes(self) -> None:
        assert numerics.decode_table("e2m3")[31] == 7.5 and numerics.decode_table("e3m2")[31] == 28.0

    def test_encode_rounds_to_nearest_even_and_saturates(self) -> None:
        x = np.array([0.25, 0.75, 1.25, 2.5, 5.0, 7.0, -3.5, 1e9], np.float32)
        assert numerics.decode_table("e2m1")[numerics.encode("e2m1", x)].tolist() == [0, 1, 1, 2, 4, 6, -4, 6]

    @pytest.mark.parametrize("name,dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
    def test_encode_agrees_with_torch(self, name: str, dtype: torch.dtype) -> None:
        x = torch.randn(4096) * torch.logspace(-6, 2, 4096)
        codes = numerics.encode(name, x.numpy())
        np.testing.assert_array_equal(numerics.decode_table(name)[codes], x.to(dtype).float().numpy())

    def test_half_rounding_agrees_with_torch(self) -> None:
        x = torch.randn(4096) * torch.logspace(-8, 6, 4096)
        for bits, dtype in ((numerics.bf16_bits, torch.bfloat16), (numerics.f16_bits, torch.float16)):
            np.testing.assert_array_equal(
                bits(x.numpy()).astype(np.uint16), x.to(dtype).view(torch.uint16).numpy()
            )

    def test_truncation(self) -> None:
        assert numerics.bf16_bits(np.float32(1.999), "rz") == 0x3FFF
        assert numerics.f16_value(numerics.f16_bits(np.array([1.9999], np.float32), "rz"))[0] < 1.9999


class TestSmemDescriptor:
    def test_fields(self) -> None:
        got = umma.SmemDescriptor.decode(0x6400 >> 4 | (1 << 16) | (64 << 32) | (1 << 46) | (2 << 61))
        assert got == umma.SmemDescriptor(start=0x6400, lbo=16, sbo=1024, swizzle=2)

    def test_unknown_version_or_swizzle_is_a_fault(self) -> None:
        with pytest.raises(Fault, match="version 0"):
            umma.SmemDescriptor.decode(0)
        with pytest.raises(Fault, match="swizzle 3"):
            umma.SmemDescriptor.decode(1 << 46 | 3 << 61)

    def test_k_major_without_swizzle(self) -> None:
        """8 rows of 16 bytes are a core matrix of 128 bytes; LBO steps in K, SBO in rows."""
        offsets = umma.k_major_chunks(descriptor(2048, 512, 128, 0), 32, 2)
        assert offsets[0].tolist() == [2048, 2560] and offsets[1, 0] == 2064 and offsets[8, 0] == 2176
        assert offsets[31, 1] == 2048 + 7 * 16 + 3 * 128 + 512

    def test_k_major_with_128_byte_swizzle(self) -> None:
        """Rows are 128 bytes apart, chunk u of row r lies at u XOR (r % 8), for a tile on a 1024-byte
        boundary."""
        offsets = umma.k_major_chunks(descriptor(4096, 16, 1024, 2), 16, 2)
        for r in (0, 1, 7, 8, 13):
            for u in (0, 1):
                assert offsets[r, u] == 4096 + 128 * (r % 8) + 1024 * (r // 8) + 16 * (u ^ r % 8)

    def test_advancing_k_adds_to_the_start_before_the_xor(self) -> None:
        base, second = (umma.k_major_chunks(descriptor(4096 + 32 * s, 16, 1024, 2), 8, 2) for s in (0, 1))
        assert (
            second[3].tolist() == [4096 + 384 + 16 * (u ^ 3) for u in (2, 3)]
            and base[3, 0] == 4096 + 384 + 48
        )

    @pytest.mark.parametrize("swizzle,pitch,mask", [(6, 32, 1), (4, 64, 3)])
    def test_narrow_swizzles(self, swizzle: int, pitch: int, mask: int) -> None:
        offsets = umma.k_major_chunks(descriptor(0, 16, 8 * pitch, swizzle), 8, 2)
        for r in range(8):
            for u in range(2):
                linear = r * pitch + 16 * u
                assert offsets[r, u] == linear ^ (linear >> 7 & mask) << 4

    def test_mn_major_f16_with_128_byte_swizzle(self) -> None:
        """64 consecutive rows of one k are 128 bytes; k steps by 128 bytes, XORed with k % 8."""
        offsets = umma.mn_major_elements(descriptor(0, 8192, 1024, 2), 128, 16, 2)
        assert offsets[0, 0] == 0 and offsets[1, 0] == 2 and offsets[8, 0] == 16 and offsets[0, 1] == 128 + 16
        assert offsets[64, 0] == 8192 and offsets[0, 8] == 1024


class TestInstructionDescriptor:
    def test_nvfp4(self) -> None:
        bits = 1 << 7 | 1 << 10 | (128 // 8) << 17 | (256 // 16) << 24 | 2 << 29 | 1 << 4
        got = umma.InstructionDescriptor.decode(bits, "mxf4nvf4")
        assert (got.a, got.b, got.m, got.n, got.scale, got.sfa_id, got.sfb_id) == (
            "e2m1",
            "e2m1",
            256,
            128,
            "ue4m3",
            2,
            1,
        )

    def test_f16_with_transposed_and_negated_operands(self) -> None:
        got = umma.InstructionDescriptor.decode(
            1 << 4 | 1 << 7 | 1 << 10 | 1 << 13 | 1 << 16 | 8 << 17 | 8 << 24, "f16"
        )
        assert (got.d, got.a, got.negate_a, got.negate_b, got.a_mn, got.b_mn) == (
            "f32",
            "bf16",
            True,
            False,
            False,
            True,
        )

    def test_unknown_format_is_a_fault(self) -> None:
        with pytest.raises(Fault, match="do not exist for kind::mxf4nvf4"):
            umma.InstructionDescriptor.decode(0, "mxf4nvf4")


class TestAccumulator:
    @pytest.mark.parametrize(
        "m,group,ws,rows,points",
        [
            (128, 1, False, 128, {(0, 0): (0, 0), (127, 5): (127, 5)}),
            (256, 2, False, 128, {(100, 31): (100, 31)}),
            (64, 1, False, 64, {(0, 0): (0, 0), (15, 1): (15, 1), (16, 0): (32, 0), (63, 7): (111, 7)}),
            (128, 2, False, 64, {(0, 0): (0, 0), (63, 15): (63, 15), (0, 16): (64, 0), (63, 31): (127, 15)}),
            (64, 1, True, 64, {(10, 16): (74, 0)}),
            (32, 1, True, 32, {(3, 8): (35, 0), (3, 31): (99, 7)}),
        ],
    )
    def test_lane_and_column(self, m: int, group: int, ws: bool, rows: int, points: dict) -> None:
        got_rows, layout = umma.accumulator_rows(m, group, ws)
        assert got_rows == rows
        lanes, columns = umma.accumulator_index(layout, rows, 32)
        for (i, j), where in points.items():
            assert (lanes[i, j], columns[i, j]) == where


class TestScaleFactors:
    def _memory(self) -> object:
        class Memory:
            words = np.zeros((128, 512), np.uint32)

        return Memory()

    def test_row_and_byte(self) -> None:
        memory = self._memory()
        memory.words[33 % 32, 10 + 1] = (
            0x48403830  # row 33: lane 1, second column; codes of 2, 1, 0.5... in e4m3
        )
        got = umma.scale_factors(memory, 10, 0, 128, 4, "ue4m3", False)
        assert got[33].tolist() == [0.5, 1.0, 2.0, 4.0]

    def test_sf_id_selects_the_byte(self) -> None:
        memory = self._memory()
        memory.words[5, 0] = 127 << 16
        assert umma.scale_factors(memory, 0, 2, 32, 1, "ue8m0", False)[5, 0] == 1.0

    def test_second_half_of_n_for_a_pair_with_m_128(self) -> None:
        memory = self._memory()
        memory.words[64 + 3, 7] = 0x38
        got = umma.scale_factors(memory, 7, 0, 64, 1, "ue4m3", True)
        assert got[35, 0] == 1.0 and got[3, 0] == 0.0

    @pytest.mark.parametrize(
        "shape,row,lanes",
        [
            ("32x128b.warpx4", 5, (5, 37, 69, 101)),
            ("64x128b.warpx2::02_13", 40, (40, 104)),
            ("64x128b.warpx2::01_23", 40, (72, 104)),
            ("128x256b", 77, (77,)),
            ("4x256b", 2, (64,)),
        ],
    )
    def test_copy_lanes(self, shape: str, row: int, lanes: tuple[int, ...]) -> None:
        assert umma.copy_lanes(shape)[2][row] == lanes

    def test_fp4_expansion(self) -> None:
        packed = np.zeros((1, 16), np.uint8)
        packed[0, :2] = (0x21, 0x43)
        assert umma.expand_narrow(packed, "b4x16_p64")[0, :4].tolist() == [1 << 2, 2 << 2, 3 << 2, 4 << 2]


class TestRegisterMaps:
    @pytest.mark.parametrize(
        "shape,repeat,register,thread,where",
        [
            ("32x32b", 4, 3, 17, (17, 3)),
            ("16x64b", 2, 1, 5, (9, 2)),
            ("16x128b", 2, 3, 9, (10, 5)),
            ("16x256b", 2, 7, 6, (9, 13)),
            ("16x256b", 1, 1, 31, (7, 7)),
        ],
    )
    def test_lane_and_column(
        self, shape: str, repeat: int, register: int, thread: int, where: tuple[int, int]
    ) -> None:
        lanes, columns = tmem.register_map(shape, repeat)
        assert (lanes[register, thread], columns[register, thread]) == where

    @pytest.mark.parametrize("shape", ["32x32b", "16x64b", "16x128b", "16x256b"])
    def test_every_cell_once(self, shape: str) -> None:
        lanes, columns = tmem.register_map(shape, 8)
        rows = 32 if shape == "32x32b" else 16
        assert len(set(zip(lanes.ravel().tolist(), columns.ravel().tolist()))) == rows * tmem.columns_of(
            shape, 8
        )


class TestTensorMap:
    def test_round_trip(self) -> None:
        memory = aligned(1 << 16)
        tm = tma.TensorMap.decode(
            tensor_map(FP4, memory, [512, 200, 3], [256, 256 * 200], [256, 128, 1], SWIZZLE_128)[:64]
        )
        assert tm == tma.TensorMap(
            memory.data_ptr(), 3, "b4x16", 4, 3, 0, False, (256, 51200), (512, 200, 3), (256, 128, 1)
        )
        assert tm.inner_bytes == 128 and tm.packed_bytes == 128 * 128

    def test_strides_beyond_32_bits(self) -> None:
        memory = aligned(256)
        tm = tma.TensorMap.decode(tensor_map(1, memory, [64, 4, 4], [1 << 37, 1 << 38], [64, 1, 1])[:64])
        assert tm.strides == (1 << 37, 1 << 38)

    def test_observed_words_of_a_host_written_descriptor(self) -> None:
        """bf16 [1000, 96] row-major, box 64 x 128, 128-byte swizzle, 128-byte promotion."""
        words = [
            0x7F0000001000,
            2 | 1 << 4 | 10 << 7 | 3 << 13 | 2 << 17 | 1 << 21 | (192 // 16) << 32,
            0,
            0,
            95 | 999 << 32,
            0,
            63 << 56,
            127,
        ]
        tm = tma.TensorMap.decode(b"".join(w.to_bytes(8, "little") for w in words))
        assert (tm.type, tm.extents, tm.box, tm.strides, tm.swizzle) == (
            "bf16",
            (96, 1000),
            (64, 128),
            (192,),
            3,
        )

    @pytest.mark.parametrize(
        "swizzle,atom,chunk,where",
        [
            (0, 0, 9, 9),
            (1, 0, 8, 9),
            (2, 0, 8 + 16, 24 ^ 3),
            (3, 0, 8 * 5 + 2, 40 + (2 ^ 5)),
            (3, 1, 8 + 1, 8 + (1 ^ 2)),
        ],
    )
    def test_swizzle_is_an_xor_on_the_address(self, swizzle: int, atom: int, chunk: int, where: int) -> None:
        assert tma.swizzled_chunks(0, 64, swizzle, atom)[chunk] == where

    def test_swizzle_of_tma_and_mma_agree(self) -> None:
        """A [8, 128-byte] box read back by the K-major formula is the identity."""
        chunks = tma.swizzled_chunks(1024, 64, 3, 0).reshape(8, 8)
        offsets = umma.k_major_chunks(descriptor(1024, 16, 1024, 2), 8, 8) >> 4
        np.testing.assert_array_equal(chunks, offsets)


class TestValues:
    """Uniform and per-lane forms of the arithmetic agree."""

    @pytest.mark.parametrize(
        "name,expected",
        [
            ("mulhi_u32(a, b)", lambda a, b: a * b >> 32),
            ("divide(a, b, 32, False, False)", lambda a, b: a // b),
            ("minmax(a, b, 32, True, True)", lambda a, b: max((a, b), key=lambda v: v - (v >> 31 << 32))),
            ("shr(a, 7, 32, True)", lambda a, _b: (a - (a >> 31 << 32) >> 7) & 0xFFFFFFFF),
            ("shl(a, b & 63, 32)", lambda a, b: (a << (b & 63)) & 0xFFFFFFFF if b & 63 < 32 else 0),
            (
                "prmt(a, b, 0x7531)",
                lambda a, b: int.from_bytes(
                    bytes((a.to_bytes(4, "little") + b.to_bytes(4, "little"))[i] for i in (1, 3, 5, 7)),
                    "little",
                ),
            ),
            ("popc(a)", lambda a, _b: bin(a).count("1")),
            ("bfe(a, 4, 9, 32, False)", lambda a, _b: a >> 4 & 511),
            ("clz32(a)", lambda a, _b: 32 - a.bit_length()),
        ],
    )
    def test_arithmetic(self, name: str, expected: object) -> None:
        rng = np.random.default_rng(1)
        a, b = (rng.integers(1, 1 << 32, 32) for _ in range(2))
        a[:4], b[:4] = (1, 0xFFFFFFFF, 0x80000000, 7), (0xFFFFFFFF, 1, 0x7FFFFFFF, 0x80000000)
        want = [expected(x, y) for x, y in zip(a.tolist(), b.tolist())]
        assert np.asarray(eval(name, vars(values), {"a": a, "b": b})).tolist() == want
        assert [eval(name, vars(values), {"a": x, "b": y}) for x, y in zip(a.tolist(), b.tolist())] == want

    def test_fma_rounds_once(self) -> None:
        a = np.float32(1 + 2**-12)
        assert values.fma32(a, a, np.float32(-1)) == np.float32(float(a) * float(a) - 1)


class TestParser:
    def test_scopes_rename_registers_and_labels(self) -> None:
        text = """.target sm_100a
            .visible .entry k() {
            .reg .b32 %r<2>;
            { .reg .pred P; LOOP: setp.eq.s32 P, %r0, 0; @P bra LOOP; }
            { .reg .pred P; LOOP: setp.eq.s32 P, %r1, 0; @!P bra LOOP; }
            ret; }"""
        kernel = ptx.parse_module(text)["k"]
        first, second = (kernel.instrs[i] for i in (0, 2))
        assert first.operands[0].index != second.operands[0].index
        assert kernel.labels[kernel.instrs[1].operands[0].name] == 0
        assert kernel.labels[kernel.instrs[3].operands[0].name] == 2 and kernel.instrs[3].guard_negated

    def test_parameters_are_laid_out_by_alignment(self) -> None:
        params = ".param .u32 a, .param .align 64 .b8 b[128], .param .u64 c"
        text = f".target sm_100a\n.visible .entry k({params}) {{ ret; }}"
        kernel = ptx.parse_module(text)["k"]
        assert [(p.name, p.offset, p.size) for p in kernel.params] == [
            ("a", 0, 4),
            ("b", 64, 128),
            ("c", 192, 8),
        ]

    def test_operands(self) -> None:
        text = """.target sm_100a
            .visible .entry k() { .reg .b32 %r<4>; .reg .b64 %d; .reg .pred %p;
            ld.global.v2.b32 {%r0, _}, [%d+-8]; elect.sync %r1|%p, -1; mov.b32 %r2, 0f3F800000; ret; }"""
        load, elect, move, _ret = ptx.parse_module(text)["k"].instrs
        assert load.operands[1].offset == -8 and load.operands[0].items[1] is ptx.SINK
        assert elect.operands[0].second.width == 1 and move.operands[1] == ptx.Imm(0x3F800000, 32)
