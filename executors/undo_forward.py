"""Out of memory: what a forward changed is put back, and a tighter plan takes over."""

from __future__ import annotations

import gc

import numpy as np
import torch
from torch import Tensor, nn

from rematplan.executors.first_step_peak import step_bytes
from rematplan.scheduler.core.errors import InfeasibleBudget
from rematplan.scheduler.plan.plan import Plan
from rematplan.scheduler.torch_layer.layouts import equal_bits
from rematplan.scheduler.torch_layer.preserve import Draws, HostRandomState
from rematplan.scheduler.torch_layer.private import version_of

__all__ = ["Changes", "State", "lowered", "release"]

Place = tuple[dict[str, Tensor | None], str]  # a module's buffers, and a name among them


class State:
    """Random-number generators and buffers as they are before a forward.

    Attributes:
        copies: (place, tensor, copy of its values) of each buffer that a forward may change.
        versions: (place, tensor, version) of each other one.
    """

    def __init__(self, device: torch.device, changing: list[Place], others: list[Place], host: bool) -> None:
        self.random, self.host_random = Draws(device), HostRandomState()
        self.copies = [(place, t, _copied(t, host=host)) for place, t in _there(changing)]
        self.versions = [(place, t, version_of(t)) for place, t in _there(others)]

    def hindrance(self) -> str | None:
        """Why the state cannot be put back; None if it can."""
        for (buffers, name), tensor, version in self.versions:
            if buffers[name] is not tensor or version_of(tensor) != version:
                return f"buffer {name!r} has changed, which it did not at the first forward"
        return None

    def restore(self) -> None:
        """Put generators and buffers back."""
        random = self.random.state()
        if random is not None:
            random.restore()
        self.host_random.restore()
        for (buffers, name), tensor, copy in self.copies:
            tensor.data.copy_(copy)  # .data: the version that autograd saw stays
            buffers[name] = tensor


class Changes:
    """Which buffers a forward changes: found at the first one, so that later ones need copies of these only.

    Values decide, not versions: kernels of batch norm change statistics without a new version.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.changing: list[Place] | None = None
        self.others: list[Place] = []

    def before(self, model: nn.Module) -> State:
        """The state now. The first time it has all buffers, in host memory."""
        if self.changing is not None:
            return State(self.device, self.changing, self.others, host=False)
        places: list[Place] = [(m._buffers, name) for m in model.modules() for name in m._buffers]
        return State(self.device, places, [], host=True)

    def after(self, state: State) -> None:
        """A forward from that state is over."""
        if self.changing is None:
            self.changing = []
            for place, tensor, copy in state.copies:
                same = place[0][place[1]] is tensor and equal_bits(tensor.cpu(), copy)
                (self.others if same else self.changing).append(place)


def _copied(tensor: Tensor, *, host: bool) -> Tensor:
    """A copy beside the tensor, in memory that plans for CUDA count; or on the host, outside of torch's allocator."""
    beside = tensor.device.type == "cuda" and not host
    if beside or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor.detach().to(tensor.device if beside else "cpu", copy=True)
    copy = torch.from_numpy(np.empty(tensor.numel() * tensor.element_size(), dtype=np.uint8))
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _there(places: list[Place]) -> list[tuple[Place, Tensor]]:
    return [(place, tensor) for place in places if (tensor := place[0][place[1]]) is not None]


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def lowered(plan: Plan, device: torch.device) -> Plan | None:
    """A plan that takes less, after a step by ``plan`` ran out of memory; None if there is none.

    A tenth less; on CUDA, if that is less still, 95 % of what the allocator can really give above what is
    live now. Where no schedule is so tight, the tightest.
    """
    peak = plan.predicted_peak
    budget = peak - peak // 10
    if device.type == "cuda":
        budget = min(budget, peak - step_bytes(plan) + _available(device) * 95 // 100)
    try:
        return plan.within(max(1, budget))
    except InfeasibleBudget as error:
        return plan.within(error.smallest) if error.smallest < peak else None


def _available(device: torch.device) -> int:
    """Bytes that the caching allocator can still give."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, limit) + reserved - torch.cuda.memory_allocated(device)
