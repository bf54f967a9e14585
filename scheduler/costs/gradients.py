"""Bytes of gradients between the backwards of stages, and of those of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from types import MappingProxyType

from torch import nn

from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.stage_run import StageCost
from rematplan.scheduler.torch_layer.fsdp import local
from rematplan.scheduler.torch_layer.target import Device

__all__ = ["GradFlows", "parameter_grads"]


class GradFlows:
    """Counts the bytes that hold the gradients of boundary and carried values while they wait.

    The gradient that a stage leaves of a value may be a view of a larger one (of a concatenation), which it
    keeps live whole, until a second reader's share is added, which makes a tensor of its own.
    """

    def __init__(self, capture: GraphCapture, costs: list[StageCost], size: dict[int, int]) -> None:
        self.capture, self.size = capture, size
        graph, self.carried = capture.graph, {key for keys in capture.linear.carried for key in keys}
        self.nodes = {node.name: node for node in graph.group_of}
        # left[k][value] = {(k, storage): bytes} that stage k's backward leaves as the value's gradient
        self.left: list[dict[int, dict[tuple[int, int], int]]] = []
        for k, (stage, cost) in enumerate(zip(capture.stages, costs, strict=True)):
            left: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
            for position, storage, held in cost.input_grads:
                for key in graph.group_of[self.nodes[stage.argument_names[position]]]:
                    left[key][k, storage] = held
            self.left.append(left)

    def _held(self, key: int, stage: int) -> dict[tuple[int, int], int]:
        """Return storages of the gradient of a value once ``stage`` and all after it are reversed."""
        readers = [k for k in range(stage, len(self.left)) if key in self.left[k]]
        if len(readers) == 1:
            return self.left[readers[0]][key]
        return {(-1, key): self.size[key]} if readers else {}

    def _elsewhere(self, stage: int) -> set[tuple[int, int]]:
        """Return the storages of carried values' gradients once ``stage`` and all after it are reversed."""
        left = {key for left in self.left[stage:] for key in left}
        return {storage for key in left & self.carried for storage in self._held(key, stage)}

    def boundary(self, stage: int) -> int:
        """Return bytes of the gradient of boundary ``stage``, storages of carried gradients left out."""
        held: dict[tuple[int, int], int] = {}
        for key in self.capture.linear.boundaries[stage]:
            held |= self._held(key, stage)
        return sum(held[storage] for storage in held.keys() - self._elsewhere(stage))

    def inputs(self) -> dict[int, list[int]]:
        """Return inputs of the model that get gradients -> the stages that these come from, ascending."""
        found: dict[int, list[int]] = defaultdict(list)
        for k, left in enumerate(self.left):
            for key in left:
                if self.capture.graph.groups[key].producer < 0:
                    found[key].append(k)
        return found

    def carried_bytes(self, key: int, stage: int) -> int:
        """Return bytes of a carried value's gradient once ``stage`` and all after it are reversed."""
        return sum(self._held(key, stage).values())


def parameter_grads(
    readers: Mapping[nn.Parameter, list[int]],
    existing: Collection[nn.Parameter],
    change: list[int],
    device: Device,
    whole: Collection[nn.Parameter] = (),
    sparse: Mapping[nn.Parameter, int] = MappingProxyType({}),
) -> tuple[list[int], list[int]]:
    """Return bytes of the gradients of parameters.

    A parameter that several stages read gets its gradient from the last of them, which is reversed first.
    Autograd sums the shares in a tensor of their own before it touches ``.grad``. Where a gradient exists
    already, that tensor waits beside it from the latest reader to the earliest: ``change`` is amended.

    Args:
        readers: the stages that read each parameter, ascending.
        existing: parameters that have a gradient before the step.
        change: (L,) by how much each backward changes the bytes of long-lived values.
        whole: sharded parameters whose gradients stay whole, beside those that exist.
        sparse: bytes of gradients that are sparse.

    Returns:
        (L,) bytes of gradients that the backward of each stage creates; (L,) bytes that it takes besides to
        add its share to the gradient of a parameter that a later stage reads too.
    """
    created, summed = [0] * len(change), [0] * len(change)
    for parameter, stages in readers.items():
        if not parameter.requires_grad:
            continue
        shard = parameter if parameter in whole else local(parameter)
        size = allocated(shard.numel() * shard.element_size(), device)
        if parameter in sparse:  # a share that is dense makes the sum dense
            size = sparse[parameter] if len(stages) == 1 else max(size, sparse[parameter])
        for k in stages[:-1]:
            summed[k] += size
        if parameter not in existing or parameter in sparse or parameter in whole:
            created[stages[-1]] += size
        elif len(stages) > 1:
            change[stages[-1]] += size
            change[stages[0]] -= size
    return created, summed
