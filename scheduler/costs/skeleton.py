"""Run a step of a captured model with its blocks taken out, to measure the user's code around them.

Each block runs without autograd, and one node of the graph stands for it, which saves nothing and passes on
gradients of the sizes of the block's. The rest of the step, forward and backward, is the user's own, in
autograd's own order: its saved tensors, the tensors that it holds, the gradients that wait meanwhile.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rematplan.scheduler.capture.blocks.block_capture import BlockCapture
from rematplan.scheduler.capture.blocks.calls import intercepted
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.costs.meters.peak import Counted
from rematplan.scheduler.costs.stage_run import seed_gradients
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.fsdp import sharded_within
from rematplan.scheduler.torch_layer.layouts import held_bytes, is_strided, storage_key
from rematplan.scheduler.torch_layer.leaves import tensor_leaves, tensors_in, tree_flatten, tree_unflatten
from rematplan.scheduler.torch_layer.loss import find_loss
from rematplan.scheduler.torch_layer.preserve import in_backward, reverse, uncached
from rematplan.scheduler.torch_layer.private import is_view

__all__ = ["Box", "Piece", "SkeletonEvent", "Timed", "Visitor", "pieces", "run_skeleton", "stand_in"]

# "enter", "leave", "reverse", "cleared", "reversed" and a block; "over" (the forward) or "done" and -1
SkeletonEvent = tuple[str, int]


@dataclass(slots=True)
class Box:
    """A block that stands in the skeleton as one node.

    Attributes:
        requires_grad: output leaf -> whether it requires grad.
        input_grads: as in ``StageCost``.
        stand_in: makes an output like the block's, so that it need not run; see ``stand_in``.
    """

    requires_grad: dict[int, bool]
    input_grads: tuple[tuple[int, int, int], ...] = ()
    stand_in: Callable[[], Any] | None = None


def stand_in(produced: Any, given: Iterable[Tensor]) -> Callable[[], Any] | None:
    """Return a function that copies an output; None where a copy is unlike running the block again.

    A copy is unlike if the output has leaves that are no tensors, or tensors that share storages or are parts
    of them.

    Args:
        given: the block's arguments and weights.
    """
    leaves, spec = tree_flatten(produced)
    seen = {storage_key(tensor) for tensor in given}
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not is_strided(leaf):
            return None
        key = storage_key(leaf)
        if key is None or key in seen or held_bytes(leaf) != leaf.nbytes:
            return None
        seen.add(key)
    kept = [leaf.detach().clone() for leaf in leaves]
    return lambda: tree_unflatten([torch.empty_like(leaf).copy_(leaf) for leaf in kept], spec)


class Visitor:
    """Follows a skeleton step; notes the events, and no more."""

    def enter(self, block: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Begin a block; return its output, if it has been made here."""
        self.note("enter", block)

    def leave(self, block: int, produced: Any) -> None:  # noqa: ARG002
        """End a block's forward."""
        self.note("leave", block)

    def arrived(self, block: int, grads: Sequence[Tensor]) -> None:
        """Take the gradients of a block's outputs."""

    def note(self, what: str, block: int = -1) -> None:
        """Note an event."""

    def unreversed(self, block: int) -> None:
        """Note at the end that an output of a block that leads to one of the model's got no gradient."""


class _Edge(torch.autograd.Function):
    """A tensor without elements that depends on the arguments of a block; backward makes their gradients."""

    @staticmethod
    def forward(ctx: Any, node: _Node, _: Tensor, *tensors: Tensor) -> Tensor:
        ctx.node, ctx.likes = node, [(t.shape, t.dtype, t.device) for t in tensors]
        return torch.empty(0, device=node.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        node: _Node = ctx.node
        node.visitor.note("reverse", node.block)
        node.visitor.arrived(node.block, node.arrived)
        node.arrived.clear()
        node.visitor.note("cleared", node.block)
        made = {position: (storage, size) for position, storage, size in node.box.input_grads}
        buffers: dict[int, Tensor] = {}
        grads: dict[int, Tensor] = {}
        for position, (shape, dtype, device) in zip(node.positions, ctx.likes, strict=True):
            if position in made:
                storage, size = made[position]
                if storage not in buffers:
                    buffers[storage] = torch.zeros(size, dtype=torch.uint8, device=device)
                flat, count = buffers[storage].view(dtype), shape.numel()
                # A gradient may be an expanded view of fewer numbers.
                whole = flat.numel() >= count
                grads[position] = flat[:count].view(shape) if whole else flat[:1].expand(shape)
        buffers.clear()
        node.visitor.note("reversed", node.block)
        return None, None, *map(grads.get, node.positions)


class _Cut(torch.autograd.Function):
    """An output of a block: depends on its edge, is no leaf, and may be changed in place."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, node: _Node, held: list[Tensor]) -> Tensor:  # noqa: ARG004 # autograd's signature
        ctx.node = node
        node.cuts.add(ctx)
        return held.pop().detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.node.cuts.discard(ctx)
        ctx.node.arrived.extend(grads)  # they stay until all have arrived, and the block is reversed
        return torch.empty(0, device=ctx.node.device), None, None


@dataclass(slots=True)
class _Node:
    """One use of a box in a step."""

    block: int
    box: Box
    visitor: Visitor
    device: torch.device
    positions: list[int] = field(default_factory=list)
    arrived: list[Tensor] = field(default_factory=list)
    cuts: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # those not reversed yet


def _closed(node: _Node, args: Any, kwargs: Any, produced: Any) -> Any:
    """Return the outputs of a block as those of one node that depends on its arguments."""
    given = [(i, t) for i, t in tensor_leaves((args, kwargs)) if t.requires_grad]
    node.positions = [i for i, _ in given]
    edge = _Edge.apply(node, torch.empty(0, device=node.device, requires_grad=True), *(t for _, t in given))
    leaves, spec = tree_flatten(produced)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if not node.box.requires_grad.get(i, False):
                leaves[i] = leaf.detach()
                continue
            leaves[i] = _Cut.apply(edge, node, [leaf])
            if is_view(leaf):  # of which a change in place is reversed on copies of the whole base
                leaves[i] = leaves[i].view_as(leaves[i])
    return tree_unflatten(leaves, spec)


def run_skeleton(
    capture: BlockCapture,
    model: nn.Module,
    call: Call,
    boxes: dict[int, Box],
    visitor: Visitor,
    *,
    own_loss: bool | None = None,
    inside: bool = False,
) -> Any:
    """Run one step with the blocks taken out; return the output. The caller preserves the model's state.

    Args:
        boxes: one for each block, once it has run for the first time.
        own_loss: whether the loss is among the model's outputs; else the outputs themselves get gradients.
            None: there is no backward.
        inside: whether the visitor is inside of the hooks by which fully_shard gathers a block. Else they are
            part of the block, and only what the user's code needs is gathered while it runs.

    Raises:
        CaptureError: the blocks do not run in the order of the capture.
    """
    ran = 0
    nodes: list[_Node] = []

    def loose(name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        index, ran = ran, ran + 1
        if in_backward():
            raise CaptureError(
                f"{name} runs again in the backward, as under torch.utils.checkpoint; leave that to the plan"
            )
        if index >= len(capture.blocks) or capture.blocks[index].name != name:
            raise CaptureError(f"{name} does not run at the same place in every forward")
        produced = visitor.enter(index, forward, args, kwargs)
        if produced is None:
            made = boxes[index].stand_in if index in boxes else None
            with torch.set_grad_enabled(capture.grad), uncached():
                produced = forward(*args, **kwargs) if made is None else made()
        nodes.append(_Node(index, boxes[index], visitor, capture.device))
        produced = _closed(nodes[-1], args, kwargs, produced)
        visitor.leave(index, produced)
        return produced

    def wrapper(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda forward: functools.partial(loose, name, forward)

    args, kwargs = call
    torch.clear_autocast_cache()
    with torch.enable_grad():
        whole = frozenset[nn.Module]() if inside else frozenset(sharded_within(model))
        blocks = {block.name: model.get_submodule(block.name) for block in capture.blocks}
        with intercepted([(module, wrapper(name)) for name, module in blocks.items()], whole):
            output = model(*args, **kwargs)
        if ran != len(capture.blocks):
            raise CaptureError(f"of {len(capture.blocks)} blocks {ran} run in another forward")
        torch.clear_autocast_cache()  # as when the context ends, which the forward alone is in
        visitor.note("over")
        if own_loss is None:
            return output
        if own_loss:
            root: Tensor | None = find_loss(output)[0]
        else:
            tensors = (t for t in tensors_in(output) if t.is_floating_point() or t.is_complex())
            root = seed_gradients(dict(enumerate(tensors)), {})[0]
    if root is not None and root.requires_grad:
        reverse(root)
    del root
    visitor.note("done")
    for node in nodes:
        if node.cuts:
            visitor.unreversed(node.block)
    return output


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of the user's code before a block, or after the last one; or of its backward.

    Attributes:
        start, end: live at its start and its end.
        peak: the most live meanwhile.
    """

    start: int
    end: int
    peak: int

    @classmethod
    def of(cls, counted: Counted, start: int, end: int) -> Piece:
        """Return the piece between two marks (-1: the start of the step)."""
        at_start = counted.marks[start] if start >= 0 else 0
        return cls(at_start, counted.marks[end], max(at_start, *counted.peaks[start + 1 : end + 1], 0))

    @property
    def taken(self) -> int:
        """The most bytes above those live at the start."""
        return self.peak - self.start


def pieces(
    events: Sequence[SkeletonEvent], blocks: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the events (-1: the start) between which each piece of the user's code runs, and its backward.

    A block that is not reversed, or out of order, leaves its piece to the one before.

    Returns:
        (blocks + 1,) each, in the order of the forward.
    """
    index = {event: i for i, event in enumerate(events)}
    cursor = index["over", -1]
    begins = [index.get(("leave", p - 1), -1) for p in range(blocks + 1)]
    ends = [*(index["enter", p] for p in range(blocks)), cursor]
    backward: list[tuple[int, int]] = []
    for p in range(blocks, -1, -1):
        ended = index.get(("reverse", p - 1), -1) if p else index["done", -1]
        backward.append((cursor, max(cursor, ended)))
        if ended >= cursor and p:
            cursor = index["reversed", p - 1]
    return list(zip(begins, ends, strict=True)), backward[::-1]


class Timed(Visitor):
    """Notes the time of each event; ``times`` begins with that of the start."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.events: list[SkeletonEvent] = []
        self.times = [now()]

    def note(self, what: str, block: int = -1) -> None:  # noqa: D102
        self.events.append((what, block))
        self.times.append(self.now())
