"""Model -> op graph, by torch.export.

The exported graph calls the same kernels on the same Parameters as the plain model. What export loses
is refused here: a custom autograd.Function (its backward would be dropped), module hooks (they would
not fire), an input that is changed in place.
"""

from __future__ import annotations

import hashlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from scheduler.capture.layouts import is_plain
from scheduler.capture.sample import Call
from scheduler.capture.unwind import met
from scheduler.capture.verify import of_an_op
from scheduler.errors import CaptureError

__all__ = ["Group", "Layout", "Op", "OpGraph", "export_graph", "unfired_hook"]

# Hooks by which transformers collects what a call asked for (output_hidden_states, output_router_logits), and which stay
# on the submodules ever after. They run while the model is exported: what they collected is in the graph.
_COLLECTING = "transformers.utils.output_capturing"
# Checks of metadata that export adds; shapes and dtypes are checked once per call by the plan's signature.
SPARSE = "a tensor is sparse or nested, and so no view of one storage, by which the values of an op graph are told apart"
_CHECKS = ("aten._assert_tensor_metadata.default", "aten.sym_constrain_range_for_size.default")


@dataclass(slots=True)
class Group:
    """One storage: a value, together with all its views.

    Attributes:
        bytes: size of the storage.
        producer: index of the op that creates it; -1 for parameters, buffers, constants and inputs.
        first_use: index of the first op that reads or writes it.
        last_use: index of the last op that reads or writes it; ``len(ops)`` if it is an output.
        requires_grad: whether any of its views does.
        mutated: indices of the ops that change it in place.
    """

    bytes: int
    producer: int
    first_use: int = -1
    last_use: int = -1
    requires_grad: bool = False
    mutated: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor as a view of its storage: any other view of the same storage and dtype can be had from it."""

    group: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """The layout of a tensor; its group is the identity of its storage."""
        key = tensor.untyped_storage()._cdata
        return cls(key, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


@dataclass(slots=True)
class Op:
    """One call in the graph.

    Attributes:
        node: the fx node.
        reads: storages of its arguments. writes: storages of its results. saved: what autograd keeps of it.
        packs: the tensors that autograd saves, in the order in which it does.
    """

    node: fx.Node
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    saved: tuple[int, ...]
    requires_grad: bool
    packs: tuple[Layout, ...] = ()

    @property
    def random(self) -> bool:
        """Whether the op may draw random numbers."""
        return torch.Tag.nondeterministic_seeded in getattr(self.node.target, "tags", ())


@dataclass(slots=True)
class OpGraph:
    """The captured model: ops in order, storages, and where everything comes from.

    Attributes:
        module: the exported GraphModule; it holds lifted constants and submodules of higher-order ops.
        ops: in the order in which they run.
        groups: storages by id.
        placeholders: input nodes, in the order of the flattened call.
        attributes: get_attr nodes -> dotted name in ``module``.
        group_of: storages of each node's result.
        grad_of: whether each node's result requires grad.
        layout_of: how each node's result lies in its storage, if it is a tensor.
        outputs: the flattened outputs: nodes, or plain values.
        output_spec: how to rebuild the output.
    """

    module: fx.GraphModule
    ops: list[Op]
    groups: dict[int, Group]
    placeholders: list[fx.Node]
    attributes: dict[fx.Node, str]
    group_of: dict[fx.Node, tuple[int, ...]]
    grad_of: dict[fx.Node, bool]
    outputs: list[Any]
    output_spec: Any
    layout_of: dict[fx.Node, Layout] = field(default_factory=dict)

    def constants(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Tensors that the export lifted out of the code: in the graph, but not in the model."""
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        found = {}
        for target in self.attributes.values():
            value = resolve(self.module, target)
            if isinstance(value, torch.Tensor) and id(value) not in own:
                found[target] = value
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the ops, their arguments and shapes: equal for two captures of one model."""
        digest = hashlib.sha256()
        for op in self.ops:
            digest.update(f"{op.node.name}|{op.node.target}|{op.node.args}|{op.node.kwargs}\n".encode())
            digest.update(repr([self.groups[g].bytes for g in op.writes]).encode())
        return digest.hexdigest()


def resolve(root: nn.Module, target: str) -> Any:
    """The attribute of ``root`` that a dotted name stands for."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Note what the model's code does that an export would drop: custom autograd.Functions, hooks on tensors."""
    seen: list[str] = []
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not of_an_op(cls):
            seen.append(
                f"the custom autograd.Function {cls.__module__}.{cls.__qualname__} is used, whose backward torch.export drops"
            )
        return original.__get__(None, cls)(*args, **kwargs)

    register_hook = torch.Tensor.register_hook

    def hooked(tensor: torch.Tensor, hook: Any) -> Any:
        seen.append("the forward sets a hook on a tensor, which an exported graph does not fire")
        return register_hook(tensor, hook)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign] # until the block ends
    torch.Tensor.register_hook = hooked  # type: ignore[method-assign] # likewise
    try:
        yield seen
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign] # as it was
        torch.Tensor.register_hook = register_hook  # type: ignore[method-assign] # likewise


@contextmanager
def _quiet() -> Iterator[None]:
    """Export warns, logs and prints (the graph where it gave up) things that do not concern a plan's user."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")
    ]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def unfired_hook(model: nn.Module) -> str | None:
    """Which hook would not fire in the exported graph, in words."""
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


def _only_requires_grad(hook: Any) -> bool:
    """Whether a hook is the one that gradient_checkpointing_enable of transformers and peft leaves on embeddings."""

    def ours(_module: Any, _given: Any, output: Any) -> None:
        output.requires_grad_(True)

    same = ("co_code", "co_names", "co_consts", "co_argcount")
    return all(
        getattr(getattr(hook, "__code__", None), part, None) == getattr(ours.__code__, part) for part in same
    )


def export_graph(model: nn.Module, call: Call) -> OpGraph:
    """Capture ``model(*args, **kwargs)`` as an op graph.

    Args:
        model: in train mode; left as it is.
        call: canonical ``(args, kwargs)``.

    Raises:
        CaptureError: torch.export fails, or the graph would not train like the model; says why.
    """
    hooked = unfired_hook(model)
    if hooked is not None:
        raise CaptureError(hooked)
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise CaptureError(
                f"submodule {name!r} is a SyncBatchNorm, whose ops depend on torch.distributed"
            )
    tensors = (*pytree.tree_leaves(call), *model.parameters(), *model.buffers())
    if not all(is_plain(t) for t in tensors if isinstance(t, torch.Tensor)):
        raise CaptureError(SPARSE)
    args, kwargs = call
    # Export raises whatever the model's code or its own passes raise.
    with _noted() as dropped, _quiet(), met("torch.export failed"):
        program = torch.export.export(model, args, kwargs, strict=False)
        module = program.module()
    if dropped:
        raise CaptureError(dropped[0])
    assert isinstance(module, fx.GraphModule)
    with met("the exported graph cannot be run without data"):
        return analyse(module, call)


def analyse(module: fx.GraphModule, call: Call) -> OpGraph:
    """Run the graph once on fake tensors: which storages are made, viewed, changed, and saved by autograd.

    No data, no memory. Storage identity is taken from the fake tensors, so that an op that may or may
    not alias (reshape, contiguous, to) is seen doing what it does.
    """
    for node in list(module.graph.nodes):
        check = node.op == "call_module" or (node.op == "call_function" and str(node.target) in _CHECKS)
        if check and not node.users:
            module.graph.erase_node(node)
    for node in reversed(module.graph.nodes):
        if not node.users and _idle(node):
            module.graph.erase_node(node)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    flat, _ = pytree.tree_flatten(call)
    if len(flat) != len(placeholders):
        raise CaptureError(f"the graph takes {len(placeholders)} inputs, the call has {len(flat)}")
    tensors = [*flat, *module.parameters(), *module.buffers()]
    known = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if known is None else known
    memo: dict[int, torch.Tensor] = {}
    env: dict[fx.Node, Any] = {}
    groups: dict[int, Group] = {}
    group_of: dict[fx.Node, tuple[int, ...]] = {}
    attributes: dict[fx.Node, str] = {}
    alive: list[Any] = []  # fake storages stay alive, so that their identity stays theirs
    ops: list[Op] = []
    saved_now: list[torch.Tensor] = []

    def faked(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in memo:
            memo[id(value)] = fake.from_tensor(value)
        return memo[id(value)]

    def note(value: Any, producer: int) -> tuple[int, ...]:
        ids = []
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                if not is_plain(leaf):
                    raise CaptureError(SPARSE)
                storage = leaf.untyped_storage()
                alive.append(storage)
                key = storage._cdata
                if key not in groups:
                    groups[key] = Group(storage.nbytes(), producer)
                groups[key].requires_grad |= leaf.requires_grad
                ids.append(key)
        return tuple(dict.fromkeys(ids))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved_now.append(tensor)
        return tensor

    with fake, torch.enable_grad():
        for node, value in zip(placeholders, flat, strict=True):
            env[node] = faked(value)
            group_of[node] = note(env[node], -1)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                attributes[node] = str(node.target)
                env[node] = faked(resolve(module, str(node.target)))
                group_of[node] = note(env[node], -1)
            elif node.op == "call_function":
                if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
                    raise CaptureError(
                        "the forward uses torch.func or torch.vmap, and no stage can begin within a transform"
                    )
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                index = len(ops)
                saved_now.clear()
                given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                versions = [t._version for t in given]
                try:
                    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                        result = node.target(*args, **kwargs)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise CaptureError(f"what {node.name} gives depends on the data: {error.func}") from error
                except (
                    RuntimeError
                ) as error:  # of code without grad within autocast an export forgets that there is none
                    raise CaptureError(f"{node.name} of the exported graph raises: {error}") from error
                env[node] = result
                reads = tuple(dict.fromkeys(g for a in node.all_input_nodes for g in group_of[a]))
                writes = note(result, index)
                saved = note(list(saved_now), index)
                group_of[node] = writes
                grad = any(
                    isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(result)
                )
                ops.append(Op(node, reads, writes, saved, grad, tuple(map(Layout.of, saved_now))))
                for key in (*reads, *writes):
                    groups[key].last_use = index
                    if groups[key].first_use < 0:
                        groups[key].first_use = index
                # By the op's schema, and by what was seen: a block of ops run without grad has no schema.
                seen = [t for t, before in zip(given, versions, strict=True) if t._version != before]
                for key in dict.fromkeys((*_changed(node, group_of), *note(seen, index))):
                    groups[key].mutated.append(index)
            elif node.op not in ("placeholder", "output"):
                raise CaptureError(f"the graph has a node of kind {node.op}: {node.name}")
    output_node = next(n for n in module.graph.nodes if n.op == "output")
    outputs = list(output_node.args[0])
    for leaf in outputs:
        if isinstance(leaf, fx.Node):
            for key in group_of[leaf]:
                groups[key].last_use = len(ops)
    for node in placeholders:
        if any(groups[g].mutated for g in group_of[node]):
            raise CaptureError(f"the input {node.name!r} is changed in place, so that it cannot be replayed")
    grad_of = {
        node: any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(value))
        for node, value in env.items()
    }
    output_spec = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined] # export's codegen
    layout_of = {node: Layout.of(value) for node, value in env.items() if isinstance(value, torch.Tensor)}
    return OpGraph(
        module, ops, groups, placeholders, attributes, group_of, grad_of, outputs, output_spec, layout_of
    )


def _idle(node: fx.Node) -> bool:
    """Whether an op does nothing beside its result: it draws no random numbers and changes nothing in place."""
    target = node.target
    if target is operator.getitem:
        return True
    # Norms with running statistics change them, whatever their schemas say.
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not any(name in str(target) for name in ("batch_norm", "instance_norm", "fake_quant"))
    )


def _changed(node: fx.Node, group_of: dict[fx.Node, tuple[int, ...]]) -> list[int]:
    """Storages that the op changes in place, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[int] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, fx.Node):
                found.extend(group_of[leaf])
    return found
