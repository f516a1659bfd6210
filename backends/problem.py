"""One FC2 call as a plain value: what the backends decide on, without tensors or a device."""
from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Mapping

import torch

#: Output types every backend offers, by the names used in JSON and on command lines.
OUT_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Fc2Problem:
    """`out[m, n] = sum_e alpha[m, e] * sum_{k in expert e} A[m, k] * B[n, k]`, K = experts * intermediate.

    Attributes:
        m: tokens, rows of A, alpha and out.
        n: hidden size, rows of B and columns of out.
        k: reduction length over all experts.
        experts: number of experts E; divides k.
        out_dtype: element type of out, one of `OUT_DTYPES`.
        a_layout: scale layout of A, "128x4" or "linear".
        b_layout: the same for B, or "backend/form" when B was permuted by that backend's `prepare`.
        device_type: where the operands lie, such as "cuda".
        capability: CUDA compute capability of that device, None where there is none.
    """

    m: int
    n: int
    k: int
    experts: int
    out_dtype: torch.dtype = torch.bfloat16
    a_layout: str = "128x4"
    b_layout: str = "128x4"
    device_type: str = "cuda"
    capability: tuple[int, int] | None = None

    @property
    def intermediate(self) -> int:
        """Weights per expert along K (I)."""
        return self.k // self.experts

    @property
    def flops(self) -> int:
        """2*M*N*K: how every published TFLOPS figure of this operation counts."""
        return 2 * self.m * self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Bytes of B: half a byte per value and one scale byte per 16 values."""
        return self.n * self.k // 2 + self.n * self.k // 16

    @property
    def bytes(self) -> int:
        """Bytes of one dense call: A, B (with scales) and alpha read once, out written once."""
        activations = self.m * self.k // 2 + self.m * self.k // 16
        return self.weight_bytes + activations + 4 * self.m * self.experts + self.m * self.n * self.out_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        fields_ = asdict(self)
        fields_["out_dtype"] = dtype_name(self.out_dtype)
        fields_["capability"] = list(self.capability) if self.capability else None
        return fields_

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Fc2Problem:
        """The inverse of `to_json`. Raises ValueError for an unknown field or output type."""
        unknown = set(record) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"Fc2Problem has no field {sorted(unknown)}; it has {[f.name for f in fields(cls)]}")
        values = dict(record)
        if "out_dtype" in values:
            if values["out_dtype"] not in OUT_DTYPES:
                raise ValueError(f"out_dtype is {values['out_dtype']!r}; accepted: {', '.join(OUT_DTYPES)}")
            values["out_dtype"] = OUT_DTYPES[values["out_dtype"]]
        if values.get("capability") is not None:
            values["capability"] = tuple(values["capability"])
        return cls(**values)
