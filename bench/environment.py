"""Where a result was measured: device, versions, and the ceilings of the device as measured in the same run."""
from __future__ import annotations

import datetime
import platform
import statistics
import sys
from typing import Any, Optional

import torch

import dispatch
from backends import registry
from backends.device import DeviceInfo
from dispatch.environment import conditions, version
from dispatch.hardware import Gpu, gpu_named
from dispatch.timing import EventRunner, l2_bytes


def describe(device: torch.device, command: Optional[str] = None) -> dict[str, Any]:
    """JSON values that say where and with what; without measuring anything."""
    info = DeviceInfo.of(device)
    packages = ("torch", "triton", "nvidia-cutlass-dsl", "cupti-python", "nvidia-ml-py", "numpy")
    return {
        "device": info.name if device.type == "cuda" else f"CPU ({platform.machine()})",
        "capability": list(info.capability) if info.capability else None,
        "sm_count": info.sm_count,
        "memory_bytes": info.memory_bytes,
        "l2_bytes": l2_bytes(device),
        "cuda": torch.version.cuda,
        "driver": _driver(device),
        "versions": {"fc2-dispatch": dispatch.__version__, **{name: version(name) for name in packages}},
        # Tuned times hold for these kernels and compilers: `bench import` carries them into the table.
        "conditions": {name: conditions(registry.get(name)) for name in registry.names()},
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command or " ".join(["python -m bench", *sys.argv[1:]]),
    }


def _driver(device: torch.device) -> Optional[str]:
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # not installed, or NVMLError, whose class exists only where the import works
        return None


def ceilings(device: torch.device) -> Optional[dict[str, float]]:
    """What the device does in this run: bytes/s of reading 2 GiB once, FLOP/s of a bfloat16 matrix product of 8192^3.

    None on a CPU. Takes about 0.1 s on an H200, and 2.5 GiB of memory, less where there is less.
    """
    if device.type != "cuda":
        return None
    values = min(1 << 29, torch.cuda.mem_get_info(device)[0] // 16)
    read = _read_seconds(values, device)
    # Random values: on zeros the same product runs faster than real data do.
    left, right = (torch.randn((8192, 8192), device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    multiply = _median_seconds(lambda: torch.mm(left, right, out=product))
    return {"read_bandwidth": 4 * values / read, "bf16_flops": 2 * 8192**3 / multiply}


def _read_seconds(values: int, device: torch.device) -> float:
    big, total = torch.ones(values, device=device), torch.empty((), device=device)
    return _median_seconds(lambda: torch.sum(big, dim=0, out=total))


def _median_seconds(launch) -> float:
    runner = EventRunner([launch])
    return statistics.median([runner() for _ in range(13)][3:])


def roofline(device: DeviceInfo, measured: Optional[dict[str, float]]) -> Optional[Gpu]:
    """The ceilings that floors are computed from: known ones of this GPU model, else those measured, None on a CPU.

    A Blackwell GPU that is not in the list of known ones gets its bfloat16 rate, below its FP4 rate: its compute floors
    come out too high.
    """
    known = gpu_named(device.name)
    if known is not None or measured is None:
        return known
    source = "measured in this run: float32 sum of 2 GiB, bfloat16 product of 8192^3"
    return Gpu(device.name, device, measured["read_bandwidth"], measured["bf16_flops"], source)
