"""Instructions of SM 9.0 that the dense kernel writes out: bulk copies, warpgroup products, decoding.

Values are the DSL's; shared memory addresses are 32-bit integers of the executing CTA's window.
"""
from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass._mlir.dialects import llvm

# High half of such a descriptor: the swizzle's code, and 1024 bytes from one group of 8 rows to the next.
_K_MAJOR_HIGH = 1 << 30 | 1024 >> 4
_LETTERS = {cutlass.Float32: "f", cutlass.Int32: "r", cutlass.Int64: "l", cutlass.Boolean: "b"}


def assembly(text: str, outputs: list, inputs: list, *, ordered: bool = True, tied: int = 0) -> list:
    """Inline PTX: operands $0.. are the outputs, then the inputs; the values of the outputs.

    Args:
        outputs: their DSL types. inputs: DSL values.
        ordered: whether it keeps its place among other ordered instructions and memory accesses.
        tied: as many leading inputs share the registers of the outputs.
    """
    constraints = ["=" + _LETTERS[t] for t in outputs]
    constraints += [str(i) if i < tied else _LETTERS[type(x)] for i, x in enumerate(inputs)]
    if ordered:
        constraints.append("~{memory}")
    types = [t.mlir_type for t in outputs]
    result = types[0] if len(types) == 1 else llvm.StructType.get_literal(types) if types else None
    value = llvm.inline_asm(
        result, [x.ir_value() for x in inputs], text, ",".join(constraints), has_side_effects=ordered,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )  # fmt: skip
    if len(types) < 2:
        return [t(value) for t in outputs]
    return [t(llvm.extractvalue(t.mlir_type, value, [i])) for i, t in enumerate(outputs)]


def bulk_copy(target, source: cute.Pointer, count: int, barrier, policy) -> None:
    """`count` bytes from global to this CTA's shared memory, counted by an mbarrier of it."""
    assembly(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$0], [$1], $2, [$3], $4;",
        [], [target, source.toint(), cutlass.Int32(count), barrier, policy],
    )  # fmt: skip


def bulk_multicast(target, source: cute.Pointer, count: int, barrier, ctas: int, policy) -> None:
    """`bulk_copy` into all CTAs of a mask, at the same place and counted by the same barrier of each."""
    assembly(
        "{ .reg .b16 m; cvt.u16.u32 m, $4; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [$0], [$1], $2, [$3], m, $5; }",
        [], [target, source.toint(), cutlass.Int32(count), barrier, cutlass.Int32(ctas), policy],
    )  # fmt: skip


def load_shared4(address, dtype=cutlass.Int32) -> list:
    kind = "b32" if dtype is cutlass.Int32 else "f32"
    return assembly(f"ld.shared.v4.{kind} {{$0, $1, $2, $3}}, [$4];", [dtype] * 4, [address])


def load_shared2(address) -> list:
    return assembly("ld.shared.v2.f32 {$0, $1}, [$2];", [cutlass.Float32] * 2, [address])


def decode_weights(word, factors) -> list:
    """The left operand's four registers of one step from a word of prepared weights, float16 2^-8 of the values.

    Args:
        factors: rows g (low side) and g + 8 (high side), as float16 bits.
    """
    return assembly(
        """{ .reg .b32 t, u, v, low, high; .reg .b16 l, h;
        mov.b32 {l, h}, $5; mov.b32 low, {l, l}; mov.b32 high, {h, h};
        and.b32 t, $4, 0x8E008E00; mul.f16x2 $0, t, low;
        shl.b32 t, $4, 3; and.b32 t, t, 0x8E008E00; mul.f16x2 $1, t, high;
        and.b32 u, $4, 0x40384038; mul.lo.u32 u, u, 66; and.b32 u, u, 0x8E008E00; mul.f16x2 $2, u, low;
        and.b32 v, $4, 0x20072007; mul.lo.u32 v, v, 516; and.b32 v, v, 0x8E008E00; mul.f16x2 $3, v, high; }""",
        [cutlass.Int32] * 4, [word, factors], ordered=False,
    )  # fmt: skip


def turn(word, bits) -> cutlass.Int32:
    """Rotated to the left."""
    return assembly("shf.l.wrap.b32 $0, $1, $1, $2;", [cutlass.Int32], [word, bits], ordered=False)[0]


def multiply(sums: list | None, left: list, right: cutlass.Int32, tokens: int) -> list:
    """Steps of 64 rows x `tokens` x 16 values begin and are committed as one group; the accumulators.

    Args:
        sums: tokens / 2 accumulators, or None to begin with zero.
        left: four registers for each step.
        right: low half of the descriptor of the right operand's first step; steps are 32 bytes apart.
    """
    count = tokens // 2
    first = count if sums else 0
    registers = ", ".join(f"${i}" for i in range(count))
    a = [f"${count + first + i}" for i in range(len(left))]
    lines = [
        ".reg .pred p, q; .reg .b32 low; .reg .b64 d; setp.ne.b32 p, 1, 0; setp.ne.b32 q, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(len(left) // 4):
        lines.append(f"add.s32 low, ${count + first + len(left)}, {2 * step}; mov.b64 d, {{low, {_K_MAJOR_HIGH}}};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.f16.f16 {{{registers}}}, "
            f"{{{', '.join(a[4 * step : 4 * step + 4])}}}, d, {'p' if sums or step else 'q'}, 1, 1, 0;"
        )
    lines.append("wgmma.commit_group.sync.aligned;")
    return assembly(
        "{ " + "\n".join(lines) + " }", [cutlass.Float32] * count, [*(sums or []), *left, right], tied=first
    )


def descriptor(address) -> cutlass.Int32:
    """Low half of the descriptor of a K-major operand with 128-byte swizzle, for `multiply`."""
    return (address >> 4) | 1 << 16


def wait_multiply(pending: int) -> None:
    """Waits until at most `pending` groups are unfinished."""
    assembly(f"wgmma.wait_group.sync.aligned {pending};", [], [])


def finish_multiply(sums: list, ready: list) -> tuple[list, list]:
    """Waits for all groups; the accumulators, readable, and registers that must be computed before the wait."""
    count = len(sums)
    types = [cutlass.Float32] * count + [cutlass.Int32] * len(ready)
    values = assembly("wgmma.wait_group.sync.aligned 0;", types, [*sums, *ready], tied=len(types))
    return values[:count], values[count:]


def store_if(wanted: cutlass.Boolean, address: cutlass.Int64, value: cutlass.Float32, dtype: type) -> None:
    """The value in another type to global memory, where `wanted`."""
    if dtype is cutlass.Float32:
        text = "@$0 st.global.f32 [$1], $2;"
    else:
        kind = "bf16" if dtype is cutlass.BFloat16 else "f16"
        text = f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $2; @$0 st.global.b16 [$1], h; }}"
    assembly(text, [], [wanted, address, value])


def store_global4(address: cutlass.Int64, values: list) -> None:
    assembly("st.global.v4.f32 [$0], {$1, $2, $3, $4};", [], [address, *values])


def load_global4(address: cutlass.Int64) -> list:
    return assembly("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", [cutlass.Float32] * 4, [address])


def signal(address: cutlass.Int64) -> None:
    """Adds one to a counter, for readers of what this thread knows to be written."""
    assembly("red.release.gpu.global.add.s32 [$0], 1;", [], [address])


def counted(address: cutlass.Int64) -> cutlass.Int32:
    """The counter, with all that was written before it was raised to that."""
    return assembly("ld.acquire.gpu.global.s32 $0, [$1];", [cutlass.Int32], [address])[0]
