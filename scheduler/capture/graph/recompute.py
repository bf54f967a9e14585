"""Compile the options of a stage: the programs that recompute the saved tensors that an option drops.

A *pack* is one tensor that autograd saves, numbered in the order in which a run of the stage saves them. An
option drops some packs. To recompute them, just the ops that they need run, in grad mode and in their order:
an op reads what is kept (as a view of the kept tensor's storage), the stage's arguments, and results of ops
before it. Dropped packs are then what those ops save, or views of what they made.

Ops that are not connected (neither reads what the other recomputes, views aside) are programs of their own,
each run when the first of its packs is asked for, so that their results are not live all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Generic, NoReturn, TypeVar

import networkx as nx
import torch
from torch import fx

from rematplan.scheduler.capture.graph.cut import Linear
from rematplan.scheduler.capture.graph.op_graph import Op, OpGraph, TensorLayout
from rematplan.scheduler.solvers.stage_options import StageOp, StageValue

__all__ = [
    "OtherOps",
    "Rebuild",
    "StageValues",
    "Thinned",
    "check_dropped",
    "compile_rebuilds",
    "divisible",
    "op_rows",
    "origin_of_pack",
    "packs_of",
    "rerun",
    "stage_values",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How dropped packs of an option are recomputed: all of them, or those that are connected.

    Attributes:
        dropped: numbers of the packs.
        rerun: the ops of the stage that run again, views aside, by their places in it.
        arguments: for each leading argument of ``function``, its index among the stage's arguments.
        sources: for each further argument, the pack that it is, and whether it requires grad.
        function: (*arguments, *sources) -> tensors; called in grad mode, under a pack hook.
        saves: for each tensor that the hook sees, the number of the pack that it is.
        gives: for each tensor returned, the number of the pack that it is.
    """

    dropped: frozenset[int]
    rerun: tuple[int, ...]
    arguments: tuple[int, ...]
    sources: tuple[tuple[int, bool], ...]
    function: Callable[..., tuple[torch.Tensor, ...]]
    saves: tuple[int, ...]
    gives: tuple[int, ...]


class OtherOps(RuntimeError):
    """A program of an option does not save what the first run of its stage did."""


def rerun(
    part: Rebuild,
    arguments: Sequence[Any],
    sources: Sequence[torch.Tensor],
    fill: Callable[[int, torch.Tensor], None],
) -> None:
    """Run a program of an option in grad mode.

    Args:
        arguments: of the stage, of which it reads some.
        sources: the kept packs that it reads.
        fill: called with the number and the tensor, detached, of each dropped pack.

    Raises:
        OtherOps: the ops save more or fewer tensors than in the first run.
    """
    count = 0

    def pack(tensor: torch.Tensor) -> None:
        nonlocal count
        if count < len(part.saves) and part.saves[count] in part.dropped:
            fill(part.saves[count], tensor.detach())
        count += 1

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _never):
        made = part.function(*(arguments[i] for i in part.arguments), *sources)
    if count != len(part.saves):
        raise OtherOps(f"the ops run again save {count} tensors, {len(part.saves)} in the first run")
    for number, tensor in zip(part.gives, made, strict=True):
        fill(number, tensor.detach())


def _never(_: Any) -> NoReturn:
    raise RuntimeError("the graph of ops that run again must not be reversed")


class Thinned(Generic[T]):
    """A stage kept with an option, until all that it dropped is recomputed.

    Attributes:
        parts: what is still to run, by the number of each pack that it recomputes.
        sources: kept packs that the parts read, or what stands for them.
        boundary: the tensors that enter the stage, or what stands for them.
    """

    __slots__ = ("boundary", "parts", "sources")

    def __init__(self, parts: Sequence[Rebuild], boundary: tuple[Any, ...] = ()) -> None:
        self.parts = {index: part for part in parts for index in part.dropped}
        self.sources: dict[int, T] = {}
        self.boundary = boundary

    def reads(self) -> set[int]:
        """Return the numbers of the packs that the parts still to run read."""
        return {number for part in set(self.parts.values()) for number, _ in part.sources}

    def ran(self, part: Rebuild) -> None:
        """Release what only this part read."""
        for number in part.dropped:
            del self.parts[number]
        for number in self.sources.keys() - self.reads():
            del self.sources[number]


@dataclass(frozen=True, slots=True)
class StageValues:
    """A stage as ``rematplan.scheduler.solvers.stage_options`` sees it.

    Attributes:
        ops: one for each op of the stage.
        values: storages, as values 0, 1, ...
        groups: the storage that each value is; -1 for one that is changed in place later.
    """

    ops: tuple[StageOp, ...]
    values: tuple[StageValue, ...]
    groups: tuple[int, ...]


def _slice(graph: OpGraph, linear: Linear, k: int) -> list[Op]:
    return graph.ops[linear.cuts[k] : linear.cuts[k + 1]]


def _changes(graph: OpGraph, linear: Linear, k: int) -> dict[int, list[int]]:
    """Return, for each storage that stage k makes, the ops of the stage (by place) that change it."""
    first = linear.cuts[k]
    named = dict.fromkeys(g for op in _slice(graph, linear, k) for g in (*op.writes, *op.saved))
    groups = {g: graph.groups[g] for g in named if first <= graph.groups[g].producer}
    return {g: sorted({i - first for i in group.mutated}) for g, group in groups.items()}


def divisible(graph: OpGraph, linear: Linear, k: int) -> bool:
    """Whether stage k can be kept in part.

    It cannot if it holds a block of ops (a higher-order op), or saves a storage under another dtype than it
    was made with.
    """
    ops = _slice(graph, linear, k)
    layouts = [graph.layout_of[op.node] for op in ops if op.node in graph.layout_of]
    dtypes = {layout.group: layout.dtype for layout in layouts}
    nodes = (node for op in ops for node in op.node.all_input_nodes)
    if any(node.op == "get_attr" and node not in graph.layout_of for node in nodes):
        return False
    return all(dtypes.get(p.group, p.dtype) == p.dtype for op in ops for p in op.packs)


def stage_values(
    graph: OpGraph, linear: Linear, k: int, size: Callable[[int], int], seconds: Sequence[float]
) -> StageValues:
    """Return the ops and storages of stage k, which is ``divisible``.

    A storage that is changed in place is one value before each change and one after the last; autograd saves
    the last.

    Args:
        size: bytes that the allocator sets aside for so many bytes.
        seconds: of each op of the stage.
    """
    ops, first = _slice(graph, linear, k), linear.cuts[k]
    changes = _changes(graph, linear, k)
    versions = [(g, version) for g, changed in changes.items() for version in range(len(changed) + 1)]
    index = {key: i for i, key in enumerate(versions)}
    last = {g: len(changed) for g, changed in changes.items()}
    carried = {group for groups in linear.carried for group in groups}
    leaving = set(linear.boundaries[k + 1]) | carried
    saved = {p.group for op in ops for p in op.packs}
    values = []
    for g, version in versions:
        kept = g in saved and version == last[g]
        # What leaves the stage is live until its backward anyway.
        held = 0 if g in carried else size(graph.groups[g].bytes)
        values.append(StageValue(held, kept, pinned=kept and g in leaving))
    stage_ops = []
    for i, (op, cost) in enumerate(zip(ops, seconds, strict=True)):
        own = {(g, 0) for g in (*op.writes, *op.saved) if graph.groups[g].producer == first + i}
        reads = {(g, sum(m < i for m in changes[g])) for g in op.reads if g in changes} - own
        writes = own | {(g, changed.index(i) + 1) for g, changed in changes.items() if i in changed}
        read, written = (tuple(sorted(index[key] for key in keys)) for keys in (reads, writes))
        stage_ops.append(StageOp(cost, read, written, op.random))
    groups = tuple(g if version == last[g] else -1 for g, version in versions)
    return StageValues(tuple(stage_ops), tuple(values), groups)


def op_rows(
    graph: OpGraph, linear: Linear, k: int, size: Callable[[int], int]
) -> tuple[tuple[str, int], ...]:
    """Return (name, bytes that autograd saves of what it makes) of each op of stage k."""
    ops, first = _slice(graph, linear, k), linear.cuts[k]
    saved = {pack.group for op in ops for pack in op.packs}
    rows = []
    for i, op in enumerate(ops, first):
        own = {g for g in (*op.writes, *op.saved) if graph.groups[g].producer == i and g in saved}
        rows.append((op.node.name, sum(size(graph.groups[g].bytes) for g in own)))
    return tuple(rows)


def packs_of(graph: OpGraph, linear: Linear, k: int) -> list[TensorLayout]:
    """Return the packs of stage k, in order."""
    return [pack for op in _slice(graph, linear, k) for pack in op.packs]


def origin_of_pack(graph: OpGraph, linear: Linear, k: int, number: int) -> str:
    """Name the ops that make and save a pack of stage k; "" if the graph does not know it."""
    packs = [(op, pack) for op in _slice(graph, linear, k) for pack in op.packs]
    if number >= len(packs):
        return ""
    op, pack = packs[number]
    producer = graph.groups[pack.group].producer
    maker = graph.ops[producer] if producer >= 0 else None
    made = "" if maker is None else "made and " if maker is op else f"made by {_named(maker)} and "
    return f", {made}saved by {_named(op)}"


def _named(op: Op) -> str:
    return f"{op.node.target} ({op.node.name})"


def compile_rebuilds(
    graph: OpGraph, linear: Linear, k: int, argument_names: tuple[str, ...], dropped: frozenset[int]
) -> tuple[Rebuild, ...]:
    """Compile what recomputes the dropped packs of stage k, in parts that can be run one without the other.

    Args:
        argument_names: of the stage (``GraphStage.argument_names``).
        dropped: numbers of packs; with one of a storage made in the stage, all of that storage.

    Raises:
        ValueError: a number that is no pack of a storage that the stage makes.
    """
    stage = _Rerun(graph, linear, k, dropped)
    return tuple(stage.compile(makers, argument_names) for makers in stage.parts())


def check_dropped(graph: OpGraph, linear: Linear, k: int, dropped: frozenset[int]) -> None:
    """Refuse packs of stage k that no option drops.

    Raises:
        ValueError: a number that is no pack of a storage that the stage makes, a storage of which only a part
            is dropped, or a stage that cannot be kept in part.
    """
    packs, made = packs_of(graph, linear, k), _changes(graph, linear, k)
    for number in sorted(dropped):
        if not 0 <= number < len(packs) or packs[number].group not in made:
            raise ValueError(f"stage {k} makes no saved tensor {number} that could be made again")
    lost = {packs[number].group for number in dropped}
    for number, pack in enumerate(packs):
        if pack.group in lost and number not in dropped:
            raise ValueError(
                f"saved tensor {number} of stage {k} lies in the storage of others that are dropped, and is not"
            )
    if dropped and not divisible(graph, linear, k):
        raise ValueError(f"stage {k} cannot be kept in part")


class _Rerun:
    """The ops of stage k that run again when ``dropped`` is not kept, named by their places in the stage."""

    def __init__(self, graph: OpGraph, linear: Linear, k: int, dropped: frozenset[int]) -> None:
        self.graph, self.k, self.dropped = graph, k, dropped
        self.ops = _slice(graph, linear, k)
        self.first = linear.cuts[k]
        self.packs = packs_of(graph, linear, k)
        check_dropped(graph, linear, k, dropped)
        self.position = {op.node: i for i, op in enumerate(self.ops)}
        self.kept: dict[int, int] = {}  # storage -> the first pack that holds it
        for number, pack in enumerate(self.packs):
            if number not in dropped and graph.groups[pack.group].producer >= self.first:
                self.kept.setdefault(pack.group, number)
        self.changes = _changes(graph, linear, k)
        self.lost = {self.packs[number].group for number in dropped}
        self.base: dict[int, fx.Node] = {}  # storage -> the first node that is a view of it
        for op in self.ops:
            if op.node in graph.layout_of:
                self.base.setdefault(graph.layout_of[op.node].group, op.node)
        # Storages changed in place that are recomputed, though they are kept too.
        remade = self.again = frozenset[int]()
        while True:
            self.again |= remade
            self.running = self._closure(self._wanted(self.lost))
            changed = (g for g, changes in self.changes.items() if changes)
            remade = frozenset(g for g in changed if self.producer(g) in self.running)
            if remade <= self.again:
                break

    def producer(self, group: int) -> int:
        """Return the op that makes a storage."""
        return self.graph.groups[group].producer - self.first

    def makes(self, i: int) -> bool:
        """Whether the op makes a storage of its own, or changes one: all but views do."""
        groups = (self.graph.groups[g] for g in (*self.ops[i].writes, *self.ops[i].saved))
        return any(g.producer == self.first + i or self.first + i in g.mutated for g in groups)

    def there(self, node: fx.Node, reader: int) -> bool:
        """Whether what op ``reader`` finds in the node's tensor is a view of what is kept."""
        group = self.graph.layout_of[node].group if node in self.graph.layout_of else -1
        return group in self.kept and group not in self.again and all(i < reader for i in self.changes[group])

    def needs(self, i: int) -> list[int]:
        """Return the ops that must run before op i does, if it runs again."""
        found = []
        for node in self.ops[i].node.all_input_nodes:
            if node in self.position and not self.there(node, i):
                found.append(self.position[node])
                for group in self.graph.group_of[node]:
                    found += [m for m in self.changes.get(group, ()) if m < i]
        if self.ops[i].random:  # draws from where those before it leave the generator
            found += [earlier for earlier in range(i) if self.ops[earlier].random]
        return found

    def _wanted(self, groups: Iterable[int]) -> list[int]:
        """Return the ops that make these dropped storages what they were when they were saved."""
        found = []
        for group in groups:
            found += [self.producer(group), *self.changes[group]]
            if group in self.base:
                found.append(self.position[self.base[group]])
            else:  # no node is a view of it: a cast, say, that autocast cached for all ops which save it
                found += [i for i, op in enumerate(self.ops) if any(pack.group == group for pack in op.packs)]
        return found

    def _closure(self, wanted: list[int]) -> set[int]:
        running: set[int] = set()
        while wanted:
            i = wanted.pop()
            if i not in running:
                running.add(i)
                wanted += self.needs(i)
        return running

    def parts(self) -> list[list[int]]:
        """Return the dropped storages in parts that share no op but views."""
        hanging: nx.Graph[int] = nx.Graph()
        for i in self.running:
            if self.makes(i):
                hanging.add_node(i)
                waiting, seen = self.needs(i), set[int]()
                while waiting:
                    other = waiting.pop()
                    if self.makes(other):
                        hanging.add_edge(i, other)
                    elif other not in seen:  # a view: what it is a view of
                        seen.add(other)
                        waiting += self.needs(other)
        number = {i: n for n, part in enumerate(nx.connected_components(hanging)) for i in part}
        found: dict[int, list[int]] = {}
        for group in sorted(self.lost, key=self.producer):
            found.setdefault(number[self.producer(group)], []).append(group)
        return list(found.values())

    def compile(self, groups: list[int], argument_names: tuple[str, ...]) -> Rebuild:
        """Return the program that recomputes the packs of some dropped storages."""
        graph, ops, position, packs = self.graph, self.ops, self.position, self.packs
        running = sorted(self._closure(self._wanted(groups)))
        wanted = frozenset(number for number in self.dropped if packs[number].group in groups)
        subgraph = fx.Graph()
        tensors: dict[fx.Node, fx.Node] = {}
        needed = dict.fromkeys(n for i in running for n in ops[i].node.all_input_nodes)
        order = {name: i for i, name in enumerate(argument_names)}
        given = sorted((n for n in needed if n not in position), key=lambda n: order[n.name])
        for node in given:
            tensors[node] = subgraph.placeholder(node.name)
        sources: list[tuple[int, bool]] = []
        reads = [(n, i) for i in running for n in ops[i].node.all_input_nodes if n in position]
        viewed = list(dict.fromkeys(n for n, i in reads if self.there(n, i)))
        pack_of = {node: self.kept[graph.layout_of[node].group] for node in viewed}
        bases: dict[int, fx.Node] = {}
        for number in dict.fromkeys(pack_of.values()):
            bases[number] = subgraph.placeholder(f"pack_{number}")
            sources.append((number, any(graph.grad_of[n] for n in viewed if pack_of[n] == number)))
        for node in viewed:
            number = pack_of[node]
            tensors[node] = _view(subgraph, bases[number], packs[number], graph.layout_of[node])
        starts = [0, *accumulate(len(op.packs) for op in ops)]
        saves: list[int] = []
        for i in running:
            tensors[ops[i].node] = subgraph.node_copy(ops[i].node, tensors.__getitem__)
            saves.extend(range(starts[i], starts[i + 1]))
        gives = tuple(sorted(wanted.difference(saves)))
        views = ((self.base[packs[number].group], packs[number]) for number in gives)
        subgraph.output(
            tuple(_view(subgraph, tensors[node], graph.layout_of[node], layout) for node, layout in views)
        )
        subgraph.lint()
        compiled = fx.GraphModule(graph.module, subgraph, class_name=f"Rebuild{self.k}")
        return Rebuild(
            wanted,
            tuple(i for i in running if self.makes(i)),
            tuple(order[node.name] for node in given),
            tuple(sources),
            compiled.forward,
            tuple(saves),
            gives,
        )


def _view(subgraph: fx.Graph, base: fx.Node, held: TensorLayout, wanted: TensorLayout) -> fx.Node:
    """Return the wanted view of the storage of ``base``, which lies in it as ``held`` says."""
    if (held.shape, held.stride, held.offset) == (wanted.shape, wanted.stride, wanted.offset):
        return base
    arguments: tuple[Any, ...] = (base, wanted.shape, wanted.stride, wanted.offset)
    return subgraph.call_function(torch.ops.aten.as_strided.default, arguments)
