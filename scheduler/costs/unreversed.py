"""Saved tensors that the loss's backward never releases, because another output still references them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx

from rematplan.scheduler.capture.graph.graph_capture import GraphCapture
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.torch_layer.leaves import tree_unflatten
from rematplan.scheduler.torch_layer.loss import find_loss

__all__ = ["held_by_user", "held_results", "unread_results", "unreversed", "unreversed_bytes"]


def unreversed(capture: GraphCapture, loss_is_output: bool) -> set[fx.Node]:
    """Return the nodes that lead to outputs that require grad, and not to the loss; none without a loss.

    Autograd releases an op's saved tensors when that op is reversed, or else with the last tensor that
    depends on it.
    """
    if not loss_is_output:
        return set()
    graph = capture.graph
    held = [leaf for leaf in graph.outputs if isinstance(leaf, fx.Node) and graph.grad_of.get(leaf)]
    loss = _loss(capture)
    reversed_ = held if loss is None else [loss]
    return {n for n in _leading_to(graph, held) - _leading_to(graph, reversed_) if graph.grad_of[n]}


def held_results(capture: GraphCapture, k: int, waiting: set[fx.Node]) -> frozenset[int]:
    """Return the results of stage k that are live while it is reversed: the user's, or not reversed."""
    graph, linear, stage = capture.graph, capture.linear, capture.stages[k]
    ops = graph.ops[linear.cuts[k] : linear.cuts[k + 1]]
    both = capture.saves(k) & held_by_user(graph)
    nodes = {op.node.name: op.node for op in ops}
    results = zip((*stage.carried, *stage.boundary), (*stage.carried_from, *stage.boundary_from), strict=True)
    made = ((nodes[name], i) for name, i in results if i >= 0)
    return frozenset(i for node, i in made if node in waiting or both.intersection(graph.group_of[node]))


def unread_results(capture: GraphCapture, k: int, loss_is_output: bool) -> frozenset[int]:
    """Return the results of stage k that get no gradient: outputs that no stage reads, but for the loss."""
    stage, linear = capture.stages[k], capture.linear
    found = capture.result_layouts(k)[1]
    if not loss_is_output:
        return found
    nodes = {node.name: node for node in capture.graph.group_of}
    read = {i for i in stage.boundary_from if i >= 0}
    return found | {
        i
        for name, i in zip(stage.carried, stage.carried_from, strict=True)
        if i not in read and not any(linear.readers.get(key) for key in capture.graph.group_of[nodes[name]])
    }


def unreversed_bytes(
    capture: GraphCapture, k: int, waiting: set[fx.Node], total: Callable[[Iterable[int]], int]
) -> int:
    """Return at most the bytes that stay when stage k is reversed: saved, or the boundary of a re-run."""
    graph, linear = capture.graph, capture.linear
    ops = graph.ops[linear.cuts[k] : linear.cuts[k + 1]]
    saved = {key for op in ops if op.node in waiting for key in op.saved}
    return max(total(saved), *map(total, linear.boundaries[: k + 1])) if saved else 0


def held_by_user(graph: OpGraph) -> set[int]:
    """Return the storages of the outputs."""
    return {key for leaf in graph.outputs if leaf in graph.group_of for key in graph.group_of[leaf]}


def _leading_to(graph: OpGraph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that gradients of these reach, through changes in place, too."""
    places = {op.node: i for i, op in enumerate(graph.ops)}

    def changes(node: fx.Node, until: int) -> list[fx.Node]:
        keys = (key for key in graph.group_of.get(node, ()) if graph.groups[key].requires_grad)
        return [graph.ops[i].node for key in keys for i in graph.groups[key].mutated if i <= until]

    found = set[fx.Node]()
    waiting = [each for node in nodes for each in (node, *changes(node, len(graph.ops)))]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        place = places.get(node, -1)
        # A result without a gradient (an index, zeros of a shape) passes none on, whatever is written there.
        if place >= 0 and graph.ops[place].requires_grad:
            for each in (node, *node.all_input_nodes):
                waiting += [each, *changes(each, place)]
    return found


def _loss(capture: GraphCapture) -> fx.Node | None:
    """Return the output that is the model's own loss, if it has one."""
    graph = capture.graph
    leaves = {}
    for leaf in graph.outputs:
        if leaf in graph.layout_of:
            like = graph.layout_of[leaf]
            stand_in = torch.empty(like.shape, dtype=like.dtype, device="meta")
            leaves[leaf] = stand_in.requires_grad_(graph.grad_of[leaf])
    output = tree_unflatten([leaves.get(leaf, leaf) for leaf in graph.outputs], graph.output_spec)
    loss, own = find_loss(output)
    return next(node for node, tensor in leaves.items() if tensor is loss) if own else None
