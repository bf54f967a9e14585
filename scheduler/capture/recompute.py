"""Options of a stage: which saved tensors stay, and the program that makes the others again.

A *pack* is one tensor that autograd saves, numbered in the order in which a run of the stage saves them. An
option drops some packs. Its program runs, in grad mode and in their order, just the ops that the dropped ones
need: an op reads what is kept (as a view of the kept tensor's storage), what the stage was given, and what ops
before it made. Dropped packs are then what those ops save, or views of what they made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from scheduler.capture.graph import Layout, Op, OpGraph
from scheduler.capture.linearize import Linear
from scheduler.options import StageOp, StageValue

__all__ = ["Rebuild", "StageValues", "compile_rebuild", "divisible", "op_rows", "packs_of", "stage_values"]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How the dropped packs of an option are made again.

    Attributes:
        dropped: numbers of the packs that are not kept.
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


@dataclass(frozen=True, slots=True)
class StageValues:
    """A stage as ``scheduler.options`` sees it.

    Attributes:
        ops: one a op of the stage, without their seconds.
        values: storages, as values 0, 1, ...
        groups: the storage that each value is; -1 for one that is changed in place later.
    """

    ops: tuple[StageOp, ...]
    values: tuple[StageValue, ...]
    groups: tuple[int, ...]


def _slice(graph: OpGraph, linear: Linear, k: int) -> list[Op]:
    return graph.ops[linear.cuts[k] : linear.cuts[k + 1]]


def _made(graph: OpGraph, linear: Linear, k: int) -> list[int]:
    """The storages that stage k makes."""
    return [g for g, group in graph.groups.items() if linear.cuts[k] <= group.producer < linear.cuts[k + 1]]


def _changes(graph: OpGraph, linear: Linear, k: int) -> dict[int, list[int]]:
    """For each storage that stage k makes, the ops that change it in place, by their places in the stage."""
    made = _made(graph, linear, k)
    return {g: sorted({i - linear.cuts[k] for i in graph.groups[g].mutated}) for g in made}


def divisible(graph: OpGraph, linear: Linear, k: int) -> bool:
    """Whether stage k can be kept in part.

    It cannot if it holds a block of ops (a higher-order op), or saves a storage under another dtype than it was
    made with.
    """
    ops = _slice(graph, linear, k)
    dtypes = {
        graph.layout_of[op.node].group: graph.layout_of[op.node].dtype
        for op in ops
        if op.node in graph.layout_of
    }
    for op in ops:
        if any(n.op == "get_attr" and n not in graph.layout_of for n in op.node.all_input_nodes):
            return False
        if any(dtypes.get(pack.group, pack.dtype) != pack.dtype for pack in op.packs):
            return False
    return True


def stage_values(
    graph: OpGraph, linear: Linear, k: int, size: Callable[[int], int], seconds: Sequence[float]
) -> StageValues:
    """The ops and storages of stage k, which is ``divisible``.

    A storage that is changed in place is one value before each change and one after the last; autograd saves the
    last.

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
        # What leaves the stage is there until its backward anyway.
        held = 0 if g in carried else size(graph.groups[g].bytes)
        values.append(StageValue(held, kept, pinned=kept and g in leaving))
    stage_ops = []
    for i, (op, cost) in enumerate(zip(ops, seconds, strict=True)):
        reads = {(g, sum(m < i for m in changes[g])) for g in op.reads if g in changes}
        own = {g for g in (*op.writes, *op.saved) if graph.groups[g].producer == first + i}
        writes = {(g, 0) for g in own} | {
            (g, changed.index(i) + 1) for g, changed in changes.items() if i in changed
        }
        reads -= {(g, 0) for g in own}
        stage_ops.append(
            StageOp(
                cost,
                tuple(sorted(index[r] for r in reads)),
                tuple(sorted(index[w] for w in writes)),
                op.random,
            )
        )
    groups = tuple(g if version == last[g] else -1 for g, version in versions)
    return StageValues(tuple(stage_ops), tuple(values), groups)


def op_rows(
    graph: OpGraph, linear: Linear, k: int, size: Callable[[int], int]
) -> tuple[tuple[str, int], ...]:
    """(name, bytes that autograd saves of what it makes) of each op of stage k."""
    ops, first = _slice(graph, linear, k), linear.cuts[k]
    saved = {pack.group for op in ops for pack in op.packs}
    rows = []
    for i, op in enumerate(ops, first):
        own = {g for g in (*op.writes, *op.saved) if graph.groups[g].producer == i and g in saved}
        rows.append((op.node.name, sum(size(graph.groups[g].bytes) for g in own)))
    return tuple(rows)


def packs_of(graph: OpGraph, linear: Linear, k: int) -> list[Layout]:
    """The packs of stage k, in order."""
    return [pack for op in _slice(graph, linear, k) for pack in op.packs]


def compile_rebuild(
    graph: OpGraph, linear: Linear, k: int, argument_names: tuple[str, ...], dropped: frozenset[int]
) -> Rebuild:
    """Compile what makes the dropped packs of stage k again.

    Args:
        argument_names: of the stage (``GraphStage.argument_names``).
        dropped: numbers of packs; with one of a storage made in the stage, all of that storage.

    Raises:
        ValueError: a number that is no pack of a storage that the stage makes.
    """
    ops = _slice(graph, linear, k)
    first = linear.cuts[k]
    packs = packs_of(graph, linear, k)
    made = set(_made(graph, linear, k))
    for number in dropped:
        if not 0 <= number < len(packs) or packs[number].group not in made:
            raise ValueError(f"stage {k} makes no saved tensor {number} that could be made again")
    of_op: list[range] = []
    for op in ops:
        start = of_op[-1].stop if of_op else 0
        of_op.append(range(start, start + len(op.packs)))
    position = {op.node: i for i, op in enumerate(ops)}
    kept: dict[int, int] = {}  # storage -> the first pack that holds it
    for number, pack in enumerate(packs):
        if number not in dropped and graph.groups[pack.group].producer >= first:
            kept.setdefault(pack.group, number)

    changes = _changes(graph, linear, k)
    lost = {packs[number].group for number in dropped}
    again: set[int] = set()  # storages changed in place that are made again, though they are kept too

    def there(node: fx.Node, reader: int) -> bool:
        """Whether what op ``reader`` finds in the node's tensor is a view of what is kept."""
        group = graph.layout_of[node].group if node in graph.layout_of else -1
        return group in kept and group not in again and all(i < reader for i in changes[group])

    # Ops to run: the makers of dropped storages, what they read and is not kept, and the views between.
    running: set[int] = set()
    base: dict[int, fx.Node] = {}  # dropped storage -> the first node that is a view of it
    for op in ops:
        if op.node in graph.layout_of and (group := graph.layout_of[op.node].group) in lost - base.keys():
            base[group] = op.node
    while True:
        waiting = [i for group in lost for i in (graph.groups[group].producer - first, *changes[group])]
        waiting += [position[node] for node in base.values()]
        running.clear()
        while waiting:
            i = waiting.pop()
            if i in running:
                continue
            running.add(i)
            for node in ops[i].node.all_input_nodes:
                if node in position and not there(node, i):
                    waiting.append(position[node])
                    for group in graph.group_of[node]:
                        waiting += [m for m in changes.get(group, ()) if m < i]
            if ops[i].random:  # draws from where those before it leave the generator
                waiting += [earlier for earlier in range(i) if ops[earlier].random]
        remade = {
            g for g, changed in changes.items() if changed and graph.groups[g].producer - first in running
        }
        if remade <= again:
            break
        again |= remade
    subgraph = fx.Graph()
    tensors: dict[fx.Node, fx.Node] = {}
    needed = dict.fromkeys(n for i in sorted(running) for n in ops[i].node.all_input_nodes)
    order = {name: i for i, name in enumerate(argument_names)}
    given = sorted((n for n in needed if n not in position), key=lambda n: order[n.name])
    for node in given:
        tensors[node] = subgraph.placeholder(node.name)
    sources: list[tuple[int, bool]] = []
    reads = [(n, i) for i in sorted(running) for n in ops[i].node.all_input_nodes if n in position]
    viewed = list(dict.fromkeys(n for n, i in reads if there(n, i)))
    bases: dict[int, fx.Node] = {}
    for node in viewed:
        number = kept[graph.layout_of[node].group]
        if number not in bases:
            bases[number] = subgraph.placeholder(f"pack_{number}")
            sources.append(
                (number, any(graph.grad_of[n] for n in viewed if kept[graph.layout_of[n].group] == number))
            )
    for node in viewed:
        layout = graph.layout_of[node]
        tensors[node] = _view(subgraph, bases[kept[layout.group]], packs[kept[layout.group]], layout)
    saves: list[int] = []
    for i in sorted(running):
        tensors[ops[i].node] = subgraph.node_copy(ops[i].node, tensors.__getitem__)
        saves.extend(of_op[i])
    gives: list[int] = []
    results: list[fx.Node] = []
    seen = set(saves)
    for number in sorted(dropped):
        if number in seen:
            continue
        layout = packs[number]
        node = base[layout.group]
        results.append(_view(subgraph, tensors[node], graph.layout_of[node], layout))
        gives.append(number)
    subgraph.output(tuple(results))
    subgraph.lint()
    compiled = fx.GraphModule(graph.module, subgraph, class_name=f"Rebuild{k}")
    rerun = tuple(i for i in sorted(running) if _makes(graph, ops[i], first + i))
    return Rebuild(
        dropped,
        rerun,
        tuple(order[node.name] for node in given),
        tuple(sources),
        compiled.forward,
        tuple(saves),
        tuple(gives),
    )


def _makes(graph: OpGraph, op: Op, index: int) -> bool:
    """Whether the op makes a storage of its own, or changes one: all but views do."""
    return any(
        graph.groups[g].producer == index or index in graph.groups[g].mutated for g in (*op.writes, *op.saved)
    )


def _view(subgraph: fx.Graph, base: fx.Node, held: Layout, wanted: Layout) -> fx.Node:
    """The wanted view of the storage of ``base``, which lies in it as ``held`` says."""
    if (held.shape, held.stride, held.offset) == (wanted.shape, wanted.stride, wanted.offset):
        return base
    arguments: tuple[Any, ...] = (base, wanted.shape, wanted.stride, wanted.offset)
    return subgraph.call_function(torch.ops.aten.as_strided.default, arguments)
