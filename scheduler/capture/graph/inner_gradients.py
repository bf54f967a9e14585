"""Capture the op graph of a forward that takes gradients itself: gradient penalties, forces, meta-learning.

torch.export cannot follow ``torch.autograd.grad``. Here the forward is traced below autograd, on tensors
without data, where the ops of the inner backward are ops like any other: to run them in grad mode makes the
graph that ``create_graph=True`` makes. What autograd does by itself is taken out again: it detaches what it
saves. What the user's code cuts off, by ``detach`` or without grad, stays cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode

from rematplan.scheduler.capture.graph.export import graph_by
from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.private import FakeTensorMode, replaced, schema_of

__all__ = ["noted_gradients", "traced_graph"]

_CUT = "rematplan: cut off"  # in a node's meta: the user's code wants no gradient through it
_DETACH = torch.ops.aten.detach.default


@contextmanager
def noted_gradients() -> Iterator[list[str]]:
    """Note whether the code within takes gradients; yield a list that stays empty if it does not."""
    seen: list[str] = []
    original = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        seen.append("torch.autograd.grad")
        return original(*args, **kwargs)

    with replaced(torch.autograd, grad=grad):
        yield seen


def traced_graph(model: nn.Module, call: Call) -> OpGraph:
    """Capture ``model(*args, **kwargs)``, inner gradients included, as an op graph.

    Raises:
        CaptureError: it cannot be traced, or tracing would drop something; says why.
    """
    return graph_by(_below_autograd, model, call)


def _below_autograd(root: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    own = {**dict(root.named_parameters()), **dict(root.named_buffers())}

    def run(*given: Any) -> list[Any]:
        mode = get_proxy_mode()
        assert mode is not None  # make_fx has entered it
        _note_grad_mode(mode.tracer)
        tensors = dict(zip(own, given, strict=False))
        with torch.enable_grad(), _Cuts(mode.tracer):
            return list(functional_call(root, tensors, given[len(own) :], tie_weights=True))

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        faked = [fake.from_tensor(tensor) for tensor in (*own.values(), *inputs)]
        try:
            module = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*faked)
        except CaptureError:
            raise
        except Exception as error:  # whatever the model's code raises on tensors without data
            raise CaptureError(f"its inner gradients cannot be traced: {str(error)[:300]}") from error
    _reconnect(module.graph)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for number, (tensor, node) in enumerate(zip(own.values(), placeholders, strict=False)):
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(f"own_{number}", tensor)
        else:
            module.register_buffer(f"own_{number}", tensor)
        with module.graph.inserting_after(placeholders[-1]):
            node.replace_all_uses_with(module.graph.get_attr(f"own_{number}"))
        module.graph.erase_node(node)
    return module


class _Cuts(TorchFunctionMode):
    """Mark what the user's code detaches; autograd detaches by itself, too, what it saves."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.detach, torch.detach, Tensor.data.__get__):  # type: ignore[attr-defined]
            slot = get_proxy_slot(result, self.tracer, None)
            if slot is not None:
                slot.proxy.node.meta[_CUT] = True
        return result


def _note_grad_mode(tracer: Any) -> None:
    """Mark, from now on, each node that is made without grad."""
    create = tracer.create_node

    def create_node(*args: Any, **kwargs: Any) -> fx.Node:
        node: fx.Node = create(*args, **kwargs)
        if not torch.is_grad_enabled():
            node.meta[_CUT] = True
        return node

    tracer.create_node = create_node


def _reconnect(graph: fx.Graph) -> None:
    """Take out the detaching that autograd does by itself, and cut off what is run without grad."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _DETACH:
            if _CUT not in node.meta:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        elif _CUT in node.meta and isinstance(node.meta.get("val"), Tensor) and not _changes(node):
            with graph.inserting_after(node):
                cut = graph.call_function(_DETACH, (node,))
            cut.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(cut, lambda user, cut=cut: user is not cut)


def _changes(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)
