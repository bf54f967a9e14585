"""Fingerprint a block's forward: blocks with equal fingerprints cost the same and are measured once.

Two traces are equal if the same ops run in the same order with the same plain arguments, on tensors of the
same shapes, strides and dtypes, whose storages are wired alike and of the same sizes; if the same storages
are released at the same places; and if the graph of the outputs has the same nodes, wired alike. Seconds and
bytes are then the same, whatever the values; an op whose cost depends on values shows in its results' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rematplan.scheduler.torch_layer.layouts import held_bytes, nonzeros, storage_key, storage_of
from rematplan.scheduler.torch_layer.leaves import tensors_in
from rematplan.scheduler.torch_layer.private import HigherOrderOperator, TorchDispatchMode

__all__ = ["trace_of_ops"]

PLAIN = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format
)  # fmt: skip # one row


def trace_of_ops(run: Callable[[], Any], given: Iterable[Tensor]) -> tuple[Hashable, Any]:
    """Run a forward in grad mode and trace it.

    Args:
        given: tensors that exist before: parameters, buffers, arguments; part of the trace, in this order.

    Returns:
        the trace, equal to others where the cost is the same; and the output.
    """
    ops = _Ops()
    existing = tuple(map(ops.described, given))
    ops.new.clear()  # they stay
    with torch.enable_grad(), ops:
        result = run()
    ops.look()
    outputs = tensors_in(result)
    graph = _graph(outputs, ops)
    return (existing, tuple(ops.rows), tuple(map(ops.described, outputs)), graph), result


class _Ops(TorchDispatchMode):
    """Notes each op: its arguments, its results, and the storages that were released before it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Hashable] = []
        self.number: dict[int, int] = {}
        self.refs: list[StorageWeakRef] = []  # no address is used again
        self.new: dict[int, StorageWeakRef] = {}  # those that the forward made and that still live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look()
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # its inner functions are not seen: equal to no other
            self.rows.append(object())
            return func(*args, **kwargs)
        # The place of a view in its storage makes no difference.
        given = tensors_in((args, kwargs)) if func.is_view else (args, kwargs)
        asked = self.described(given)
        result = func(*args, **kwargs)
        self.rows.append((func, asked, self.described(result)))
        return result

    def look(self) -> None:
        """Note the storages that have been released."""
        gone = tuple(number for number, ref in self.new.items() if ref.expired())
        if gone:
            self.rows.append(gone)
            for number in gone:
                del self.new[number]

    def described(self, value: Any) -> Hashable:
        """Return a value as it is compared: a tensor by its layout and the number of its storage."""
        if isinstance(value, Tensor):
            key = storage_key(value)
            if key is None:
                return type(value).__name__, tuple(value.shape), value.dtype
            if key not in self.number:
                number = self.number[key] = len(self.number)
                ref = StorageWeakRef(storage_of(value))
                self.refs.append(ref)
                self.new[number] = ref
            size = held_bytes(value)
            sparse = nonzeros(value)
            steps = value.stride() if sparse is None else (value.layout, sparse)
            layout = tuple(value.shape), steps, value.dtype, value.device.type
            return self.number[key], size, value.requires_grad, *layout
        if isinstance(value, PLAIN):
            return type(value), value
        if isinstance(value, (tuple, list)):
            return tuple(map(self.described, value))
        if isinstance(value, dict):
            return tuple((key, self.described(each)) for key, each in value.items())
        return type(value).__name__


def _graph(outputs: list[Tensor], ops: _Ops) -> Hashable:
    """Return autograd's nodes behind the outputs, and their edges, numbered in the order of the walk."""
    number: dict[Any, int] = {None: -1}
    rows: list[Hashable] = []
    waiting = [tensor.grad_fn for tensor in reversed(outputs) if tensor.grad_fn is not None]
    roots = tuple((tensor.requires_grad, tensor.output_nr, tensor.grad_fn is None) for tensor in outputs)
    while waiting:
        node = waiting.pop()
        if node in number:
            continue
        number[node] = len(number)
        edges = tuple((number.get(following, -2), place) for following, place in node.next_functions)
        waiting += [following for following, _ in node.next_functions if following is not None]
        rows.append((_kind(node), ops.described(getattr(node, "variable", None)), edges))
    return roots, tuple(rows)


def _kind(node: Any) -> Hashable:
    """Return the kind of a node: for a custom autograd.Function also the plain values on its context."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return node.name()
    return type(node), tuple(
        (name, value if isinstance(value, PLAIN) else id(value)) for name, value in vars(node).items()
    )
