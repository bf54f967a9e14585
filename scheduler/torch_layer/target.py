"""The device that costs are for: one at hand, or the description of one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rematplan.scheduler.core.device import DeviceSpec

__all__ = ["Device", "Target", "lies_on"]


@dataclass(frozen=True, slots=True)
class Target:
    """Stands where a ``torch.device`` does while a step is priced for a device that is not there.

    Fake tensors on the CPU stand for those on the device: a build of torch without CUDA cannot reverse fake
    CUDA tensors. So the kernels are those that the CPU would choose, and the rounding of bytes is that of the
    device.
    """

    spec: DeviceSpec

    @property
    def type(self) -> str:
        """Whose rules hold: "cuda" or "cpu"."""
        return self.spec.kind


Device: TypeAlias = torch.device | Target


def lies_on(tensor: Tensor, device: Device) -> bool:
    """Whether the tensor is on this kind of device, or stands for one that is."""
    return tensor.device.type == ("cpu" if isinstance(device, Target) else device.type)
