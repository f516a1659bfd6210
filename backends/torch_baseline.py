"""FC2 in plain torch operations: runs on any device, and is the reference of the shoot-out."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from backends.device import DeviceInfo
from backends.interface import SUPPORTED, Fc2Backend, Operand, Support
from backends.operand import BLOCK, Nvfp4Tensor
from backends.problem import OUT_DTYPES, Fc2Problem
from backends.tactic import Tactic

# Decoded values of B held at a time. With bfloat16 values and the float32 partial sums that go with them this bounds
# the extra memory of `form="experts"` to about 0.2 GiB at M <= 512, where the whole decoded B of DeepSeek-V3 is 0.94 GB.
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class TorchTactic(Tactic):
    """How the torch baseline runs.

    Attributes:
        form: "experts" decodes B a few experts at a time and adds alpha times each expert's float32 partial sum, in
            expert order. "cached_weight" keeps all of B in bfloat16 beside the operand (2 bytes per value) and folds
            alpha into bfloat16 activations, as users of a dense library GEMM do: one more rounding, so it misses the
            accuracy bar of the other tactics. It is there to compare with, and "auto" never takes it.
    """

    backend = "torch"
    form: str = "experts"


class TorchBackend(Fc2Backend):
    """The baseline. Reproducible as far as the device's library GEMM is, which cuBLAS is for one stream and version."""

    name = "torch"
    tactic_type = TorchTactic

    def __init__(self) -> None:
        # Decoded weights by the identity of the packed data; an entry lives as long as that tensor does.
        self._decoded: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def is_supported(self, device: DeviceInfo) -> Support:
        return SUPPORTED

    def can_implement(self, problem: Fc2Problem, tactic: TorchTactic) -> Support:
        if tactic.form not in ("experts", "cached_weight"):
            return Support(False, f"form is {tactic.form!r}; it is 'experts' or 'cached_weight'")
        if "/" in problem.b_layout:
            owner = problem.b_layout.partition("/")[0]
            return Support(False, f"b was prepared for backend {owner!r}; pass the Nvfp4Tensor, or that backend's unprepare(b)")
        if problem.k % problem.experts or problem.intermediate % BLOCK:
            return Support(False, f"K / E = {problem.k}/{problem.experts} is not a multiple of {BLOCK}")
        if problem.out_dtype not in OUT_DTYPES.values():
            return Support(False, f"out_dtype {problem.out_dtype} is not one of {', '.join(OUT_DTYPES)}")
        return SUPPORTED

    def keeps_accuracy(self, tactic: TorchTactic) -> Support:
        if tactic.form == "cached_weight":
            return Support(False, "alpha is folded into bfloat16 activations, one rounding too many; name it to run it")
        return SUPPORTED

    def tactics(self, problem: Fc2Problem) -> list[TorchTactic]:
        return [t for t in (TorchTactic(), TorchTactic("cached_weight")) if self.can_implement(problem, t)]

    def default_tactic(self, problem: Fc2Problem) -> TorchTactic:
        return TorchTactic()

    def run(
        self,
        problem: Fc2Problem,
        tactic: TorchTactic,
        a: Nvfp4Tensor,
        b: Operand,
        alpha: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if tactic.form == "cached_weight":
            self._run_cached(problem, a, b, alpha, out)
        else:
            _run_experts(problem, a, b, alpha, out)

    def _run_cached(
        self, problem: Fc2Problem, a: Nvfp4Tensor, b: Nvfp4Tensor, alpha: torch.Tensor, out: torch.Tensor
    ) -> None:
        weight = self._cached_weight(b)
        activations = a.decode(dtype=torch.bfloat16).view(problem.m, problem.experts, problem.intermediate)
        weighted = (activations * alpha.unsqueeze(-1)).to(torch.bfloat16).view(problem.m, problem.k)
        if out.dtype == torch.bfloat16:
            torch.mm(weighted, weight.t(), out=out)
        else:
            out.copy_(_matmul_f32(weighted, weight.t()))

    def _cached_weight(self, b: Nvfp4Tensor) -> torch.Tensor:
        # The version counters tell when an operand was overwritten in place, as weight reloading does.
        stamp = (id(b.scale), b.data._version, b.scale._version, b.layout)
        entry = self._decoded.get(b.data)
        if entry is None or entry[0] != stamp:
            entry = (stamp, b.decode(dtype=torch.bfloat16), b.scale)
            self._decoded[b.data] = entry
        return entry[1]


def _run_experts(problem: Fc2Problem, a: Nvfp4Tensor, b: Nvfp4Tensor, alpha: torch.Tensor, out: torch.Tensor) -> None:
    """Blocks of columns of out; in each, groups of experts whose decoded weights stay within `_CHUNK_VALUES`."""
    inner = problem.intermediate
    dtype = torch.bfloat16 if out.is_cuda else torch.float32  # both exact; a CPU's bfloat16 GEMM may round its sums
    columns = min(problem.n, max(128, _CHUNK_VALUES // inner // 128 * 128))
    largest = max(inner * columns, inner * problem.m, problem.m * columns)  # values per expert: B, A, partial sums
    group = max(1, min(problem.experts, _CHUNK_VALUES // largest))
    for n0 in range(0, problem.n, columns):
        n1 = min(n0 + columns, problem.n)
        total = torch.zeros((problem.m, n1 - n0), dtype=torch.float32, device=out.device)
        for e0 in range(0, problem.experts, group):
            e1 = min(e0 + group, problem.experts)
            k = slice(e0 * inner, e1 * inner)
            left = a.decode(k, dtype=dtype).view(problem.m, e1 - e0, inner).transpose(0, 1)
            right = b.decode(k, slice(n0, n1), dtype=dtype).view(n1 - n0, e1 - e0, inner).permute(1, 2, 0)
            for e, partial in enumerate(_matmul_f32(left, right), start=e0):
                total.addcmul_(partial, alpha[:, e : e + 1])
        out[:, n0:n1] = total


def _matmul_f32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right accumulated in float32 and returned in float32.

    On CUDA the float32 result is asked of the bfloat16 GEMM. Elsewhere the operands are float32; even a matrix unit that
    shortens them (TF32) reads these values exactly, since e2m1 times e4m3 has at most 6 significant bits.
    """
    if left.is_cuda:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    return torch.matmul(left.float(), right.float())
