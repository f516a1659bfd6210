"""Control flow of a kernel: basic blocks, register liveness, tensor-memory loads that may be in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

from .opcodes import lookup
from .ptx import Kernel, Vec


@dataclass
class Effects:
    """What one instruction does to registers."""

    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)


@dataclass
class Block:
    start: int
    end: int  # instruction indices
    successors: list[int] = field(default_factory=list)
    live_in: frozenset[int] = frozenset()
    live_out: frozenset[int] = frozenset()


TERMINATORS = {"bra", "ret", "exit", "brx", "trap"}


def split_blocks(kernel: Kernel) -> list[Block]:
    instrs = kernel.instrs
    leaders = {0} | set(kernel.labels.values())
    for i, instr in enumerate(instrs):
        if instr.parts[0] in TERMINATORS:
            leaders.add(i + 1)
        else:
            opcode = lookup(instr)
            if opcode.starts_block:
                leaders.add(i)
            if opcode.ends_block:
                leaders.add(i + 1)
    edges = sorted(x for x in leaders if x < len(instrs)) + [len(instrs)]
    blocks = [Block(a, b) for a, b in zip(edges, edges[1:])]
    index = {b.start: n for n, b in enumerate(blocks)}
    for n, block in enumerate(blocks):
        last = instrs[block.end - 1]
        kind = last.parts[0]
        if kind == "bra":
            block.successors.append(index[kernel.labels[last.operands[0].name]])
        elif kind == "brx":
            block.successors.extend(
                index[kernel.labels[t]] for t in kernel.branch_tables[last.operands[1].name]
            )
        if (kind not in TERMINATORS or last.guard is not None) and n + 1 < len(blocks):
            block.successors.append(n + 1)
    return blocks


def liveness(kernel: Kernel, blocks: list[Block], effects: list[Effects]) -> None:
    use, define = [], []
    for block in blocks:
        used, defined = set(), set()
        for i in range(block.start, block.end):
            used.update(r for r in effects[i].reads if r not in defined)
            if kernel.instrs[i].guard is None:
                defined.update(effects[i].writes)
            else:
                used.update(r for r in effects[i].writes if r not in defined)
        use.append(used)
        define.append(defined)
    changed = True
    live = [set() for _ in blocks]
    while changed:
        changed = False
        for n in range(len(blocks) - 1, -1, -1):
            out = set().union(*(live[s] for s in blocks[n].successors)) if blocks[n].successors else set()
            inside = use[n] | (out - define[n])
            if inside != live[n]:
                live[n], changed = inside, True
            blocks[n].live_out = frozenset(out)
    for n, block in enumerate(blocks):
        block.live_in = frozenset(live[n])


@dataclass(frozen=True)
class WgmmaRegisters:
    """Registers that wgmma uses asynchronously."""

    accumulators: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()  # that hold matrix A
    copies: frozenset[int] = frozenset()  # that moves may give an accumulator to, and the accumulators

    def __bool__(self) -> bool:
        return bool(self.accumulators)


def wgmma_registers(kernel: Kernel, effects: list[Effects]) -> WgmmaRegisters:
    accumulators: set[int] = set()
    left: set[int] = set()
    for instr in kernel.instrs:
        if instr.opcode.startswith("wgmma.mma_async"):
            d, a = instr.operands[:2]
            accumulators.update(r.index for r in d.items)
            if isinstance(a, Vec):
                left.update(r.index for r in a.items)
    copies = _moved(kernel, effects, accumulators)
    return WgmmaRegisters(frozenset(accumulators), frozenset(left), frozenset(copies))


def _moved(kernel: Kernel, effects: list[Effects], registers: set[int]) -> set[int]:
    """`registers` and those that moves copy them to."""
    moves = [i for i, x in enumerate(kernel.instrs) if x.parts[0] == "mov"]
    out, size = set(registers), -1
    while size != len(out):
        size = len(out)
        for i in moves:
            if not out.isdisjoint(effects[i].reads):
                out.update(effects[i].writes)
    return out


def pending_loads(kernel: Kernel, blocks: list[Block], effects: list[Effects]) -> dict[int, frozenset[int]]:
    """For each instruction's line, the tcgen05.ld (by line) whose result may not have arrived when it
    executes.

    A load has arrived once tcgen05.wait::ld executes or an instruction uses one of its results; a move is no
    use, for ptxas removes moves.
    """
    instrs = kernel.instrs
    results: dict[int, set[int]] = {
        i: set(effects[i].writes) for i, x in enumerate(instrs) if x.opcode.startswith("tcgen05.ld")
    }
    if not results:
        return {}
    results = {i: _moved(kernel, effects, regs) for i, regs in results.items()}
    users: dict[int, set[int]] = {}  # register -> loads it ends when used
    for load, regs in results.items():
        for r in regs:
            users.setdefault(r, set()).add(load)
    entering: list[set[int]] = [set() for _ in blocks]
    out: dict[int, frozenset[int]] = {}
    work = list(range(len(blocks)))
    while work:
        n = work.pop(0)
        pending = set(entering[n])
        for i in range(blocks[n].start, blocks[n].end):
            x = instrs[i]
            if x.opcode.startswith("tcgen05.wait::ld"):
                pending.clear()
            elif x.parts[0] != "mov":
                for r in effects[i].reads:
                    if r in users:
                        pending -= users[r]
            out[x.line] = frozenset(instrs[j].line for j in pending)
            if i in results:
                pending.add(i)
        for s in blocks[n].successors:
            if not pending <= entering[s]:
                entering[s] |= pending
                work.append(s)
    return {line: loads for line, loads in out.items() if loads}
