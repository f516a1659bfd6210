"""What the GPUs of interest can do at best, and the floor that puts under an FC2 call."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from backends.device import DeviceInfo
from backends.problem import Fc2Problem


@dataclass(frozen=True)
class Gpu:
    """A GPU model and its ceilings.

    Attributes:
        name: short name, as `--device` takes it.
        device: the device description the backends decide on.
        read_bandwidth: bytes per second of a large read.
        mma_flops: FLOP/s of the fastest dense matrix product that is exact for NVFP4 operands.
        source: where the two ceilings come from.
    """

    name: str
    device: DeviceInfo
    read_bandwidth: float
    mma_flops: float
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "B200",
            DeviceInfo("cuda", "NVIDIA B200", (10, 0), 148, 192 * 10**9),
            8.0e12,
            9.0e15,
            "NVIDIA data sheet: 8 TB/s, 9 PFLOP/s dense FP4",
        ),
        Gpu(
            "H200",
            DeviceInfo("cuda", "NVIDIA H200", (9, 0), 132, 141 * 10**9),
            4.38e12,
            790e12,
            "measured 2026-11-23 on one H200: pure read 4.38 TB/s, bf16 GEMM 770-800 TFLOP/s (no FP4 tensor cores)",
        ),
        Gpu(
            "H100",
            DeviceInfo("cuda", "NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * 10**9),
            2.98e12,
            780e12,
            "measured 2026-11-25 on H100 SXM5s: pure read 2.88-3.06 TB/s, bf16 GEMM 760-788 TFLOP/s (no FP4 tensor cores)",
        ),
    )
}


def gpu_named(name: str) -> Optional[Gpu]:
    """The known GPU that the driver calls by this name, or None.

    The whole name: an "NVIDIA H100 PCIe" has 114 multiprocessors and 2 TB/s (NVIDIA data sheet), not an H100 SXM5's.
    """
    return next((gpu for gpu in GPUS.values() if gpu.device.name == name), None)


def expected_active_experts(m: int, experts: int, top_k: int) -> float:
    """Experts that at least one of m tokens selects, when each picks top_k of them uniformly."""
    return experts * (1.0 - (1.0 - top_k / experts) ** m)


def floor_seconds(
    problem: Fc2Problem, gpu: Gpu, active_experts: Optional[float] = None, rows: Optional[float] = None
) -> float:
    """The time below which no kernel can go: the larger of bytes over bandwidth and FLOPs over the matrix rate.

    Args:
        active_experts: experts whose weights must be read; None for all (dense alpha).
        rows: (token, expert) pairs to be multiplied; None for every token in every active expert. top_k * M when a
            kernel gathers only the rows that selected an expert.
    """
    share = 1.0 if active_experts is None else active_experts / problem.experts
    pairs = problem.m * problem.experts * share if rows is None else rows
    weights = problem.weight_bytes * share
    flops = 2.0 * pairs * problem.n * problem.intermediate
    return max((problem.bytes - problem.weight_bytes + weights) / gpu.read_bandwidth, flops / gpu.mma_flops)
