"""What a compiled kernel uses, read off its cubin: registers, spills, memory, and tensor core instructions.

Needs the disassemblers that ship with triton (or a CUDA toolkit on PATH); no GPU.
"""
from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from backends.cute import budget
from backends.cute.budget import CuteTactic
from backends.cute.cache import describe
from backends.cute.compiler import compile_kernel

#: SASS mnemonics that are counted. UTCOMMA is the block-scaled FP4 MMA, LDTM and STTM read and write tensor memory,
#: UTMALDG and UTMASTG are TMA loads and stores, UTCBAR commits, LDL and STL are spills.
_COUNTED = {
    "mma": r"\bUTCOMMA\b",
    "mma_2cta": r"\bUTCOMMA\.2CTA\b",
    "mma_not_block_scaled": r"\bUTC[HQI]MMA\b",
    "commits": r"\bUTCBAR\b",
    "tmem_loads": r"\bLDTM\b",
    "tmem_stores": r"\bSTTM\b",
    "tma_loads": r"\bUTMALDG\b",
    "tma_multicast_loads": r"\bUTMALDG\S*\.MULTICAST",
    "tma_stores": r"\bUTMASTG\b",
    "packed_fma": r"\bFFMA2\b",
    "spill_instructions": r"\b(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Resources:
    """One kernel's use; instruction counts are static, of the code, not of a run.

    Attributes:
        registers: of a thread, 255 at most.
        stack_bytes: of a thread; a spill shows here.
        smem_bytes: shared memory for stages and output staging.
        tmem_columns: in use; tmem_allocation: allocated.
        instructions: counts by the names of `_COUNTED`.
    """

    kernel: str
    out_dtype: str
    registers: int
    stack_bytes: int
    ab_stages: int
    acc_stages: int
    smem_bytes: int
    tmem_columns: int
    tmem_allocation: int
    instructions: dict[str, int]

    def row(self) -> dict[str, object]:
        """The table row: all fields, flat."""
        fields = dict(self.__dict__)
        return fields | fields.pop("instructions")


def inspect(tactic: CuteTactic, out_dtype: str = "bfloat16", arch: str = "sm_100a") -> Resources:
    """Compile the tactic's kernel and read its cubin.

    Raises:
        FileNotFoundError: no disassembler is installed.
    """
    with tempfile.TemporaryDirectory() as directory:
        compiled = compile_kernel(tactic, out_dtype, arch, options=f"--keep-cubin --dump-dir={directory}")
        cubin = Path(directory) / "fc2.cubin"
        cubin.write_bytes(compiled.artifacts.CUBIN)
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
    plan = budget.Budget.of(tactic)
    return Resources(
        kernel=describe(tactic),
        out_dtype=out_dtype,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        ab_stages=plan.ab_stages,
        acc_stages=plan.acc_stages,
        smem_bytes=plan.smem_bytes,
        tmem_columns=plan.tmem_columns,
        tmem_allocation=plan.tmem_allocation,
        instructions={name: len(re.findall(pattern, sass)) for name, pattern in _COUNTED.items()},
    )


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([find_tool(tool), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def find_tool(name: str) -> str:
    """Path of a CUDA binary utility: triton's copy, or the first on PATH."""
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if shipped.exists():
            return str(shipped)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} was not found; it ships with triton's Linux wheels and with the CUDA toolkit")
    return found
