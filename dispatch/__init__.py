"""fc2-dispatch: the fastest FC2 of "mixture of experts as dense GEMM" with NVFP4 operands, on the GPU at hand.

    out = dispatch.fc2(a, b, alpha)
"""
from backends import Fc2Backend, Fc2Problem, Nvfp4Tensor, PreparedOperand, Support, Tactic
from backends import pack_experts, quantize_nvfp4, register
from dispatch import library  # noqa: F401  (defines the operators that graphs call)
from dispatch.api import backends, explain, fc2, prepare
from dispatch.execute import fold_scales
from dispatch.errors import ArgumentError, ArgumentTypeError, Fc2Error, NotCompiledError, PerformanceWarning
from dispatch.errors import UnavailableError
from dispatch.report import Decision
from dispatch.tune import TuneReport, autotune

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Decision",
    "Fc2Backend",
    "Fc2Error",
    "Fc2Problem",
    "NotCompiledError",
    "Nvfp4Tensor",
    "PerformanceWarning",
    "PreparedOperand",
    "Support",
    "Tactic",
    "TuneReport",
    "UnavailableError",
    "autotune",
    "backends",
    "explain",
    "fc2",
    "fold_scales",
    "pack_experts",
    "prepare",
    "quantize_nvfp4",
    "register",
]
