"""Single instructions and short sequences that the DSL does not offer, as inline PTX.

Shared addresses are 32-bit integers.

Weights and activations are decoded to float16 holding 2^-8 of the value: a product is 2^-16 of the true one, exactly.
`backends/triton/layout.py` gives the arrangement of the bits, `backends/triton/fragments.py` the order of K.
"""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

#: Cache policies of the L2 as the copy engine takes them (CUTLASS, TMA::CacheHintSm90).
EVICT_FIRST, EVICT_LAST = 0x12F0000000000000, 0x14F0000000000000
#: Selects the signs and magnitudes of one field of a word, where they lie in a float16.
_FIELD = "0x8E008E00"
_CONSTRAINTS = {Float32: "f", Int32: "r", Int64: "l", Boolean: "b"}


@dsl_user_op
def ptx(
    code: str,
    outputs: tuple,
    inputs: tuple,
    tied: int = 0,
    *,
    effects: bool = True,
    memory: bool = False,
    loc=None,
    ip=None,
) -> tuple:
    """Run PTX text. $0, $1, ... are the outputs, then the inputs; the last `tied` inputs share the registers of the first
    outputs, for instructions that change a value in place.

    Args:
        outputs: types.
        inputs: values of the DSL.
        effects: whether it keeps its place among others with effects.
        memory: whether it keeps its place among all accesses of memory as well.

    Returns:
        The outputs; an empty tuple where there are none.
    """
    free = len(inputs) - tied
    # Early clobber: a text of several instructions may write an output before it has read all inputs.
    constraints = [("=" if i < tied else "=&") + _CONSTRAINTS[t] for i, t in enumerate(outputs)]
    constraints += (
        [_CONSTRAINTS[type(x)] for x in inputs[:free]] + [str(i) for i in range(tied)] + ["~{memory}"] * memory
    )
    values = [x.ir_value(loc=loc, ip=ip) for x in inputs]
    kinds = [t.mlir_type for t in outputs]
    kind = kinds[0] if len(kinds) == 1 else llvm.StructType.get_literal(kinds) if kinds else None
    result = llvm.inline_asm(kind, values, code, ",".join(constraints), has_side_effects=effects, loc=loc, ip=ip)
    if len(kinds) < 2:
        return tuple(t(result) for t in outputs)
    return tuple(t(llvm.extractvalue(t.mlir_type, result, [i], loc=loc, ip=ip)) for i, t in enumerate(outputs))


def load4(address: Int32, dtype: type = Int32) -> tuple:
    """Four words of shared memory."""
    return ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", (dtype,) * 4, (address,))


def load4_if(wanted: Boolean | None, address: Int32, old: tuple) -> tuple:
    """As `load4` where `wanted`, else `old`; None is always, without a predicate."""
    kind = type(old[0])
    if wanted is None:
        return load4(address, kind)
    return ptx("@$4 ld.shared.v4.b32 {$0, $1, $2, $3}, [$5];", (kind,) * 4, (wanted, address, *old), tied=4)


def load2(address: Int32, dtype: type = Int32) -> tuple:
    """Two words of shared memory."""
    return ptx("ld.shared.v2.b32 {$0, $1}, [$2];", (dtype,) * 2, (address,))


def load2_if(wanted: Boolean, address: Int32, old: tuple) -> tuple:
    """As `load2` where `wanted`, else `old`."""
    return ptx("@$2 ld.shared.v2.b32 {$0, $1}, [$3];", (type(old[0]),) * 2, (wanted, address, *old), tied=2)


def load1(address: Int32, dtype: type = Int32):
    return ptx("ld.shared.b32 $0, [$1];", (dtype,), (address,))[0]


def store1(address: Int32, value: Int32) -> None:
    ptx("st.shared.b32 [$0], $1;", (), (address, value))


def store1_if(wanted: Boolean, address: Int32, value: Int32) -> None:
    ptx("@$0 st.shared.b32 [$1], $2;", (), (wanted, address, value))


def store2_if(wanted: Boolean, address: Int32, values: tuple) -> None:
    ptx("@$0 st.shared.v2.b32 [$1], {$2, $3};", (), (wanted, address, *values))


def store4_if(wanted: Boolean | None, address: Int32, values: tuple) -> None:
    """Four words to shared memory where `wanted`; None is always, without a predicate."""
    if wanted is None:
        return store4(address, values)
    ptx("@$0 st.shared.v4.b32 [$1], {$2, $3, $4, $5};", (), (wanted, address, *values))


def store4(address: Int32, values: tuple) -> None:
    ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", (), (address, *values))


def load_global4_if(wanted: Boolean, address: Int64) -> tuple:
    """Four words of memory that no kernel in flight writes, or zeros."""
    return ptx(
        "@$4 ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$5];", (Int32,) * 4, (wanted, address, *(Int32(0),) * 4), tied=4
    )


def load_global1_if(wanted: Boolean, address: Int64) -> Int32:
    """As `load_global4_if`, one word."""
    return ptx("@$1 ld.global.nc.b32 $0, [$2];", (Int32,), (wanted, address, Int32(0)), tied=1)[0]


def load_global4(address: Int64, wanted: Boolean | bool = True, dtype: type = Float32) -> tuple:
    """Four words of memory that another CTA may have written, or zeros."""
    text = "@$4 ld.global.v4.b32 {$0, $1, $2, $3}, [$5];"
    return ptx(text, (dtype,) * 4, (Boolean(wanted), address, *(dtype(0),) * 4), tied=4, memory=True)


def store_global1_if(wanted: Boolean, address: Int64, value: Int32) -> None:
    ptx("@$0 st.global.b32 [$1], $2;", (), (Boolean(wanted), address, value), memory=True)


def store_global4_if(wanted: Boolean, address: Int64, values: tuple) -> None:
    ptx("@$0 st.global.v4.b32 [$1], {$2, $3, $4, $5};", (), (wanted, address, *values), memory=True)


def store_global4(address: Int64, values: tuple) -> None:
    """Four words."""
    ptx("st.global.v4.b32 [$0], {$1, $2, $3, $4};", (), (address, *values), memory=True)


def store_rounded_if(wanted: Boolean, address: Int64, value: Float32, dtype: type) -> None:
    """The value as `dtype`, where `wanted`."""
    if dtype is Float32:
        ptx("@$0 st.global.f32 [$1], $2;", (), (wanted, address, value))
    else:
        kind = "bf16" if dtype is BFloat16 else "f16"
        text = f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $2; @$0 st.global.b16 [$1], h; }}"
        ptx(text, (), (wanted, address, value))


def round_pair(low: Float32, high: Float32, dtype: type) -> Int32:
    """Two values of a 16-bit type in a word."""
    kind = "bf16x2" if dtype is BFloat16 else "f16x2"
    return ptx(f"cvt.rn.{kind}.f32 $0, $2, $1;", (Int32,), (low, high))[0]


def transpose(word: Int32) -> Int32:
    """8 x 8 16-bit values, two of row lane / 4 in each lane, transposed."""
    return ptx("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", (Int32,), (word,))[0]


def select(condition: Int32, one: Int32, other: Int32) -> Int32:
    """`one` where the condition is not zero."""
    text = "{ .reg .pred p; setp.ne.s32 p, $3, 0; selp.b32 $0, $1, $2, p; }"
    return ptx(text, (Int32,), (one, other, condition), effects=False)[0]


def store_global2_if(wanted: Boolean, address: Int64, values: tuple) -> None:
    ptx("@$0 st.global.v2.b32 [$1], {$2, $3};", (), (wanted, address, *values))


def count_up(address: Int64) -> None:
    """Adds one to a counter, and so publishes what this thread knows to be written."""
    ptx("red.release.gpu.global.add.s32 [$0], 1;", (), (address,), memory=True)


def counted(address: Int64) -> Int32:
    """The counter, with all that was published by raising it to that."""
    return ptx("ld.acquire.gpu.global.s32 $0, [$1];", (Int32,), (address,), memory=True)[0]


def take(address: Int64, lane: Int32) -> Int32:
    """Adds one to a counter for the whole warp; what it was before."""
    (old,) = ptx(
        "{ .reg .pred p; setp.eq.s32 p, $2, 0; mov.b32 $0, 0; @p atom.relaxed.gpu.global.add.s32 $0, [$1], 1; }",
        (Int32,), (address, lane), memory=True,
    )  # fmt: skip
    return cute.arch.shuffle_sync(old, 0)


def fence_async() -> None:
    """What this thread knows to be written is so for bulk copies, too, that it starts from here on."""
    ptx("fence.proxy.async.global;", (), (), memory=True)


@cute.jit
def split_e4m3(word: Int32) -> tuple:
    """64 times each of four e4m3 values, twice each as float16."""
    return ptx(
        """{ .reg .b16 l, h; .reg .b32 x, y, c; mov.b32 {l, h}, $4; mov.b32 c, 0x54005400;
        cvt.rn.f16x2.e4m3x2 x, l; mul.f16x2 x, x, c; prmt.b32 $0, x, x, 0x1010; prmt.b32 $1, x, x, 0x3232;
        cvt.rn.f16x2.e4m3x2 y, h; mul.f16x2 y, y, c; prmt.b32 $2, y, y, 0x1010; prmt.b32 $3, y, y, 0x3232; }""",
        (Int32,) * 4, (word,),
    )  # fmt: skip


def expand_e4m3(word: Int32) -> Int32:
    """64 times the e4m3 value in the lowest byte, twice as float16."""
    return ptx(
        """{ .reg .b16 l, h; .reg .b32 x, c; mov.b32 {l, h}, $1; mov.b32 c, 0x54005400;
        cvt.rn.f16x2.e4m3x2 x, l; mul.f16x2 x, x, c; prmt.b32 $0, x, x, 0x1010; }""",
        (Int32,), (word,),
    )[0]  # fmt: skip


def decode_pairs(word: Int32, factor: Int32) -> tuple:
    """Values 0 and 4 of a word of eight e2m1 codes, then 2 and 6: each 2^-14 of the value, times the factor."""
    # Sign and magnitude are moved to where they stand in a float16.
    return ptx(
        """{ .reg .b32 s, m;
        shl.b32 s, $2, 12; and.b32 s, s, 0x80008000; shl.b32 m, $2, 9; and.b32 m, m, 0x0E000E00;
        or.b32 m, m, s; mul.f16x2 $0, m, $3;
        shl.b32 s, $2, 4; and.b32 s, s, 0x80008000; shl.b32 m, $2, 1; and.b32 m, m, 0x0E000E00;
        or.b32 m, m, s; mul.f16x2 $1, m, $3; }""",
        (Int32,) * 2, (word, factor),
    )  # fmt: skip


def copy_bulk(
    target: Int32, source: Int64, size: Int32, barrier: Int32, ctas: int = 1, policy: Int64 | None = None
) -> None:
    """Start a copy of `size` bytes from global to shared memory, which arrives at `barrier` with its bytes.

    Args:
        ctas: of the cluster that all get it, at the same place and counted by the same barrier of each.
        policy: `EVICT_FIRST`, `EVICT_LAST` or neither.
    """
    name, operands = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", "[$0], [$1], $2, [$3]"
    if ctas > 1:
        name, operands = f"{name}.multicast::cluster", f"{operands}, m"
    if policy is not None:
        name, operands = f"{name}.L2::cache_hint", f"{operands}, $4"
    inputs = (target, source, size, barrier) + (() if policy is None else (policy,))
    mask = f".reg .b16 m; mov.b16 m, {(1 << ctas) - 1}; " if ctas > 1 else ""
    ptx(f"{{ {mask}{name} {operands}; }}", (), inputs)


def fixed(value: Int32) -> Int32:
    """The value, kept in a register: shared memory's address is else computed anew at each use, from a special register."""
    return ptx("mov.b32 $0, $1;", (Int32,), (value,))[0]


def wait(barrier: Int32, phase: Int32) -> None:
    """Waits until the barrier's phase of that parity is complete."""
    text = "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra again; }"
    ptx(text, (), (barrier, phase), memory=True)


def in_cluster(address: Int32, rank: Int32) -> Int32:
    """An address of shared memory, in a CTA of the cluster."""
    return ptx("mapa.shared::cluster.u32 $0, $1, $2;", (Int32,), (address, rank))[0]


def arrive_if(wanted: Boolean, barrier: Int32) -> None:
    """Arrives at a barrier of any CTA of the cluster."""
    ptx("@$0 mbarrier.arrive.shared::cluster.b64 _, [$1];", (), (wanted, barrier), memory=True)


def completed(barrier: Int32, phase: Int32) -> Int32:
    """Whether it is, without waiting."""
    text = "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [$1], $2; selp.s32 $0, 1, 0, p; }"
    return ptx(text, (Int32,), (barrier, phase), memory=True)[0]


def expect_bytes(barrier: Int32, size: Int32) -> None:
    """One arrival, with which the barrier's phase waits for bytes of copies."""
    ptx("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", (), (barrier, size), memory=True)


def scale_pair(word: Int32, turned: Int32 | int) -> Int32:
    """Scale factors of rows g and g + 8 of a warp's 16, as float16 in the two sides of a word.

    Args:
        turned: 0 for the first 16 rows of a block of 32, 8 for the others.
    """
    (word,) = ptx("shf.l.wrap.b32 $0, $1, $1, $2;", (Int32,), (word, Int32(turned)), effects=False)
    return word & 0x7F807F80


def decode_weights(word: Int32, scales: Int32) -> tuple:
    """The left operand's four registers of one step of 16 values of K; `scales` of `scale_pair`."""
    return ptx(
        f"""{{ .reg .b32 s, t, low, high; .reg .b16 l, h;
        mov.b32 {{l, h}}, $5; mov.b32 low, {{l, l}}; mov.b32 high, {{h, h}};
        and.b32 t, $4, {_FIELD}; mul.f16x2 $0, t, low;
        shl.b32 t, $4, 3; and.b32 t, t, {_FIELD}; mul.f16x2 $1, t, high;
        shl.b32 s, $4, 7; shl.b32 t, $4, 10; xor.b32 t, t, s; and.b32 t, t, {_FIELD}; mul.f16x2 $2, t, low;
        shf.l.wrap.b32 t, $4, $4, 12; xor.b32 t, t, s; and.b32 t, t, {_FIELD}; mul.f16x2 $3, t, high; }}""",
        (Int32,) * 4, (word, scales), effects=False,
    )  # fmt: skip


def multiply(acc: tuple, left: tuple, right: tuple) -> tuple:
    """acc plus 16 rows x 16 values of K times 8 tokens."""
    return ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};",
        (Float32,) * 4, (*left, *right, *acc), tied=4,
    )  # fmt: skip
