"""FC2 backends and the values they share. Imports torch alone; optional packages load with the backend that needs them."""
from backends.device import DeviceInfo
from backends.interface import SUPPORTED, Fc2Backend, Operand, Support
from backends.operand import Nvfp4Tensor, PreparedOperand
from backends.problem import Fc2Problem
from backends.quantize import pack_experts, quantize_nvfp4
from backends.registry import get, names, register, unregister
from backends.tactic import Tactic

__all__ = [
    "DeviceInfo",
    "Fc2Backend",
    "Fc2Problem",
    "Nvfp4Tensor",
    "Operand",
    "PreparedOperand",
    "SUPPORTED",
    "Support",
    "Tactic",
    "get",
    "names",
    "pack_experts",
    "quantize_nvfp4",
    "register",
    "unregister",
]
