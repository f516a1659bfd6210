"""`fc2` as `torch.compile` traces it.

Imported by the first traced call only: its decorator imports torch's compiler, which takes as long as torch itself does
(2.5 s, 2-core x86-64, 2026-11-25).
"""
from __future__ import annotations

import json
from typing import Optional

import torch

from backends.interface import Operand
from backends.operand import Nvfp4Tensor
from dispatch.execute import fold_scales
from dispatch.pins import Pin, TacticLike


def traced_fc2(
    a: Nvfp4Tensor,
    b: Operand,
    alpha: torch.Tensor,
    backend: str,
    out_dtype: torch.dtype,
    out: Optional[torch.Tensor],
    tactic: TacticLike,
) -> torch.Tensor:
    """The scale folding as plain operations, then one operator. Arguments are as of `dispatch.fc2`."""
    encoded = "" if tactic is None else _encode(tactic)
    alpha = fold_scales(alpha, a, b)
    operands = (a.data, a.scale, a.layout, b.data, b.scale, b.layout, b.shape[0], alpha, backend, encoded)
    if out is None:
        return torch.ops.fc2_dispatch.fc2(*operands, out_dtype)
    torch.ops.fc2_dispatch.fc2_out(*operands, out)
    return out


@torch.compiler.assume_constant_result
def _encode(tactic: TacticLike) -> str:
    return json.dumps(Pin.of(tactic).to_json())
