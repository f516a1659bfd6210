"""Parse PTX text into kernels: variables, parameters, and a flat list of instructions with their source
lines.

Only syntax lives here; what an opcode means is in the `isa_*` modules. Scopes opened by `{` inside a body
(inline assembly) get their own names for the registers and labels they declare.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .report import PtxError

# Modelled targets: compute capability, and the number of SMs (of a B200; of an H100 SXM or H200).
TARGETS = {"sm_100a": ((10, 0), 148), "sm_90a": ((9, 0), 132)}

_WIDTHS = {
    "pred": 1,
    "b8": 8,
    "u8": 8,
    "s8": 8,
    "b16": 16,
    "u16": 16,
    "s16": 16,
    "f16": 16,
    "f16x2": 32,
    "b32": 32,
    "u32": 32,
    "s32": 32,
    "f32": 32,
    "b64": 64,
    "u64": 64,
    "s64": 64,
    "f64": 64,
    "b128": 128,
}


@dataclass(frozen=True)
class Reg:
    index: int
    width: int  # bits; 1 for a predicate
    name: str


@dataclass(frozen=True)
class Imm:
    value: int  # integer value, or the bit pattern of a float literal
    is_float: int = 0  # width of the float literal: 0, 32 or 64


@dataclass(frozen=True)
class Special:
    name: str  # "tid.x", "clusterid.y", ...


@dataclass(frozen=True)
class Symbol:
    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Mem:
    base: object  # Reg, Imm or Symbol
    offset: int
    coords: tuple = ()


@dataclass(frozen=True)
class Pair:
    """`d|p`: a destination and a predicate destination."""

    first: object
    second: object


@dataclass(frozen=True)
class Not:
    """`!p` used as an operand."""

    reg: Reg


class Sink:
    """`_`: a destination that is thrown away (or an unused half of a pack)."""


SINK = Sink()


@dataclass
class Instr:
    opcode: str
    operands: list
    guard: Reg | None
    guard_negated: bool
    line: int
    text: str

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")


@dataclass
class Variable:
    name: str
    space: str  # shared, global, const, local, param
    size: int
    align: int
    offset: int = 0
    data: bytes | None = None


@dataclass
class Kernel:
    name: str
    params: list[Variable]
    target: str  # of the module: sm_100a or sm_90a
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of the instruction that follows it
    variables: dict[str, Variable] = field(default_factory=dict)  # shared, local, global, const
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    registers: list[Reg] = field(default_factory=list)
    reqntid: tuple[int, ...] | None = None
    param_bytes: int = 0


def _strip_comments(text: str) -> str:
    """Blank comments out, keeping line breaks so that line numbers stay true."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.M)  # line information has no semicolon


_ENTRY = re.compile(r"\.(entry|func)\b")
_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+((?:\.\w+\s+|\.align\s+\d+\s+|\.attribute\([^)]*\)\s*)*)\.(\w+)\s+"
    r"([$\w]+)\s*(\[[^\]]*\])?\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)


def _variable(match: re.Match) -> Variable:
    space, qualifiers, dtype, name, extent, init = match.groups()
    element = _WIDTHS[dtype] // 8
    align = re.search(r"\.align\s+(\d+)", qualifiers)
    count = 1 if extent is None else int(extent[1:-1] or 0)
    data = None
    if init is not None:
        values = [int(v, 0) for v in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", init)]
        data = b"".join((v % (1 << 8 * element)).to_bytes(element, "little") for v in values)
        data = data.ljust(element * count, b"\0")
    return Variable(name, space, element * count, int(align.group(1)) if align else element, data=data)


def _match_brace(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    raise PtxError("unbalanced braces in PTX")


def parse_module(text: str) -> dict[str, Kernel]:
    """All `.entry` kernels of a PTX module by name, each with the module's variables."""
    source = _strip_comments(text)
    directive = re.search(r"^\s*\.target\s+(\w+)", source, re.M)
    target = directive.group(1) if directive else "none"
    if target not in TARGETS:
        raise PtxError(f".target {target}: the emulator models {' and '.join(TARGETS)}")
    kernels: dict[str, Kernel] = {}
    bodies: list[tuple[int, int]] = []
    pos = 0
    while match := _ENTRY.search(source, pos):
        semicolon, brace = source.find(";", match.end()), source.find("{", match.end())
        if brace < 0 or 0 <= semicolon < brace:  # declaration only
            bodies.append((match.start(), semicolon + 1))
            pos = semicolon + 1
            continue
        end = _match_brace(source, brace)
        bodies.append((match.start(), end + 1))
        if match.group(1) == "entry":
            kernel = _parse_kernel(source, target, match.end(), brace, end)
            kernels[kernel.name] = kernel
        pos = end + 1
    outside = "".join(
        source[a:b] for a, b in zip([0] + [e for _, e in bodies], [s for s, _ in bodies] + [None])
    )
    for match in _VARIABLE.finditer(outside):
        for kernel in kernels.values():
            kernel.variables[match.group(4)] = _variable(match)
    return kernels


def _parse_kernel(source: str, target: str, head: int, brace: int, end: int) -> Kernel:
    header = source[head:brace]
    name = re.match(r"\s*([$\w]+)", header).group(1)
    params, offset = [], 0
    pointer = r"(?:\s+\.ptr[^,)\w]*(?:\.\w+|\s|\d)*)?"
    pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)" + pointer + r"\s+([$\w]+)\s*(?:\[(\d+)\])?"
    for align, dtype, param, count in re.findall(pattern, header):
        element = _WIDTHS[dtype] // 8
        size, alignment = element * int(count or 1), int(align or element)
        offset = -(-offset // alignment) * alignment
        params.append(Variable(param, "param", size, alignment, offset))
        offset += size
    kernel = Kernel(name, params, target, param_bytes=offset)
    reqntid = re.search(r"\.reqntid\s+([\d,\s]+)", header)
    if reqntid:
        kernel.reqntid = tuple(int(v) for v in reqntid.group(1).split(","))
    _Body(kernel, source, brace + 1, end).parse()
    return kernel


class _Body:
    """Split a kernel body into statements and parse each."""

    def __init__(self, kernel: Kernel, source: str, start: int, end: int) -> None:
        self.kernel, self.source, self.pos, self.end = kernel, source, start, end
        self.line = source.count("\n", 0, start) + 1
        self.scopes: list[dict[str, object]] = [{}]
        self.scope_ids = [0]
        self.next_scope = 0
        self.pending: list[tuple[Instr, int]] = []
        self.call_params: set[str] = set()

    def parse(self) -> None:
        pattern = re.compile(r"\s*(?:([{}])|([$\w]+)\s*:(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
        table = re.compile(r"\s*([$\w]+)\s*:\s*\.branchtargets\s+([^;]+);")
        while self.source[self.pos : self.end].strip():
            branch_table = table.match(self.source, self.pos, self.end)
            match = branch_table or pattern.match(self.source, self.pos, self.end)
            if not match:
                raise PtxError(
                    f"cannot parse PTX near line {self.line}: {self.source[self.pos:self.pos + 80]!r}"
                )
            lead = len(match.group(0)) - len(match.group(0).lstrip())
            self.line += self.source.count("\n", self.pos, self.pos + lead)
            if branch_table:
                names = [self._label(n.strip()) for n in match.group(2).split(",")]
                self.kernel.branch_tables[match.group(1)] = names
            elif match.group(1) == "{":
                self.next_scope += 1
                self.scopes.append({})
                self.scope_ids.append(self.next_scope)
            elif match.group(1) == "}":
                self.scopes.pop()
                self.scope_ids.pop()
            elif match.group(2):
                self._define_label(match.group(2))
            else:
                self._statement(match.group(3).strip())
            self.line += self.source.count("\n", self.pos + lead, match.end())
            self.pos = match.end()
        for instr, scope_chain in self.pending:
            self._resolve_labels(instr, scope_chain)

    # Labels: a scope may define the same name again, and a branch may refer to a label further down.
    def _define_label(self, name: str) -> None:
        self.kernel.labels[f"{name}@{self.scope_ids[-1]}"] = len(self.kernel.instrs)

    def _label(self, name: str) -> str:
        for scope in reversed(self.scope_ids):
            if f"{name}@{scope}" in self.kernel.labels:
                return f"{name}@{scope}"
        return f"{name}@0"

    def _resolve_labels(self, instr: Instr, chain: tuple[int, ...]) -> None:
        target = instr.operands[0]
        for scope in reversed(chain):
            if f"{target.name}@{scope}" in self.kernel.labels:
                instr.operands[0] = Symbol(f"{target.name}@{scope}")
                return
        raise PtxError(f"line {instr.line}: branch to unknown label {target.name}")

    def _statement(self, text: str) -> None:
        if not text:
            return
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".local", ".shared", ".global", ".const")):
            match = _VARIABLE.match(text + ";")
            self.kernel.variables[match.group(4)] = _variable(match)
        elif text.startswith(".param"):  # an argument or result of a call
            self.call_params.add(re.search(r"([$\w]+)\s*(\[\d+\])?$", text).group(1))
        elif text.startswith((".pragma", ".callprototype")):
            pass
        else:
            self._instruction(text)

    def _registers(self, text: str) -> None:
        dtype, names = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", text, re.S).groups()
        width = _WIDTHS[dtype]
        for name in (n.strip() for n in names.split(",")):
            ranged = re.match(r"(.*)<(\d+)>$", name)
            for n in [f"{ranged.group(1)}{i}" for i in range(int(ranged.group(2)))] if ranged else [name]:
                self.scopes[-1][n] = (width, n)

    def _register(self, name: str) -> Reg | None:
        for scope in reversed(self.scopes):
            entry = scope.get(name)
            if entry is None:
                continue
            if not isinstance(entry, Reg):
                entry = Reg(len(self.kernel.registers), *entry)
                self.kernel.registers.append(entry)
                scope[name] = entry
            return entry
        return None

    def _instruction(self, text: str) -> None:
        match = re.match(r"(?:@(!?)\s*([$%\w]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S)
        if not match:
            raise PtxError(f"line {self.line}: cannot parse instruction {text!r}")
        negated, guard, opcode, rest = match.groups()
        if opcode.split(".")[0] == "call":
            operands: list = [Symbol(n) for n in re.findall(r"[$\w]+", rest)]
        else:
            operands = [self._operand(o) for o in _split(rest)] if rest.strip() else []
        instr = Instr(
            opcode,
            operands,
            self._register(guard) if guard else None,
            negated == "!",
            self.line,
            re.sub(r"\s+", " ", text),
        )
        if instr.opcode.startswith(("ld.param", "st.param")):
            mem = operands[instr.opcode.startswith("ld")]
            if isinstance(mem.base, Symbol) and mem.base.name in self.call_params:
                return
        if instr.parts[0] == "bra":
            self.pending.append((instr, tuple(self.scope_ids)))
        self.kernel.instrs.append(instr)

    def _operand(self, text: str) -> object:
        text = text.strip()
        if text == "_":
            return SINK
        if text.startswith("{"):
            return Vec(tuple(self._operand(t) for t in _split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text[1:-1])
        if text.startswith("!"):
            return Not(self._operand(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        return self._scalar(text)

    def _memory(self, text: str) -> Mem:
        parts = _split(text)
        match = re.match(r"\s*([$%\w]+)\s*(?:\+\s*(-?\s*\w+)|-\s*(\d+))?\s*$", parts[0])
        if not match:
            raise PtxError(f"line {self.line}: cannot parse address [{text}]")
        base = self._scalar(match.group(1))
        offset = int(match.group(2).replace(" ", ""), 0) if match.group(2) else -int(match.group(3) or 0)
        coords = self._operand(parts[1]).items if len(parts) > 1 and parts[1].strip().startswith("{") else ()
        if len(parts) > 1 and not coords:
            coords = (self._operand(parts[1]),)
        return Mem(base, offset, coords)

    def _scalar(self, text: str) -> object:
        register = self._register(text)
        if register is not None:
            return register
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Imm(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Imm(int(text[2:], 16), 64)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|0b[01]+|\d+)U?", text):
            digits = text.rstrip("U")
            octal = re.fullmatch(r"-?0\d+", digits)
            return Imm(int(digits, 8) if octal else int(digits, 0))
        if text.startswith("%"):
            return Special(text[1:])
        match = re.fullmatch(r"([$\w]+)\s*(?:\+\s*(\d+))?", text)
        if match:
            return Symbol(match.group(1), int(match.group(2) or 0))
        raise PtxError(f"line {self.line}: cannot parse operand {text!r}")


def _split(text: str) -> list[str]:
    """Split at top-level commas."""
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[start:i])
            start = i + 1
    out.append(text[start:])
    return out
