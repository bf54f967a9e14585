"""Model -> op graph, by torch.export.

The model is traced as a function of tensors alone: those of the call, and those that Python state holds. The
exported graph calls the same kernels on the same Parameters as the plain model. What it would lose is refused
here: a custom autograd.Function (its backward would be dropped), module hooks (they would not fire), Python
state that the forward changes.
"""

from __future__ import annotations

import io
import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from rematplan.scheduler.capture.call_reads import CallReads
from rematplan.scheduler.capture.graph.op_graph import OUTPUT, SPARSE, Face, OpGraph, analyse
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.eager import own_attributes
from rematplan.scheduler.torch_layer.layouts import is_strided
from rematplan.scheduler.torch_layer.leaves import repeated_floats, tree_flatten, tree_leaves, tree_unflatten
from rematplan.scheduler.torch_layer.preserve import bare
from rematplan.scheduler.torch_layer.private import EXPORT_LOGGERS, is_of_library_op, replaced
from rematplan.scheduler.torch_layer.python_reads import Reads, state_tensors
from rematplan.scheduler.torch_layer.python_state import MISSING, Snapshot, is_plain
from rematplan.scheduler.torch_layer.unwind import met

__all__ = ["export_graph", "graph_by", "unfired_hook"]

# Hooks by which transformers collects what a call asked for (output_hidden_states, output_router_logits), and
# which stay on the submodules ever after. They run while the model is exported: what they collected is in the
# graph.
_COLLECTING = "transformers.utils.output_capturing"

Tracer = Callable[[nn.Module, Sequence[Tensor]], fx.GraphModule]


@contextmanager
def _dropped() -> Iterator[list[str]]:
    """Note what an export would drop of the model's code: custom autograd.Functions, hooks on tensors."""
    seen: list[str] = []
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_of_library_op(cls):
            seen.append(
                f"the custom autograd.Function {cls.__module__}.{cls.__qualname__} is used, whose backward torch.export drops"
            )
        return original.__get__(None, cls)(*args, **kwargs)

    register_hook = Tensor.register_hook

    def hooked(tensor: Tensor, hook: Any) -> Any:
        seen.append("the forward sets a hook on a tensor, which an exported graph does not fire")
        return register_hook(tensor, hook)

    with replaced(torch.autograd.Function, apply=classmethod(apply)), replaced(Tensor, register_hook=hooked):
        yield seen


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what an export warns of, logs and prints (the graph where it gave up)."""
    levels = {log: log.level for log in map(logging.getLogger, EXPORT_LOGGERS)}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


def unfired_hook(model: nn.Module) -> str | None:
    """Say which hook the exported graph would not fire; None if there is none."""
    for name, module in model.named_modules():
        if module is model:
            continue  # the planned model is a module itself: its own hooks fire
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            for hook in getattr(module, kind).values():
                if getattr(hook, "__module__", "") == _COLLECTING:
                    continue
                what = f"submodule {name!r} has hooks, which an exported graph does not fire"
                if kind != "_forward_hooks" or not _only_requires_grad(hook):
                    return what
                # It does nothing where the output requires grad anyway.
                if not isinstance(module, nn.Embedding) or not module.weight.requires_grad:
                    return f"{what}: {hook.__qualname__}; model.disable_input_require_grads() removes it"
    return None


class _Inert:
    """Stand for what a hook is given: all that it allows is ``requires_grad_``, which it notes."""

    __hash__ = None  # type: ignore[assignment] # nor may it be a key

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def requires_grad_(self, requires_grad: bool = True) -> _Inert:
        self.asked.append(requires_grad)
        return self

    def __bool__(self) -> bool:
        raise TypeError

    def __eq__(self, _: object) -> bool:
        raise TypeError


def _only_requires_grad(hook: Any) -> bool:
    """Whether a hook only sets ``requires_grad`` of an output, as transformers' and peft's on embeddings do.

    It is run on stand-ins, but only where that can have no effect: a function that names nothing but
    ``requires_grad_``, closes over nothing and has no defaults reaches nothing but the stand-ins, which allow
    nothing else.
    """
    plain = isinstance(hook, types.FunctionType) and not hook.__defaults__ and not hook.__kwdefaults__
    if not plain or hook.__code__.co_names != ("requires_grad_",) or hook.__closure__:
        return False
    output = _Inert()
    try:
        given = hook(_Inert(), _Inert(), output)
    except TypeError:
        return False
    return given is None and output.asked == [True]


def export_graph(model: nn.Module, call: Call) -> OpGraph:
    """Capture ``model(*args, **kwargs)`` as an op graph, by torch.export.

    Args:
        model: in train mode; left as it is.
        call: canonical ``(args, kwargs)``.

    Raises:
        CaptureError: torch.export fails, or the graph would not train like the model; says why.
    """
    return graph_by(_export, model, call)


def _export(root: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    with met("torch.export failed"):  # whatever the model's code or its own passes raise
        module = torch.export.export(root, tuple(inputs), strict=False).module()
    assert isinstance(module, fx.GraphModule)
    return module


def graph_by(tracer: Tracer, model: nn.Module, call: Call) -> OpGraph:
    """Capture a call as an op graph.

    Args:
        tracer: makes a graph module of a module and the tensors that it is called with.

    Raises:
        CaptureError: it cannot be traced, or the graph would not train like the model; says why.
    """
    hooked = unfired_hook(model)
    if hooked is not None:
        raise CaptureError(hooked)
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise CaptureError(
                f"submodule {name!r} is a SyncBatchNorm, whose ops depend on torch.distributed"
            )
    tensors = (*tree_leaves(call), *model.parameters(), *model.buffers())
    if not all(map(is_strided, (t for t in tensors if isinstance(t, Tensor)))):
        raise CaptureError(SPARSE)
    traced, trace = _traced(tracer, model, call)
    if not trace.written:
        return trace.analysed(traced)
    # A first forward may fill in what is not set yet. If another one then leaves all as it is, so may the
    # graph.
    writes = trace.writes
    if writes is not None:
        with _made(writes):
            traced, trace = _traced(tracer, model, call)
            if not trace.written:
                graph = trace.analysed(traced)
                graph.face.guards.settle_by(writes)
                return graph
    raise CaptureError(
        f"the forward changes Python state ({', '.join(trace.written[:3])}), which an exported graph does not"
    )


@contextmanager
def _made(writes: Sequence[tuple[Any, Any, Any, Any]]) -> Iterator[None]:
    """Make these writes, (dict, key, before, after) each, within the block; undo them on leaving."""
    for container, key, _, after in writes:
        container[key] = after
    try:
        yield
    finally:
        for container, key, before, _ in writes:
            if before is MISSING:
                container.pop(key, None)
            else:
                container[key] = before


def _traced(tracer: Tracer, model: nn.Module, call: Call) -> tuple[fx.GraphModule, _Trace]:
    """Trace a call, and return the module with what was seen of the model's code meanwhile."""
    trace = _Trace(model, call)
    with _dropped() as dropped, _quiet(), trace.flattened() as root:
        module = tracer(root, trace.inputs)
    if dropped:
        raise CaptureError(dropped[0])
    return module, trace


class _Trace:
    """An export of a model as a function of tensors alone: those of the call and of Python state.

    Attributes:
        inputs: the tensors, in this order.
        written: places in Python state that the forward changed.
        writes: the changes, if they are all of plain values; see ``Snapshot.plain_writes``.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model = model
        self.leaves, self.spec = tree_flatten(call)
        self.given = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.reads = Reads(model)
        self.state = state_tensors(model, self.reads.roots)
        found = [self.leaves[i] for i in self.given] + [places[0].get() for places in self.state]
        # One tensor given twice would be one input, and another call may give two.
        self.inputs = [
            t.detach().requires_grad_(t.requires_grad) if any(t is other for other in found[:i]) else t
            for i, t in enumerate(found)
        ]
        self.written: list[str] = []
        self.writes: list[tuple[Any, Any, Any, Any]] | None = None
        self.calls = CallReads(model, call)
        self.outputs: list[Any] = []
        self.output_spec: Any = None

    @contextmanager
    def flattened(self) -> Iterator[nn.Module]:
        """Yield the model with a forward that takes ``inputs``; restore Python state on leaving."""
        whole, forward = Snapshot(self.reads.roots), self.model.forward

        def flat(*tensors: Any) -> Any:
            leaves = self.leaves.copy()
            for position, tensor in zip(self.given, tensors, strict=False):
                leaves[position] = tensor
            args, kwargs = tree_unflatten(leaves, self.spec)
            count = len(self.given)
            call = self.calls.watched((args, kwargs))
            state = zip(self.state, tensors[count:], strict=True)
            bound = [(place, tensor, place.get()) for places, tensor in state for place in places]
            before = Snapshot(self.reads.roots)
            for place, tensor, _ in bound:
                place.put(tensor)
            try:
                with self.reads.recording(), self.calls.recording():
                    output = forward(*call[0], **call[1])
            finally:
                for place, mine, original in bound:
                    if place.get() is mine:  # else the forward has put another one there
                        place.put(original)
                # Recurrent modules follow the parameters that an export puts in the places of theirs.
                self.written = [place for place in before.changes() if "._flat_weight" not in f".{place}"]
                self.writes = before.plain_writes()
            self.outputs, self.output_spec = tree_flatten(output)
            strange = next((o for o in self.outputs if not isinstance(o, Tensor) and not is_plain(o)), None)
            if strange is not None:
                raise CaptureError(
                    f"the forward returns a {type(strange).__name__}, which an exported graph cannot make"
                )
            return tuple(o for o in self.outputs if isinstance(o, Tensor))

        flat.eager = True  # type: ignore[attr-defined] # not somebody's own (eager.wrapped_forward)
        try:
            with bare(self.model) as root, replaced(own_attributes(self.model), forward=flat):
                yield root
        finally:
            whole.restore()  # export itself binds copies of containers

    def analysed(self, module: fx.GraphModule) -> OpGraph:
        """Return the op graph of what was traced, with what is known of its inputs and outputs."""
        with met("the exported graph cannot be run without data"):
            graph = analyse(module, self.inputs)
        nodes = graph.placeholders[len(self.given) :]
        used = [bool(node.users) or node in graph.outputs for node in nodes]
        state = [places if read else [] for places, read in zip(self.state, used, strict=True)]
        face = Face(
            (*self.given, *range(len(self.leaves), len(self.leaves) + len(state))),
            tuple(map(tuple, state)),
            self.reads.guards([places for places in state if places]),
            self.calls.unread(),
            tuple(OUTPUT if isinstance(leaf, Tensor) else leaf for leaf in self.outputs),
            self.output_spec,
            repeated_floats(self.leaves),
        )
        return graph.shown_as(face)
