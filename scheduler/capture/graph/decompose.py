"""Replace composite ops in an op graph by the ops that they consist of.

PyTorch runs an op without a kernel of its own (CompositeImplicitAutograd) as a series of other ops, and
autograd saves what those need. Attention with dropout on a CPU is one: two matrix products, a softmax, a
dropout. As one op it can be recomputed as a whole only; in parts, the dropout can be recomputed and the
products be kept. An op with a kernel of its own (flash attention, layer_norm) stays as it is: its parts would
save more.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from rematplan.scheduler.capture.graph.op_graph import Op, OpGraph, analyse, resolve
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.private import FakeTensorMode, codegen_of, composite_kernel

__all__ = ["in_parts"]

# Storages smaller than this share of the largest that an op makes are no reason to take it apart: a norm's
# means, counts.
SMALL = 1 / 16
# An op of more parts stays whole: a recurrent layer may be a series of ops for each time step.
MOST = 64


def in_parts(graph: OpGraph, call: Call) -> OpGraph:
    """Take composite ops apart where an option could keep some of what they save.

    These are the ops of which autograd saves two or more large storages that they make themselves.

    Args:
        graph: stays as it is.
        call: canonical ``(args, kwargs)`` that it was captured on.

    Returns:
        another graph on the same parameters; ``graph`` itself if there is nothing to take apart.
    """
    inputs, face = graph.inputs(call), graph.face
    while (module := _one_level_down(graph)) is not None:
        graph = analyse(module, inputs).shown_as(face)
    return graph


def _one_level_down(graph: OpGraph) -> fx.GraphModule | None:
    """Return the module with composite ops replaced by what they call; None if it has none."""
    known: dict[str, fx.GraphModule | None] = {}
    found: dict[fx.Node, fx.GraphModule] = {}
    saved = {key for op in graph.ops for key in op.saved}
    for index, op in enumerate(graph.ops):
        made = {key for key in (*op.writes, *op.saved) if graph.groups[key].producer == index}
        least = SMALL * max((graph.groups[key].bytes for key in made), default=0)
        large = sum(graph.groups[key].bytes >= least for key in made & saved)
        if large < 2 or composite_kernel(op.node.target) is None:
            continue
        described = _described(graph, op)
        if described not in known:
            known[described] = _parts(graph, op)
        parts = known[described]
        if parts is not None:
            found[op.node] = parts
    if not found:
        return None
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph.module.graph, copies))
    copy.set_codegen(codegen_of(graph.module.graph))
    for node, parts in found.items():
        _inline(copy, copies[node], parts)
    copy.lint()
    return fx.GraphModule(graph.module, copy)


def _tensor(graph: OpGraph, node: fx.Node) -> torch.Tensor | None:
    """Return a tensor like the node's; None if it is no tensor."""
    value = resolve(graph.module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _described(graph: OpGraph, op: Op) -> str:
    """Return text that is equal for two ops with the same parts."""
    number = {node: i for i, node in enumerate(op.node.all_input_nodes)}

    def argument(node: fx.Node) -> str:
        tensor = _tensor(graph, node)
        if tensor is None:
            return node.name
        layout = f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"
        return f"%{number[node]} {layout} {graph.grad_of[node]}"

    return f"{op.node.target} {fx.map_arg((op.node.args, op.node.kwargs), argument)}"


def _parts(graph: OpGraph, op: Op) -> fx.GraphModule | None:
    """Return the ops that the op calls, as a function of the tensors that it reads.

    None if they cannot be had, are too many, or are one op with a kernel of its own.
    """
    nodes = op.node.all_input_nodes
    target: Any = op.node.target
    kernel: Any = composite_kernel(target)

    def run(*tensors: torch.Tensor) -> Any:
        env = dict(zip(nodes, tensors, strict=True))
        args, kwargs = fx.map_arg((op.node.args, op.node.kwargs), env.__getitem__)
        return target(*args, **kwargs)

    with FakeTensorMode(), torch.enable_grad():
        given = []
        for node in nodes:
            tensor = _tensor(graph, node)
            if tensor is None:
                return None
            like = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            given.append(like.requires_grad_(graph.grad_of[node]))
        try:
            parts = make_fx(run, {target: kernel}, "fake", pre_dispatch=True)(*given)
        except Exception:  # noqa: BLE001 # whatever the kernel raises on tensors without data
            return None
    calls = [n for n in parts.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    if any(n.op == "get_attr" for n in parts.graph.nodes) or len(calls) > MOST:
        return None
    return parts if len(calls) > 1 or any(composite_kernel(n.target) for n in calls) else None


def _inline(graph: fx.Graph, node: fx.Node, parts: fx.GraphModule) -> None:
    """Put the parts into the graph, in the place of the node."""
    inputs = [n for n in parts.graph.nodes if n.op == "placeholder"]
    made = dict(zip(inputs, node.all_input_nodes, strict=True))
    kept = {name: node.meta[name] for name in ("nn_module_stack", "stack_trace") if name in node.meta}
    with graph.inserting_before(node):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                made[part] = graph.node_copy(part, made.__getitem__)
                made[part].meta = {**kept, "val": part.meta.get("val")}
    results: Any = fx.map_arg(parts.graph.output_node().args[0], made.__getitem__)
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):  # each takes one of the results
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
