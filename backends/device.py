"""What the decision code needs to know of a device, as a plain value.

`DeviceInfo` can be built by hand, so that choices for a GPU can be computed and tested on a machine without it.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceInfo:
    """A device as the backends see it.

    Attributes:
        type: `torch.device` type, such as "cuda" or "cpu".
        name: the driver's name of the device, such as "NVIDIA H200".
        capability: CUDA compute capability (major, minor); None where there is none.
        sm_count: streaming multiprocessors; 0 where there are none.
        memory_bytes: device memory; 0 where it was not asked for.
    """

    type: str
    name: str
    capability: tuple[int, int] | None = None
    sm_count: int = 0
    memory_bytes: int = 0

    @staticmethod
    def of(device: torch.device | str) -> DeviceInfo:
        """The description of a real device; cached, since CUDA properties cost microseconds."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return _of(device)

    @property
    def arch(self) -> str:
        """Short name for messages: "SM 9.0", or the device type where there is no capability."""
        return self.type if self.capability is None else f"SM {self.capability[0]}.{self.capability[1]}"


@functools.lru_cache(maxsize=None)
def _of(device: torch.device) -> DeviceInfo:
    if device.type != "cuda":
        return DeviceInfo(type=device.type, name=device.type)
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(
        type="cuda",
        name=properties.name,
        # A ROCm build reports capabilities that mean other chips.
        capability=None if torch.version.hip else (properties.major, properties.minor),
        sm_count=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
    )
