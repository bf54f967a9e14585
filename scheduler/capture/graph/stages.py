"""Compile the stages of an op graph, once, by fx, to plain functions of their tensors: no interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import fx, nn

from rematplan.scheduler.capture.graph.cut import Linear
from rematplan.scheduler.capture.graph.op_graph import Op, OpGraph, resolve
from rematplan.scheduler.core.errors import CaptureError

__all__ = ["GraphStage", "Source", "compile_stages"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where one argument of a stage comes from.

    Attributes:
        kind: "boundary" (index into the boundary's tensors), "carried" (name), "input" (index into the
            leaves of the call, and state tensors after them), "parameter" or "buffer" (dotted name in the
            model), "constant" (name).
        key: index or name.
        requires_grad: of the tensor, in the step.
    """

    kind: str
    key: Any
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class GraphStage:
    """One compiled stage.

    Attributes:
        name: for people: the modules from the first op to the last.
        function: (*arguments) -> tuple of results.
        sources: one per argument.
        argument_names: name of the node that each argument is.
        boundary: names of the next boundary's tensors.
        boundary_from: for each of them, an index into the results, or -1 - j for tensor j of the boundary
            that this stage was given (a value that passes through).
        carried: names of the carried tensors made here.
        carried_from: for each of them, an index into the results.
        signature: equal for two stages that run the same ops on the same shapes.
    """

    name: str
    function: Callable[..., tuple[torch.Tensor, ...]]
    sources: tuple[Source, ...]
    argument_names: tuple[str, ...]
    boundary_from: tuple[int, ...]
    carried: tuple[str, ...]
    carried_from: tuple[int, ...]
    boundary: tuple[str, ...]
    signature: str


def compile_stages(
    graph: OpGraph, linear: Linear, model: nn.Module
) -> tuple[list[GraphStage], list[Source | Any]]:
    """Compile every stage of a linearised graph.

    Returns:
        the stages; and for each leaf of the output, where it comes from, or the plain value that it is.

    Raises:
        CaptureError: a value that is no tensor crosses a cut.
    """
    users = _last_stage_of_use(graph, linear)
    carried_groups = {key for keys in linear.carried for key in keys}
    own = {id(t): ("parameter", name) for name, t in model.named_parameters()}
    own.update({id(t): ("buffer", name) for name, t in model.named_buffers()})
    stages: list[GraphStage] = []
    entering: list[fx.Node] = []  # the boundary

    def source_of(node: fx.Node) -> Source | None:
        if node.op == "placeholder":
            return Source("input", graph.face.positions[graph.placeholders.index(node)])
        if node.op == "get_attr":
            value = resolve(graph.module, graph.attributes[node])
            known = own.get(id(value), ("constant", graph.attributes[node]))
            return Source(*known) if isinstance(value, torch.Tensor) else None
        return Source("boundary", entering.index(node)) if node in entering else Source("carried", node.name)

    for k, (start, stop) in enumerate(pairwise(linear.cuts)):
        ops = graph.ops[start:stop]
        inside = {op.node for op in ops}
        subgraph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        given: dict[fx.Node, Source] = {}
        # fx wants all placeholders first: make them before the ops are copied.
        for node in dict.fromkeys(n for op in ops for n in op.node.all_input_nodes if n not in inside):
            source = source_of(node)
            if source is None:  # a submodule of a higher-order op
                made[node] = subgraph.get_attr(str(node.target))
            else:
                made[node] = subgraph.placeholder(node.name)
                given[node] = replace(source, requires_grad=graph.grad_of[node])
        for op in ops:
            made[op.node] = subgraph.node_copy(op.node, made.__getitem__)
        leaving = [op.node for op in ops if users.get(op.node, -1) > k]
        results = [made[node] for node in leaving]
        # What passes through, then what this stage makes.
        boundary = {node: -1 - j for j, node in enumerate(entering) if users[node] > k}
        carried: dict[fx.Node, int] = {}
        for index, node in enumerate(leaving):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                raise CaptureError(
                    f"{node.name}, which crosses a cut, is {type(value).__name__}, not a tensor"
                )
            lasts = all(g in carried_groups or graph.groups[g].producer < 0 for g in graph.group_of[node])
            (carried if lasts else boundary)[node] = index
        subgraph.output(tuple(results))
        subgraph.lint()
        compiled = fx.GraphModule(graph.module, subgraph, class_name=f"Stage{k}")
        stages.append(
            GraphStage(
                _stage_name(ops),
                compiled.forward,
                tuple(given.values()),
                tuple(node.name for node in given),
                tuple(boundary.values()),
                tuple(node.name for node in carried),
                tuple(carried.values()),
                tuple(node.name for node in boundary),
                _signature(graph, start, ops, given, results, subgraph),
            )
        )
        entering = [*boundary]
    return stages, [source_of(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in graph.outputs]


def _last_stage_of_use(graph: OpGraph, linear: Linear) -> dict[fx.Node, int]:
    """Return the last stage that reads each node; L for outputs."""
    last: dict[fx.Node, int] = {}
    for k, (start, stop) in enumerate(pairwise(linear.cuts)):
        for op in graph.ops[start:stop]:
            last.update(dict.fromkeys(op.node.all_input_nodes, k))
    for leaf in graph.outputs:
        if isinstance(leaf, fx.Node):
            last[leaf] = len(linear)
    return last


def _stage_name(ops: list[Op]) -> str:
    """Return the common module path of the ops, or the paths of the first and last op."""
    paths = []
    for op in ops:
        stack = op.node.meta.get("nn_module_stack")
        if stack:
            paths.append(list(stack.values())[-1][0] or "model")
    if not paths:
        return ops[-1].node.name
    first, last = paths[0], paths[-1]
    if first == last:
        return first
    both = zip(first.split("."), last.split("."), strict=False)
    common = ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], both))
    head, tail = (path[len(common) + 1 :] if common else path for path in (first, last))
    span = f"{head or '.'}..{tail or '.'}"
    return f"{common}[{span}]" if common else span


def _signature(
    graph: OpGraph,
    first: int,
    ops: list[Op],
    given: Mapping[fx.Node, Source],
    results: list[fx.Node],
    subgraph: fx.Graph,
) -> str:
    """Return text that is equal for stages that run the same ops on arguments of the same kinds and shapes.

    They save storages of their own alike, too: under autocast a weight that an earlier stage has cast may be
    cached.
    """
    number = {node: index for index, node in enumerate(subgraph.nodes)}
    rows = [f"{source.kind} {_shape(node)} {source.requires_grad}" for node, source in given.items()]
    made = [node for node in subgraph.nodes if node.op == "call_function"]
    for op, node in zip(ops, made, strict=True):
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        rows.append(f"{node.target} {args} {_shape(op.node)} {op.requires_grad}")
        rows.append(str([graph.groups[pack.group].producer >= first for pack in op.packs]))
    return "\n".join(rows) + f"\n{[number[r] for r in results]}"


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{tuple(value.shape)} {value.dtype} {value.stride()}"
