"""Describe the device that costs are for: one of this machine, or the specification of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rematplan.scheduler.core.device import DeviceSpec

__all__ = ["Device", "Target", "lies_on"]


@dataclass(frozen=True, slots=True)
class Target:
    """Stands for the ``torch.device`` while a step is priced for a device that this machine lacks.

    Fake tensors on the CPU stand for those on the device: a build of torch without CUDA cannot reverse fake
    CUDA tensors. So kernels are chosen as on the CPU, and bytes are rounded as on the device.
    """

    spec: DeviceSpec

    @property
    def type(self) -> str:
        """The type of the device: "cuda" or "cpu"."""
        return self.spec.kind


Device: TypeAlias = torch.device | Target


def lies_on(tensor: Tensor, device: Device) -> bool:
    """Whether the tensor is on this kind of device, or stands for one that is."""
    return tensor.device.type == ("cpu" if isinstance(device, Target) else device.type)
