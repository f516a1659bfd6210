"""Machine code of the tactics for Hopper, read without a GPU: `python -m bench.hopper_sass [--m 8 64 512]`.

Per kernel of the "triton" and "hopper" backends: registers, bytes of stack, local memory instructions, tensor core
instructions, global loads by width, bulk copies, and the instructions of the main loop, all of them and per 8 weights (one
32-bit word per thread). Of the streaming kernel, whose loop has a branch for each width of a pass, those of a pass over an
item with one slot of tokens, two, and so on.
"""
from __future__ import annotations

import argparse
import collections
import itertools
import os
import re
import subprocess
import tempfile
from typing import Iterator

import triton
from tabulate import tabulate

from backends.hopper import tactic as hopper_rules
from backends.hopper.dense_plan import STREAM_TOKENS, kernel_tile
from backends.problem import Fc2Problem, dtype_name
from backends.triton import tactic as rules
from backends.triton.offline import compile_for

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
#: Words of weights a thread decodes per turn of a Triton kernel's main loop, from its tactic.
_WORDS_PER_TURN = {
    "fc2_few": lambda t: t.num_stages * 8 * (t.block_n // 32),
    "fc2_routed": lambda t: 16,
}
# The same of the "hopper" backend: a warp's 32 rows of an item, and 16 rows of a chunk, 256 values of K each.
_STREAM_WORDS, _DENSE_WORDS = 32, 16


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(machine code as text, resource usage line) of a cubin, by the tools that come with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([f"{_TOOLS}/nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([f"{_TOOLS}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    return code, usage.stdout + usage.stderr


def instructions(code: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and for each label the index of the instruction it precedes."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*\.L_x_(\d+):", line):
            labels[label.group(1)] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction.group(1))
    return found, labels


def main_loop(found: list[str], labels: dict[str, int]) -> list[str]:
    """The smallest loop that holds the most tensor core instructions."""
    best: list[str] = []
    for index, text in enumerate(found):
        branch = re.search(r"BRA.*`\(\.L_x_(\d+)\)", text)
        if branch and labels.get(branch.group(1), index + 1) <= index:
            body = found[labels[branch.group(1)] : index + 1]
            if (_tensor(body), -len(body)) > (_tensor(best), -len(best)):
                best = body
    return best


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\d+\s+", "", text).split()[0]


def _tensor(body: list[str]) -> int:
    return sum(_opcode(text).split(".")[0] in ("HMMA", "HGMMA") for text in body)


def straight_passes(found: list[str], labels: dict[str, int]) -> list[int]:
    """Instructions of each stretch without branches that has tensor core instructions, fewest first."""
    ends = {*labels.values(), *(i + 1 for i, text in enumerate(found) if _opcode(text) == "BRA"), len(found)}
    bounds = sorted({0, *ends})
    stretches = [found[begin:end] for begin, end in zip(bounds, bounds[1:])]
    return sorted(len(body) for body in stretches if _tensor(body))


def describe(name: str, tactic: object, cubin: bytes, words: int | None) -> dict[str, object]:
    """One row of the table; `words` of weights that a thread decodes in a turn of the main loop, None where it decodes none."""
    code, usage = disassemble(cubin)
    found, labels = instructions(code)
    opcodes = collections.Counter(_opcode(text) for text in found)
    loads = collections.Counter()
    for opcode, count in opcodes.items():
        if opcode.startswith(("LDG", "LDGSTS")):
            width = next((int(part) // 8 for part in opcode.split(".") if part in ("64", "128")), 4)
            loads[width] += count
    lengths = straight_passes(found, labels) if name == "StreamKernel" else [len(main_loop(found, labels))]
    return {
        "kernel": name,
        "tactic": str(tactic),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "LDL/STL": sum(count for opcode, count in opcodes.items() if opcode.startswith(("LDL", "STL"))),
        "HMMA": sum(count for opcode, count in opcodes.items() if opcode.startswith("HMMA")),
        "HGMMA": sum(count for opcode, count in opcodes.items() if opcode.startswith("HGMMA")),
        "loads of 16/8/4 B": f"{loads[16]}/{loads[8]}/{loads[4]}",
        "bulk copies": sum(count for opcode, count in opcodes.items() if opcode.startswith("UBLKCP")),
        "loop": "/".join(map(str, lengths)),
        "per 8 weights": "/".join(f"{length / words:.1f}" for length in lengths) if words else "",
    }


def triton_kernels(problem: Fc2Problem, capability: tuple[int, int]) -> Iterator[tuple]:
    """(name, tactic, cubin, words of a turn) of all kernels but those that list, gather and add up."""
    for tactic in rules.tactics(problem):
        for name, kernel in compile_for(problem, tactic, capability).items():
            if name not in ("list_tokens", "gather_tokens", "finish"):
                words = _WORDS_PER_TURN.get(name)
                yield name, tactic, kernel.asm["cubin"], words and words(tactic)


def hopper_kernels(problem: Fc2Problem) -> Iterator[tuple]:
    """The same of the "hopper" backend; its dense kernel follows from the problem alone."""
    from backends.hopper import compiler

    def compiled(config) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            return compiler.compile_kernel(config, options=f"--keep-cubin --dump-dir={directory}").artifacts.CUBIN

    tokens = min(problem.m, hopper_rules.PASS_TOKENS)
    for tactic in hopper_rules.tactics(problem):
        yield "StreamKernel", tactic, compiled(hopper_rules.stream_config(problem, tactic, tokens)), _STREAM_WORDS
    if tokens > STREAM_TOKENS:
        tile = kernel_tile(tokens, dtype_name(problem.out_dtype), problem.a_layout == "128x4")
        yield "DenseKernel", tile, compiled(tile), _DENSE_WORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[8, 64, 512], help="tokens, one problem each")
    parser.add_argument("--capability", default="9.0", help="compute capability to compile for")
    arguments = parser.parse_args()
    capability = tuple(int(part) for part in arguments.capability.split("."))
    rows, seen = [], set()
    for m in arguments.m:
        problem = Fc2Problem(m, 7168, 65536, 256, b_layout=rules.PREPARED, capability=capability)
        kernels = [triton_kernels(problem, capability)]
        if capability == hopper_rules.CAPABILITY:
            kernels.append(hopper_kernels(problem))
        for name, tactic, cubin, words in itertools.chain(*kernels):
            if (name, cubin) not in seen:
                seen.add((name, cubin))
                rows.append(describe(name, tactic, cubin, words))
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
