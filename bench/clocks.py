"""Clocks, temperature and throttling of a GPU while it is being timed, through NVML (`nvidia-ml-py`, optional)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch

# nvml.h, NVML_CLOCKS_EVENT_REASON_*: those that slow a kernel down; not idling, nor a clock limit somebody asked for.
_THROTTLING = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True)
class Clocks:
    """What was seen over one or more readings.

    Attributes:
        sm_mhz: lowest and highest SM clock.
        temperature_c: highest GPU temperature.
        throttling: names of the reasons seen, sorted.
    """

    sm_mhz: tuple[int, int]
    temperature_c: int
    throttling: tuple[str, ...] = ()

    def merge(self, other: Optional[Clocks]) -> Clocks:
        """Both together."""
        if other is None:
            return self
        return Clocks(
            (min(self.sm_mhz[0], other.sm_mhz[0]), max(self.sm_mhz[1], other.sm_mhz[1])),
            max(self.temperature_c, other.temperature_c),
            tuple(sorted({*self.throttling, *other.throttling})),
        )

    def to_json(self) -> dict[str, Any]:
        return {"sm_mhz": list(self.sm_mhz), "temperature_c": self.temperature_c, "throttling": list(self.throttling)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Clocks:
        return cls(tuple(record["sm_mhz"]), record["temperature_c"], tuple(record["throttling"]))


class ClockReader:
    """Reads the clocks of one device; `reason` says why it cannot, where it cannot."""

    def __init__(self, device: torch.device):
        self.reason = ""
        self._nvml = self._handle = None
        if device.type != "cuda":
            self.reason = "clocks are read of CUDA devices only"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # CUDA's numbering may differ from NVML's
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is not installed; pip install 'fc2-dispatch[bench]'"
        except Exception as error:  # NVMLError, whose class exists only where the import worked
            self.reason = f"NVML does not answer: {error}"

    def read(self) -> Optional[Clocks]:
        """The present state; None where it cannot be read."""
        if self._nvml is None:
            return None
        nvml, handle = self._nvml, self._handle
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        names = tuple(sorted(name for bit, name in _THROTTLING.items() if reasons & bit))
        return Clocks((clock, clock), nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), names)
