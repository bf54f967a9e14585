"""Bytes that CUDA takes besides tensors: the workspaces of cuBLAS, and the excess of the allocator's blocks.

cuBLAS (ATen/cuda/CublasHandlePool.cpp) keeps a workspace for each handle and stream, taken from the caching
allocator when the handle first multiplies and never released. A step has two handles on one stream: of the
forward's thread, and of autograd's own; later versions of torch may have them share one. They are measured
where there is a device; those of further streams are not counted. cuDNN's workspaces last for one convolution
each: they are in the transients that ``stage_run.py`` counts on a device, and unknown without one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.costs.meters.clock import wait
from rematplan.scheduler.costs.meters.cuda_allocator import LARGEST_SLACK, CachingAllocator, block_bytes
from rematplan.scheduler.costs.meters.live_storages import Event, LiveBytes
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.fake import without_hardware
from rematplan.scheduler.torch_layer.layouts import held_bytes, storage_key
from rematplan.scheduler.torch_layer.leaves import tree_leaves
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import preserved, reverse
from rematplan.scheduler.torch_layer.private import expandable_segments_are_on
from rematplan.scheduler.torch_layer.target import Device, Target

__all__ = ["allocator_slack", "expandable_segments", "simulated_slack", "stays", "workspace_bytes"]

HANDLES = 2  # that of the forward's thread and that of autograd's
_KNOWN: dict[int, int] = {}  # workspaces that exist, by device
# Another schedule is another stream of sizes. Of 72 rehearsed ones (GPT-2, Llama, ViT, ResNet-50, odd sizes
# among them, with Adam's state and without) the slack was mostly below that of the plain step, at most 1.9
# times it.
SAFETY = 2


def workspace_bytes(device: Device) -> int:
    """Return bytes of cuBLAS's workspaces of a step on one stream; on a present device they exist afterwards.

    They are measured when first taken, and never cleared: CUDA graphs captured before may point to them.
    """
    if isinstance(device, Target):
        return HANDLES * allocated(device.spec.workspace, device) if device.type == "cuda" else 0
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    _KNOWN[index] = stays(*_taken(index), _KNOWN.get(index), lambda: allocated(_default_bytes(index), device))
    return _KNOWN[index]


def stays(forward: int, backward: int, known: int | None, one: Callable[[], int]) -> int:
    """Return bytes of the workspaces of both threads.

    Args:
        forward, backward: bytes that a product has taken for good in this thread, then in autograd's.
        known: found before; fewer may have been taken since, if somebody cleared them.
        one: bytes of one workspace, if they existed before anybody looked.
    """
    if known is not None:
        return max(known, forward + backward)
    if forward:
        return forward + backward  # autograd's thread takes none where a stream has one
    return HANDLES * (backward or one())


def _taken(index: int) -> tuple[int, int]:
    """Return bytes that stay when this thread multiplies, and when autograd's does."""
    with torch.cuda.device(index), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        factor = torch.ones(8, 8, device=f"cuda:{index}", requires_grad=True)
        bias, product = torch.ones(8, device=factor.device), torch.empty_like(factor)
        before = torch.cuda.memory_allocated(index)
        with torch.no_grad():
            torch.mm(factor, factor, out=product)
            torch.addmm(bias, factor, factor, out=product)  # by cuBLASLt
        forward = torch.cuda.memory_allocated(index) - before
        torch.autograd.grad((factor @ factor).sum(), factor)
        wait(factor.device)
        return forward, torch.cuda.memory_allocated(index) - before - forward


def _default_bytes(index: int) -> int:
    """Return bytes of one workspace, as ATen chooses them (CUDABlas.cpp): by environment or device."""
    if hasattr(torch.backends.cuda, "cublas_workspace_size"):
        return int(torch.backends.cuda.cublas_workspace_size())
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(kibibytes) * int(count) for kibibytes, count in pairs) * 1024
    return 32 * 2**20 if torch.cuda.get_device_capability(index)[0] >= 9 else (2 * 4096 + 8 * 16) * 1024


def expandable_segments(device: Device) -> bool:
    """Whether a device's allocator splits blocks at any 512 bytes, so that none has any excess."""
    if isinstance(device, Target):
        return device.spec.expandable_segments
    if not torch.cuda.is_available():
        return False
    if torch.cuda.get_allocator_backend() != "native":  # cudaMallocAsync counts what is asked for
        return True
    return expandable_segments_are_on()  # the settings' text has only those that were set last


def allocator_slack(model: nn.Module, call: Call, device: Device, optimizer_state: int) -> int:
    """Return bytes that large blocks may hold, at a step's peak, above their tensors' rounded up to 512.

    A block that is not split holds up to 1 MiB too much; 1 MiB for every large tensor would be some ten times
    of what happens. So two plain steps without data are simulated (``cuda_allocator``), and ``SAFETY`` times
    the slack of the second is set aside, and that of one more block: an estimate with a margin, no proof. 0
    off CUDA, with expandable segments, and where no tensor is large. Of a model that does not run without
    data, 1 MiB for every large tensor that is live before the step.

    Args:
        model, call: real; for a Target, what ``without_hardware`` gives, within its block.
        optimizer_state: bytes; taken to be copies of the parameters, as Adam's and momentum are.
    """
    if device.type != "cuda" or expandable_segments(device):
        return 0
    tensors: list[Any] = [*model.parameters(), *model.buffers(), *tree_leaves(call)]
    storages = {storage_key(t): t for t in tensors if isinstance(t, Tensor)}
    standing = [held_bytes(t) for t in storages.values()]
    parameters = [held_bytes(p) for p in model.parameters()]
    try:
        if isinstance(device, Target):
            events = _plain_events(model, call)
        else:
            with without_hardware(model, call) as (twin, fake_call):
                events = _plain_events(twin, fake_call)
    except Exception:  # noqa: BLE001 # kernels of the user's own, which do not run on tensors without data
        return LARGEST_SLACK * sum(size > LARGEST_SLACK for size in standing)
    if all(size <= LARGEST_SLACK for size in (*standing, *(event.change for event in events))):
        return 0
    copies = optimizer_state // max(1, sum(parameters))
    return SAFETY * simulated_slack(standing, parameters * copies, events) + LARGEST_SLACK


def _plain_events(model: nn.Module, call: Call) -> list[Event]:
    """Return the storage events of a plain step on tensors without data; its gradients stay."""
    args, kwargs = call
    with preserved(model), torch.enable_grad(), LiveBytes("cuda", record=True) as live:
        output = model(*args, **kwargs)
        reverse(find_loss(output)[0])
        del output
        return list(live.events)  # the gradients go later


def simulated_slack(standing: Iterable[int], state: Iterable[int], events: Iterable[Event]) -> int:
    """Return by how much the blocks in use at a second step's peak exceed the sizes rounded up to 512.

    Args:
        standing: sizes (bytes) of the storages live before the first step, in order.
        state: sizes of those that the optimizer makes after the first step, and keeps.
        events: of one step. Its last live storages stay while the optimizer makes its state, and are released
            before the second.
    """
    allocator = CachingAllocator()
    steps = list(events)
    rounded = slack = 0
    blocks: dict[int, tuple[int, int]] = {}  # storage -> (address, bytes)
    for lasting in (standing, state):
        for size in lasting:
            if size:
                allocator.allocate(size)
                rounded += block_bytes(size)
        for address, _ in blocks.values():
            allocator.free(address)
        blocks.clear()
        allocator.reset_peaks()
        live = peak = 0
        for event in steps:
            address, size = blocks.pop(event.storage, (0, 0))
            if size:
                allocator.free(address)
            size += event.change
            if size > 0:
                blocks[event.storage] = (allocator.allocate(size), size)
            live += event.change
            peak = max(peak, live)
        slack = allocator.peaks.allocated - rounded - peak
    return slack
