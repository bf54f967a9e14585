"""Compile the stages of an op graph to Python functions, and tell what each takes and returns.

Each stage is compiled once, by fx, into a plain function of its tensors: no interpreter, no dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from rematplan.scheduler.capture.graph.cut import Linear
from rematplan.scheduler.capture.graph.op_graph import OpGraph, resolve
from rematplan.scheduler.core.errors import CaptureError

__all__ = ["GraphStage", "Source", "compile_stages"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where one argument of a stage comes from.

    Attributes:
        kind: "boundary" (index into the boundary's tensors), "carried" (name), "input" (index into the
            leaves of the call, and state tensors after them), "parameter" or "buffer" (dotted name in the
        model), "constant" (name). key: index or name. requires_grad: of the tensor, in the step.
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


def compile_stages(graph: OpGraph, linear: Linear, model: nn.Module) -> list[GraphStage]:
    """Compile every stage of a linearised graph.

    Raises:
        CaptureError: a value that is no tensor crosses a cut.
    """
    users = _last_stage_of_use(graph, linear)
    carried_groups = {key for keys in linear.carried for key in keys}
    own = {id(t): ("parameter", name) for name, t in model.named_parameters()}
    own.update({id(t): ("buffer", name) for name, t in model.named_buffers()})
    crossing: dict[fx.Node, tuple[str, Any]] = {}  # where a node made earlier is found
    stages: list[GraphStage] = []
    entering: tuple[str, ...] = ()  # names of the boundary's tensors
    for k in range(len(linear)):
        ops = graph.ops[linear.cuts[k] : linear.cuts[k + 1]]
        inside = {op.node for op in ops}
        subgraph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        sources: list[Source] = []

        originals: list[fx.Node] = []
        # fx wants all placeholders first: make them before the ops are copied.
        for node in dict.fromkeys(n for op in ops for n in op.node.all_input_nodes if n not in inside):
            source = _source(node, graph, own, crossing, entering)
            if source is None:  # a submodule of a higher-order op
                made[node] = subgraph.get_attr(str(node.target))
            else:
                made[node] = subgraph.placeholder(node.name)
                sources.append(replace(source, requires_grad=graph.grad_of[node]))
                originals.append(node)
        for op in ops:
            made[op.node] = subgraph.node_copy(op.node, made.__getitem__)
        results: list[fx.Node] = []
        boundary: list[str] = []
        boundary_from: list[int] = []
        for j, name in enumerate(entering):  # values that pass through this stage
            node = next(n for n in crossing if n.name == name)
            if users[node] > k:
                boundary.append(name)
                boundary_from.append(-1 - j)
        carried: list[str] = []
        carried_from: list[int] = []
        for op in ops:
            node = op.node
            if users.get(node, -1) <= k:
                continue
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                raise CaptureError(
                    f"{node.name}, which crosses a cut, is {type(value).__name__}, not a tensor"
                )
            results.append(made[node])
            keys = graph.group_of[node]
            if all(key in carried_groups or graph.groups[key].producer < 0 for key in keys):
                carried.append(node.name)
                carried_from.append(len(results) - 1)
                crossing[node] = ("carried", node.name)
            else:
                boundary.append(node.name)
                boundary_from.append(len(results) - 1)
                crossing[node] = ("boundary", node.name)
        subgraph.output(tuple(results))
        subgraph.lint()
        compiled = fx.GraphModule(graph.module, subgraph, class_name=f"Stage{k}")
        stages.append(
            GraphStage(
                _stage_name(ops),
                compiled.forward,
                tuple(sources),
                tuple(node.name for node in originals),
                tuple(boundary_from),
                tuple(carried),
                tuple(carried_from),
                tuple(boundary),
                _signature(graph, linear.cuts[k], ops, sources, originals, results, subgraph),
            )
        )
        entering = tuple(boundary)
    return stages


def _source(
    node: fx.Node,
    graph: OpGraph,
    own: Mapping[int, tuple[str, str]],
    crossing: Mapping[fx.Node, tuple[str, Any]],
    entering: tuple[str, ...],
) -> Source | None:
    if node.op == "placeholder":
        return Source("input", graph.face.positions[graph.placeholders.index(node)])
    if node.op == "get_attr":
        value = resolve(graph.module, graph.attributes[node])
        if not isinstance(value, torch.Tensor):
            return None
        kind, name = own.get(id(value), ("constant", graph.attributes[node]))
        return Source(kind, name)
    kind, name = crossing[node]
    return Source(kind, entering.index(name) if kind == "boundary" else name)


def _last_stage_of_use(graph: OpGraph, linear: Linear) -> dict[fx.Node, int]:
    """Return the last stage that reads each node; L for outputs."""
    last: dict[fx.Node, int] = {}
    for k in range(len(linear)):
        for op in graph.ops[linear.cuts[k] : linear.cuts[k + 1]]:
            for node in op.node.all_input_nodes:
                last[node] = k
    for leaf in graph.outputs:
        if isinstance(leaf, fx.Node):
            last[leaf] = len(linear)
    return last


def _stage_name(ops: list[Any]) -> str:
    """Return the common module path of the ops, or the paths of the first and last op."""
    paths = []
    for op in ops:
        stack = op.node.meta.get("nn_module_stack")
        if stack:
            paths.append(list(stack.values())[-1][0] or "model")
    if not paths:
        return ops[-1].node.name
    first, last = paths[0], paths[-1]
    parts = []
    for a, b in zip(first.split("."), last.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    if first == last:
        return first
    common = ".".join(parts)
    tail = last[len(common) + 1 :] if common else last
    head = first[len(common) + 1 :] if common else first
    span = f"{head or '.'}..{tail or '.'}"
    return f"{common}[{span}]" if common else span


def _signature(
    graph: OpGraph, first: int, ops: list[Any], sources: list[Source], originals: list[fx.Node],
    results: list[fx.Node], subgraph: fx.Graph,
) -> str:  # fmt: skip # one line per kind of thing
    """Return text that is equal for stages that run the same ops on arguments of the same kinds and shapes.

    They save storages of their own alike, too: under autocast a weight that an earlier stage has cast may be
    cached.
    """
    number = {node: index for index, node in enumerate(subgraph.nodes)}
    rows = []
    for source, node in zip(sources, originals, strict=True):
        rows.append(f"{source.kind} {_shape(node)} {source.requires_grad}")
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
