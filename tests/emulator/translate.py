"""Translate a parsed kernel into one Python function per basic block.

Each opcode has one emitter (in an `isa_*` module). It runs twice: against a `Recorder`, which learns what the
instruction reads, writes and how it views each register, and against a `Generator`, which produces the code.
Between the two, every register gets a storage class (see `values`), and liveness decides which registers a
block writes back.

A block function takes the warp and its register list and returns the next block index, or BLOCKED (re-execute
the block later), HOLD (wait for the warp's other lanes) or EXIT. An instruction that may wait therefore
starts its own block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from . import values
from .flow import TERMINATORS, Block, Effects, WgmmaRegisters
from .flow import liveness, pending_loads, split_blocks, wgmma_registers
from .opcodes import EXIT, NAMESPACE, load_families, lookup
from .ptx import SINK, Imm, Instr, Kernel, Mem, Not, Reg, Special, Symbol, Vec, parse_module
from .report import PtxError
from .wgmma import UNWRITTEN


class Recorder:
    """First pass: reads, writes, and votes on the class of each register half."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.parent: dict[tuple[int, int], tuple[int, int]] = {}
        self.votes: dict[tuple[int, int], set[str]] = {}
        self.wide_votes: dict[int, set[str]] = {}
        self.packed: set[int] = set()  # 64-bit registers that are put together from halves or taken apart
        self.effects = Effects()
        self.emitting, self.mask = False, "m"

    def find(self, node: tuple[int, int]) -> tuple[int, int]:
        while (parent := self.parent.get(node, node)) != node:
            self.parent[node] = node = self.parent.get(parent, parent)
        return node

    def union(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[a] = b
            self.votes.setdefault(b, set()).update(self.votes.pop(a, ()))

    def _vote(self, reg: Reg, cls: str) -> None:
        if reg.width == 64 and cls != "n":
            self.wide_votes.setdefault(reg.index, set()).add("q" if cls == "d" else cls)
            for half in range(2):
                self.votes.setdefault(self.find((reg.index, half)), set()).add("f" if cls == "v" else "i")
        elif reg.width == 32 and cls in "if":
            self.votes.setdefault(self.find((reg.index, 0)), set()).add(cls)

    def read(self, operand: object, cls: str, bits: int = 0) -> str:
        if isinstance(operand, Not):
            operand = operand.reg
        if isinstance(operand, Reg):
            self.effects.reads.append(operand.index)
            self._vote(operand, cls)
        return "0"

    def write(self, operand: object, expr: str, cls: str) -> None:
        if isinstance(operand, Reg):
            self.effects.writes.append(operand.index)
            self._vote(operand, cls)

    def copy(self, dst: object, src: object, bits: int = 0) -> None:
        self.read(src, "n")
        self.write(dst, "", "n")
        if isinstance(dst, Reg) and isinstance(src, Reg):
            for half in range(2 if dst.width == 64 else 1):
                self.union((dst.index, half), (src.index, half))
            if dst.width == 64:
                self.wide_votes.setdefault(dst.index, set())

    def pack(self, dst: object, halves: tuple) -> None:
        self.write(dst, "", "n")
        self.packed.update(r.index for r in (dst,) if isinstance(r, Reg))
        for i, half in enumerate(halves):
            self.read(half, "n")
            if isinstance(half, Reg) and isinstance(dst, Reg):
                self.union((half.index, 0), (dst.index, i))

    def unpack(self, halves: tuple, src: object) -> None:
        self.read(src, "n")
        self.packed.update(r.index for r in (src,) if isinstance(r, Reg))
        for i, half in enumerate(halves):
            self.write(half, "", "n")
            if isinstance(half, Reg) and isinstance(src, Reg):
                self.union((half.index, 0), (src.index, i))

    def storage(self, reg: Reg) -> str:
        return "n"

    def address(self, mem: Mem) -> str:
        self.read(mem.base, "n")
        if isinstance(mem.base, Reg):
            self._vote(mem.base, "q" if mem.base.width == 64 else "i")
        return "0"

    def begin_guard(self, instr: Instr) -> None:
        if instr.guard is not None:
            self.read(instr.guard, "p")

    def line(self, text: str) -> None: ...

    def constant(self, value: object) -> str:
        return "0"

    def temp(self) -> str:
        return "0"

    def classes(self) -> dict[int, object]:
        """Register index -> storage class; class t carries its halves' classes: ("t", low, high)."""

        def half(node: tuple[int, int]) -> str:
            votes = self.votes.get(self.find(node), set())
            return "f" if votes == {"f"} else "i"

        out: dict[int, object] = {}
        for reg in self.kernel.registers:
            if reg.width == 1:
                out[reg.index] = "p"
            elif reg.width <= 16:
                out[reg.index] = "i"
            elif reg.width == 32:
                out[reg.index] = half((reg.index, 0))
            elif reg.width == 64:
                votes = self.wide_votes.get(reg.index, set())
                packed = reg.index in self.packed
                out[reg.index] = (
                    "q"
                    if "q" in votes or not votes and not packed
                    else "v" if "v" in votes else ("t", half((reg.index, 0)), half((reg.index, 1)))
                )
            else:
                out[reg.index] = "o"  # b128: a Python list of four i values
        return out


def _convert(expr: str, have: object, want: object) -> str:
    """Code that changes a value's class without changing its bits."""
    if have == want:
        return expr
    if isinstance(have, tuple) and isinstance(want, tuple):
        return f"({_convert(f'{expr}[0]', have[1], want[1])}, {_convert(f'{expr}[1]', have[2], want[2])})"
    if isinstance(have, tuple):  # t -> q, v
        target = "f" if want == "v" else "i"
        halves = ", ".join(_convert(f"{expr}[{i}]", have[i + 1], target) for i in range(2))
        return f"ff2v({halves})" if want == "v" else _convert(f"t2q({halves})", "q", want)
    if isinstance(want, tuple):
        if have == "v":
            return f"({', '.join(_convert(f'v_half({expr}, {i})', 'f', want[i + 1]) for i in range(2))})"
        return _convert(f"q2t({_convert(expr, have, 'q')})", ("t", "i", "i"), want)
    direct = {
        ("i", "f"): "i2f({})",
        ("f", "i"): "f2i({})",
        ("q", "v"): "q2v({})",
        ("v", "q"): "v2q({})",
        ("q", "d"): "q2d({})",
        ("d", "q"): "d2q({})",
        ("d", "v"): "q2v(d2q({}))",
        ("v", "d"): "q2d(v2q({}))",
        ("i", "q"): "wrap64({})",
        ("q", "i"): "wrap32({})",
    }
    return direct[have, want].format(expr)


class Generator:
    """Second pass: Python source of one block."""

    def __init__(
        self, kernel: Kernel, classes: dict[int, object], constants: dict[str, object], wgmma: WgmmaRegisters
    ) -> None:
        self.kernel, self.classes, self.constants = kernel, classes, constants
        self.lines: list[str] = []
        self.loaded: list[int] = []
        self.known: set[int] = set()
        self.written: list[int] = []
        self.origin: dict[int, tuple[str, int]] = (
            {}
        )  # register -> (2-D value of a tcgen05.ld, row), while it holds that row
        self.temps = 0
        self.indent = ""
        self.mask = "m"
        self.emitting = True
        self.wgmma = wgmma.accumulators | wgmma.left
        self.tracked = self.wgmma  # empty in instructions that may use them in flight
        self.touched: set[int] = set()

    def line(self, text: str) -> None:
        self.lines.append(self.indent + text)

    def temp(self) -> str:
        self.temps += 1
        return f"t{self.temps}"

    def constant(self, value: object) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def storage(self, reg: Reg) -> object:
        return self.classes[reg.index]

    def _load(self, reg: Reg) -> str:
        if reg.index not in self.known:
            self.known.add(reg.index)
            self.loaded.append(reg.index)
        return f"v{reg.index}"

    def read(self, operand: object, cls: str, bits: int = 32) -> str:
        """Code for an operand's value in class `cls` (i: `bits` wide)."""
        if isinstance(operand, Reg):
            self._touch(operand)
            return _convert(self._load(operand), self.classes[operand.index], cls)
        if isinstance(operand, Not):
            return f"pnot({self.read(operand.reg, 'p')})"
        if isinstance(operand, Imm):
            return self._immediate(operand, cls, bits)
        if isinstance(operand, Special):
            return _convert(f"w.special({operand.name!r})", "i", "i" if cls == "q" else cls)
        if isinstance(operand, Symbol):
            return f"w.symbol({operand.name!r}, {operand.offset})"
        if operand is SINK:
            return "0"
        raise PtxError(f"cannot read operand {operand}")

    def _immediate(self, operand: Imm, cls: str, bits: int) -> str:
        if cls == "p":
            return str(bool(operand.value))
        if cls == "f":
            pattern = operand.value if operand.is_float else operand.value & values.M32
            return self.constant(np.uint32(pattern).view(np.float32))
        if cls == "d":
            return self.constant(np.uint64(operand.value & values.M64).view(np.float64))
        if cls == "v":
            return self.constant(values.q2v(operand.value & values.M64))
        return str(operand.value & (values.M64 if cls == "q" else (1 << bits) - 1))

    def start(self, instr: Instr) -> None:
        self.instr, self.tracked = instr, self.wgmma

    def _touch(self, reg: Reg) -> None:
        """Once per block, for the instructions of wgmma start blocks."""
        if reg.index in self.tracked and reg.index not in self.touched:
            if not self.indent:
                self.touched.add(reg.index)
            self.line(f"w.wgmma.touch({reg.index}, {self.instr.line})")

    def write(self, operand: object, expr: str, cls: str) -> None:
        if operand is SINK:
            self.line(expr)
            return
        self._touch(operand)
        want = self.classes[operand.index]
        expr = _convert(expr, cls, want)
        if self.mask != "m":
            function = "merge_q" if want == "q" else "merge"
            expr = f"{function}({self.mask}, {expr}, {self._load(operand)})"
        self.known.add(operand.index)
        self.origin.pop(operand.index, None)
        if operand.index not in self.written:
            self.written.append(operand.index)
        self.line(f"v{operand.index} = {expr}")

    def copy(self, dst: Reg, src: object, bits: int = 32) -> None:
        if isinstance(src, Reg):  # ptxas removes moves between registers
            self.tracked = frozenset()
        elif dst.index in self.tracked:
            self.tracked = frozenset()
            self.line(f"w.wgmma.initialize({dst.index}, {self.instr.line})")
        want = self.classes[dst.index]
        if isinstance(want, tuple):
            have = self.classes[src.index] if isinstance(src, Reg) else "q"
            self.write(dst, _convert(self.read(src, have), have, want), want)
        else:
            self.write(dst, self.read(src, want, bits), want)

    def pack(self, dst: Reg, halves: tuple) -> None:
        want = self.classes[dst.index]
        if want == "q":
            low, high = (self.read(h, "i") for h in halves)
            self.write(dst, f"t2q({low}, {high})", "q")
        elif want == "v":
            rows = [self.origin.get(h.index) if isinstance(h, Reg) else None for h in halves]
            low, high = (self.read(h, "f") for h in halves)
            if rows[0] and rows[1] == (
                rows[0][0],
                rows[0][1] + 1,
            ):  # adjacent rows of one load are already packed
                self.write(dst, f"{rows[0][0]}[{rows[0][1]}:{rows[0][1] + 2}]", "v")
            else:
                self.write(dst, f"ff2v({low}, {high})", "v")
        else:
            low, high = (self.read(h, c) for h, c in zip(halves, want[1:]))
            self.write(dst, f"({low}, {high})", want)

    def unpack(self, halves: tuple, src: object) -> None:
        have = self.classes[src.index] if isinstance(src, Reg) else "q"
        t = self.temp()
        source = self.read(src, have)
        if have == "q":
            self.line(f"{t} = q2t({source})")
            have = ("t", "i", "i")
        else:
            self.line(f"{t} = {source}")
        for i, half in enumerate(halves):
            if half is not SINK:
                if have == "v":
                    self.write(half, f"v_half({t}, {i})", "f")
                else:
                    self.write(half, f"{t}[{i}]", have[i + 1])

    def address(self, mem: Mem) -> str:
        base = mem.base
        if isinstance(base, Reg):
            text = self.read(base, "q" if base.width == 64 else "i")
        elif isinstance(base, Symbol):
            text = self.read(base, "i")
        else:
            text = str(base.value)
        if mem.offset == 0:
            return text
        return f"{text} + {mem.offset}" if mem.offset > 0 else f"{text} - {-mem.offset}"

    def begin_guard(self, instr: Instr) -> None:
        self.start(instr)
        if instr.guard is not None:
            guard = self.read(instr.guard, "p")
            for operand in instr.operands:  # a destination keeps its old value in lanes the guard turns off
                for reg in operand.items if isinstance(operand, Vec) else (operand,):
                    if isinstance(reg, Reg):
                        self._load(reg)
            self.line(f"g = guard(m, {f'pnot({guard})' if instr.guard_negated else guard})")
            self.line("if g is not False:")
            self.indent, self.mask = "    ", "g"

    def end_guard(self) -> None:
        self.indent, self.mask = "", "m"


@dataclass
class Program:
    """A kernel ready to run."""

    kernel: Kernel
    blocks: list[Block]
    functions: list[Callable]
    live_in: list[frozenset[int]]
    lengths: list[int]
    source: str
    zero_registers: list  # what a register holds before anything writes it: undefined in PTX, zero here
    pending_loads: dict[int, frozenset[int]] = field(
        default_factory=dict
    )  # line -> lines of tcgen05.ld possibly in flight
    wgmma: WgmmaRegisters = WgmmaRegisters()


def translate(kernel: Kernel) -> Program:
    recorder = Recorder(kernel)
    effects = []
    for instr in kernel.instrs:
        recorder.effects = Effects()
        recorder.begin_guard(instr)
        if instr.parts[0] in TERMINATORS:
            if instr.parts[0] == "brx":
                recorder.read(instr.operands[0], "i")
        else:
            try:
                lookup(instr, kernel.target).emit(recorder, instr)
            except PtxError:
                raise
            except Exception as error:
                raise PtxError(f"line {instr.line}: cannot translate: {instr.text} ({error!r})") from error
        effects.append(recorder.effects)
    blocks = split_blocks(kernel)
    liveness(kernel, blocks, effects)
    classes = recorder.classes()
    constants: dict[str, object] = {}
    index = {b.start: n for n, b in enumerate(blocks)}
    wgmma = wgmma_registers(kernel, effects)
    source = []
    for n, block in enumerate(blocks):
        gen = Generator(kernel, classes, constants, wgmma)
        source.append(_block_source(gen, n, block, index))
    text = "\n".join(source)
    namespace = {**NAMESPACE, **constants}
    exec(compile(text, f"<ptx {kernel.name[:40]}>", "exec"), namespace)  # noqa: S102
    functions = [namespace[f"b{n}"] for n in range(len(blocks))]
    zeros = [
        UNWRITTEN if r.index in wgmma.accumulators and classes[r.index] == "f" else _zero(classes[r.index])
        for r in kernel.registers
    ]
    return Program(
        kernel,
        blocks,
        functions,
        [b.live_in for b in blocks],
        [b.end - b.start for b in blocks],
        text,
        zeros,
        pending_loads(kernel, blocks, effects),
        wgmma,
    )


def _zero(cls: object) -> object:
    if isinstance(cls, tuple):
        return _zero(cls[1]), _zero(cls[2])
    return {
        "p": False,
        "i": 0,
        "q": 0,
        "f": np.float32(0),
        "v": np.zeros((2, 1), np.float32),
        "o": [0, 0, 0, 0],
    }[cls]


def _block_source(gen: Generator, n: int, block: Block, index: dict) -> str:
    kernel, classes = gen.kernel, gen.classes
    final = f"return {n + 1}" if n + 1 < len(index) else f"return {EXIT}"
    for i in range(block.start, block.end):
        instr = kernel.instrs[i]
        kind = instr.parts[0]
        if kind in TERMINATORS:
            gen.start(instr)
            final = _terminator(gen, instr, n, kernel, index)
        else:
            gen.begin_guard(instr)
            lookup(instr).emit(gen, instr)
            gen.end_guard()
    out = [f"def b{n}(w, R):", "    m = w.mask"]
    out += [f"    v{r} = R[{r}]" for r in gen.loaded]
    out += ["    " + line for line in gen.lines]
    live = [r for r in gen.written if r in block.live_out]
    if live:
        out.append("    if m is None:")
        out += [f"        R[{r}] = v{r}" for r in live]
        out += ["    else:", "        P = w.protect"]
        for r in live:
            function = "merge_q" if classes[r] == "q" else "merge"
            out.append(f"        R[{r}] = {function}(m, v{r}, R[{r}]) if {r} in P else v{r}")
    out.append("    " + final)
    return "\n".join(out)


def _terminator(gen: Generator, instr: Instr, n: int, kernel: Kernel, index: dict) -> str:
    kind = instr.parts[0]
    if kind == "trap":
        return f"return w.trap({instr.line})"
    if kind == "brx":
        targets = tuple(index[kernel.labels[t]] for t in kernel.branch_tables[instr.operands[1].name])
        return f"return w.branch_indexed(m, {gen.read(instr.operands[0], 'i')}, {targets})"
    target = index[kernel.labels[instr.operands[0].name]] if kind == "bra" else EXIT
    if instr.guard is None:
        return f"return {target}"
    guard = gen.read(instr.guard, "p")
    taken, other = (n + 1, target) if instr.guard_negated else (target, n + 1)
    gen.line(f"c = {guard}")
    return (
        f"return ({taken} if c else {other}) if c is True or c is False else w.branch(m, c, {taken}, {other})"
    )


_cache: dict[int, dict[str, Program]] = {}


def program(ptx: str, kernel: str) -> Program:
    """The translated kernel, cached by PTX text."""
    load_families()
    programs = _cache.setdefault(hash(ptx), {})
    if kernel not in programs:
        parsed = parse_module(ptx)
        if kernel not in parsed:
            raise PtxError(f"kernel {kernel} is not in the PTX, which has {sorted(parsed)}")
        programs[kernel] = translate(parsed[kernel])
    return programs[kernel]
