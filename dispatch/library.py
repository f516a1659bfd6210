"""fc2 as operators of `torch.library`, so that `torch.compile` and export see one opaque call with known shapes.

Eager calls do not pass through here: the dispatcher's boxing would cost them more than their own checks do. What is
traced calls them in `dispatch.tracing`.
"""
from __future__ import annotations

import json
from typing import Optional

import torch

from backends.operand import Nvfp4Tensor, PreparedOperand
from dispatch.execute import run_fc2
from dispatch.pins import Pin

_library = torch.library.Library("fc2_dispatch", "DEF")
_OPERANDS = (
    "Tensor a_data, Tensor a_scale, str a_layout, Tensor b_data, Tensor b_scale, str b_layout, SymInt n, Tensor alpha, "
    "str backend, str tactic"
)
_library.define(f"fc2({_OPERANDS}, ScalarType out_dtype) -> Tensor")
_library.define(f"fc2_out({_OPERANDS}, Tensor(a!) out) -> ()")


def _run(
    a_data: torch.Tensor,
    a_scale: torch.Tensor,
    a_layout: str,
    b_data: torch.Tensor,
    b_scale: torch.Tensor,
    b_layout: str,
    n: int,
    alpha: torch.Tensor,
    backend: str,
    tactic: str,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    a = Nvfp4Tensor(a_data, a_scale, a_layout)
    owner, _, form = b_layout.partition("/")
    if form:
        b = PreparedOperand(owner, form, (n, a.shape[1]), b_data, b_scale)
    else:
        b = Nvfp4Tensor(b_data, b_scale, b_layout)
    return run_fc2(a, b, alpha, backend, out_dtype, out, Pin.of(json.loads(tactic)) if tactic else None)


def _fc2(*args) -> torch.Tensor:
    return _run(*args)


def _fc2_out(*args) -> None:
    *operands, out = args
    _run(*operands, out.dtype, out)


def _fc2_fake(a_data, a_scale, a_layout, b_data, b_scale, b_layout, n, alpha, backend, tactic, out_dtype):
    return alpha.new_empty((a_data.shape[0], n), dtype=out_dtype)


_library.impl("fc2", _fc2, "CompositeExplicitAutograd")
_library.impl("fc2_out", _fc2_out, "CompositeExplicitAutograd")
torch.library.register_fake("fc2_dispatch::fc2", _fc2_fake, lib=_library)
torch.library.register_fake("fc2_dispatch::fc2_out", lambda *args: None, lib=_library)
