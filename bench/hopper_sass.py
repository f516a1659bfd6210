"""Machine code of the Triton backend's tactics, read without a GPU: `python -m bench.hopper_sass [--m 8 64 512]`.

Per kernel: registers, bytes of stack, local memory instructions, tensor core instructions, global loads by width, and the
instructions of the main loop per 8 weights (one 32-bit word per thread), everything in the loop counted.
"""
from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import tempfile

import triton
from tabulate import tabulate

from backends.problem import Fc2Problem
from backends.triton import tactic as rules
from backends.triton.offline import compile_for

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
#: Words of weights a thread decodes per turn of a kernel's main loop, from its tactic.
_WORDS_PER_TURN = {
    "fc2_few": lambda t: t.num_stages * 8 * (t.block_n // 32),
    "fc2_routed": lambda t: 16,
}


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


def describe(name: str, tactic: rules.TritonTactic, cubin: bytes) -> dict[str, object]:
    """One row of the table."""
    code, usage = disassemble(cubin)
    found, labels = instructions(code)
    opcodes = collections.Counter(_opcode(text) for text in found)
    loads = collections.Counter()
    for opcode, count in opcodes.items():
        if opcode.startswith(("LDG", "LDGSTS")):
            width = next((int(part) // 8 for part in opcode.split(".") if part in ("64", "128")), 4)
            loads[width] += count
    body = main_loop(found, labels)
    words = _WORDS_PER_TURN.get(name)
    return {
        "kernel": name,
        "tactic": str(tactic),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "LDL/STL": sum(count for opcode, count in opcodes.items() if opcode.startswith(("LDL", "STL"))),
        "HMMA": sum(count for opcode, count in opcodes.items() if opcode.startswith("HMMA")),
        "HGMMA": sum(count for opcode, count in opcodes.items() if opcode.startswith("HGMMA")),
        "loads of 16/8/4 B": f"{loads[16]}/{loads[8]}/{loads[4]}",
        "loop": len(body),
        "per 8 weights": f"{len(body) / words(tactic):.1f}" if words else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[8, 64, 512], help="tokens, one problem each")
    parser.add_argument("--capability", default="9.0", help="compute capability to compile for")
    arguments = parser.parse_args()
    capability = tuple(int(part) for part in arguments.capability.split("."))
    rows, seen = [], set()
    for m in arguments.m:
        problem = Fc2Problem(m, 7168, 65536, 256, b_layout=rules.PREPARED, capability=capability)
        for tactic in rules.tactics(problem):
            for name, kernel in compile_for(problem, tactic, capability).items():
                cubin = kernel.asm["cubin"]
                if name in ("list_tokens", "gather_tokens", "finish") or (name, cubin) in seen:
                    continue
                seen.add((name, cubin))
                rows.append(describe(name, tactic, cubin))
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
