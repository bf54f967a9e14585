"""Bytes that are live during the whole step: parameters, buffers, gradients, optimizer state, inputs."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from scheduler.capture.target import Device, Target, lies_on
from scheduler.costs.peak import allocated

__all__ = ["optimizer_bytes", "resident_parts", "storage_bytes"]


def storage_bytes(tensors: Iterable[Tensor], device: Device) -> int:
    """Bytes that ``tensors`` take on the kind of ``device``: a storage that several share counts once.

    Of a storage that is larger than the tensors seen on it (a batch cut out of a data set) only their part
    counts.
    """
    seen: set[Tensor] = set()
    parts: dict[int, tuple[int, int]] = {}  # storage -> (its bytes, bytes of the tensors on it)
    for tensor in tensors:
        if lies_on(tensor, device) and tensor not in seen:
            seen.add(tensor)
            storage = tensor.untyped_storage()
            _, part = parts.get(storage._cdata, (0, 0))
            parts[storage._cdata] = (storage.nbytes(), part + tensor.numel() * tensor.element_size())
    return sum(allocated(min(whole, part), device) for whole, part in parts.values())


def resident_parts(model: nn.Module, call: Any, device: Device) -> dict[str, int]:
    """Bytes of parameters, gradients that exist already, buffers and the tensors in ``call``.

    The workspaces of libraries count for a device that is not there; one that is says nothing of them.
    """
    return {
        "parameters": storage_bytes(model.parameters(), device),
        "existing gradients": storage_bytes(
            (p.grad for p in model.parameters() if p.grad is not None), device
        ),
        "buffers": storage_bytes(model.buffers(), device),
        "inputs": storage_bytes((t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)), device),
        "workspaces": device.spec.workspace if isinstance(device, Target) else 0,
    }


def optimizer_bytes(optimizer: torch.optim.Optimizer | None, device: Device) -> int:
    """Bytes of the optimizer's state: as it is, or as its first step will make it.

    A state that is still empty is found by one step of a copy of the optimizer on fake tensors: exact, and
    without memory.

    Raises:
        ValueError: the optimizer's step does not run on fake tensors and its state is empty.
    """
    if optimizer is None:
        return 0
    if optimizer.state:
        return storage_bytes(
            (leaf for leaf in pytree.tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)), device
        )
    fake = FakeTensorMode()
    stand_in = copy.copy(optimizer)
    stand_in.state = defaultdict(dict)
    stand_in._optimizer_step_pre_hooks = OrderedDict()  # the user's hooks are not for a trial
    stand_in._optimizer_step_post_hooks = OrderedDict()
    groups = []
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            with fake:
                place = "cpu" if isinstance(device, Target) else parameter.device
                like = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=place
                )
            double = nn.Parameter(like, requires_grad=parameter.requires_grad)
            if parameter.requires_grad:
                with fake:
                    double.grad = torch.empty_like(double)
            parameters.append(double)
        groups.append({**group, "params": parameters})
    stand_in.param_groups = groups
    try:
        with fake, torch.no_grad():
            type(optimizer).step(stand_in)
    except Exception as error:  # whatever a third-party optimizer does on fake tensors
        raise ValueError(
            f"solve: the state of {type(optimizer).__name__} is still empty and its size cannot be found by a "
            f"trial step on fake tensors ({error}); call optimizer.step() once before solve()"
        ) from error
    total = 0
    for state in stand_in.state.values():
        for leaf in pytree.tree_leaves(state):
            # Optimizers keep their counts of steps, of no dimension, on the host.
            counts = (
                isinstance(device, Target)
                and device.type != "cpu"
                and isinstance(leaf, Tensor)
                and not leaf.ndim
            )
            if isinstance(leaf, Tensor) and lies_on(leaf, device) and not counts:
                total += allocated(leaf.untyped_storage().nbytes(), device)
    return total
