"""Find ops, storages, aliases and saved tensors of a model's op graph, by one run on fake tensors."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import fx, nn

from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.torch_layer.call import Call
from rematplan.scheduler.torch_layer.layouts import is_strided
from rematplan.scheduler.torch_layer.leaves import tree_leaves
from rematplan.scheduler.torch_layer.private import (
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
from rematplan.scheduler.torch_layer.python_reads import Guards, StateTensor

__all__ = ["OUTPUT", "Face", "Group", "Op", "OpGraph", "TensorLayout", "analyse", "arguments_of", "resolve"]

SPARSE = "a tensor is sparse or nested, and so no view of one storage, by which the values of an op graph are told apart"
# Checks of metadata that export adds; shapes and dtypes are checked once per call by the plan's signature.
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
class TensorLayout:
    """A tensor as a view of its storage: any other view of the same storage and dtype can be had from it."""

    group: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorLayout:
        """Return the layout of a tensor; its group is the identity of its storage."""
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
    packs: tuple[TensorLayout, ...] = ()

    @property
    def random(self) -> bool:
        """Whether the op may draw random numbers."""
        return _may_draw(self.node)


def _may_draw(node: fx.Node) -> bool:
    """Whether a node may draw random numbers: by the tag of its op, or of one in its block of ops."""
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
    given = arguments_of(node)
    share = given.get("dropout_p", given.get("dropout", given.get("p") if "dropout" in str(target) else None))
    # A dropout that drops nothing draws nothing; nor does one in eval mode.
    return not (share == 0.0 or given.get("train") is False)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a node's op by name, defaults included."""
    arguments = schema_of(node.target).arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return given | {a.name: value for a, value in zip(arguments, node.args, strict=False)} | node.kwargs


@dataclass(frozen=True, slots=True)
class Face:
    """How the inputs and outputs of an op graph relate to a call of the model.

    Attributes:
        positions: for each placeholder, its place among the leaves of the call; state tensors follow these.
        state: for each state tensor among the inputs, its places; none if the graph does not read it.
        guards: the Python state that the traced forward read.
        unread: leaves of the call, other than tensors, that the forward did not read.
        outputs: the leaves of the model's output; OUTPUT in the places of what the graph gives.
        output_spec: how to put them together.
        repeats: (leaf, earlier leaf) of floating-point tensors of the call that were one; the graph takes
            each by itself.
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
    layout_of: dict[fx.Node, TensorLayout] = field(default_factory=dict)
    face: Face = field(default_factory=Face)

    def flat(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves of a call, and the state tensors after them."""
        return [*leaves, *(places[0].get() if places else None for places in self.face.state)]

    def inputs(self, call: Call) -> list[Any]:
        """Return the values of the placeholders in a call."""
        flat = self.flat(tree_leaves(call))
        return [flat[position] for position in self.face.positions]

    def shown_as(self, face: Face) -> OpGraph:
        """Set the face, and put the output together as it says; return this graph."""
        given = iter(self.outputs)
        self.face, self.output_spec = face, face.output_spec
        self.outputs = [next(given) if leaf is OUTPUT else leaf for leaf in face.outputs]
        return self

    def constants(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return tensors that the export lifted out of the code: in the graph, but not in the model."""
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        found = {}
        for path in self.attributes.values():
            value = resolve(self.module, path)
            if isinstance(value, torch.Tensor) and id(value) not in own:
                found[path] = value
        return found

    def fingerprint(self) -> str:
        """Return SHA-256 of ops, wiring, and what they make and save: equal for graphs that one plan fits.

        Numbers that ops take as scalars do not count: a plan stays good when a temperature or a dropout's p
        changes.
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
            args = [*map(_unscaled, op.node.args, chain(kinds.values(), repeat("")))]
            named = {name: _unscaled(value, kinds.get(name, "")) for name, value in op.node.kwargs.items()}
            wired = fx.map_arg((args, named), lambda node: f"%{number.get(node, node.name)}")
            digest.update(f"{op.node.target}|{wired}|{op.requires_grad}\n".encode())
            digest.update(repr([numbered(key) for key in (*op.writes, *op.saved)]).encode())
            packs = [(numbered(p.group), p.shape, p.stride, p.offset, p.dtype) for p in op.packs]
            digest.update(repr(packs).encode())
        return digest.hexdigest()


def _unscaled(value: Any, kind: str) -> Any:
    """Return an argument of an op; "scalar" for a number that is no size or flag, and devices unindexed.

    A plan of cuda:0 is one for cuda:1: ranks of one job capture the same graph, each on its own device.
    """
    if isinstance(value, torch.device):
        return torch.device(value.type)
    # A number in the place of a tensor is wrapped in one.
    scalar = kind in ("number", "float", "Optional[number]", "Optional[float]", "Tensor", "Optional[Tensor]")
    return "scalar" if scalar and isinstance(value, (int, float)) else value


def resolve(root: nn.Module, path: str) -> Any:
    """Return the attribute of ``root`` that a dotted name stands for."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def analyse(module: fx.GraphModule, inputs: Sequence[Any]) -> OpGraph:
    """Run the graph once on fake tensors: which storages are made, viewed, changed, and saved by autograd.

    No data, no memory. Storage identity is taken from the fake tensors, so that an op that may or may not
    alias (reshape, contiguous, to) is seen doing what it does. Ops without a reader or an effect are erased
    from ``module``.

    Raises:
        CaptureError: the graph cannot be run without data, or a step by it could not be replayed; says why.
    """
    _prune(module.graph)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(inputs) != len(placeholders):
        raise CaptureError(f"the graph takes {len(placeholders)} inputs, the call has {len(inputs)}")
    outputs = list(module.graph.output_node().args[0])  # type: ignore[arg-type] # a tuple
    graph = OpGraph(module, [], {}, placeholders, {}, {}, {}, outputs, None)
    run = _FakeRun(graph, inputs)
    with run.fake, torch.enable_grad():
        for node, value in zip(placeholders, inputs, strict=True):
            run.give(node, value)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                graph.attributes[node] = str(node.target)
                run.give(node, resolve(module, str(node.target)))
            elif node.op == "call_function":
                run.call(node)
            elif node.op not in ("placeholder", "output"):
                raise CaptureError(f"the graph has a node of kind {node.op}: {node.name}")
    _reject_unreplayable(graph)
    for leaf in outputs:
        if isinstance(leaf, fx.Node):
            for key in graph.group_of[leaf]:
                graph.groups[key].last_use = len(graph.ops)
    for node, value in run.env.items():
        graph.grad_of[node] = _requires_grad(value)
        if isinstance(value, torch.Tensor):
            graph.layout_of[node] = TensorLayout.of(value)
    return graph


def _prune(graph: fx.Graph) -> None:
    """Erase checks that nothing reads, and ops whose results nothing reads."""
    for node in list(graph.nodes):
        check = node.op == "call_module" or (node.op == "call_function" and str(node.target) in _CHECKS)
        if check and not node.users:
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if not node.users and _idle(node):
            graph.erase_node(node)


def _requires_grad(value: Any) -> bool:
    """Whether a tensor of a node's result requires grad."""
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(value))


class _FakeRun:
    """A run of a graph on fake tensors, node by node, which notes ops and storages in the graph.

    Attributes:
        fake: the mode to run within.
        env: the result of each node.
    """

    def __init__(self, graph: OpGraph, inputs: Sequence[Any]) -> None:
        self.graph = graph
        tensors = [*inputs, *graph.module.parameters(), *graph.module.buffers()]
        known = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if known is None else known
        self.env: dict[fx.Node, Any] = {}
        self._memo: dict[int, torch.Tensor] = {}  # a tensor that is given twice is one
        self._alive: list[Any] = []  # fake storages stay alive, so that their identity stays theirs

    def give(self, node: fx.Node, value: Any) -> None:
        """Let a node stand for a value from outside, without its data."""
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            if id(value) not in self._memo:
                self._memo[id(value)] = self.fake.from_tensor(value)
            value = self._memo[id(value)]
        self.env[node] = value
        self.graph.group_of[node] = self._note(value, -1)

    def call(self, node: fx.Node) -> None:
        """Run an op, and note what it reads, makes, saves and changes."""
        if is_transform(node.target):
            raise CaptureError(
                "the forward uses torch.func or torch.vmap, and no stage can begin within a transform"
            )
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        graph = self.graph
        index, packed = len(graph.ops), list[torch.Tensor]()
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        versions = [*map(version_of, given)]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor)
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                result = node.target(*args, **kwargs)  # type: ignore[operator] # of a call_function
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise CaptureError(f"what {node.name} gives depends on the data: {error.func}") from error
        except RuntimeError as error:  # code without grad within autocast: its export has grad
            raise CaptureError(f"{node.name} of the exported graph raises: {error}") from error
        self.env[node] = result
        reads = tuple(dict.fromkeys(g for a in node.all_input_nodes for g in graph.group_of[a]))
        writes = graph.group_of[node] = self._note(result, index)
        saved = self._note(packed, index)
        packs = tuple(map(TensorLayout.of, packed))
        graph.ops.append(Op(node, reads, writes, saved, _requires_grad(result), packs))
        for group in (graph.groups[key] for key in (*reads, *writes)):
            group.last_use = index
            group.first_use = index if group.first_use < 0 else group.first_use
        # By the op's schema, and by what was seen: a block of ops run without grad has no schema.
        seen = [t for t, before in zip(given, versions, strict=True) if version_of(t) != before]
        for key in dict.fromkeys((*_changed(node, graph.group_of), *self._note(seen, index))):
            graph.groups[key].mutated.append(index)

    def _note(self, value: Any, producer: int) -> tuple[int, ...]:
        """Return the storages of a value, each once; new ones are made by op ``producer``."""
        keys = []
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                if not is_strided(leaf):
                    raise CaptureError(SPARSE)
                storage = leaf.untyped_storage()
                self._alive.append(storage)
                group = self.graph.groups.setdefault(storage_id(storage), Group(storage.nbytes(), producer))
                group.requires_grad |= leaf.requires_grad
                keys.append(storage_id(storage))
        return tuple(dict.fromkeys(keys))


def _reject_unreplayable(graph: OpGraph) -> None:
    """Refuse changes in place of inputs and parameters, and generators of the forward's own."""
    changed = {n for n, keys in graph.group_of.items() if any(graph.groups[key].mutated for key in keys)}
    for node in graph.placeholders:
        if node in changed:
            raise CaptureError(f"the input {node.name!r} is changed in place, so that it cannot be replayed")
    for node, path in graph.attributes.items():
        value = resolve(graph.module, path)
        if isinstance(value, nn.Parameter) and node in changed:
            raise CaptureError(
                f"the forward changes the parameter {path!r} in place, so that it cannot be replayed"
            )
        if isinstance(value, torch.Generator):
            raise CaptureError(
                "the forward draws from a generator of its own, which an exported graph would keep"
            )


def _idle(node: fx.Node) -> bool:
    """Whether an op has no effect but its result: no random numbers, no change in place."""
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
    """Return the storages that the op changes in place, by its schema."""
    schema = schema_of(node.target)
    if schema is None or not schema.is_mutable:
        return []
    given = arguments_of(node)
    written = [given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    leaves = (leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, fx.Node))
    return [group for leaf in leaves for group in group_of[leaf]]
