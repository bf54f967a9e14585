"""Cut an op graph into stages in a line.

Every gap between ops is a possible cut; its state is the set of values that are live there. A good cut
is a valley: a run of gaps where fewer values are live than before and after it. In a transformer those are
the ends of the attention and MLP halves, in a ResNet the ends of the residual blocks, in a U-Net the block
ends at every level, skips included.

Values that live across many cuts (U-Net skips, masks, rotary tables) and the outputs are *carried*: held
once, from where they are made until their first reader is reversed, instead of being part of every boundary
in between. A value that crosses a few cuts only is part of each of those boundaries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch

from rematplan.scheduler.capture.graph.op_graph import OpGraph
from rematplan.scheduler.core.errors import CaptureError
from rematplan.scheduler.plan.why_cut import Cut

__all__ = ["Linear", "linearize", "op_dag"]

# A value that crosses more cuts than this is carried. Carrying pins it in memory, so a value that merely
# spans a few stages (the residual around a cut inside a block) is better left to the solver.
MAX_CROSSED = 3
# Of the bytes that the model makes: a stage of less is merged with a neighbour. docs/cuts.md compares the
# cuts that come of it with coarser and finer ones.
SMALLEST = 1 / 400


@dataclass(frozen=True, slots=True)
class Linear:
    """A linearised op graph with L stages.

    Attributes:
        cuts: (L + 1,) op indices; stage k is ops[cuts[k]:cuts[k + 1]].
        boundaries: (L + 1,) storages that cross into stage k and are not carried; the last is empty, since
            the outputs are carried.
        carried: (L,) carried storages first made in stage k.
        readers: carried storage -> stages after its producer that read it, ascending.
        frozen_prefix: stage 0 needs no gradient at all, and is run once.
        reasons: (L - 1,) why each stage but the first begins where it does.
        left_out: how many gaps were no cuts in the end, by why (``plan.why_cut.LEFT_OUT``).
    """

    cuts: tuple[int, ...]
    boundaries: tuple[tuple[int, ...], ...]
    carried: tuple[tuple[int, ...], ...]
    readers: dict[int, tuple[int, ...]]
    frozen_prefix: bool
    reasons: tuple[Cut, ...]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.cuts) - 1


def op_dag(graph: OpGraph) -> nx.DiGraph:
    """Return the ops as a directed graph: edges from what makes or changes a storage to its later readers."""
    dag = nx.DiGraph()
    last_writer: dict[int, int] = {}
    for index, op in enumerate(graph.ops):
        dag.add_node(index)
        for key in op.reads:
            if key in last_writer:
                dag.add_edge(last_writer[key], index, storage=key)
        for key in (*op.writes, *(g for g in op.reads if index in graph.groups[g].mutated)):
            last_writer[key] = index
    return dag


def linearize(graph: OpGraph, max_stages: int = 100, cuts: Sequence[int] | None = None) -> Linear:
    """Cut the op graph into at most ``max_stages`` stages.

    Args:
        cuts: op indices of the inner cuts, to repeat an earlier linearisation; found if None.

    Raises:
        CaptureError: the ops are not in a topological order (a broken graph), or a cut that is given is none.
    """
    dag = op_dag(graph)
    if any(a >= b for a, b in dag.edges):
        raise CaptureError("the exported ops are not in topological order")
    prefix = _prefix(graph)
    left_out: dict[str, int] = {}
    if cuts is None:
        valleys, left_out["dip"] = _valleys(graph, prefix)
        inner = _merge_small(graph, valleys, prefix, max_stages)
        left_out["small"] = len(valleys) - len(inner)
        why = {cut: "frozen" if cut == prefix and prefix else "valley" for cut in inner}
    else:
        inner = list(cuts)
        _check_cuts(graph, inner)
        why = dict.fromkeys(inner, "given")
    edges = (0, *inner, len(graph.ops))
    stage_of = [k for k, (start, stop) in enumerate(itertools.pairwise(edges)) for _ in range(start, stop)]
    outputs = _output_groups(graph)
    boundaries: list[list[int]] = [[] for _ in edges]
    carried: list[list[int]] = [[] for _ in edges[:-1]]
    reads: dict[int, set[int]] = {}
    for op, stage in zip(graph.ops, stage_of, strict=True):
        for key in op.reads:
            reads.setdefault(key, set()).add(stage)
    readers: dict[int, tuple[int, ...]] = {}
    for key, group in graph.groups.items():
        if group.producer < 0:
            continue
        made = stage_of[group.producer]
        later = tuple(sorted(s for s in reads.get(key, ()) if s > made))
        if key in outputs or (later and later[-1] - made > MAX_CROSSED):
            carried[made].append(key)
            readers[key] = later
        elif later:
            for stage in range(made + 1, later[-1] + 1):
                boundaries[stage].append(key)
    frozen = bool(inner) and prefix == edges[1] and prefix > 0
    return Linear(
        edges,
        tuple(tuple(b) for b in boundaries),
        tuple(tuple(c) for c in carried),
        readers,
        frozen,
        _explained(graph, why),
        left_out,
    )


def _check_cuts(graph: OpGraph, inner: Sequence[int]) -> None:
    """Refuse cuts that this graph cannot have."""
    forbidden, before = _forbidden(graph), 0
    for cut in inner:
        if not before < cut < len(graph.ops):
            raise CaptureError(
                f"a cut before op {cut}, expected ascending places in 1 .. {len(graph.ops) - 1}"
            )
        if cut in forbidden:
            raise CaptureError(
                f"a cut before op {cut} ({graph.ops[cut].node.name}), where a value that is live is changed in place later, or "
                "the results of one op are still together"
            )
        before = cut


def _output_groups(graph: OpGraph) -> set[int]:
    """Return the storages that the user holds when the forward is over."""
    nodes = [leaf for leaf in graph.outputs if leaf in graph.group_of]
    return {g for node in nodes for g in graph.group_of[node] if graph.groups[g].producer >= 0}


def _prefix(graph: OpGraph) -> int:
    """Return the number of leading ops that need no gradient."""
    return next((index for index, op in enumerate(graph.ops) if op.requires_grad), len(graph.ops))


@dataclass(slots=True)
class _Gaps:
    """(n + 1,) of the gradient-carrying values live in each gap; gap g is before op g.

    Attributes:
        count, held: their number and their bytes.
        unneeded: bytes of those that no op after the gap saves for its backward.
        unsaved: bytes of those that no op at all saves.
    """

    count: list[int]
    held: list[int]
    unneeded: list[int]
    unsaved: list[int]


def _gaps(graph: OpGraph) -> _Gaps:
    size = len(graph.ops) + 1
    saved = {key: index for index, op in enumerate(graph.ops) for key in op.saved}  # the last that saves it
    rows = count, held, unneeded, unsaved = [[0] * (size + 1) for _ in range(4)]  # changes at each gap
    for key, group in graph.groups.items():
        if group.producer < 0 or not group.requires_grad or group.last_use <= group.producer:
            continue
        over = min(group.last_use + 1, size)
        for row, after, amount in (
            (count, group.producer, 1),
            (held, group.producer, group.bytes),
            (unneeded, max(group.producer, saved.get(key, -1)), group.bytes),
            (unsaved, over if key in saved else group.producer, group.bytes),
        ):
            row[min(after + 1, over)] += amount
            row[over] -= amount
    return _Gaps(*([*itertools.accumulate(row)] for row in rows))


def _forbidden(graph: OpGraph) -> set[int]:
    """Return the gaps that no cut may use.

    A value live there would be changed in place later, so that a replay would see the changed value. A buffer
    that is changed may be changed again by the next forward before this one is replayed: all that reads it
    belongs to one stage, which is re-run on a copy of what it was. Or the gap parts an op with several
    results from the ops that take them apart.
    """
    bad: set[int] = set()
    for group in graph.groups.values():
        if group.mutated and group.producer >= 0:
            bad.update(range(group.producer + 1, max(group.mutated) + 1))
        elif group.mutated:
            bad.update(range(group.first_use + 1, group.last_use + 1))
    position = {op.node: index for index, op in enumerate(graph.ops)}
    for index, op in enumerate(graph.ops):
        if not isinstance(op.node.meta.get("val"), torch.Tensor):  # a tuple: its parts are taken next
            last = max((position[user] for user in op.node.users if user in position), default=index)
            bad.update(range(index + 1, last + 1))
    return bad


def _valleys(graph: OpGraph, prefix: int) -> tuple[list[int], int]:
    """Return the gaps of every valley, ascending, and how many valleys among many live values were left out.

    After a frozen prefix that computes something, its end is a gap too.
    """
    live = _gaps(graph)
    forbidden = _forbidden(graph)
    gaps = [g for g in range(prefix + 1, len(graph.ops)) if g not in forbidden]
    valleys: list[tuple[int, list[int]]] = []  # level, gaps
    plateaus = [[*run] for _, run in itertools.groupby(gaps, key=live.count.__getitem__)]
    levels = [live.count[plateau[0]] for plateau in plateaus]
    for at in _dips(levels):
        # Within a plateau only the gaps that hold the fewest bytes around them are worth a cut, and of those
        # the ones at which a later op, or any op, saves what crosses: a chain charges a kept stage for its
        # input and its output, too much for a value that autograd releases (between GELU and Dropout).
        run = plateaus[at]
        run = [g for g in run if not live.unneeded[g]] or [g for g in run if not live.unsaved[g]] or run
        valleys.append((levels[at], [run[i] for i in _dips([live.held[g] for g in run])]))
    kept = _without_dimples(valleys)
    chosen = [g for _, best in kept for g in best]
    if prefix and prefix not in forbidden:
        made = sum(graph.groups[k].bytes for op in graph.ops[:prefix] for k in op.writes)
        total = sum(g.bytes for g in graph.groups.values() if g.producer >= 0)
        if made > 0.01 * total:
            chosen.insert(0, prefix)
    return chosen, len(valleys) - len(kept)


def _dips(values: Sequence[int]) -> list[int]:
    """Return the places of values that none beside them is less than."""
    padded = [math.inf, *values, math.inf]
    triples = zip(padded, padded[1:], padded[2:], strict=False)
    return [i for i, (before, value, after) in enumerate(triples) if before >= value <= after]


def _without_dimples(valleys: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Drop each valley that lies higher than both neighbours: a dip inside a block."""
    kept = list(valleys)
    index = 1
    while index < len(kept) - 1:
        if kept[index - 1][0] < kept[index][0] > kept[index + 1][0]:
            del kept[index]
            index = max(1, index - 1)
        else:
            index += 1
    return kept


def _merge_small(graph: OpGraph, gaps: list[int], prefix: int, max_stages: int) -> list[int]:
    """Drop cuts until every stage makes something worth a decision and there are few enough stages."""
    made = [0] * len(graph.ops)  # bytes by op, saved for backward or not
    for group in graph.groups.values():
        if group.producer >= 0:
            made[group.producer] += group.bytes
    weight = [0, *itertools.accumulate(made)]
    edges, smallest = [0, *gaps, len(graph.ops)], weight[-1] * SMALLEST
    # The end of a frozen prefix is kept whatever its size: it spares the prefix its re-run.
    while choices := [i for i in range(1, len(edges) - 1) if edges[i] != prefix]:
        sizes = [weight[b] - weight[a] for a, b in itertools.pairwise(edges)]
        if len(edges) - 1 > max_stages:
            del edges[min(choices, key=lambda i: sizes[i - 1] + sizes[i])]
            continue
        merged = min(choices, key=lambda i: min(sizes[i - 1], sizes[i]))
        if min(sizes[merged - 1], sizes[merged]) >= smallest:
            break
        del edges[merged]
    return edges[1:-1]


def _explained(graph: OpGraph, why: Mapping[int, str]) -> tuple[Cut, ...]:
    """Return the facts about each cut, in order; ``why`` has the reason of each."""
    live = _gaps(graph)
    held, size = live.held, len(graph.ops)

    def other(gap: int, step: int) -> int:
        at = gap
        while 0 < at < size and held[at] == held[gap]:
            at += step
        return held[at]

    return tuple(
        Cut(why[g], live.count[g], held[g], other(g, -1), other(g, 1), _inside(graph, g)) for g in sorted(why)
    )


def _inside(graph: OpGraph, gap: int) -> str:
    """Return the innermost module of the ops on both sides of a gap, ops without a storage aside."""

    def stack(indices: range) -> list[str]:
        for index in indices:
            op = graph.ops[index]
            if any(graph.groups[key].producer == index for key in op.writes):
                return [path for path, _ in (op.node.meta.get("nn_module_stack") or {}).values()]
        return []

    both = zip(stack(range(gap - 1, -1, -1)), stack(range(gap, len(graph.ops))), strict=False)
    common = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    return common[-1] if common else ""
