"""Total and free memory of the device that a step is planned for: budgets are shares of these."""

from __future__ import annotations

import torch

from rematplan.scheduler.core.budget import free_machine_bytes, machine_bytes

__all__ = ["device_bytes", "free_device_bytes"]


def device_bytes(device: torch.device | str) -> int:
    """Return the total bytes of the device; for the CPU, of this machine."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def free_device_bytes(device: torch.device | str) -> int:
    """Return the free bytes of the device, including those that torch's allocator has cached."""
    device = torch.device(device)
    if device.type != "cuda":
        return free_machine_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
