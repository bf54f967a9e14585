"""Measure a block in isolation, once for all blocks that run the same ops.

Blocks are equal if their traces are (``op_trace.py``) and if gradients exist of the same parameters: so are
the calls of a cell over time, and the layers of a transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_capture import BlockCapture
from rematplan.scheduler.capture.blocks.block_state import BlockState
from rematplan.scheduler.costs.meters.peak import allocated
from rematplan.scheduler.costs.op_trace import trace_of_ops
from rematplan.scheduler.costs.roofline import estimate_run
from rematplan.scheduler.costs.skeleton import Box
from rematplan.scheduler.costs.stage_run import (
    Enter,
    StageCost,
    StageRun,
    as_leaf,
    cached_casts,
    fresh_grads,
    measure_stage,
    saving,
)
from rematplan.scheduler.torch_layer.layouts import held_bytes, storage_key, storage_keys, tensor_bytes
from rematplan.scheduler.torch_layer.leaves import (
    map_tensors,
    repeats,
    tensor_leaves,
    tensors_in,
    tree_flatten,
    tree_unflatten,
)

__all__ = ["BlockCost", "BlockRun"]


@dataclass(slots=True)
class BlockCost:
    """Bytes and seconds of one block.

    Attributes:
        input_grad: bytes of the gradients of its boundary.
        saved_arguments, saved_outputs: leaves whose storages its backward needs.
        private: bytes that it saves besides.
        casts: bytes of its weights' casts that autocast's cache holds until the forward is over: those that
            it saves, and others.
    """

    cost: StageCost
    input_grad: int
    saved_arguments: frozenset[int]
    saved_outputs: frozenset[int]
    private: int
    casts: tuple[int, int]
    box: Box


class BlockRun:
    """A block on its arguments of the step.

    Args:
        existing: the parameters that have a gradient before a stage's backward adds to it.
        waiting: those of which a later block makes a share of the gradient.
    """

    def __init__(
        self,
        capture: BlockCapture,
        index: int,
        module: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        existing: Collection[nn.Parameter],
        waiting: Collection[nn.Parameter],
    ) -> None:
        block = capture.blocks[index]
        changed = capture.effects[block.stage].changed
        self.state = BlockState(block.name, module, changed, capture.overwritten)
        self.found = self.state.take()
        self.reversing = block.name in capture.reversing
        self.waiting = [p for p in module.parameters() if p in waiting and p.requires_grad]
        self.capture, self.module, self.forward, self.existing = capture, module, forward, existing
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.tensors = tensor_leaves((args, kwargs))
        self.repeats = repeats(self.leaves)
        self.fed = {argument for argument, *_ in block.fed} or {i for i, _ in self.tensors}
        self.weights = [*module.parameters(), *module.buffers()]  # gathered now, if they are sharded
        self.given = [*self.weights, *(tensor for _, tensor in self.tensors)]
        self.grad = {i for i, t in self.tensors if t.requires_grad}

    def __call__(self, enter: Enter) -> Any:
        """Run the block; see ``StageRun.run``."""
        again = dict(self.repeats)
        fresh = [
            enter(i, leaf) if i in self.grad and i not in again else leaf
            for i, leaf in enumerate(self.leaves)
        ]
        # As in a step, no leaf: autocast would put casts of a leaf into its cache.
        fresh = [t.view_as(t) if i in self.grad and t.is_leaf else t for i, t in enumerate(fresh)]
        for i, earlier in self.repeats:
            fresh[i] = fresh[earlier]
        positional, named = tree_unflatten(fresh, self.spec)
        self.state.put(self.found)
        return self.forward(*positional, **named)

    def trace(self) -> tuple[Hashable, Any]:
        """Return the fingerprint of the block's cost; and the output."""
        torch.clear_autocast_cache()
        ops, produced = trace_of_ops(lambda: self(as_leaf), self.given)
        torch.clear_autocast_cache()
        states = tuple(p in self.existing for p in self.module.parameters()), len(self.waiting)
        places = tuple(i for i, _ in self.tensors)
        return (ops, states, places, frozenset(self.fed)), map_tensors(Tensor.detach, produced)

    def measure(self, clock: bool) -> BlockCost:
        """Run the block a few times and count.

        Args:
            clock: False to estimate the seconds by the roofline.
        """
        capture, tensors = self.capture, self.tensors

        def run(enter: Enter) -> list[Tensor]:
            torch.clear_autocast_cache()  # a run casts its weights again
            try:
                return tensors_in(self(enter))
            finally:  # it may be stopped half-way
                torch.clear_autocast_cache()

        external = [t for i, t in tensors if i not in self.fed]
        lasting = storage_keys((*self.weights, *external))
        stage = StageRun(
            run,
            fresh_grads(self.module.parameters(), self.existing),
            lasting=lasting,
            waiting=self.waiting,
            reversing=self.reversing,
        )
        cost = measure_stage(stage, capture.place, clock=clock)
        if not clock:
            forward, backward = estimate_run(stage, capture.place)
            cost = replace(cost, forward=forward, backward=backward)
        kept: set[int | None] = set()
        sizes: dict[int | None, int] = {}
        holding: list[Tensor] = []  # no address is used again

        def pack(tensor: Tensor) -> Tensor:
            key = storage_key(tensor)
            kept.add(key)
            if key is not None:
                holding.append(tensor.detach())
                sizes[key] = allocated(held_bytes(tensor), capture.place)
            return tensor

        def saves() -> tuple[list[tuple[int, Tensor]], frozenset[int | None]]:
            kept.clear()
            with saving(pack, lambda t: t):
                outputs = tensor_leaves(self(as_leaf))
            return outputs, frozenset(kept)

        cached = cached_casts(lambda: self(as_leaf), capture.place)
        outputs, everything = saves()
        # Storages that a second run saves too are from autocast's cache.
        again = saves()[1] if cached else frozenset()
        torch.clear_autocast_cache()
        # Those that this run saves too existed before (in a closure): held ones are not recomputed.
        first = everything - saves()[1] - {storage_key(t) for t in self.given}
        saved_outputs = frozenset(i for i, t in outputs if storage_key(t) in first)
        fresh = {storage_key(t) for i, t in outputs if i in saved_outputs}
        saved_arguments = frozenset(i for i, t in tensors if storage_key(t) in everything)
        casts = sum(sizes[key] for key in again & (first - fresh))
        torch.clear_autocast_cache()
        # Kernels may keep bytes that no hook sees.
        own = max(cost.kept, sum(sizes[key] for key in first))
        boundary = [t for i, t in tensors if i in self.fed and t.requires_grad]
        return BlockCost(
            cost,
            sum(allocated(tensor_bytes(t), capture.place) for t in boundary),
            saved_arguments,
            saved_outputs,
            own - sum(sizes[key] for key in fresh) - casts,
            (casts, max(0, cached - casts)),
            Box({i: t.requires_grad for i, t in outputs}, cost.input_grads),
        )
