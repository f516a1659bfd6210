"""Warpgroup matrix multiply of sm_90a: what is in flight, and what it computes (PTX ISA 9.7.15, "Asynchronous
warpgroup level matrix multiply-accumulate operations").

A wgmma is one operation of four warps: it may run once all of them have issued it, in the warpgroup's order,
and it is complete for any of them when `wgmma.wait_group` says so. Until then its accumulator registers hold
`InFlight` objects, which nothing but a move or a further wgmma may use.

Arithmetic: operand products are exact; the K terms of one instruction and the accumulator are summed in
float64 and rounded once to float32. What the hardware does inside one instruction (order, alignment,
truncation) is not specified.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

import numpy as np

from .isa_mma import a_fragment_index, fragment_values
from .report import Fault
from .umma import SmemDescriptor, matrix_product, operand_words, smem_operand
from .values import LANES

_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}
_KIND = {16: "f16", 32: "tf32", 8: "f8f6f4"}  # names of umma's operand kinds, by element bits


@functools.lru_cache(maxsize=1 << 14)
def decode_descriptor(bits: int) -> SmemDescriptor:
    """64-bit matrix descriptor of wgmma ("Matrix descriptor format").

    bits 13:0 start address >> 4; 29:16 leading-dimension byte offset >> 4; 45:32 stride-dimension byte offset
    >> 4; 51:49 base offset; 63:62 swizzle: 0 none, 1 128B, 2 64B, 3 32B. The strides mean what tcgen05's do.
    """
    other = bits & ~(3 << 62 | 7 << 49 | 0x3FFF << 32 | 0x3FFF << 16 | 0x3FFF)
    if other:
        raise Fault(f"matrix descriptor {bits:#018x} has bits {other:#x} set, which wgmma does not define")
    if bits >> 49 & 7:
        raise Fault(f"matrix descriptor {bits:#018x}: base offset {bits >> 49 & 7} is not modelled")
    swizzle = (0, 2, 4, 6)[bits >> 62]
    return SmemDescriptor(
        (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, swizzle
    )


@functools.lru_cache(maxsize=None)
def accumulator_index(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of element [register, lane] of one warp's 16 x n part of D ("Register fragments"):
    row lane/4 + 8*((register/2)%2), column 8*(register/4) + 2*(lane%4) + register%2."""
    r, t = np.arange(n // 2)[:, None], LANES[None, :]
    return t // 4 + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * (t % 4) + r % 2


@dataclass(frozen=True, eq=False)
class Form:
    """What one wgmma.mma_async instruction says, apart from the values of its operands."""

    line: int
    n: int
    k: int
    a_kind: str
    b_kind: str
    d_registers: tuple[int, ...]
    a_registers: tuple[int, ...]  # empty when A comes from shared memory
    negate_a: bool
    negate_b: bool
    a_mn: bool
    b_mn: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "registers", frozenset(self.d_registers + self.a_registers))
        object.__setattr__(self, "busy", dict.fromkeys(self.d_registers + self.a_registers, self.line))


class InFlight:
    """An accumulator register between a wgmma and the wait that covers it."""

    __slots__ = ("op", "row")

    def __init__(self, op: Op, row: int) -> None:
        self.op, self.row = op, row

    def refuse(self, *_args: object, **_kwargs: object) -> None:
        raise Fault(
            f"a copy of an accumulator register is used while the wgmma.mma_async at PTX line "
            f"{self.op.form.line} is in flight (no wgmma.wait_group covers it)"
        )

    __array__ = __float__ = __int__ = __index__ = __bool__ = __neg__ = __abs__ = __invert__ = refuse


for _name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "lshift", "rshift"):
    setattr(InFlight, f"__{_name}__", InFlight.refuse)
    setattr(InFlight, f"__r{_name}__", InFlight.refuse)
for _name in ("lt", "le", "gt", "ge"):
    setattr(InFlight, f"__{_name}__", InFlight.refuse)

UNWRITTEN = np.float32(0)  # what an accumulator register holds before anything writes it; told by identity


class Op:
    """One wgmma of a warpgroup."""

    def __init__(self, group: Warpgroup, form: Form, number: int, operands: tuple) -> None:
        self.group, self.form, self.number, self.operands = group, form, number, operands
        self.accumulators: list = [None] * 4  # per warp: what D holds before (an Op, or float32[n / 2, 32])
        self.left: list = [None] * 4  # per warp: A registers
        self.issued = 0
        self.done = False
        self.waiters: list = []
        self.clock = None  # vector clock, see checks
        self.result: np.ndarray | None = None  # float32[64, n]

    def execute(self) -> None:
        form, cta = self.form, self.group.cta
        a_bits, b_bits, scale_d = self.operands
        kind = _KIND[_BITS[form.a_kind]]
        if form.a_registers:
            a = np.zeros((64, form.k))
            index = a_fragment_index(_BITS[form.a_kind], form.k)
            for slot, registers in enumerate(self.left):
                a[16 * slot : 16 * slot + 16][index] = fragment_values(registers, form.a_kind)
        else:
            a = smem_operand(cta, decode_descriptor(a_bits), 64, form.a_kind, form.a_mn, kind)
        b = smem_operand(cta, decode_descriptor(b_bits), form.n, form.b_kind, form.b_mn, kind)
        total = matrix_product(a, b)
        if form.negate_a != form.negate_b:
            total = -total
        if scale_d:
            total += self._before()
        self.result = total.astype(np.float32)
        self.accumulators = self.left = []
        self.done = True
        cta.cluster.machine.wake(self.waiters)

    def _before(self) -> np.ndarray:
        first = self.accumulators[0]
        if isinstance(first, Op) and all(x is first for x in self.accumulators):
            return first.result
        out = np.empty((64, self.form.n), np.float32)
        for slot, x in enumerate(self.accumulators):
            part = out[16 * slot : 16 * slot + 16]
            if isinstance(x, Op):
                part[:] = x.result[16 * slot : 16 * slot + 16]
            else:
                part[accumulator_index(self.form.n)] = x
        return out

    def fragments(self, slot: int) -> np.ndarray:
        """float32[n / 2, 32]: one warp's registers."""
        return self.result[16 * slot : 16 * slot + 16][accumulator_index(self.form.n)]

    def missing(self) -> str:
        late = [w.index for w in self.group.warps if w.wgmma.number <= self.number]
        return f" (warps {late} of the warpgroup have not issued it)" if late else ""


class Warpgroup:
    """Four consecutive warps, the first one's number a multiple of four, and their operations in order."""

    def __init__(self, cta, number: int) -> None:
        self.cta, self.number = cta, number
        self.warps = cta.warps[4 * number : 4 * number + 4]
        if len(self.warps) < 4:
            raise Fault(f"wgmma by a warpgroup of {len(self.warps)} warps; it takes four")
        self.pipe: deque = deque()
        self.open: dict[int, Op] = {}  # operations that some of the warps have yet to issue

    def operation(self, w, form: Form, operands: tuple) -> Op:
        """The warp's next operation, which must be the same in all four warps."""
        number = w.wgmma.number
        op = self.open.get(number)
        if op is None:
            op = self.open[number] = Op(self, form, number, operands)
        elif op.form is not form or op.operands != operands:
            raise Fault(
                f"the warps of a warpgroup must execute the same wgmma.mma_async: another warp's was at PTX "
                f"line {op.form.line} with (A, B descriptor, scale-d) {_show(op.operands)}, this one is at "
                f"line {form.line} with {_show(operands)}"
            )
        w.wgmma.number += 1
        return op

    def issue(self, w, op: Op) -> None:
        """Start the operation when the last warp has arrived."""
        op.issued += 1
        if op.issued == 4:
            del self.open[op.number]
            self.cta.cluster.machine.counters["wgmma.mma_async"] += 1
            self.cta.cluster.machine.submit(self.cta.cluster, op.execute, self.pipe)


def _show(operands: tuple) -> str:
    a, b, scale_d = operands
    return f"({a if a is None else hex(a)}, {b:#x}, {scale_d})"


class WarpState:
    """One warp's view: operations not yet waited for, and registers touched since the last wgmma.fence."""

    def __init__(self, w) -> None:
        self.w = w
        self.number = 0  # of the next operation
        self.open: list[Op] = []  # not yet committed
        self.groups: list[list[Op]] = []
        self.busy: dict[int, int] = {}  # register -> PTX line of the wgmma that uses it
        self.unfenced: dict[int, int] = {}  # register -> PTX line of the last access by the warp
        self.fenced = False

    def _name(self, register: int) -> str:
        return self.w.machine.program.kernel.registers[register].name

    def touch(self, register: int, line: int) -> None:
        """The warp itself reads or writes a register that some wgmma uses."""
        self.initialize(register, line)
        self.unfenced[register] = line

    def initialize(self, register: int, line: int) -> None:
        """A constant is written. Compilers sink these below the wgmma.fence, so it need not follow them."""
        at = self.busy.get(register)
        if at is not None:
            self.w.line = line
            raise Fault(
                f"register {self._name(register)} is accessed while the wgmma.mma_async at PTX line {at} is "
                "in flight (no wgmma.wait_group covers it)"
            )

    def fence(self) -> None:
        self.unfenced.clear()
        self.fenced = True

    def check_fence(self, form: Form) -> None:
        if not self.fenced:
            raise Fault("wgmma.mma_async without a wgmma.fence before the first one")
        if not self.unfenced.keys().isdisjoint(form.registers):
            register = min(self.unfenced.keys() & form.registers)
            raise Fault(
                f"wgmma.mma_async uses register {self._name(register)}, which the warp accessed at PTX line "
                f"{self.unfenced[register]} with no wgmma.fence between"
            )

    def accumulator(self, form: Form, values: list, accumulate: bool):
        """What D holds before the operation: the operation in flight on the same registers, or their
        values."""
        first = values[0]
        if type(first) is InFlight:
            op = first.op
            if op.form.n != form.n or any(
                type(v) is not InFlight or v.op is not op or v.row != i for i, v in enumerate(values)
            ):
                raise Fault(
                    f"wgmma.mma_async accumulates in registers of which the one at PTX line {op.form.line} "
                    "uses only some, or with another shape, and is still in flight"
                )
            return op
        for register, value in zip(form.d_registers, values):
            if type(value) is InFlight or register in self.busy:
                raise Fault(
                    f"wgmma.mma_async accumulates in register {self._name(register)}, which another one "
                    f"still uses (PTX line {self.busy.get(register)})"
                )
            if accumulate and value is UNWRITTEN:
                raise Fault(
                    f"wgmma.mma_async accumulates onto register {self._name(register)}, which nothing has "
                    "written (scale-d must be false for the first one)"
                )
        if not accumulate:
            return None
        out = np.empty((len(values), 32), np.float32)
        for i, v in enumerate(values):
            out[i] = (
                v
                if getattr(v, "dtype", None) == np.float32
                else np.asarray(v).astype(np.uint32).view(np.float32)
            )
        return out

    def start(self, form: Form, d: list, a: list, operands: tuple) -> list[InFlight]:
        w, group = self.w, self.w.cta.warpgroup(self.w.index // 4)
        if w.check:
            self.check_fence(form)
        for register, value in zip(form.a_registers, a):
            if type(value) is InFlight:
                raise Fault(
                    f"the left operand {self._name(register)} is an accumulator of the wgmma.mma_async at "
                    f"PTX line {value.op.form.line}, which is in flight"
                )
        before = self.accumulator(form, d, operands[2])
        op = group.operation(w, form, operands)
        slot = w.index % 4
        op.accumulators[slot], op.left[slot] = before, a
        if w.check:
            self._check_operands(op)
        self.open.append(op)
        self.busy.update(form.busy)
        group.issue(w, op)
        return [InFlight(op, i) for i in range(len(d))]

    def _check_operands(self, op: Op) -> None:
        check, form, rank = self.w.check, op.form, self.w.cta.rank
        ticket = check.issue_wgmma(self.w, op)
        kind = _KIND[_BITS[form.a_kind]]
        if not form.a_registers:
            at = operand_words(decode_descriptor(op.operands[0]), 64, form.a_kind, form.a_mn, kind)
            check.async_smem_read(ticket, rank, at, "wgmma matrix A")
        at = operand_words(decode_descriptor(op.operands[1]), form.n, form.b_kind, form.b_mn, kind)
        check.async_smem_read(ticket, rank, at, "wgmma matrix B")

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, registers: list, keep: int) -> bool:
        """Every group older than the `keep` newest must be complete; their registers get their values."""
        groups = self.groups
        older = groups[: len(groups) - keep] if keep else groups
        last = next((group[-1] for group in reversed(older) if group), None)
        if last is not None:
            if not last.done:
                if self.w not in last.waiters:
                    last.waiters.append(self.w)
                self.w.wait(lambda: f"the wgmma.mma_async at PTX line {last.form.line}{last.missing()}")
                return False
            self._settle(registers, last)
        del groups[: len(older)]
        self.busy = {}
        for op in (op for group in (*groups, self.open) for op in group):
            self.busy.update(op.form.busy)
        return True

    def _settle(self, registers: list, last: Op) -> None:
        w = self.w
        w.machine.counters["wgmma waits"] += 1
        if w.check:
            w.check.wgmma_waited(w, last)
        values: dict[int, np.ndarray] = {}
        zeros = w.machine.program.zero_registers
        for index in w.machine.program.wgmma.copies:
            held = registers[index]
            if type(held) is InFlight and held.op.number <= last.number:
                found = values.get(held.op.number)
                if found is None:
                    found = values[held.op.number] = held.op.fragments(w.index % 4)
                row = found[held.row]
                as_float = isinstance(zeros[index], np.floating)
                registers[index] = row if as_float else row.view(np.uint32).astype(np.int64)

    def exit(self) -> None:
        pending = [op for group in (*self.groups, self.open) for op in group]
        if pending:
            raise Fault(
                f"warp {self.w.index} exits while the wgmma.mma_async at PTX line {pending[0].form.line} is "
                "in flight: the shared memory it reads may be gone"
            )
