"""The op graph of a model: ops in order, storages, aliases, and what autograd saves, found by one run on fake tensors."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from scheduler.capture.flat import tree_leaves
from scheduler.capture.layouts import is_plain
from scheduler.capture.private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    is_transform,
    pytree,
    schema_of,
    storage_id,
    version_of,
)
from scheduler.capture.reads import Guards, StateTensor
from scheduler.capture.sample import Call
from scheduler.errors import CaptureError

__all__ = ["OUTPUT", "Face", "Group", "Layout", "Op", "OpGraph", "analyse", "resolve"]

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
        key = storage_id(tensor.untyped_storage())
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
        return _may_draw(self.node)


def _may_draw(node: fx.Node) -> bool:
    """Whether a node may draw random numbers: by its op's tag, or that of an op in a block of ops (a branch, say)."""
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        owner = node.graph.owning_module
        blocks = [resolve(owner, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr" and owner]
        return any(
            _may_draw(inner)
            for block in blocks
            if isinstance(block, fx.GraphModule)
            for inner in block.graph.nodes
        )
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    given = {a.name: a.default_value for a in schema_of(target).arguments if a.has_default_value()}
    given |= {
        a.name: value for a, value in zip(schema_of(target).arguments, node.args, strict=False)
    } | node.kwargs
    share = given.get("dropout_p", given.get("dropout", given.get("p") if "dropout" in str(target) else None))
    # A dropout that drops nothing draws nothing; nor does one in eval mode.
    return not (share == 0.0 or given.get("train") is False)


@dataclass(frozen=True, slots=True)
class Face:
    """What the inputs and outputs of an op graph are to those who call the model.

    Attributes:
        positions: for each placeholder, its place among the leaves of the call; state tensors follow these.
        state: for each state tensor among the inputs, its places; none of one that the graph does not read.
        guards: the Python state that the traced forward read.
        unread: leaves of the call, other than tensors, that the forward did not read.
        repeats: (leaf, earlier leaf) of floating-point tensors of the call that were one; the graph takes each by itself.
        outputs: the leaves of the model's output; OUTPUT in the places of what the graph gives.
        output_spec: how to put them together.
    """

    positions: tuple[int, ...] = ()
    state: tuple[tuple[StateTensor, ...], ...] = ()
    guards: Guards = field(default_factory=Guards)
    unread: frozenset[int] = frozenset()
    outputs: tuple[Any, ...] = ()
    output_spec: Any = None
    repeats: tuple[tuple[int, int], ...] = ()


OUTPUT = object()


@dataclass(slots=True)
class OpGraph:
    """The captured model: ops in order, storages, and where everything comes from.

    Attributes:
        module: the exported GraphModule; it holds lifted constants and submodules of higher-order ops.
        ops: in the order in which they run.
        groups: storages by id.
        placeholders: input nodes, in the order of the flattened call.
        attributes: get_attr nodes -> dotted name in ``module``.
        face: what inputs and outputs are to a caller.
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
    face: Face = field(default_factory=Face)

    def flat(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves of a call, and the state tensors after them."""
        return [*leaves, *(places[0].get() if places else None for places in self.face.state)]

    def inputs(self, call: Call) -> list[Any]:
        """What the placeholders stand for in a call."""
        flat = self.flat(tree_leaves(call))
        return [flat[position] for position in self.face.positions]

    def shown_as(self, face: Face) -> OpGraph:
        """The same graph to callers of a model."""
        given = iter(self.outputs)
        self.face, self.output_spec = face, face.output_spec
        self.outputs = [next(given) if leaf is OUTPUT else leaf for leaf in face.outputs]
        return self

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
        """SHA-256 of the ops, how they are wired, what they make and save: equal for graphs that one plan fits.

        Numbers that ops take as scalars do not count: a plan stays good when a temperature or a dropout's p changes.
        """
        digest = hashlib.sha256()
        number = {node: i for i, node in enumerate((*self.attributes, *self.placeholders))}
        storage: dict[int, int] = {}

        def numbered(key: int) -> tuple[int, int]:
            return storage.setdefault(key, len(storage)), self.groups[key].bytes

        for key in (key for node in number for key in self.group_of[node]):
            numbered(key)
        for op in self.ops:
            number[op.node] = len(number)
            schema = schema_of(op.node.target)
            kinds = {a.name: str(a.type) for a in schema.arguments} if schema is not None else {}
            args = [
                _unscaled(value, kind)
                for value, kind in zip(
                    op.node.args, [*kinds.values(), *[""] * len(op.node.args)], strict=False
                )
            ]
            named = {name: _unscaled(value, kinds.get(name, "")) for name, value in op.node.kwargs.items()}
            wired = fx.map_arg((args, named), lambda node: f"%{number.get(node, node.name)}")
            digest.update(f"{op.node.target}|{wired}|{op.requires_grad}\n".encode())
            digest.update(repr([numbered(key) for key in (*op.writes, *op.saved)]).encode())
            packs = [(numbered(p.group), p.shape, p.stride, p.offset, p.dtype) for p in op.packs]
            digest.update(repr(packs).encode())
        return digest.hexdigest()


def _unscaled(value: Any, kind: str) -> Any:
    """An argument of an op; a sign in the place of a number that is no size, dimension or flag, and a device without its index.

    A plan of cuda:0 is one for cuda:1: ranks of one job capture the same graph, each on its own device.
    """
    if isinstance(value, torch.device):
        return torch.device(value.type)
    # A number in the place of a tensor is wrapped in one.
    scalar = kind in ("number", "float", "Optional[number]", "Optional[float]", "Tensor", "Optional[Tensor]")
    return "scalar" if scalar and isinstance(value, (int, float)) else value


def resolve(root: nn.Module, target: str) -> Any:
    """The attribute of ``root`` that a dotted name stands for."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def analyse(module: fx.GraphModule, inputs: Sequence[Any]) -> OpGraph:
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
    if len(inputs) != len(placeholders):
        raise CaptureError(f"the graph takes {len(placeholders)} inputs, the call has {len(inputs)}")
    tensors = [*inputs, *module.parameters(), *module.buffers()]
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
                key = storage_id(storage)
                if key not in groups:
                    groups[key] = Group(storage.nbytes(), producer)
                groups[key].requires_grad |= leaf.requires_grad
                ids.append(key)
        return tuple(dict.fromkeys(ids))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved_now.append(tensor)
        return tensor

    with fake, torch.enable_grad():
        for node, value in zip(placeholders, inputs, strict=True):
            env[node] = faked(value)
            group_of[node] = note(env[node], -1)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                attributes[node] = str(node.target)
                env[node] = faked(resolve(module, str(node.target)))
                group_of[node] = note(env[node], -1)
            elif node.op == "call_function":
                if is_transform(node.target):
                    raise CaptureError(
                        "the forward uses torch.func or torch.vmap, and no stage can begin within a transform"
                    )
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                index = len(ops)
                saved_now.clear()
                given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                versions = [*map(version_of, given)]
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
                seen = [t for t, before in zip(given, versions, strict=True) if version_of(t) != before]
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
    for node, target in attributes.items():
        value = resolve(module, target)
        if isinstance(value, nn.Parameter) and any(groups[g].mutated for g in group_of[node]):
            raise CaptureError(
                f"the forward changes the parameter {target!r} in place, so that it cannot be replayed"
            )
        if isinstance(value, torch.Generator):
            raise CaptureError(
                "the forward draws from a generator of its own, which an exported graph would keep"
            )
    grad_of = {
        node: any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(value))
        for node, value in env.items()
    }
    layout_of = {node: Layout.of(value) for node, value in env.items() if isinstance(value, torch.Tensor)}
    return OpGraph(module, ops, groups, placeholders, attributes, group_of, grad_of, outputs, None, layout_of)


def _idle(node: fx.Node) -> bool:
    """Whether an op does nothing beside its result: it draws no random numbers and changes nothing in place."""
    target = node.target
    if target is operator.getitem:
        return True
    # Norms with running statistics change them, whatever their schemas say.
    return (
        isinstance(target, OpOverload)
        and target.namespace == "aten"
        and not schema_of(target).is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not any(name in str(target) for name in ("batch_norm", "instance_norm", "fake_quant"))
    )


def _changed(node: fx.Node, group_of: dict[fx.Node, tuple[int, ...]]) -> list[int]:
    """Storages that the op changes in place, by its schema."""
    schema = schema_of(node.target)
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
